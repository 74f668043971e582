"""Measures memory and time of a large random model: made, read, adapted, saved, merged and exported.

    python tests/tools/large_model.py 7b FOLDER

Each step is a process of its own. Printed are its time and the most memory that it held. FOLDER needs room
for three models in bfloat16. It is made, and removed at the end.
"""

import dataclasses
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mora_jax import sharding
from mora_jax.hf.config import config_json
from mora_jax.hf.names import places
from mora_jax.hf.weights import write_json, write_weights
from mora_jax.models.llama import LlamaConfig
from train.config import flags
from train.config.run import RunConfig
from train.data.rows.info import DataInfo
from train.jobs.adapter import AdapterOptions, export_adapter, merge_adapters
from train.jobs.export import export
from train.run import base
from train.run.folder import claim, open_checkpoints
from train.run.meta import build_meta
from train.run.model import load_initial
from train.run.state import assign_methods, fresh_state, named_base
from train.step.state import TrainState

SIZES = {
    "7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, max_position_embeddings=4096),
    "3b": LlamaConfig(32000, 3200, 8640, 26, 32, 32, max_position_embeddings=2048),
    "tiny": LlamaConfig(384, 64, 96, 2, 2, 2, max_position_embeddings=64),
    "1.3b": LlamaConfig(32000, 2048, 5461, 24, 32, 32, max_position_embeddings=2048),
}
CONFIG = """
steps: 10
batch_size: 1
base_dtype: bfloat16
method: {name: mora, rank: 8, align: 1}
params: {train: ""}
restart: {every: 0}
schedule: {kind: cosine, warmup: 1}
checkpoint: {every: 1, keep: 1}
compilation: {cache: "off"}
"""


def make(folder: Path, model: LlamaConfig) -> None:
    """Writes the model, in bfloat16."""
    rng, out = np.random.default_rng(0), epath.Path(folder / "base")
    out.mkdir()
    specs = {name: jax.ShapeDtypeStruct(place.shape, jnp.bfloat16) for name, place in places(model).items()}

    def value(name: str) -> np.ndarray:
        shape = specs[name].shape
        few = rng.standard_normal((min(shape[0], 256), *shape[1:]), np.float32) * 0.02
        return np.resize(few, shape) if len(shape) > 1 else np.ones(shape)

    write_weights(out, specs, value)
    write_json(out / "config.json", config_json(model, "bfloat16", {}))


def config_of(folder: Path, model: LlamaConfig) -> RunConfig:
    """Returns the config of a run that adapts the model."""
    file = folder / "c.yaml"
    file.write_text(f"run_dir: {folder / 'run'}\ninit_from: {folder / 'base'}\n{CONFIG}")
    words = ["--data.directory", str(folder), "--data.sequence-length", str(model.max_position_embeddings)]
    return dataclasses.replace(flags.read_config(str(file), words), model=model)


def started(folder: Path, model: LlamaConfig) -> tuple[RunConfig, TrainState]:
    """Returns the state that a run starts from."""
    config = config_of(folder, model)
    mesh, methods = sharding.make_mesh(1), assign_methods(config)
    return config, fresh_state(config, methods, mesh, load_initial(config, info(folder, model), mesh))


def info(folder: Path, model: LlamaConfig) -> DataInfo:
    """Returns what is known of a data set that is not there."""
    return DataInfo(
        directory=str(folder),
        tokenizer_sha256="",
        vocab_size=model.vocab_size,
        eos_id=None,
        sequence_length=model.max_position_embeddings,
        rows={"train": 1000, "validation": 10},
        tokens={},
    )


def read(folder: Path, model: LlamaConfig) -> None:
    """Reads the model as a run of `init_from` does."""
    started(folder, model)


def checkpoint(folder: Path, model: LlamaConfig) -> None:
    """Reads the model, and saves the first checkpoint of a run, with random numbers in M."""
    config, state = started(folder, model)
    methods, keys = assign_methods(config), iter(jax.random.split(jax.random.key(0), 1000))
    noise = jax.tree.map(lambda a: 1e-3 * jax.random.normal(next(keys), a.shape, a.dtype), state.adapters)
    state, shared = base.split(dataclasses.replace(state, adapters=noise), methods)
    start = time.perf_counter()
    named = named_base(config, methods)
    hashed = time.perf_counter()
    Path(config.run_dir).mkdir()
    claim(config)
    with open_checkpoints(config) as saved:
        assert named
        saved.refer_to(named)
        meta = build_meta(config, methods, info(folder, model), 0)
        saved.save(0, state, meta, shared, 0)
        saved.wait()
    size = sum(file.stat().st_size for file in (folder / "run/checkpoints").rglob("*") if file.is_file())
    print(
        f"  hashes of the base {hashed - start:.1f} s; a checkpoint of {size / 1e6:,.1f} MB "
        f"{time.perf_counter() - hashed:.1f} s",
        flush=True,
    )


def adapter(folder: Path, _: LlamaConfig) -> None:
    """Runs `mora export RUN OUT --adapter`."""
    export_adapter(str(folder / "run"), str(folder / "adapter"), AdapterOptions(dtype="bfloat16"))


def merge(folder: Path, _: LlamaConfig) -> None:
    """Runs `mora merge BASE ADAPTER OUT`."""
    merge_adapters(str(folder / "base"), [(str(folder / "adapter"), 1.0)], str(folder / "merged"))


def merged_export(folder: Path, _: LlamaConfig) -> None:
    """Runs `mora export RUN OUT --dtype bfloat16`."""
    shutil.rmtree(folder / "merged", ignore_errors=True)
    export(str(folder / "run"), str(folder / "export"), "bfloat16")


STEPS: dict[str, Callable[[Path, LlamaConfig], None]] = {
    step.__name__: step for step in (make, read, checkpoint, adapter, merge, merged_export)
}


def sizes(folder: Path) -> Iterator[str]:
    """Yields the size of each folder of weights."""
    for place in sorted(folder.iterdir()):
        if files := list(place.glob("*.safetensors")):
            yield f"{place.name} {sum(file.stat().st_size for file in files) / 1e9:.2f} GB"


def main() -> None:
    size, folder, *step = sys.argv[1], Path(sys.argv[2]).absolute(), *sys.argv[3:]
    if step:
        return STEPS[step[0]](folder, SIZES[size])
    folder.mkdir()
    try:
        for name in STEPS:
            start = time.perf_counter()
            command = subprocess.Popen([sys.executable, __file__, size, str(folder), name])
            _, status, used = os.wait4(command.pid, 0)
            took, peak = time.perf_counter() - start, used.ru_maxrss / 2**20
            said = f"{took:.0f} s, {peak:.2f} GiB"
            print(f"{name}: {said}; there: {', '.join(sizes(folder))}", flush=True)
            if status:
                sys.exit(f"{name} failed")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
