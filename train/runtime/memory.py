"""Memory that ran out, of a device or of the machine: how it is recognised, and what is said of it."""

import errno
import os
import re

import jax

_HELP = (
    "what helps: more --microbatches, --compute.remat full, a smaller --eval.batch-size (--batch-size of "
    "mora evaluate), or more devices in --mesh.fsdp"
)
_BYTES = re.compile(r"(\d{7,}) bytes")
# How TensorStore states the system's number of an error.
_SYSTEM = f"os_error_code='{errno.ENOMEM}'"
# The words of XLA, which has one code for memory and for other things that run out.
_WORDS = re.compile(r"out of memory|allocat", re.IGNORECASE)


def exhausted(error: BaseException | None) -> BaseException | None:
    """Returns the error, or that among its causes, which says that memory ran out; None if there is none."""
    while error is not None and not _says_so(error):
        error = error.__cause__ or error.__context__
    return error


def describe(error: BaseException) -> str:
    """Returns one line of an `exhausted` error: what was asked for, what there is, and what helps."""
    words = " ".join(str(error).split()).removeprefix("RESOURCE_EXHAUSTED: ")[:200].rstrip(".")
    asked = _BYTES.sub(lambda match: f"{int(match[1]) / 1e9:,.1f} GB", words)
    return f"memory ran out: {asked or 'no size is known'}; {_available()}; {_HELP}"


def _says_so(error: BaseException) -> bool:
    xla = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    system = (isinstance(error, OSError) and error.errno == errno.ENOMEM) or _SYSTEM in str(error)
    return isinstance(error, MemoryError) or system or (xla and bool(_WORDS.search(str(error))))


def _available() -> str:
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        used = stats.get("bytes_in_use", 0)
        return f"{device.device_kind} has {limit / 1e9:.1f} GB, of which {used / 1e9:.1f} GB are in use"
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"this machine has {machine / 1e9:.1f} GB"
