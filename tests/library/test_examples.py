"""The examples in the library's docstrings."""

import doctest
import importlib
import pkgutil

import pytest
from slow import slow

import mora_jax

MODULES = [info.name for info in pkgutil.walk_packages(mora_jax.__path__, "mora_jax.")]
LONG = ("frontends.adapted", "hf.adapter", "hf.merge", "hf.weights", "models.generate", "models.score")
PUBLIC = [getattr(mora_jax, name) for name in mora_jax.__all__]
FUNCTIONS = [f for f in PUBLIC if callable(f) and not isinstance(f, type)]


@pytest.mark.parametrize(
    "name", [slow(n) if n.removeprefix("mora_jax.").startswith(LONG) else n for n in MODULES]
)
def test_examples_are_true(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_public_function_has_an_example(function):
    assert ">>> " in (function.__doc__ or "")
