"""Singular values of what changed between two parameter trees."""

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax import LoRA, On, assign
from mora_jax.spectrum import numerical_rank, singular_values


def test_singular_values_are_those_of_the_change_layer_by_layer():
    before = {"a": {"kernel": jax.random.normal(jax.random.key(0), (3, 8, 6))}, "scale": jnp.ones(8)}
    change = jax.random.normal(jax.random.key(1), (3, 8, 2)) @ jax.random.normal(jax.random.key(2), (3, 2, 6))
    after = {"a": {"kernel": before["a"]["kernel"] + change}, "scale": 2 * before["scale"]}
    methods = assign([("a/kernel", On(LoRA(1), stack=(0,))), (".*", "train")], before)
    values = singular_values(before, after, methods)
    assert values.keys() == {"a/kernel"}
    expected = np.linalg.svd(np.asarray(change), compute_uv=False)
    np.testing.assert_allclose(values["a/kernel"], expected, atol=1e-5)
    assert numerical_rank(values["a/kernel"]).tolist() == [2, 2, 2]


def test_what_did_not_change_has_none():
    tree = {"kernel": jnp.ones((4, 4))}
    assert singular_values(tree, tree) == {}
