"""Several processes as one program: how they find each other, and what happens if one of them is gone.

JAX's own runtime does it. The processes meet at a coordinator in process 0 and send it heartbeats. If a
process or the coordinator falls silent, the runtime aborts all others wherever they are. They can only be
started again together.
"""

import contextlib
import errno
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import jax

from mora_jax.errors import InputError
from train.config.sections import Distributed
from train.console import exits, streams
from train.runtime.agree import Disagreement
from train.runtime.memory import exhausted
from train.runtime.workarounds import on_abort

_LOST = (
    "another process of this run is gone or out of reach, and this one cannot continue alone. Start all of "
    "them again with the same command; the run resumes from its newest checkpoint"
)
# Some errors of the runtime are ValueErrors, whose text begins with a status.
_STATUS = re.compile(
    "(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)
# Seconds beyond the heartbeats' timeout within which the runtime reports a silent process.
_GRACE = 5


@contextlib.contextmanager
def joined(config: Distributed, explain: Callable[[BaseException], int]) -> Iterator[None]:
    """Makes this process one of several, if the config or the environment says so.

    Must be entered before JAX is asked for a device. An error inside ends the process at once: a regular exit
    would wait for the other processes, and they for it.

    Args:
      config: the other processes.
      explain: prints what an error means, and returns the exit status.

    Raises:
      InputError: if the processes do not find each other.
    """
    if not several(config, os.environ):
        yield
        return
    with _meeting(config):
        _initialize(config)
    with on_abort(lambda: _last_words(f"\nmora: {_LOST}", exits.LOST)):
        try:
            yield
        except (exits.Stopped, Disagreement):  # raised on all processes
            jax.distributed.shutdown()
            raise
        except BaseException as error:
            if not exhausted(error) and (_came_from_jax(error) or _has_no_reason(error)):
                # If another process is gone, the runtime aborts this one meanwhile.
                time.sleep(config.heartbeat_timeout + _GRACE)
            _exit(explain(error))
        jax.distributed.shutdown()


@contextlib.contextmanager
def _meeting(config: Distributed) -> Iterator[None]:
    """Ends the program with one line if JAX's runtime aborts, as it does if one is not found in time."""
    where = f" at {config.coordinator_address}" if config.coordinator_address else ""
    line = (
        f"mora: the processes of this run do not find each other{where} within "
        f"{config.initialization_timeout} seconds (distributed.initialization_timeout); start all of them, "
        "with an address that reaches process 0, the right number of processes, and an id for each"
    )
    with streams.held_errors() as drop:  # the runtime prints a page of native stack before it aborts

        def end() -> int:
            drop()
            return _last_words(line, exits.BAD_INPUT)

        with on_abort(end):
            yield


def _last_words(line: str, status: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return status


def several(config: Distributed, environment: Mapping[str, str]) -> bool:
    """Returns whether the flags or the environment say that this is one of several processes.

    The variables of Slurm and Open MPI count if there is more than one task, `TPU_WORKER_HOSTNAMES` if it
    names more than one host. On a TPU VM JAX asks the metadata server, however many hosts there are.
    """
    if config.coordinator_address:
        return config.num_processes > 1
    if environment.get("JAX_PLATFORMS", "").startswith("cpu"):
        on_tpu = False
    else:
        on_tpu = "," in environment.get("TPU_WORKER_HOSTNAMES", "") or _is_tpu_vm(environment)
    slurm = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= environment.keys()
    return (
        (slurm and _number(environment, "SLURM_NTASKS") > 1)
        or ("OMPI_MCA_orte_hnp_uri" in environment and _number(environment, "OMPI_COMM_WORLD_SIZE") > 1)
        or on_tpu
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else 0


def _is_tpu_vm(environment: Mapping[str, str]) -> bool:
    if "TPU_SKIP_MDS_QUERY" in environment or importlib.util.find_spec("libtpu") is None:
        return False
    return Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()


def _initialize(config: Distributed) -> None:
    named = {
        "coordinator_address": config.coordinator_address,
        "num_processes": config.num_processes,
        "process_id": config.process_id,
    }
    try:
        jax.distributed.initialize(
            **(named if config.coordinator_address else {}),
            initialization_timeout=config.initialization_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:  # JaxRuntimeError is a RuntimeError
        line = " ".join(str(error).split())
        raise InputError(f"the processes of this run do not find each other: {line[:300]}") from error


def _came_from_jax(error: BaseException | None) -> bool:
    """Whether JAX's runtime raised an error or one of its causes. Another process may then be gone."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return True
        # In the first call of a jitted function, a collective fails with "UNKNOWN: Gloo AllGather failed".
        if isinstance(error, ValueError) and _STATUS.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _has_no_reason(error: BaseException) -> bool:
    """Whether input or output failed without a reason of the system: a save waits for all processes."""
    return isinstance(error, OSError) and error.errno in (None, errno.EIO)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
