"""Which parameters of a test `make test` leaves to `make test-all`."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def quick(these: Container[Any], among: Iterable[Any]) -> list[Any]:
    """Returns the parameters of a test, marked slow but for `these`. A tuple is of several names."""
    marked = ((case, slow(*case) if isinstance(case, tuple) else slow(case)) for case in among)
    return [case if case in these else other for case, other in marked]


def slow(*values: Any, id: str | None = None) -> Any:
    """Returns the values of one case, marked slow."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)
