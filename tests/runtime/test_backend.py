"""Where compiled programs are kept, and that a kill in mid-write does no lasting harm."""

import dataclasses
import errno
import importlib
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache

from mora_jax.errors import InputError
from mora_jax.sharding import make_mesh
from train.config.run import RunConfig
from train.config.sections import Compilation
from train.runtime import backend


@pytest.fixture
def config(tmp_path, monkeypatch) -> RunConfig:
    monkeypatch.setattr(backend, "_WORTH_KEEPING", 0.0)
    return RunConfig(run_dir=str(tmp_path / "runs/a"))


def named(function: str) -> str:
    """Returns a name as JAX gives it to a program."""
    return f"{function}-{'0' * 64}-cache"


def programs(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*-cache")}


def compile_something(config: RunConfig, number: int, devices: int = 1) -> None:
    with backend.compiled_programs(config, make_mesh(devices)):
        jax.jit(lambda x: jnp.sin(x) * number)(jnp.ones(3)).block_until_ready()


def test_programs_are_kept_beside_the_run_and_options_are_restored(config, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    compile_something(config, 1)
    kept = programs(tmp_path / "runs/jax_cache")
    assert kept
    assert jax.config.jax_compilation_cache_dir == before
    jax.jit(lambda x: jnp.cos(x) * 2)(jnp.ones(3))
    assert programs(tmp_path / "runs/jax_cache") == kept


@pytest.mark.parametrize("cache", ["off", "elsewhere"])
def test_the_cache_may_be_moved_or_turned_off(config, tmp_path, cache):
    where = cache if cache == "off" else str(tmp_path / cache)
    compile_something(dataclasses.replace(config, compilation=Compilation(where)), 3)
    assert not (tmp_path / "runs").exists()
    assert bool(programs(tmp_path / cache)) == (cache != "off")


@pytest.mark.parametrize("deterministic", [False, True])
def test_programs_for_several_cpus_are_not_kept(config, deterministic):
    """XLA loads them without the order of their collectives, and devices then wait for each other."""
    config = dataclasses.replace(config, deterministic=deterministic)
    folder = Path(backend.cache_folder(config))
    compile_something(config, 2, devices=2)
    assert not folder.exists()
    compile_something(config, 2, devices=1)
    assert programs(folder)


def test_a_folder_named_in_the_environment_is_used(config, tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "named"))
    try:
        assert str(backend.cache_folder(config)) == str(tmp_path / "named")
    finally:
        jax.config.update("jax_compilation_cache_dir", None)


def test_an_empty_name_is_refused():
    with pytest.raises(InputError, match=r"compilation\.cache must be"):
        Compilation("")


def compressors() -> list:
    return ["zlib", pytest.param("zstandard", marks=pytest.mark.skipif(
        not importlib.util.find_spec("zstandard"), reason="needs zstandard"))]  # fmt: skip


@pytest.mark.parametrize("compressor", compressors())
def test_truncated_programs_are_removed_and_complete_ones_kept(config, tmp_path, compressor):
    folder = tmp_path / "runs/jax_cache"
    folder.mkdir(parents=True)
    compress = zlib.compress if compressor == "zlib" else importlib.import_module(compressor).compress
    program = compress(os.urandom(1 << 16))
    (folder / named("whole")).write_bytes(program)
    for name, size in (("a", 0), ("b", 1), ("c", len(program) // 2), ("d", len(program) - 1)):
        (folder / named(f"cut_{name}")).write_bytes(program[:size])
    compile_something(config, 4)
    assert not any(name.startswith("cut") for name in programs(folder))
    assert named("whole") in programs(folder)


def test_files_of_the_user_in_the_folder_of_programs_stay(config, tmp_path):
    mine = {"notes-cache": "mine", "checked": "mine", "checked.part": "mine"}
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    compile_something(dataclasses.replace(config, compilation=Compilation(str(tmp_path))), 4)
    assert {name: (tmp_path / name).read_text() for name in mine} == mine


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_pipe_in_the_place_of_a_program_is_refused(config, deterministic):
    config = dataclasses.replace(config, deterministic=deterministic)
    folder = Path(backend.cache_folder(config))
    folder.mkdir(parents=True)
    os.mkfifo(folder / named("pipe"))
    with (
        pytest.raises(InputError, match="is not a regular file; remove it"),
        backend.compiled_programs(config, make_mesh(1)),
    ):
        pass


def test_checked_programs_are_not_read_again(config, tmp_path):
    compile_something(config, 5)
    folder = tmp_path / "runs/jax_cache"
    old = folder / named("old")
    old.write_bytes(b"cut off")
    long_ago = time.time() - 3600
    os.utime(old, (long_ago, long_ago))
    compile_something(config, 5)
    assert old.exists()


def test_a_full_disk_is_named(disk):
    config = RunConfig(run_dir=str(disk.path / "run"), deterministic=True)
    folder = disk.path / "run" / backend.CACHE
    folder.mkdir(parents=True)
    disk.fill()
    with pytest.raises(OSError, match="No space left") as error:
        compile_something(config, 8)
    assert error.value.filename == str(folder)
    disk.free()
    compile_something(config, 8)
    keeping = backend.compiled_programs(config, make_mesh(1))
    with pytest.raises(OSError, match="No space left") as error, keeping:
        raise OSError(errno.ENOSPC, "No space left")  # of something else
    assert error.value.filename is None


def test_an_interrupted_check_is_repeated(config, tmp_path, monkeypatch):
    compile_something(config, 7)
    folder = tmp_path / "runs/jax_cache"
    (folder / "mora-checked").unlink(missing_ok=True)
    (folder / named("cut")).write_bytes(b"cut off")
    long_ago = time.time() - 3600
    os.utime(folder / named("cut"), (long_ago, long_ago))

    def fail(program: bytes) -> bool:
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(backend, "_verify", fail)
        compile_something(config, 7)
    assert (folder / named("cut")).exists()
    compile_something(config, 7)
    assert not (folder / named("cut")).exists()


def test_a_program_that_cannot_be_decompressed_here_is_kept(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    folder = tmp_path / "runs/jax_cache"
    folder.mkdir(parents=True)
    (folder / named("other")).write_bytes(backend._ZSTD + b"whatever")
    compile_something(config, 8)
    assert (folder / named("other")).exists()


@pytest.fixture
def gpu_expected(monkeypatch):
    """As if a GPU's plugin were installed, and JAX had not started."""
    monkeypatch.setattr(backend, "_gpu_expected", lambda: True)
    monkeypatch.setattr(backend.workarounds, "jax_has_started", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    return monkeypatch


def test_flags_for_gpus_are_set_once(config, gpu_expected):
    flags = " ".join(["--xla_dump_to=x", *backend.PRODUCTS])
    for deterministic, expected in ((False, flags), (True, f"{flags} {backend._DETERMINISTIC}")):
        for _ in range(2):
            backend.set_flags(deterministic)
            assert os.environ["XLA_FLAGS"] == expected


@pytest.mark.parametrize("value", ["true", "false"])
def test_the_users_flags_stay_except_against_determinism(config, gpu_expected, value):
    own = f"--xla_gpu_enable_triton_gemm={value} --xla_gpu_exclude_nondeterministic_ops=false"
    gpu_expected.setenv("XLA_FLAGS", own)
    backend.set_flags(deterministic=False)
    flags = f"{own} {backend.PRODUCTS[1]}"
    assert os.environ["XLA_FLAGS"] == flags
    backend.set_flags(deterministic=True)
    assert os.environ["XLA_FLAGS"] == f"{flags} {backend._DETERMINISTIC}"  # XLA goes by the last


def test_flags_are_known_to_this_xla(config, gpu_expected):
    gpu_expected.setenv("XLA_FLAGS", "")
    backend.set_flags(deterministic=True)
    code = "import jax; jax.jit(lambda: 1)()"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_once_jax_has_started_only_determinism_is_refused(config, gpu_expected):
    gpu_expected.setattr(backend.workarounds, "jax_has_started", lambda: True)
    backend.set_flags(deterministic=False)
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=x"
    with pytest.raises(
        InputError, match="deterministic comes too late, JAX has started: set XLA_FLAGS=--xla_gpu"
    ):
        backend.set_flags(deterministic=True)
    gpu_expected.setenv("XLA_FLAGS", backend._DETERMINISTIC)
    backend.set_flags(deterministic=True)


def test_without_a_gpu_no_flag_is_set(config, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    backend.set_flags(deterministic=True)
    assert os.environ["XLA_FLAGS"] == ""


def test_a_deterministic_run_keeps_every_program_in_its_own_folder(config, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "_WORTH_KEEPING", 1e9)
    compile_something(config, 6)
    assert not programs(tmp_path / "runs/jax_cache")
    compile_something(dataclasses.replace(config, deterministic=True), 6)
    assert programs(tmp_path / "runs/a/jax_cache")
    with pytest.raises(InputError, match=r"leave compilation\.cache at auto"):
        dataclasses.replace(config, deterministic=True, compilation=Compilation("off"))


@pytest.mark.parametrize("compressor", compressors())
def test_a_deterministic_run_checks_every_program_at_every_start(config, tmp_path, compressor):
    """Whatever was looked at before: a program compiled in the place of another may compute other bits."""
    deterministic, folder = dataclasses.replace(config, deterministic=True), tmp_path / "runs/a/jax_cache"
    compile_something(deterministic, 9)
    program = importlib.import_module(compressor).compress(os.urandom(1 << 16))
    altered = program[:2] + bytes(b ^ 255 for b in program[2:40]) + program[40:]
    if compressor == "zstandard":
        altered = program[:4] + bytes(b ^ 255 for b in program[4:40]) + program[40:]
    long_ago = time.time() - 3600
    for name, content in (("cut", program[:99]), ("whole", program), ("altered", altered)):
        (folder / named(name)).write_bytes(content)
        os.utime(folder / named(name), (long_ago, long_ago))
    for _ in range(2):
        with pytest.raises(InputError, match=r"altered-0{64}-cache is damaged: remove it .* may change bits"):
            compile_something(deterministic, 9)
    (folder / named("altered")).unlink()
    compile_something(deterministic, 9)
    assert named("cut") not in programs(folder)
    assert named("whole") in programs(folder)


def test_a_deterministic_run_loads_the_programs_it_kept(config, tmp_path):
    """JAX itself ends where a program that it kept cannot be unpacked."""
    deterministic, folder = dataclasses.replace(config, deterministic=True), tmp_path / "runs/a/jax_cache"
    compile_something(deterministic, 10)
    for path in folder.glob("*-cache"):
        kept = path.read_bytes()
        path.write_bytes(kept[:100] + bytes([kept[100] ^ 255]) + kept[101:])
        os.utime(path, (0, 0))
    with pytest.raises(InputError, match="-cache is damaged"):
        compile_something(deterministic, 10)


def test_a_program_that_decompresses_to_something_else_is_refused(config, tmp_path):
    """As where a damaged stream has no checksum."""
    deterministic, folder = dataclasses.replace(config, deterministic=True), tmp_path / "runs/a/jax_cache"
    compile_something(deterministic, 11)
    for path in folder.glob("*-cache"):
        path.write_bytes(compilation_cache.compress_executable(b"no program at all"))
    with pytest.raises(InputError, match=r"a file .*-cache is damaged"):
        compile_something(deterministic, 11)


@pytest.mark.slow
def test_xla_knows_the_flag_and_importing_starts_nothing():
    """In programs of their own: XLA ends one for a flag that it does not know."""
    source = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
from train.runtime import backend
from train.jobs import pretrain as loop
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
os.environ["XLA_FLAGS"] = backend._DETERMINISTIC if len(sys.argv) < 2 else sys.argv[1]
import jax
print(jax.numpy.ones(2).sum())
"""
    known, unknown = (
        subprocess.run([sys.executable, "-c", source, *more], capture_output=True, text=True)
        for more in ([], ["--xla_gpu_no_such_flag=true"])
    )
    assert (known.returncode, known.stdout) == (0, "2.0\n"), known.stderr
    assert unknown.returncode != 0


@pytest.mark.parametrize(
    ("platform", "width", "dtype", "kernel"),
    [
        ("gpu", 64, "bfloat16", "cudnn"),
        ("gpu", 64, "float32", "xla"),
        ("gpu", 20, "bfloat16", "xla"),
        ("gpu", 256, "bfloat16", "xla"),
        ("cpu", 64, "bfloat16", "xla"),
    ],
)
def test_the_attention_kernel_of_full_sequences(monkeypatch, platform, width, dtype, kernel):
    class Device:
        pass

    Device.platform = platform
    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert backend.attention_here(width, dtype) == kernel
