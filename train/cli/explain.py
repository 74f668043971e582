"""How errors are printed, and the exit status that each has."""

import errno
import sys
import traceback

from mora_jax.errors import InputError
from train.console import exits
from train.storage import buckets
from train.storage.files import is_bad_place


def explain(error: BaseException) -> int:
    """Prints an error as one line on stderr, or a bug as its traceback. Returns the exit status."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else bool(error.code)
        case InputError():
            line, status = str(error), exits.BAD_INPUT
        case exits.Stopped():
            line, status = str(error), error.status
        case OSError() if error.errno != errno.ENOMEM:
            line = f"{error.filename or 'input or output'}: {error.strerror or error}"
            status = exits.BAD_INPUT if is_bad_place(error) else exits.DISK
        case KeyboardInterrupt():
            line, status = "interrupted", exits.INTERRUPTED
        case _ if line := buckets.describe_error(error):
            status = exits.BAD_INPUT if isinstance(error, ImportError) else exits.DISK
        case _ if found := _exhausted(error):
            line, status = found, exits.MEMORY
        case _:
            traceback.print_exception(error)
            return exits.BUG
    print(f"mora: {line}", file=sys.stderr)
    return status


def _exhausted(error: BaseException) -> str | None:
    """Returns a line on memory that ran out, None for any other error."""
    from train.runtime import memory  # imports JAX

    found = memory.exhausted(error)
    return memory.describe(found) if found else None
