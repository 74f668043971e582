"""`mora plan-table`: plans of several configs on several slices of TPUs, kept as JSON, shown as Markdown."""

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from mora_jax.errors import InputError
from train.config import flags
from train.config.run import RunConfig
from train.perf.plan.plan import Plan
from train.perf.plan.report import plan
from train.perf.plan.targets import chips

MIB, GIB = 2**20, 2**30


def make_table(
    configs: Sequence[str], topologies: Sequence[str], sequences: int, out: str, compiling: bool = True
) -> str:
    """Plans every config for every slice that is not in the file yet, and shows all that are asked for.

    Each is divided over all chips of a slice (mesh.fsdp), in microbatches of at most so many sequences a
    chip, with layers recomputed (compute.remat full) and splash attention.

    Args:
      configs: config files.
      topologies: slices, such as v5e:16x16.
      sequences: of a microbatch on one chip, at most.
      out: JSON file of what has been compiled; it grows with every plan.
      compiling: whether to compile what is not in the file; else the state's sizes and the formula are shown.

    Returns:
      Markdown.

    Raises:
      InputError: for a config or slice that cannot be planned.
    """
    path = epath.Path(out)
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    rows = []
    for config, topology in itertools.product(configs, topologies):
        name = f"{epath.Path(config).stem} {topology}"
        if name not in kept:
            here = spread(flags.read_config(config), chips(topology), sequences)
            made = row(plan(here, topology, 0, 0.0, ["train"] if compiling else []))
            if not compiling:
                rows.append((name, made))
                continue
            kept[name] = made
            path.write_text(json.dumps(kept, indent=1) + "\n")
        rows.append((name, kept[name]))
    return "\n".join(_markdown(rows))


def spread(config: RunConfig, devices: int, sequences: int) -> RunConfig:
    """A config for so many devices, as the table has it."""
    if config.batch_size % devices:
        raise InputError(f"batch_size {config.batch_size} does not divide among {devices} devices")
    a_device = config.batch_size // devices
    microbatches = next(m for m in range(1, a_device + 1) if a_device % m == 0 and a_device // m <= sequences)
    return dataclasses.replace(
        config,
        microbatches=microbatches,
        mesh=dataclasses.replace(config.mesh, data=1, fsdp=devices, tensor=1),
        eval=dataclasses.replace(config.eval, batch_size=math.lcm(config.eval.batch_size, devices)),
        compute=dataclasses.replace(config.compute, layers="scan", remat="full", attention="splash"),
    )


def row(made: Plan) -> dict[str, Any]:
    """What the table keeps of a plan."""
    kept = {
        "compiler": made.compiler,
        "chips": made.devices,
        "microbatches": made.microbatches,
        **dataclasses.asdict(made.held),
        "usable": made.usable,
        "expected": sum(line.base + line.adapters for line in made.expected),
        "expected_adapters": sum(line.adapters for line in made.expected),
    }
    for program in made.programs:
        sent: Counter[str] = Counter()
        for collective in program.collectives:
            sent[collective.kind] += collective.sent
        kept |= {"peak": program.peak, "fits": made.fits(), "flops": program.flops, "sent": dict(sent)}
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


def _cells(r: dict[str, Any]) -> Iterator[str]:
    parameters, optimizer = r["parameters"] + r["adapters"], r["base_optimizer"] + r["adapter_optimizer"]
    state = parameters + optimizer
    yield f"{r['chips']}"
    yield f"{parameters / MIB:,.1f}"
    yield f"{optimizer / MIB:,.1f}"
    yield f"{state * r['chips'] / GIB:,.2f}"
    yield f"{(r['adapters'] + r['adapter_optimizer']) / state:.0%}"
    yield f"{r['peak'] / GIB:,.2f} of {r['usable'] / GIB:,.4g}" if "peak" in r else ""
    yield ("yes" if r["fits"] else "no") if "peak" in r else ""
    yield f"{r['flops'] / 1e12:,.1f}" if "peak" in r else ""
    yield f"{r['expected'] / GIB:,.2f}"
    yield f"{r['expected_adapters'] / max(r['expected'], 1):.0%}"
    yield f"{sum(r['sent'].values()) / GIB:,.2f}" if r.get("sent") else ""
