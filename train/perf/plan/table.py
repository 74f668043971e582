"""`mora plan-table`: plans of several configs on several TPU slices, kept as JSON, printed as Markdown."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from mora_jax.errors import InputError
from mora_jax.io import json_text, read_object
from train.config import flags
from train.config.run import RunConfig
from train.perf.plan.plan import Plan
from train.perf.plan.programs import TRAINING
from train.perf.plan.report import plan
from train.perf.plan.targets import chips
from train.storage.files import write_result

MIB, GIB = 2**20, 2**30


def make_table(
    configs: Sequence[str], topologies: Sequence[str], sequences: int, out: str, compiling: bool = True
) -> str:
    """Plans every config on every slice that the file lacks, and returns the table of all.

    Each is sharded over all chips of a slice (mesh.fsdp), with layers recomputed (compute.remat full)
    and splash attention.

    Args:
      configs: config files.
      topologies: slices, such as v5e:16x16.
      sequences: most sequences of a microbatch on one chip.
      out: JSON file of the compiled plans; every plan is added.
      compiling: whether to compile what the file lacks. Otherwise these rows show only the sizes of the state
        and the formula.

    Returns:
      Markdown.

    Raises:
      InputError: for a config or slice that cannot be planned, or a file that holds anything but plans.
    """
    path = epath.Path(out)
    kept = _read(path)
    rows = []
    for config, topology in itertools.product(configs, topologies):
        name = f"{epath.Path(config).stem} {topology}"
        if name not in kept:
            here = spread(flags.read_config(config), chips(topology), sequences)
            made = to_row(plan(here, topology, 0, 0.0, TRAINING if compiling else ()))
            if not compiling:
                rows.append((name, made))
                continue
            kept[name] = made
            write_result(path, json_text(kept, indent=1) + "\n")
        rows.append((name, kept[name]))
    return "\n".join(_markdown(rows))


def _read(path: epath.Path) -> dict[str, Any]:
    """Returns the plans in a file, none if it is missing. Raises InputError if it holds anything else."""
    if not path.exists():
        return {}
    found = read_object(path)
    if not all(isinstance(row, dict) and {"compiler", "chips"} <= row.keys() for row in found.values()):
        raise InputError(f"{path} holds no plans of mora plan-table; choose another --out")
    return found


def spread(config: RunConfig, devices: int, sequences: int) -> RunConfig:
    """Returns a config for a number of devices, with at most `sequences` in a microbatch of each."""
    if config.batch_size % devices:
        raise InputError(f"batch_size {config.batch_size} is not a multiple of the {devices} devices")
    a_device = config.batch_size // devices
    microbatches = next(m for m in range(1, a_device + 1) if a_device % m == 0 and a_device // m <= sequences)
    return dataclasses.replace(
        config,
        microbatches=microbatches,
        mesh=dataclasses.replace(config.mesh, data=1, fsdp=devices, tensor=1),
        eval=dataclasses.replace(config.eval, batch_size=math.lcm(config.eval.batch_size, devices)),
        compute=dataclasses.replace(config.compute, layers="scan", remat="full", attention="splash"),
    )


def to_row(made: Plan) -> dict[str, Any]:
    """Returns what the table keeps of a plan."""
    kept = {
        "compiler": made.compiler,
        "chips": made.devices,
        "microbatches": made.microbatches,
        **dataclasses.asdict(made.held),
        "usable": made.usable,
        "expected": sum(line.base + line.adapters for line in made.expected),
        "expected_adapters": sum(line.adapters for line in made.expected),
    }
    if made.programs:
        step = made.programs[0]
        sent: Counter[str] = Counter()
        for collective in step.collectives:
            sent[collective.kind] += collective.sent
        peak = max(program.peak for program in made.programs)
        kept |= {"peak": peak, "fits": made.fits(), "flops": step.flops, "sent": dict(sent)}
    return kept


COLUMNS = (
    "config", "slice", "chips", "parameters MiB", "optimizer MiB", "x chips GiB", "of it adapters",
    "peak GiB", "fits", "TFLOP", "expected GiB", "of it adapters", "sent GiB",
)  # fmt: skip


def _markdown(rows: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---|---|" + "---:|" * (len(COLUMNS) - 2)
    for name, kept in rows:
        yield f"| {' | '.join((*name.split(), *_cells(kept)))} |"


def _cells(row: dict[str, Any]) -> Iterator[str]:
    parameters = row["parameters"] + row["adapters"]
    optimizer = row["base_optimizer"] + row["adapter_optimizer"]
    state = parameters + optimizer
    yield f"{row['chips']}"
    yield f"{parameters / MIB:,.1f}"
    yield f"{optimizer / MIB:,.1f}"
    yield f"{state * row['chips'] / GIB:,.2f}"
    yield f"{(row['adapters'] + row['adapter_optimizer']) / state:.0%}"
    yield f"{row['peak'] / GIB:,.2f} of {row['usable'] / GIB:,.4g}" if "peak" in row else ""
    yield ("yes" if row["fits"] else "no") if "peak" in row else ""
    yield f"{row['flops'] / 1e12:,.1f}" if "peak" in row else ""
    yield f"{row['expected'] / GIB:,.2f}"
    yield f"{row['expected_adapters'] / max(row['expected'], 1):.0%}"
    yield f"{sum(row['sent'].values()) / GIB:,.2f}" if row.get("sent") else ""
