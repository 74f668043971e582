"""Path names and rules over nested dicts."""

import pytest

from mora_jax import trees
from mora_jax.errors import InputError

NAMES = ["embed/table", "layers/q/kernel", "layers/k/kernel", "norm/scale"]


def test_flatten_and_back():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert trees.flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert trees.unflatten(trees.flatten(tree)) == tree


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


def test_combine_refuses_a_path_in_two_trees():
    with pytest.raises(ValueError, match="'a/c'"):
        trees.combine({"a": {"c": 2}}, {"a": {"c": 3}})
