"""Path names and rules over any pytree, and trees taken apart and joined."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

from mora_jax import trees
from mora_jax.errors import InputError

NAMES = ["embed/table", "layers/q/kernel", "layers/k/kernel", "norm/scale"]


def test_flatten_and_back():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert trees.flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert trees.unflatten(trees.flatten(tree)) == tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    value: Any


def variables() -> nnx.State:
    return nnx.state(nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(1))]))


TREES = {
    "empty dicts": ({"a": {}, "b": {"c": np.ones(2), "d": {}}}, ["b/c"]),
    "FrozenDict": (FrozenDict({"a": {"b": np.ones(2)}, "c": np.ones(3)}), ["a/b", "c"]),
    "slash in a key": ({"mlp/~/linear_0": {"w": np.ones(2)}, "b": np.ones(3)}, ["b", "mlp/~/linear_0/w"]),
    "int keys": ({0: {"w": np.ones(2)}, 1: {"w": np.ones(3)}}, ["0/w", "1/w"]),
    "list and tuple": ([(np.ones(1), np.ones(2)), {"w": np.ones(3)}], ["0/0", "0/1", "1/w"]),
    "dataclass": ([Layer(np.ones(2), np.ones(3))], ["0/kernel", "0/value"]),
    "None": ({"a": None, "b": np.ones(2)}, ["b"]),
    "nnx.State": (variables(), ["0/bias", "0/kernel", "1/bias", "1/kernel"]),
    "pure nnx.State": (nnx.to_pure_dict(variables()), ["0/bias", "0/kernel", "1/bias", "1/kernel"]),
}
any_tree = pytest.mark.parametrize(("tree", "paths"), TREES.values(), ids=TREES.keys())


@any_tree
def test_leaves_have_paths_in_any_tree(tree, paths):
    assert list(trees.flatten(tree)) == paths


@any_tree
def test_replacing_leaves_keeps_the_tree(tree, paths):
    new = trees.replaced(tree, {paths[0]: jnp.zeros(7)})
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    assert trees.flatten(new)[paths[0]].shape == (7,)
    for path in paths[1:]:
        assert trees.flatten(new)[path] is trees.flatten(tree)[path]


@any_tree
def test_any_tree_is_split_and_combined(tree, paths):
    kept, rest = trees.split(tree, lambda path: path == paths[-1])
    assert list(trees.flatten(kept)) == paths[-1:]
    assert list(trees.flatten(rest)) == paths[:-1]
    both = trees.combine(kept, rest)
    assert jax.tree.structure(both) == jax.tree.structure(tree)
    for path, leaf in trees.flatten(tree).items():
        np.testing.assert_array_equal(trees.flatten(both)[path], leaf)


def test_an_unknown_path_is_named_with_the_nearest():
    with pytest.raises(InputError, match="no 'a/kernle'; did you mean a/kernel"):
        trees.replaced({"a": {"kernel": 1}}, {"a/kernle": 2})


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(InputError, match="two leaves of the tree have the path 'a/b'"):
        trees.flatten({"a/b": 1, "a": {"b": 2}})


def test_the_first_matching_rule_wins():
    rules = [("layers/q/.*", 1), ("layers/.*", 2), (".*", 3)]
    assert trees.first_match(rules, NAMES) == dict(zip(NAMES, [3, 1, 2, 3], strict=True))


def test_a_rule_matches_the_whole_path():
    with pytest.raises(InputError, match="'kernel' matches no parameter"):
        trees.first_match([("kernel", 1), (".*", 2)], NAMES)


def test_a_rule_that_matches_nothing_is_named_with_the_nearest_path():
    with pytest.raises(InputError, match=r"'layers/qq/kernel' matches no parameter.*'layers/q/kernel'"):
        trees.first_match([("layers/qq/kernel", 1), (".*", 2)], NAMES)


def test_a_rule_that_earlier_ones_leave_nothing_is_named():
    with pytest.raises(InputError, match="'layers/q/kernel' decides nothing"):
        trees.first_match([("layers/.*", 1), ("layers/q/kernel", 2), (".*", 3)], NAMES)


def test_the_catch_all_may_be_idle():
    assert set(trees.first_match([("[a-z].*", 1), (".*", 2)], NAMES).values()) == {1}


def test_uncovered_parameters_are_named():
    with pytest.raises(InputError, match="no rule covers 'embed/table', 'norm/scale'"):
        trees.first_match([("layers/.*", 1)], NAMES)


def test_a_broken_regex_is_named():
    with pytest.raises(InputError, match=r"'\(' is not a regular expression"):
        trees.first_match([("(", 1)], NAMES)


def test_split_and_combine_are_inverse():
    tree = {"a": {"b": 1, "c": 2}, "d": 3}
    kept, rest = trees.split(tree, lambda path: path == "a/c")
    assert kept == {"a": {"c": 2}}
    assert rest == {"a": {"b": 1}, "d": 3}
    assert trees.combine(kept, rest) == tree


def test_combine_refuses_trees_of_other_containers():
    with pytest.raises(ValueError, match="differ in structure at 'a'"):
        trees.combine({"a": [1, None]}, {"a": (None, 2)})


def test_combine_refuses_a_path_in_two_trees():
    with pytest.raises(ValueError, match="'a/c'"):
        trees.combine({"a": {"c": 2}}, {"a": {"c": 3}})
