"""Set-up of every test (eight CPU devices, implicit rank promotion is an error) and the shared fixtures."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most of the time goes into compiling, and no test needs the optimised program. The environment passes this
# on to the processes that tests start, so that they compute the same bits.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jaxlib.version

# Splitting small programs among threads costs more than it saves.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_parallel_codegen_split_count=1"
# These versions have two code generators for fusions. The older one compiles three times as fast.
if jaxlib.version.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import fake_store
import jax
import pytest
from small_disk import SmallDisk
from tiny import TINY, TinyRun, write_tiny_text

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A shell starts programs in the background with SIGINT ignored, and so would be what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True, scope="module")
def free_compiled_programs() -> Iterator[None]:
    """Drops compiled programs before they use up the process's memory map.

    Each program takes a few entries of the map, which has 65,530 by Linux's default. XLA crashes without one.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 32_000:
        jax.clear_caches()


def reference_folder(name: str) -> Path:
    """Returns ../shared/NAME, or skips the test where it is missing."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs the reference folder ../shared/{name}, which is missing")
    return folder


@pytest.fixture
def golden() -> Path:
    """Numbers recorded from the authors' implementation."""
    return reference_folder("golden")


@pytest.fixture
def corpus() -> Path:
    """Real text in C4's format."""
    return reference_folder("corpus")


@pytest.fixture
def tokenizers() -> Path:
    """A real SentencePiece model."""
    return reference_folder("tokenizers")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up text in C4's format (two training shards, one validation shard) and a tokenizer."""
    from train.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny_text")
    write_tiny_text(folder, train=80, validation=80)
    train_tokenizer(str(folder / "c4-train.*"), str(folder / "t.model"), 384)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_text` prepared as a data set with rows of 32 tokens."""
    from train.data.rows.build import prepare

    out = tmp_path_factory.mktemp("tiny_data") / "data"
    source, validation = (str(tiny_text / f"c4-{split}.*") for split in ("train", "validation"))
    prepare(source, validation, str(tiny_text / "t.model"), 32, str(out), workers=1)
    return out


@pytest.fixture(scope="session")
def tiny_yaml(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of a tiny run on `tiny_data`."""
    folder = tmp_path_factory.mktemp("tiny_run")
    path = folder / "tiny.yaml"
    data = f"{{directory: {tiny_data}, sequence_length: 32}}"
    path.write_text(f"run_dir: {folder / 'run'}\ndata: {data}\n{TINY}")
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_yaml: Path) -> TinyRun:
    """The run of `tiny_yaml`, trained without an interruption."""
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
    """The address of an empty bucket in a fake object store, with its own cache of downloads."""
    monkeypatch.setenv("MORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(fake_store.ROOT, str(tmp_path / "store"))
    fake_store.install(tmp_path / "store")
    return "s3://bucket"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of 16 MiB in memory. Mounting it needs root."""
    path = tmp_path / "disk"
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk in memory")
    yield SmallDisk(path)
    subprocess.run(["umount", "-l", str(path)], check=True)
