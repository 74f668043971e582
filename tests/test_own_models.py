"""The code of docs/own_models.md and of the README, run as it stands there."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    """Returns the Python code of a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):  # the model on the page is any user's
        yield tmp_path


@pytest.mark.slow
def test_own_models(folder, capsys):
    names: dict = {}
    linen, nnx = blocks("docs/own_models.md")
    exec(linen, names)
    state = names["state"]
    assert float(names["value"]) < 1.0 < float(names["loss"](names["params"], names["tokens"]))
    assert state.methods["up_0/kernel"].pattern == "1"
    got = names["loss"](names["merged"], names["tokens"])
    assert jnp.allclose(got, names["loss"](state.merged(), names["tokens"]), atol=1e-5)
    assert "attention_0/out/kernel    (4, 8, 32)" in capsys.readouterr().out
    exec(nnx, names)
    start = jnp.mean((names["plain"](names["x"]) - names["x"]) ** 2)
    assert float(names["value"]) < 0.8 * float(start)
    assert jnp.allclose(names["merged_model"](names["x"]), names["model"](names["x"]), atol=1e-5)


def test_readme(folder):
    model, batch = nn.Dense(8), jax.random.normal(jax.random.key(0), (16, 8))
    params = model.init(jax.random.key(1), batch)["params"]
    names = {
        "params": params,
        "batch": batch,
        "loss": lambda params, x: jnp.mean((model.apply({"params": params}, x) - x) ** 2),
    }
    (code,) = blocks("README.md")
    exec(code, names)
    assert names["loss"](names["merged"], batch) < names["value"]
