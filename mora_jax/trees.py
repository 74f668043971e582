"""Pytrees by path: leaves named "a/b/0/kernel", first-match rules, split and combine."""

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
from flax import traverse_util
from jax.tree_util import KeyPath

from mora_jax.errors import InputError, nearest, some

V = TypeVar("V")
Tree: TypeAlias = Any  # any pytree
CATCH_ALL = ".*"


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns the leaves of any pytree by path, such as `layers/0/mlp/kernel`, in JAX's order.

    A path holds the keys of dicts, the indices of lists and tuples, and the names of attributes. The value of
    an `nnx.Variable` has the variable's path.

    Raises:
      InputError: if two leaves have one path, as those of `{"a/b": x}` and `{"a": {"b": x}}` in one tree.
    """
    flat: dict[str, Any] = {}
    for path, leaf in _leaves(tree):
        if path in flat:
            raise InputError(f"two leaves of the tree have the path {path!r}")
        flat[path] = leaf
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict whose leaves have these paths."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def replaced(tree: Tree, leaves: Mapping[str, Any]) -> Tree:
    """Returns the same tree with other leaves at some paths.

    Raises:
      InputError: if the tree has no leaf at one of the paths.
    """
    old = flatten(tree)
    if missing := [path for path in leaves if path not in old]:
        names = some([repr(path) for path in missing])
        raise InputError(f"the tree has no {names}{nearest(missing[0], old)}")
    values = [leaves.get(path, leaf) for path, leaf in old.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), values)


def first_match(rules: Sequence[tuple[str, V]], names: Iterable[str]) -> dict[str, V]:
    """Returns for each name the value of the first rule whose regex matches the full name.

    Args:
      rules: pairs of (regular expression, value); earlier ones win.
      names: paths, as `flatten` makes them.

    Raises:
      InputError: if a rule is no regular expression, a rule decides nothing (it matches no name, or earlier
        rules match all its names; only the catch-all `.*` may be idle), or no rule covers a name. The message
        names the rule or the name.
    """
    patterns = [_compiled(regex) for regex, _ in rules]
    names = list(names)
    winners = {name: _first(patterns, name) for name in names}
    uncovered = [name for name, winner in winners.items() if winner is None]
    if uncovered:
        raise InputError(
            f"no rule covers {some([repr(n) for n in uncovered])}; add a last rule such as ('.*', 'frozen')"
        )
    used = set(winners.values())
    for i, pattern in enumerate(patterns):
        if i not in used and pattern.pattern != CATCH_ALL:
            raise InputError(_idle_rule(pattern, names))
    return {name: rules[winner][1] for name, winner in winners.items() if winner is not None}


def split(tree: Tree, keep: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Returns two trees: the leaves of `tree` whose path `keep` accepts, and the rest.

    Entries of dicts that hold no leaf of their part are left out. In other containers None stands for them.
    What is empty in `tree` belongs to the rest.
    """
    chosen = iter([keep(path) for path in flatten(tree)])
    marked = jax.tree.map(lambda leaf: _Leaf(leaf, next(chosen)), tree)
    kept, rest = _part(marked, True), _part(marked, False)
    return {} if kept is _NOTHING else kept, {} if rest is _NOTHING else rest


def combine(*trees: Tree) -> Tree:
    """Returns one tree with the leaves of all, as before `split`.

    Raises:
      ValueError: if two trees have a leaf at one place.

    Example:
      >>> from mora_jax import trees
      >>> kept, rest = trees.split({"a": [1, 2], "b": 3}, lambda path: path == "a/0")
      >>> kept, rest
      ({'a': [1, None]}, {'a': [None, 2], 'b': 3})
      >>> trees.combine(kept, rest)
      {'a': [1, 2], 'b': 3}
    """
    return _combined("", trees)


_NOTHING = object()


class _Leaf:
    """A leaf of a tree that is split, and the part it belongs to."""

    def __init__(self, leaf: Any, kept: bool) -> None:
        self.leaf, self.kept = leaf, kept


def _part(node: Any, kept: bool) -> Any:
    """Returns one of the parts of a node, or `_NOTHING` if it has none of the node's leaves."""
    if isinstance(node, _Leaf):
        return node.leaf if node.kept == kept else _NOTHING
    if type(node) is dict:
        parts = {key: _part(child, kept) for key, child in node.items()}
        parts = {key: part for key, part in parts.items() if part is not _NOTHING}
        return parts if parts or not (node or kept) else _NOTHING
    children, structure = _children(node)
    parts = [_part(child, kept) for child in children]
    if all(part is _NOTHING for part in parts) and (parts or kept):
        return _NOTHING
    return jax.tree.unflatten(structure, [None if part is _NOTHING else part for part in parts])


def _combined(path: str, parts: Sequence[Any]) -> Any:
    parts = [part for part in parts if part is not None]
    if len(parts) < 2:
        return parts[0] if parts else None
    if all(type(part) is dict for part in parts):
        keys = dict.fromkeys(key for part in parts for key in part)
        return {k: _combined(f"{path}/{k}".lstrip("/"), [p[k] for p in parts if k in p]) for k in keys}
    if any(jax.tree_util.all_leaves([part]) for part in parts):
        raise ValueError(f"combine: more than one tree holds {path!r}")
    opened = [_children(part) for part in parts]
    if any(structure != opened[0][1] for _, structure in opened):
        raise ValueError(f"combine: the trees differ in structure at {path!r}")
    joined = [_combined(path, children) for children in zip(*(c for c, _ in opened), strict=True)]
    return jax.tree.unflatten(opened[0][1], joined)


def _children(node: Any) -> tuple[list[Any], Any]:
    """Returns what a container holds, None included, and how to make it again."""
    return jax.tree.flatten(node, is_leaf=lambda child: child is not node)


def _leaves(tree: Tree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    nnx = sys.modules.get("flax.nnx")  # without it there are no variables
    if nnx is None:
        return [(written(path), leaf) for path, leaf in leaves]
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))[0]
    variables = {path for path, node in nodes if isinstance(node, nnx.Variable)}
    return [(written(path[:-1] if path[:-1] in variables else path), leaf) for path, leaf in leaves]


def written(path: KeyPath) -> str:
    """Returns a path of JAX as text, such as "a/b/0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _compiled(regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except re.error as error:
        raise InputError(f"rule {regex!r} is not a regular expression: {error}") from error


def _first(patterns: Sequence[re.Pattern[str]], name: str) -> int | None:
    return next((i for i, pattern in enumerate(patterns) if pattern.fullmatch(name)), None)


def _idle_rule(pattern: re.Pattern[str], names: Sequence[str]) -> str:
    if any(pattern.fullmatch(name) for name in names):
        return f"rule {pattern.pattern!r} decides nothing: earlier rules match all its parameters"
    near = difflib.get_close_matches(pattern.pattern, names, n=1, cutoff=0.3) or list(names[:1])
    hint = f"; the nearest path is {near[0]!r}" if near else ""
    return f"rule {pattern.pattern!r} matches no parameter (it must match the full path){hint}"
