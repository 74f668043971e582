"""What JAX is told before a run computes: where compiled programs are kept, which makes a restart quick,
which kernels a GPU has to choose from, and whether it must compute the same bits again.

On a GPU two things differ from one process to the next: kernels that add in no fixed order, and the choice of
kernels, which the compiler makes by timing them. A flag excludes the former. The latter is settled by keeping
every compiled program: XLA's own file of choices, `xla_gpu_per_fusion_autotune_cache_dir`, does not hold all
of them (openxla/xla#37902).
"""

import contextlib
import importlib.util
import os
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
from etils import epath
from jax._src import xla_bridge  # whether JAX has started is said nowhere else
from jax.experimental.compilation_cache import compilation_cache

from mora_jax.errors import InputError
from train.config.run import RunConfig
from train.storage.buckets import in_bucket

CACHE = "jax_cache"
# In the cache's folder: its age says which programs were looked at. JAX names a program `<key>-cache`.
_CHECKED = "checked"
_OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_raise_persistent_cache_errors",
)
# All flags are of jaxlib 0.10 to 0.12. XLA ends a program for one that it does not know.
_DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops=true"
# Products as they are written, and by cuBLAS alone (docs/performance.md). XLA would time many kernels of
# Triton for each of LoRA's small ones, which takes over a minute, and no step was faster for it; and it would
# copy kernels that one input is multiplied with side by side, which takes longer than one product saves.
_PRODUCTS = ("--xla_gpu_enable_triton_gemm=false", "--xla_gpu_dot_merger_threshold_mb=0")
_GPU_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
# Seconds of compilation that are worth a file.
_WORTH_KEEPING = 0.1
# JAX's module that reads and writes kept programs; its errors do not say what they are about.
_KEEPER = "compilation_cache.py"
# How a stream of zstandard begins. JAX compresses with it where it is installed, and with zlib elsewhere.
_ZSTD = b"\x28\xb5\x2f\xfd"


def set_flags(config: RunConfig) -> None:
    """Has XLA leave products on a GPU to cuBLAS, each as it is, and, where that is asked for, exclude what
    computes other bits each time. What XLA_FLAGS says of products already, stays.

    Raises:
      InputError: if JAX has started already and a deterministic run needs a flag: XLA reads them once.
    """
    given = os.environ.get("XLA_FLAGS", "").split()
    chosen = {flag.partition("=")[0] for flag in given}
    flags = [flag for flag in _PRODUCTS if flag.partition("=")[0] not in chosen]
    if config.deterministic and _DETERMINISTIC not in given:
        flags.append(_DETERMINISTIC)
    if not flags or not _gpu_expected():
        return
    if not xla_bridge.backends_are_initialized():
        os.environ["XLA_FLAGS"] = " ".join([*given, *flags])
    elif _DETERMINISTIC in flags:
        raise InputError(
            f"deterministic comes too late, JAX has started: set XLA_FLAGS={_DETERMINISTIC} for the program"
        )


@contextlib.contextmanager
def compiled_programs(config: RunConfig) -> Iterator[None]:
    """Keeps what is compiled inside in the folder that `compilation.cache` names, and takes it from there.

    Raises:
      InputError: if a program that a deterministic run has kept is damaged.
      OSError: naming the folder, if a program of such a run cannot be kept, as on a full disk.
    """
    folder = cache_folder(config)
    before = {name: getattr(jax.config, name) for name in _OPTIONS}
    if folder is not None and jax.process_index() == 0 and not in_bucket(folder):  # there, each is put whole
        if config.deterministic:
            _check_all(folder)
        else:
            _remove_cut_off(folder)
    # Deterministic is only what is kept: a program compiled again may be another one.
    least = 0.0 if config.deterministic else _WORTH_KEEPING
    _set(dict(zip(_OPTIONS, (folder and str(folder), least, config.deterministic), strict=True)))
    try:
        yield
    except OSError as error:
        if error.filename or not _in_the_keeping(error):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error
    finally:
        _set(before)


def cache_folder(config: RunConfig) -> epath.Path | None:
    """The folder of compiled programs; None where there is to be none.

    By default it lies beside the run's folder, unless JAX_COMPILATION_CACHE_DIR names another; that of a
    deterministic run lies in it.
    """
    if config.deterministic:
        return epath.Path(config.run_dir) / CACHE
    if config.compilation.cache == "off":
        return None
    if config.compilation.cache != "auto":
        return epath.Path(config.compilation.cache)
    named = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 (pyright does not know it)
    return epath.Path(named or epath.Path(config.run_dir).parent / CACHE)


def _set(options: dict[str, object]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks at the options once, with the first program


def _in_the_keeping(error: OSError) -> bool:
    """Whether an error comes from JAX's reading or writing of a kept program."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).name == _KEEPER for frame in frames)


def _gpu_expected() -> bool:
    """Whether JAX may start with a GPU: asking JAX itself would start it."""
    platforms = getattr(jax.config, "jax_platforms")  # noqa: B009 (pyright does not know it)
    asked_for = not platforms or any(name in platforms for name in ("cuda", "rocm", "gpu"))
    return asked_for and any(importlib.util.find_spec(name) for name in _GPU_PLUGINS)


def _remove_cut_off(folder: epath.Path) -> None:
    """Removes programs that a kill cut off as they were written: JAX would compile them at every start, and
    never replace them."""
    checked, checking = folder / _CHECKED, folder / f"{_CHECKED}.part"
    since = checked.stat().mtime if checked.exists() else 0
    with contextlib.suppress(OSError):  # a folder that cannot be written to may still be read
        folder.mkdir(parents=True, exist_ok=True)
        checking.write_bytes(b"")  # its age is that of the beginning: what is written meanwhile is not known
        for program in folder.glob("*-cache"):
            if program.stat().mtime >= since - 1 and _look(program.read_bytes()) != "whole":
                program.unlink(missing_ok=True)
        checking.replace(checked)


def _check_all(folder: epath.Path) -> None:
    """Removes programs that a kill cut off, which were never run, and refuses others that are damaged."""
    for program in sorted(folder.glob("*-cache")):
        found = _look(program.read_bytes())
        if found == "altered":
            raise InputError(
                f"{program} is damaged: remove it to have the program compiled anew, which may then compute "
                "other bits, or put it back"
            )
        if found == "cut off":
            program.unlink(missing_ok=True)


def _look(program: bytes) -> Literal["whole", "cut off", "altered"]:
    """What the compressed stream of a program says of itself, where it can be read here."""
    if program.startswith(_ZSTD):
        try:
            import zstandard  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError:  # it was kept by another installation
            return "whole"
        reader, errors = zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
    else:
        reader, errors = zlib.decompressobj(), zlib.error
    try:
        reader.decompress(program)
    except errors:
        return "altered"
    return "whole" if reader.eof else "cut off"
