"""docs/architecture.md names files, functions and rooms that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()
NAMES = sorted(set(re.findall(r"`([^`\s]+)`", PAGE)))
PATHS = [name for name in NAMES if "/" in name.partition(":")[0] and not name.startswith(("layers/", "http"))]
ROOMS = {p.parent.relative_to(ROOT) for top in ("mora_jax", "train") for p in (ROOT / top).rglob("*.py")}


def definitions(path: Path) -> set[str]:
    """Returns what a file defines at its top level and in its classes, as `name` and `Class.name`."""
    tree = ast.parse(path.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    inner = {f"{c.name}.{name}" for c in classes for node in c.body for name in defined(node)}
    return inner | {name for node in tree.body for name in defined(node)}


def defined(node: ast.stmt) -> set[str]:
    """Returns the names that a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("name", PATHS)
def test_what_the_page_names_exists(name: str):
    path, _, definition = name.partition(":")
    assert (ROOT / path).exists(), f"docs/architecture.md names {path}, which is not there"
    if definition:
        assert definition in definitions(ROOT / path), f"docs/architecture.md: {path} has no {definition}"


@pytest.mark.parametrize("room", sorted(str(room) for room in ROOMS))
def test_the_page_names_every_room(room: str):
    assert f"`{room}/`" in PAGE


def test_the_map_lists_the_rooms_in_the_order_of_imports():
    floors = ast.parse((ROOT / "tests/test_floors.py").read_text()).body
    order = next(node.value for node in floors if isinstance(node, ast.Assign) and defined(node) == {"ROOMS"})
    rooms = [room for line in ast.literal_eval(order) for room in line if "." in room]
    places = [PAGE.index(f"`{room.replace('.', '/')}") for room in rooms]
    assert places == sorted(places)


def test_the_page_names_all_that_a_method_states():
    section = PAGE.partition("## Adding a method")[2].partition("## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    stated = definitions(ROOT / "mora_jax/methods/base.py")
    assert named == {name.removeprefix("Method.") for name in stated if re.match(r"Method\.[a-z]", name)}
