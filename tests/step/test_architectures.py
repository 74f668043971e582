"""Every architecture trains, on meshes as on one device: biases, norms of q and k, windows, wide heads."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import CONFIGS, LENGTH, random_params, tokens_BT
from jax.sharding import PartitionSpec as P

from mora_jax import sharding, transform, trees
from mora_jax.methods import LoRA, Method, MoRA
from mora_jax.models.batch import Batch
from mora_jax.models.llama import Compute, Llama
from mora_jax.sharding.rules import names
from train.config.run import RunConfig
from train.config.sections import REST, Data, Params, Schedule
from train.run.state import abstract_state, assign_methods, fresh_state
from train.step.spec import spec_of
from train.step.step import train_step

METHODS = {"mora": MoRA(4, align=8), "lora": LoRA(4)}
WITH_BIASES = Params(train=f"{REST}|.*/bias")
# Each with one method, and meshes that divide heads, widths and vectors in both ways.
CASES = [
    ("llama, biases", "mora", (2, 2, 2)),
    ("qwen3, biases, window", "mora", (2, 2, 2)),
    ("olmo2, biases", "lora", (2, 2, 2)),
    ("mistral, window", "lora", (1, 4, 2)),
    ("qwen2", "lora", (1, 4, 2)),
    ("llama, yarn", "mora", (8, 1, 1)),
]


def configured(name: str, method: Method) -> RunConfig:
    # Heads, widths and the vocabulary divide among all devices of the meshes.
    model = dataclasses.replace(CONFIGS[name], vocab_size=96)
    return RunConfig(
        steps=4,
        batch_size=8,
        model=model,
        compute=Compute(dtype="float32", layers="scan", remat="dots", loss_chunk=64),
        data=Data("nowhere", LENGTH),
        method=method,
        params=WITH_BIASES,
        schedule=Schedule(warmup=0),
    )


def drawn(config: RunConfig, methods: Any, state: Any) -> Any:
    """A copy of the state with adapters that are not zero."""
    kernels = trees.flatten(state.params)
    arrays = {
        f"{path}/{name}": array
        for i, (path, on) in enumerate(methods.kernels())
        for name, array in jax.vmap(lambda w, m=on.method, i=i: m.example(jax.random.key(i), w, 0.02))(
            jnp.asarray(kernels[path])
        ).items()
    }
    old = trees.flatten(state.adapters)
    assert arrays.keys() == old.keys()
    placed = {path: jax.device_put(np.array(arrays[path]), old[path].sharding) for path in arrays}
    return dataclasses.replace(state, adapters=trees.unflatten(placed))


def updated(config: RunConfig, shape: tuple[int, int, int]) -> tuple[float, dict[str, np.ndarray], Any]:
    """Loss and gradients of one update on a mesh, and the state after it."""
    mesh, methods = sharding.make_mesh(*shape), assign_methods(config)
    with jax.set_mesh(mesh):
        state = drawn(config, methods, fresh_state(config, methods, mesh, random_params(config.model)))
        tokens = np.tile(tokens_BT() % 96, (4, 1)).astype(np.int32)
        tokens += np.arange(8)[:, None] * 5
        on_mesh = Batch(jax.device_put(tokens % 96, sharding.batch(mesh)))
        after, scalars = train_step(spec_of(config), methods, state, on_mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, methods, mesh))
    assert jax.tree.map(lambda leaf: leaf.sharding, after) == places
    moments = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(after.opt_state)
    }
    gradients = {path: leaf for path, leaf in moments.items() if "mu/" in path}
    return float(scalars["loss"]), gradients, after


_ON_ONE: dict = {}


def on_one(config: RunConfig):
    if config not in _ON_ONE:
        _ON_ONE[config] = updated(config, (1, 1, 1))
    return _ON_ONE[config]


@pytest.mark.parametrize("name", ["llama, biases", "qwen3, biases, window", "olmo2"])
def test_every_array_has_its_place_on_a_mesh(name):
    """Biases of divided outputs are divided over `tensor`; other vectors are replicated."""
    config = configured(name, METHODS["mora"])
    state = abstract_state(config, assign_methods(config), sharding.make_mesh(2, 2, 2))
    for path, leaf in trees.flatten(state.params).items():
        spec = leaf.sharding.spec
        if path.endswith("bias"):
            assert spec == (P() if path.endswith(("o_proj/bias", "down_proj/bias")) else P(None, "tensor"))
        elif path.endswith("scale"):
            assert spec == P()
        else:
            assert any("tensor" in names(axis) for axis in spec)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method", "shape"), CASES, ids=str)
def test_every_mesh_computes_what_one_device_computes(name, method, shape):
    config = configured(name, METHODS[method])
    loss, gradients, _ = on_one(config)
    their_loss, theirs, _ = updated(config, shape)
    np.testing.assert_allclose(their_loss, loss, rtol=1e-5)
    trained = assign_methods(config).trainable()
    assert len(gradients) == len(trained) == len(theirs)
    assert any("bias" in path for path in gradients) == ("biases" in name or name == "qwen2")
    assert any("q_norm" in path for path in gradients) == name.startswith(("qwen3", "olmo2"))
    for path, expected in gradients.items():
        largest = np.abs(expected).max()
        assert largest > 0, path
        np.testing.assert_allclose(theirs[path], expected, rtol=0, atol=1e-5 * largest, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [case[:2] for case in CASES])
def test_adapted_is_merged(name, method):
    """Over heads that are wider than the residual stream, and beside biases."""
    config = configured(name, METHODS[method])
    methods = assign_methods(config)
    _, _, state = on_one(config)
    model, tokens = Llama(config.model, config.compute), jnp.array(tokens_BT() % 96)
    bound = transform.bind(state.params, state.adapters, methods)
    merged = transform.merge(state.params, state.adapters, methods)
    adapted = model.apply({"params": bound}, tokens)
    np.testing.assert_allclose(adapted, model.apply({"params": merged}, tokens), atol=2e-4)
    assert np.abs(adapted - model.apply({"params": state.params}, tokens)).max() > 1e-2


def test_biases_are_frozen_unless_named():
    config = configured("qwen3, biases, window", MoRA(4))
    named, default = (
        assign_methods(dataclasses.replace(config, params=params)) for params in (WITH_BIASES, Params())
    )
    biases = {f"layers/self_attn/{name}_proj/bias" for name in "qkvo"}
    assert named.trained() - default.trained() == biases
    assert {"layers/self_attn/q_norm/scale", "layers/self_attn/k_norm/scale"} < default.trained()
