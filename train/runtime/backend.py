"""JAX's settings for a run: the cache of compiled programs, XLA's flags, and determinism on a GPU.

On a GPU two things may differ between processes: kernels that add in no fixed order, and the choice of
kernels, which the compiler makes by timing them. A flag excludes the former. Keeping every compiled program
settles the latter: XLA's own file of choices, `xla_gpu_per_fusion_autotune_cache_dir`, does not hold all of
them (openxla/xla#37902).
"""

import contextlib
import importlib.util
import os
import re
import secrets
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
from etils import epath

from mora_jax.errors import InputError
from mora_jax.io import is_plain_file
from train.config.run import RunConfig
from train.runtime import workarounds
from train.storage.buckets import in_bucket

CACHE = "jax_cache"
# A file in the cache's folder whose age says which programs were checked.
_CHECKED = "mora-checked"
# JAX's name of a program: the function's, a SHA-256 and `cache`. Other files in the folder are the user's.
_PROGRAM = re.compile(r".+-[0-9a-f]{64}-cache")
_OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_raise_persistent_cache_errors",
)
# All flags are of jaxlib 0.10 to 0.12. XLA ends the program for an unknown one.
_DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops=true"
# Matrix products as written, and by cuBLAS alone (docs/performance.md). XLA would time many Triton kernels
# for each of LoRA's small products, which takes over a minute and made no step faster. It would also
# concatenate kernels that share an input, which takes longer than one product saves.
PRODUCTS = ("--xla_gpu_enable_triton_gemm=false", "--xla_gpu_dot_merger_threshold_mb=0")
_GPU_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
# Seconds of compilation that are worth a file.
_WORTH_KEEPING = 0.1
# The first bytes of a zstandard stream. JAX compresses with zstandard if it is installed, else with zlib.
_ZSTD = b"\x28\xb5\x2f\xfd"


def set_flags(deterministic: bool) -> None:
    """Sets XLA's flags for GPUs: products by cuBLAS as written and, if asked, only deterministic kernels.

    Flags that XLA_FLAGS already has are kept, except those against determinism.

    Args:
      deterministic: whether only deterministic kernels are used.

    Raises:
      InputError: if JAX has started and a deterministic run needs a flag: XLA reads flags once.
    """
    if not _gpu_expected():
        return
    given = os.environ.get("XLA_FLAGS", "").split()
    chosen = {flag.partition("=")[0] for flag in given}
    missing = [flag for flag in PRODUCTS if flag.partition("=")[0] not in chosen]
    missing += [_DETERMINISTIC] if deterministic and _DETERMINISTIC not in given else []
    if not missing:
        return
    if not workarounds.jax_has_started():
        os.environ["XLA_FLAGS"] = " ".join([*given, *missing])
    elif _DETERMINISTIC in missing:
        raise InputError(
            f"--deterministic comes too late, JAX has started: set XLA_FLAGS={_DETERMINISTIC} for the program"
        )


def flags(deterministic: bool) -> tuple[str, ...]:
    """Returns the flags that `set_flags` sets if XLA_FLAGS has none of them."""
    return (*PRODUCTS, *((_DETERMINISTIC,) if deterministic else ()))


def attention_here(head_width: int, dtype: str) -> Literal["xla", "cudnn"]:
    """Returns the attention kernel that full sequences of a model are computed with outside of a run.

    XLA's holds the scores of whole sequences. cuDNN's is for NVIDIA GPUs and bfloat16, and holds none.
    """
    fits = dtype == "bfloat16" and head_width % 8 == 0 and head_width <= 128
    return "cudnn" if fits and jax.devices()[0].platform == "gpu" else "xla"


