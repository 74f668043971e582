"""Several processes as one program: how they find each other, and what is said when one of them is gone.

JAX's own runtime does it. Its processes meet at a coordinator, which is in process 0, and send it heartbeats.
Where one stays silent, or the coordinator does, the runtime aborts all others in the middle of whatever they
do; that they are one program is over, and they can only be started again together.
"""

import contextlib
import ctypes
import errno
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import jax

from mora_jax.errors import InputError
from train.config.sections import Distributed
from train.console import exits

_GONE = (
    "another process of this run is gone, or out of reach: this one cannot go on alone. Start all of them "
    "again with the same command, and the run goes on from its newest checkpoint"
)
# Seconds beyond the heartbeats' timeout in which the runtime tells of a silent process.
_GRACE = 5
_ABORT_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


@contextlib.contextmanager
def joined(config: Distributed, explain: Callable[[BaseException], int]) -> Iterator[None]:
    """Makes this process one of several, if it is to be, for as long as the context lasts.

    It must be entered before JAX is asked for a device. An error inside ends the process at once: were it
    to leave as usual, it would wait for the others, and these for it.

    Args:
      config: who the others are.
      explain: tells what an error means, and gives the status to exit with.

    Raises:
      InputError: if the processes do not find each other.
    """
    if not several(config, os.environ):
        yield
        return
    handler = _say_who_aborts()
    _initialize(config)
    try:
        yield
    except exits.Stopped:  # on all processes alike
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        if _begins_in_jax(error) or _unclear(error):
            time.sleep(config.heartbeat_timeout + _GRACE)  # if a process is gone, this one ends meanwhile
        _leave(explain(error))
    jax.distributed.shutdown()
    del handler


def _begins_in_jax(error: BaseException | None) -> bool:
    """Whether JAX's runtime raised an error, or one that led to it: then another process may be gone."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error is not None


def _unclear(error: BaseException) -> bool:
    """Whether input or output failed, and the system has no reason for it: a save waits for all processes."""
    return isinstance(error, OSError) and error.errno in (None, errno.EIO)


def several(config: Distributed, environment: Mapping[str, str]) -> bool:
    """Whether the flags or the environment say that this is one of several processes.

    Slurm's and Open MPI's variables count where there is more than one task, `TPU_WORKER_HOSTNAMES` where it
    names more than one host. On a TPU VM JAX asks the metadata server, whatever their number is.
    """
    if config.coordinator_address:
        return config.num_processes > 1
    if environment.get("JAX_PLATFORMS", "").startswith("cpu"):
        on_tpu = False
    else:
        on_tpu = "," in environment.get("TPU_WORKER_HOSTNAMES", "") or _is_tpu_vm(environment)
    slurm = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= environment.keys()
    return (
        (slurm and _count(environment, "SLURM_NTASKS") > 1)
        or ("OMPI_MCA_orte_hnp_uri" in environment and _count(environment, "OMPI_COMM_WORLD_SIZE") > 1)
        or on_tpu
    )


def _count(environment: Mapping[str, str], name: str) -> int:
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
    except (ValueError, RuntimeError) as error:  # JaxRuntimeError is one
        line = " ".join(str(error).split())
        raise InputError(f"the processes of this run do not find each other: {line[:300]}") from error


def _say_who_aborts() -> object:
    """The runtime knows no other way out than abort(), behind a page of its own: this has the last word.

    JAX takes a callback for it, and cannot call it: it has no way to hand over the reason.
    """

    def last_word(_: int) -> None:
        print(f"\nmora: {_GONE}", file=sys.stderr, flush=True)
        os._exit(exits.LOST)

    handler = _ABORT_HANDLER(last_word)
    # Python's own handlers wait for the main thread, which may be in a call that never ends.
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
    return handler


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
