"""Data parallelism: the same numbers on four devices as on one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax import sharding, trees
from mora_jax.errors import InputError
from mora_jax.llama import Llama
from mora_jax.transform import Methods
from train import loop, runs
from train.metrics import read_metrics
from train.step import eval_step


@pytest.fixture(scope="module")
def four(tiny_run, tmp_path_factory):
    """The tiny run on four devices."""
    config = dataclasses.replace(
        tiny_run.config,
        run_dir=str(tmp_path_factory.mktemp("four") / "run"),
        mesh=dataclasses.replace(tiny_run.config.mesh, data=4),
    )
    loop.pretrain(config)
    return config


def numbers(folder: str, name: str) -> list[float]:
    return [line[name] for line in read_metrics(f"{folder}/metrics.jsonl") if name in line]


@pytest.mark.parametrize("name", ["loss", "validation_loss"])
def test_four_devices_equal_one(tiny_run, four, name):
    ours, theirs = numbers(four.run_dir, name), numbers(str(tiny_run.folder), name)
    assert len(ours) == len(theirs) > 1
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_four_devices_train_the_same_weights(tiny_run, four):
    ours, theirs = (trees.flatten(runs.load_model(str(f))[0]) for f in (four.run_dir, tiny_run.folder))
    for path, leaf in ours.items():
        np.testing.assert_allclose(leaf, theirs[path], atol=1e-5, err_msg=path)


def test_a_batch_is_divided_and_the_state_is_whole_on_each():
    mesh = sharding.make_mesh(4)
    x_BT = jnp.arange(32.0).reshape(8, 4)
    parts = jax.device_put(x_BT, sharding.batch(mesh)).addressable_shards
    assert [part.data.shape for part in parts] == [(2, 4)] * 4
    np.testing.assert_array_equal(np.concatenate([part.data for part in parts]), x_BT)
    copies = jax.device_put(x_BT, sharding.replicated(mesh)).addressable_shards
    assert [copy.data.shape for copy in copies] == [(8, 4)] * 4


def test_each_device_computes_its_own_part(tiny_run):
    """What is compiled for each of four devices holds the products of a quarter of the batch."""
    config = tiny_run.config
    model = Llama(config.model, config.compute)
    flops = {}
    for devices in (1, 4):
        mesh = sharding.make_mesh(devices)
        state = runs.abstract_state(config, runs.assign_methods(config), mesh)
        tokens = jax.ShapeDtypeStruct((64, 32), jnp.int32, sharding=sharding.batch(mesh))
        weights = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=sharding.batch(mesh))
        compiled = eval_step.lower(model, Methods(()), state.params, {}, tokens, weights).compile()
        flops[devices] = compiled.cost_analysis()["flops"]
    assert 0.2 * flops[1] < flops[4] < 0.4 * flops[1]


def test_more_devices_than_there_are():
    with pytest.raises(InputError, match=r"mesh\.data asks for 64 devices; 4 \(cpu\) are here"):
        sharding.make_mesh(64)
    assert sharding.make_mesh(2).devices.size == 2
    assert sharding.make_mesh(-1).devices.size == 4