@contextlib.contextmanager
def compiled_programs(config: RunConfig, mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Keeps programs compiled inside in the folder of `compilation.cache`, and loads them from there.

    Programs for several CPUs are not kept.

    Args:
      config: the run's config.
      mesh: the devices of its programs.

    Raises:
      InputError: if a program that a deterministic run kept is damaged.
      OSError: naming the folder, if a deterministic run cannot keep a program, as on a full disk.
    """
    folder = None if workarounds.may_deadlock_if_kept(mesh) else cache_folder(config)
    before = {name: getattr(jax.config, name) for name in _OPTIONS}
    # An object in a bucket is complete, so only folders on a disk are checked.
    if folder is not None and jax.process_index() == 0 and not in_bucket(folder):
        if config.deterministic:
            _check_all(folder)
        else:
            _remove_truncated(folder)
    # A deterministic run keeps every program, since a recompiled one may differ.
    least = 0.0 if config.deterministic else _WORTH_KEEPING
    _set_options(dict(zip(_OPTIONS, (folder and str(folder), least, config.deterministic), strict=True)))
    try:
        yield
    except OSError as error:
        if error.filename or not workarounds.raised_by_compilation_cache(error):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error
    except jax.errors.JaxRuntimeError as error:
        # A program without a checksum may decompress although it is damaged.
        if not workarounds.raised_by_compilation_cache(error):
            raise
        raise InputError(
            f"a file {folder}/*-cache is damaged: remove them to recompile the programs, which may change "
            "bits, or restore them"
        ) from error
    finally:
        _set_options(before)


def cache_folder(config: RunConfig) -> epath.Path | None:
    """Returns the folder of compiled programs, None if none are kept.

    The default is beside the run's folder, unless JAX_COMPILATION_CACHE_DIR names another. A deterministic
    run keeps programs in its own folder.
    """
    if config.deterministic:
        return epath.Path(config.run_dir) / CACHE
    if config.compilation.cache == "off":
        return None
    if config.compilation.cache != "auto":
        return epath.Path(config.compilation.cache)
    named = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 (pyright does not know it)
    return epath.Path(named or epath.Path(config.run_dir).parent / CACHE)


def _set_options(options: dict[str, object]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    workarounds.reset_compilation_cache()


def _gpu_expected() -> bool:
    """Whether JAX may start with a GPU. Asking JAX itself would start it."""
    platforms = getattr(jax.config, "jax_platforms")  # noqa: B009 (pyright does not know it)
    asked_for = not platforms or any(name in platforms for name in ("cuda", "rocm", "gpu"))
    return asked_for and any(importlib.util.find_spec(name) for name in _GPU_PLUGINS)


def _remove_truncated(folder: epath.Path) -> None:
    """Removes programs that a kill truncated. JAX would never replace them, and compile at every start."""
    checked, checking = folder / _CHECKED, folder / f"{_CHECKED}.{secrets.token_hex(8)}.part"
    since = checked.stat().mtime if checked.exists() else 0
    with contextlib.suppress(OSError):  # a folder that cannot be written to may still be read
        folder.mkdir(parents=True, exist_ok=True)
        # Before the loop: its age must not cover what is written meanwhile.
        Path(checking).touch(exist_ok=False)
        try:
            for program in _programs(folder):
                if program.stat().mtime >= since - 1 and _verify(program.read_bytes()) != "good":
                    program.unlink(missing_ok=True)
            checking.replace(checked)
        finally:
            checking.unlink(missing_ok=True)


def _programs(folder: epath.Path) -> list[epath.Path]:
    """Returns the files in a folder that JAX keeps programs in, sorted."""
    there = folder.iterdir() if folder.exists() else ()
    programs = sorted(path for path in there if _PROGRAM.fullmatch(path.name))
    for program in programs:
        if not in_bucket(program) and not is_plain_file(program):  # a pipe would be waited for
            raise InputError(f"{program} is not a regular file; remove it")
    return programs


def _check_all(folder: epath.Path) -> None:
    """Removes truncated programs, which never ran. Raises InputError for any other damage."""
    for program in _programs(folder):
        found = _verify(program.read_bytes())
        if found == "altered":
            raise InputError(
                f"{program} is damaged: remove it to recompile the program, which may change bits, "
                "or restore it"
            )
        if found == "truncated":
            program.unlink(missing_ok=True)


def _verify(program: bytes) -> Literal["good", "truncated", "altered"]:
    """Returns the state of a program's compressed stream; "good" if it cannot be decompressed here."""
    if program.startswith(_ZSTD):
        try:
            import zstandard  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError:  # another installation kept the program
            return "good"
        reader, errors = zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
    else:
        reader, errors = zlib.decompressobj(), zlib.error
    try:
        reader.decompress(program)
    except errors:
        return "altered"
    return "good" if reader.eof else "truncated"
