"""Trains tiny models of every method on meshes of real devices, beside one device.

    python tests/tools/meshes.py --jobs 8 --out meshes.json

Each method takes 20 updates in full float32, with a restart in the middle, on one device and on every mesh
of `--devices` devices: from the same random state, on the same tokens. One mesh computes a batch in two
microbatches, and one run is saved on a mesh and continued on another.

A line has the largest difference of losses and gradient norms, relative to those of one device, and that of
the parameters at the end, adapters merged, relative to the largest entry of each. Adapters are compared as
well, but not judged: singular vectors, which the spectral method trains between, turn with the last bits of a
gradient. The exit status is 1 if a difference of losses and norms is above 1e-4, or one of parameters above
1e-3.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / name) for name in ("step", "support"))]

LARGEST, LARGEST_OF_PARAMETERS = 1e-4, 1e-3
Shape = tuple[int, int, int]  # data, fsdp, tensor
ONE = (1, 1, 1)
SAVED = 13  # updates before a run is saved: after the restart


@dataclasses.dataclass(frozen=True)
class Trial:
    """Compares training on meshes of several devices with training on one.

    Attributes:
      methods: the methods to train; all by default.
      devices: devices of a mesh, 2, 4 or 8.
      jobs: methods that are trained side by side, each in a process of its own.
      out: JSON file for the figures; empty for none.
      here: train in this process, and print a line of JSON for each comparison.
    """

    methods: tuple[str, ...] = ()
    devices: Literal[2, 4, 8] = 4
    jobs: int = 1
    out: str = ""
    here: bool = False


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One run on meshes beside one device.

    Attributes:
      method: what is trained.
      mesh: sizes of the axes data, fsdp and tensor; of both meshes if the run is continued.
      microbatches: parts of a batch.
      scalars: largest relative difference of losses and gradient norms.
      parameters: that of a parameter at the end, adapters merged, relative to its largest entry.
      adapters: that of an adapter's array; 0 if there are none.
      loss: the last one.
    """

    method: str
    mesh: str
    microbatches: int
    scalars: float
    parameters: float
    adapters: float
    loss: float


def main(trial: Trial) -> int:
    """Runs the trial and prints a line for each comparison. Returns the exit status."""
    names = trial.methods or tuple(configs())
    if trial.here:
        for name in names:
            for found in compared(name, trial.devices):
                print(json.dumps(dataclasses.asdict(found)), flush=True)
        return 0
    with concurrent.futures.ThreadPoolExecutor(trial.jobs) as pool:
        lines = [
            line for found in pool.map(partial(in_process, devices=trial.devices), names) for line in found
        ]
    if trial.out:
        Path(trial.out).write_text(json.dumps([dataclasses.asdict(line) for line in lines], indent=1) + "\n")
    bad = [
        line for line in lines if not (line.scalars <= LARGEST and line.parameters <= LARGEST_OF_PARAMETERS)
    ]
    print(f"{len(lines)} comparisons, of which {len(bad)} differ too much")
    return int(bool(bad))


def in_process(name: str, devices: int) -> list[Comparison]:
    """Compares the meshes of one method in a process of its own, which takes memory as it needs it."""
    words = [sys.executable, __file__, "--here", "--devices", str(devices), "--methods", name]
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    found = [Comparison(**json.loads(line)) for line in done.stdout.splitlines()]
    for line in found:
        parts = f" in {line.microbatches} microbatches" if line.microbatches > 1 else ""
        print(
            f"{line.method}, {line.mesh}{parts}: losses and norms {line.scalars:.1e}, "
            f"parameters {line.parameters:.1e}, adapters {line.adapters:.1e}, loss {line.loss:.6f}",
            flush=True,
        )
    return found


def configs() -> dict[str, Any]:
    """Returns the config of each method."""
    from test_meshes import METHODS, STEPS, configured, rules

    from mora_jax.methods import Decouple, MoRA, Share, Spectral, Truncate

    more = {
        "truncate": MoRA(4, Truncate(), 8),
        "decouple": MoRA(4, Decouple(), 8),
        "share, reordered": MoRA(4, Share(reorder=True), 8),
        "spectral": Spectral(4, 8),
    }
    found = {name: configured(name, STEPS, "merged") for name in METHODS}
    like = found["share"]
    found |= {name: dataclasses.replace(like, rules=rules(**{".*": m})) for name, m in more.items()}
    mixture = next(iter(METHODS))
    return found | {f"{mixture}, by activation": configured(mixture, STEPS, "activation")}


