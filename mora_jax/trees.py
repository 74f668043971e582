"""Parameter trees by path: nested dicts flattened to "a/b/c", first-match rules, split and combine."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from flax import traverse_util

from mora_jax.errors import InputError, some

V = TypeVar("V")
Tree = Mapping[str, Any]
CATCH_ALL = ".*"


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns a nested dict as one flat dict, whose keys are paths such as `layers/mlp/up_proj/kernel`."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict that `flatten` flattened."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


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


def split(tree: Tree, keep: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns two trees: the leaves of `tree` whose path `keep` accepts, and the rest."""
    flat = flatten(tree)
    kept = {name: leaf for name, leaf in flat.items() if keep(name)}
    rest = {name: leaf for name, leaf in flat.items() if name not in kept}
    return unflatten(kept), unflatten(rest)


def combine(*trees: Tree) -> dict[str, Any]:
    """Returns one tree with the leaves of all, as before `split`. Raises ValueError if two share a path."""
    flat: dict[str, Any] = {}
    for tree in trees:
        leaves = flatten(tree)
        shared = flat.keys() & leaves.keys()
        if shared:
            raise ValueError(f"combine: more than one tree holds {some([repr(n) for n in sorted(shared)])}")
        flat.update(leaves)
    return unflatten(flat)


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
