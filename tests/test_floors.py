"""Imports go downward only: every module may import from floors below its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up; modules of one floor may import each other.
FLOORS = (
    ("mora_jax.errors",),
    ("mora_jax.io",),
    ("mora_jax.hf.safetensors", "mora_jax.hf.tokenizer"),
    ("mora_jax.trees", "mora_jax.sharding"),
    ("mora_jax.methods.operators",),
    ("mora_jax.methods.base", "mora_jax.models.attention"),
    ("mora_jax.methods.mora", "mora_jax.methods.lora", "mora_jax.methods.dora", "mora_jax.methods.linear"),
    ("mora_jax.methods",),
    ("mora_jax.transform", "mora_jax.models.loss"),
    ("mora_jax.models", "mora_jax.spectrum"),
    ("mora_jax.hf",),
    ("mora_jax",),
    ("train.console.terminal",),
    ("train.console",),
    ("train.storage.buckets",),
    ("train.storage.files",),
    ("train.storage",),
    ("train.config.sections",),
    ("train.config.run",),
    ("train.config",),
    ("train.data.rows.layout", "train.data.rows.description"),
    ("train.data.text",),
    ("train.data.tokenizer",),
    ("train.data",),
    ("train.step.optim", "train.step.spikes"),
    ("train.step",),
    ("train.runtime",),
    ("train.run.manifest", "train.run.metrics"),
    ("train.run.checkpoint", "train.run.upload", "train.run.step_log"),
    ("train.run.folder",),
    ("train.run.meta",),
    ("train.run.state",),
    ("train.run",),
    ("train.jobs.evaluate", "train.jobs.plot"),
    ("train.jobs",),
    ("train.perf.hlo",),
    ("train.perf.plan",),
    ("train.perf.bench.cases", "train.perf.bench.hlo"),
    ("train.perf.bench.program", "train.perf.bench.options"),
    ("train.perf.bench",),
    ("train.perf",),
    ("train.cli.commands", "train.cli.describe", "train.cli.methods", "train.cli.demo"),
    ("train.cli",),
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = sorted(module_name(p) for top in ("mora_jax", "train") for p in (ROOT / top).rglob("*.py"))


def floor(module: str) -> int:
    """The floor of a module: that of its longest listed prefix."""
    listed = {name: i for i, names in enumerate(FLOORS) for name in names}
    exact = [
        name for name in listed if module == name or (name != "mora_jax" and module.startswith(f"{name}."))
    ]
    assert exact, f"{module} stands on no floor; add it to FLOORS"
    return listed[max(exact, key=len)]


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                full if (full := f"{node.module}.{alias.name}") in MODULES else node.module
                for alias in node.names
            }
    return found & set(MODULES)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "train"])
def test_a_module_imports_only_from_below(module: str):
    folder = ROOT / Path(*module.split("."))
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    for imported in imports(path):
        same_package = imported.rpartition(".")[0] in (module, module.rpartition(".")[0])
        allowed = floor(imported) < floor(module) or (floor(imported) == floor(module) and same_package)
        assert allowed or imported == "train", (
            f"{module} imports {imported}, which stands on its floor or above"
        )


def test_only_the_model_imports_linen():
    users = {
        module_name(p)
        for top in ("mora_jax", "train")
        for p in (ROOT / top).rglob("*.py")
        if "linen" in p.read_text()
    }
    assert users == {"mora_jax.models.llama"}
