"""What JAX is told before a run computes: where compiled programs are kept, which makes a restart quick."""

import contextlib
import zlib
from collections.abc import Iterator

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from train.config import RunConfig

CACHE = "jax_cache"
# In the cache's folder: its age says which programs were looked at. JAX names a program `<key>-cache`.
_CHECKED = "checked"
_OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
# Seconds of compilation that are worth a file.
_WORTH_KEEPING = 0.1
# How a stream of zstandard begins. JAX compresses with it where it is installed, and with zlib elsewhere.
_ZSTD = b"\x28\xb5\x2f\xfd"


@contextlib.contextmanager
def compiled_programs(config: RunConfig) -> Iterator[None]:
    """Keeps what is compiled inside in the folder that `compilation.cache` names, and takes it from there."""
    folder = cache_folder(config)
    before = {name: getattr(jax.config, name) for name in _OPTIONS}
    if folder is not None and jax.process_index() == 0:
        _remove_cut_off(folder)
    _set(dict(zip(_OPTIONS, (folder and str(folder), _WORTH_KEEPING), strict=True)))
    try:
        yield
    finally:
        _set(before)


def cache_folder(config: RunConfig) -> epath.Path | None:
    """The folder of compiled programs; None where there is to be none.

    By default it lies beside the run's folder, unless JAX_COMPILATION_CACHE_DIR names another.
    """
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


def _remove_cut_off(folder: epath.Path) -> None:
    """Removes programs that a kill cut off as they were written: JAX would compile them at every start, and
    never replace them."""
    checked = folder / _CHECKED
    since = checked.stat().mtime if checked.exists() else 0
    with contextlib.suppress(OSError):  # a folder that cannot be written to may still be read
        folder.mkdir(parents=True, exist_ok=True)
        checked.write_bytes(b"")
        for program in folder.glob("*-cache"):
            if program.stat().mtime >= since - 1 and not _whole(program.read_bytes()):
                program.unlink(missing_ok=True)


def _whole(program: bytes) -> bool:
    """Whether the compressed stream of a program reaches its end."""
    if program.startswith(_ZSTD):
        import zstandard  # pyright: ignore[reportMissingImports]

        reader, errors = zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
    else:
        reader, errors = zlib.decompressobj(), zlib.error
    try:
        reader.decompress(program)
    except errors:
        return False
    return reader.eof
