"""Shared set-up: CPU devices are forced before JAX starts; rank promotion raises."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most of the tests' time is compilation, and none of it is about what XLA makes faster. Set in the
# environment, so that programs started by tests compute the same bits.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"

import contextlib
import gzip
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jaxlib.version

# Of the two ways in which these versions make code of fusions the older one is three times as fast.
if jaxlib.version.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).parents[2] / "shared"


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs the reference folder ../shared/{name}, which is not here")
    return folder


@pytest.fixture(autouse=True, scope="module")
def room_for_programs() -> Iterator[None]:
    """Lets go of compiled programs where there are many.

    Each takes a part of the process's memory map, which by Linux's default has 65,530 parts. XLA crashes
    where there are no more, which was after most of the tests.
    """
    yield
    parts = Path("/proc/self/maps")
    if parts.exists() and parts.read_bytes().count(b"\n") > 16_000:
        jax.clear_caches()


@pytest.fixture
def golden() -> Path:
    """The folder of numbers recorded from the authors' implementation."""
    return _folder("golden")


@pytest.fixture
def corpus() -> Path:
    """The folder of real text in C4's format."""
    return _folder("corpus")


@pytest.fixture
def tokenizers() -> Path:
    """The folder with a real SentencePiece model."""
    return _folder("tokenizers")


TINY = """
steps: 22
batch_size: 4
model:
  {vocab_size: 384, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2,
   num_key_value_heads: 2, max_position_embeddings: 32}
compute: {dtype: float32, layers: scan, loss_chunk: 64}
method: {name: mora, rank: 4, align: 8}
optimizer: {learning_rate: 1e-2}
schedule: {kind: jagged-cosine, warmup: 2}
restart: {every: 2, warmup: 1}
bad_steps: {window: 1}
eval: {every: 11, batch_size: 4, max_batches: 3}
checkpoint: {every: 3, keep: 0}
mesh: {data: 1}
"""


class TinyRun(NamedTuple):
    """A finished run of ten restarts; its `config.run_dir` is free again: others use what it compiled."""

    config: Any
    folder: Path
    summary: dict[str, Any]
    compilations: dict[str, int]


def tiny_documents(count: int, seed: int) -> list[str]:
    words = ["".join(random.Random(n).choices("abcdefghij", k=2 + n % 6)) for n in range(200)]
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(10, 60))) for _ in range(count)]


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of made text in C4's format, two training shards and one for validation, and a tokenizer."""
    from train.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny_text")
    for name, seed in (("train.0", 0), ("train.1", 1), ("validation.0", 2)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in tiny_documents(80, seed))
        (folder / f"c4-{name}.json.gz").write_bytes(gzip.compress(lines.encode()))
    train_tokenizer(str(folder / "c4-train.*"), str(folder / "t.model"), 384)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_text` as a prepared data set of rows of 32 tokens."""
    from train.data.rows.build import prepare

    out = tmp_path_factory.mktemp("tiny_data") / "data"
    source, validation = (str(tiny_text / f"c4-{split}.*") for split in ("train", "validation"))
    prepare(source, validation, str(tiny_text / "t.model"), 32, str(out), workers=1)
    return out


@pytest.fixture(scope="session")
def tiny_yaml(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of a tiny run with a restart at every second update."""
    folder = tmp_path_factory.mktemp("tiny_run")
    path = folder / "tiny.yaml"
    data = f"{{directory: {tiny_data}, sequence_length: 32}}"
    path.write_text(f"run_dir: {folder / 'run'}\ndata: {data}\n{TINY}")
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_yaml: Path) -> TinyRun:
    """`tiny_yaml` trained from beginning to end without an interruption."""
    from train.config import flags
    from train.jobs import pretrain as loop
    from train.step import step

    config = flags.read_config(str(tiny_yaml))
    steps = {"train_step": step.train_step, "restart_step": step.restart_step}
    before = {name: function._cache_size() for name, function in steps.items()}
    summary = loop.pretrain(config)
    compilations = {name: function._cache_size() - before[name] for name, function in steps.items()}
    folder = Path(config.run_dir).rename(tiny_yaml.parent / "finished")
    return TinyRun(config, folder, summary, compilations)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket of an object store that stands in for s3://, and a cache of its own."""
    import fake_store

    monkeypatch.setenv("MORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(fake_store.ROOT, str(tmp_path / "store"))
    fake_store.install(tmp_path / "store")
    return "s3://bucket"


class Disk:
    """A small disk of its own, for what happens when one is full or read-only.

    Attributes:
      path: where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        """Leaves no room for another page."""
        with contextlib.suppress(OSError), (self.path / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass

    def free(self) -> None:
        """Makes room again."""
        (self.path / "filler").unlink()

    def read_only(self, on: bool) -> None:
        """Forbids, or allows, writing."""
        how = f"remount,{'ro' if on else 'rw'}"
        subprocess.run(["mount", "-o", how, str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 16 MiB in memory. Only root can mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk in memory")
    yield Disk(path)
    subprocess.run(["umount", "-l", str(path)], check=True)
