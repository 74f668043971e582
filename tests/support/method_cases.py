"""Methods, shapes and random arrays for tests that every method must pass."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import quick

from mora_jax.methods import METHODS, DoRA, LoRA, Method, MoRA, Rotate, Share, Spectral

# The variants of every method with a small rank, and others that take other branches.
CASES: list[Method] = [
    *(variant for method in METHODS.values() for variant in method.variants(4).values()),
    LoRA(3, alpha=7.0, rslora=True, b_lr_scale=4.0),
    LoRA(3, train_factors="b", a_init="orthogonal"),
    LoRA(3, train_factors="b", a_init="normal"),
    MoRA(4, Share(1)),
    MoRA(4, Share((0, 1), "wrap", cycle=4)),
    MoRA(4, Rotate("wrap", "drop"), align=16),
    MoRA(4, align=16),
]
# One or two of each method, with options that take other branches.
QUICK = [
    LoRA(3, alpha=7.0, rslora=True, b_lr_scale=4.0),
    MoRA(4, Share((0, 1), "wrap", cycle=4)),
    MoRA(4, Rotate("wrap", "drop"), align=16),
    DoRA(4),
    Spectral(4),
]
ADDITIVE = [m for m in CASES if m.additive]
PATHS: list[Any] = ["merged", "compressed", "folded", "activation"]
SHAPES = [(24, 24), (20, 33), (33, 20)]
every_case = pytest.mark.parametrize("method", CASES, ids=str)
costly_case = pytest.mark.parametrize("method", quick(QUICK, CASES), ids=str)
every_additive = pytest.mark.parametrize("method", quick(QUICK, ADDITIVE), ids=str)
every_shape = pytest.mark.parametrize(("k", "d"), quick([(33, 20)], SHAPES))


def kernel(seed: int, k: int, d: int) -> jax.Array:
    return 0.3 * jax.random.normal(jax.random.key(seed), (k, d))


@functools.partial(jax.jit, static_argnums=0)
def random_arrays(method: Method, w: jax.Array, seed: int = 0) -> dict[str, jax.Array]:
    """Returns arrays as after some training: everything that may be non-zero is random."""
    arrays = method.init(jax.random.key(seed), w)
    keys = jax.random.split(jax.random.key(seed + 1), len(arrays))
    arrays = {
        n: a + 0.3 * jax.random.normal(k, a.shape) for k, (n, a) in zip(keys, arrays.items(), strict=True)
    }
    if isinstance(method, MoRA):  # the padding of m is zero and stays zero
        r = method.r_hat(*w.shape)
        arrays["m_RR"] = jnp.zeros_like(arrays["m_RR"]).at[:r, :r].set(arrays["m_RR"][:r, :r])
    return arrays


def relative_error(got: jax.Array, expected: jax.Array) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
