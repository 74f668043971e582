"""Processes of one run that were not started alike would hang or compute nonsense: they compare first."""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mora_jax.errors import InputError
from train.config import flags
from train.config import run as run_config
from train.config.run import RunConfig
from train.data.rows.info import DataInfo, content_hash
from train.runtime.workarounds import coordinator

# What may differ: each process has its own number, and machines may keep copies in folders of other names.
_OWN = ("distributed", "compilation", "data.directory")
_PACKAGES = ("mora_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Variables of the environment that change what is computed, but for those that each process has its own of.
_VARIABLES = re.compile(
    r"XLA_FLAGS|LIBTPU_INIT_ARGS|NVIDIA_TF32_OVERRIDE|"
    r"JAX_(?!PROCESS_ID|COORDINATOR|LOCAL_DEVICE_IDS|COMPILATION_CACHE|TRACEBACK|LOG|DUMP|DEBUG_LOG)\w+"
)
# For a copy of the data, which may take long. A process that is gone ends the others by its heartbeat.
_PATIENCE_MS = 7 * 24 * 3600 * 1000

_EQUAL = "equal"
# Numbers of the comparisons, which come in one order in all processes.
_comparisons = itertools.count()

Facts = Mapping[str, Any]


class Disagreement(InputError):
    """The processes of a run were started differently. All of them raise it."""


def check_config(config: RunConfig, resume: bool) -> None:
    """Compares the config and the versions of all processes, before they compute anything together.

    Raises:
      Disagreement: naming the first difference.
    """
    plain = dict(flags.flatten(run_config.to_plain(config)))
    facts = {name: v for name, v in plain.items() if name.split(".")[0] not in _OWN and name not in _OWN}
    versions = {f"version of {name}": _version(name) for name in _PACKAGES}
    check_equal({**facts, "resume": resume, **versions, **variables(os.environ)})


def variables(environment: Mapping[str, str]) -> Facts:
    """Returns the variables of the environment that change what is computed, as messages name them."""
    found = sorted(name for name in environment if _VARIABLES.fullmatch(name))
    return {f"environment variable {name}": environment[name] for name in found}


def check_data(info: DataInfo) -> None:
    """Compares the data sets of all processes. Raises Disagreement, naming the first difference."""
    client, _, _ = coordinator()
    if client is None:
        return
    own = ("directory", "rows", "tokens", "counts")
    facts = {f.name: getattr(info, f.name) for f in dataclasses.fields(info) if f.name not in own}
    facts |= {f"{split} rows": rows for split, rows in info.rows.items()}
    check_equal({**facts, "hash of the token counts": content_hash(info)})


def check_equal(facts: Facts) -> None:
    """Compares facts of all processes; does nothing in a single one.

    Args:
      facts: by name, as JSON holds them.

    Raises:
      Disagreement: naming the first difference.
    """
    client, process, count = coordinator()
    if client is None:
        return
    key = f"mora/compared/{next(_comparisons)}"
    client.key_value_set(f"{key}/{process}", json.dumps(facts))
    if process == 0:
        every = [client.blocking_key_value_get(f"{key}/{i}", _PATIENCE_MS) for i in range(count)]
        found = first_difference([json.loads(text) for text in every])
        client.key_value_set(f"{key}/verdict", found or _EQUAL)
    verdict = client.blocking_key_value_get(f"{key}/verdict", _PATIENCE_MS)
    if verdict != _EQUAL:
        raise Disagreement(verdict)


def first_difference(every: Sequence[Facts]) -> str:
    """Returns a sentence on the first fact that is not equal in all processes, empty if there is none."""
    for process, facts in enumerate(every):
        for name in {**every[0], **facts}:
            here, there = facts.get(name), every[0].get(name)
            if here != there:
                return (
                    f"process {process} of this run has {name} {here!r}, but process 0 has {there!r}; start "
                    "all processes with the same config, data and versions"
                )
    return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
