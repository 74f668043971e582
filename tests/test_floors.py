"""The rooms of the two packages stand above each other, and imports go downward only."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. Rooms of one line do not import each other.
ROOMS = (
    ("mora_jax.errors",),
    ("mora_jax.trees", "mora_jax.io"),
    ("mora_jax.sharding",),
    ("mora_jax.methods",),
    ("mora_jax.on",),
    ("mora_jax.transform",),
    ("mora_jax.orienting", "mora_jax.spectrum", "mora_jax.moments", "mora_jax.report"),
    ("mora_jax.state",),
    ("mora_jax.frontends",),
    ("mora_jax.nnx",),
    ("mora_jax.models",),
    ("mora_jax.hf",),
    ("mora_jax.adapter_file",),
    ("mora_jax",),  # its public names
    ("train.console",),
    ("train.storage",),
    ("train.config",),
    ("train.data",),
    ("train.step",),
    ("train.runtime",),
    ("train.run",),
    ("train.jobs",),
    ("train.tasks",),
    ("train.perf",),
    ("train.cli",),
)
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def module_name(path: Path) -> str:
    """Returns the name under which a file of the project is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for package in ("mora_jax", "train") for p in (ROOT / package).rglob("*.py")}
MODULES.pop("train")  # empty


def room(module: str) -> str:
    """Returns the room of a module: itself, or the package that it lies in."""
    name = module
    while name not in FLOORS:
        name = name.rpartition(".")[0]
        assert name not in ("", "mora_jax"), f"{module} lies in no room; add its room to ROOMS"
    return name


def imports(module: str) -> set[str]:
    """Returns the project's modules that a module imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{module} has a relative import"  # noqa: PT018
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & MODULES.keys()
            found |= submodules | ({node.module} if submodules != names else set())
    return found & MODULES.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_from_its_own_room_and_from_rooms_below(module: str):
    for imported in imports(module):
        below = FLOORS[room(imported)] < FLOORS[room(module)]
        assert below or room(imported) == room(module), f"{module} imports {imported}, which is not below it"


@pytest.mark.parametrize("name", FLOORS)
def test_the_imports_of_a_room_form_no_circle(name: str):
    inside = {module for module in MODULES if room(module) == name}
    assert inside, f"there is no room {name}"
    graphlib.TopologicalSorter({module: imports(module) & inside for module in inside}).prepare()


def test_only_the_model_imports_linen():
    line = re.compile(r"^(from|import) .*linen", re.MULTILINE)
    users = {name for name, path in MODULES.items() if line.search(path.read_text())}
    assert users == {"mora_jax.models.llama"}