def compared(name: str, devices: int) -> Iterator[Comparison]:
    """Yields the comparisons of one method on meshes of so many devices."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    config = configs()[name]
    one, start = trained(config, [ONE])
    sizes = [2**i for i in range(devices.bit_length())]
    shapes = [shape for shape in itertools.product(sizes, repeat=3) if math.prod(shape) == devices]
    mixed = (devices // 2, 1, 2)
    for meshes, parts in [*(([shape], 1) for shape in shapes), ([mixed], 2), ([(1, devices, 1), mixed], 1)]:
        many, _ = trained(dataclasses.replace(config, microbatches=parts), meshes, start)
        words = " then ".join(" x ".join(map(str, mesh)) for mesh in meshes)
        yield Comparison(name, words, parts, *differences(one, many), float(many[0][-1, 0]))


def trained(config: Any, meshes: Sequence[Shape], start: Any = None) -> tuple[Any, Any]:
    """Trains on the first mesh, and after a checkpoint on the second if there is one.

    Returns:
      Losses and gradient norms (updates, 2), the last parameters with adapters merged and the adapters, and
      the state at the start; host arrays.
    """
    import jax
    import numpy as np
    from test_meshes import drawn, placed

    from mora_jax import sharding, transform
    from mora_jax.models.batch import Batch
    from train.run.checkpoint import Checkpoints
    from train.run.state import abstract_state, assign_methods, fresh_state
    from train.step.spec import spec_of
    from train.step.step import orient_step, restart_step, train_step

    spec, methods, logged, state = spec_of(config), assign_methods(config), [], None
    ends = [config.steps] if len(meshes) == 1 else [SAVED, config.steps]
    with tempfile.TemporaryDirectory() as folder:
        for shape, end in zip(meshes, ends, strict=True):
            mesh = sharding.make_mesh(*shape)
            with jax.set_mesh(mesh):
                abstract = abstract_state(config, methods, mesh)
                if state is not None:  # at the end of the first mesh
                    with Checkpoints(folder) as checkpoints:
                        checkpoints.save(len(logged), state, {})
                        checkpoints.wait()
                        state = checkpoints.restore(len(logged), abstract)
                elif start is None:
                    state = drawn(fresh_state(config, methods, mesh))
                    start = jax.tree.map(np.array, state)
                else:
                    state = placed(start, abstract)
                for step in range(len(logged), end):
                    if restarts := config.restarts_at(step):
                        state, _ = restart_step(spec, methods, state)
                        methods = methods.after_restart()
                    tokens_BT = np.random.default_rng(step % 2).integers(0, 60, (8, 16), np.int32)
                    batch = Batch(jax.device_put(tokens_BT, sharding.batch(mesh)))
                    if (restarts or step == 0) and list(methods.orientable()):
                        state = orient_step(spec, methods, state, batch)
                    state, scalars = train_step(spec, methods, state, batch)
                    logged.append((float(scalars["loss"]), float(scalars["grad_norm"])))
    with jax.set_mesh(mesh):
        merged = jax.tree.map(np.array, transform.merge(state.params, state.adapters, methods))
    return (np.array(logged), merged, jax.tree.map(np.array, state.adapters)), start


def differences(one: Any, many: Any) -> tuple[float, float, float]:
    """Returns the largest relative difference of scalars, and those of arrays, as `Comparison` says."""
    import jax
    import numpy as np

    def largest(ours: Any, theirs: Any) -> float:
        pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
        return max((float(np.max(np.abs(a - b)) / np.max(np.abs(a))) for a, b in pairs), default=0.0)

    scalars = float(np.max(np.abs(many[0] / one[0] - 1)))
    return scalars, largest(one[1], many[1]), largest(one[2], many[2])


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Trial, description=__doc__)))
