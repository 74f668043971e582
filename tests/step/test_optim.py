"""Schedules against recorded numbers, optimizer groups, and what a reset clears."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.config.run import RunConfig
from train.config.sections import Optimizer, Restart, Schedule
from train.step import optim


def multipliers(config: RunConfig) -> np.ndarray:
    return np.asarray(jax.vmap(lambda s: optim.learning_rate(config, s))(jnp.arange(config.steps + 1)))


def config(
    kind: str, total: int, warmup: int, restart: Restart | None = None, min_ratio: float = 0.1
) -> RunConfig:
    return RunConfig(
        steps=total,
        schedule=Schedule(kind, warmup, min_ratio),
        restart=restart or Restart(),
        optimizer=Optimizer(learning_rate=1.0),
    )


@pytest.mark.parametrize(("total", "warmup", "again", "every"), [(10_000, 1000, 50, 2000), (200, 20, 5, 50)])
def test_the_jagged_cosine_is_the_recorded_one(total, warmup, again, every, golden):
    name = f"relora_cosine_restarts_T{total}_w{warmup}_rw{again}_every{every}_min0p1"
    expected = np.load(golden / "schedules.npz")[name]
    got = multipliers(config("jagged-cosine", total, warmup, Restart(every, again)))
    np.testing.assert_allclose(got, expected, atol=5e-7)


def test_cosine_and_linear_by_hand():
    for kind, middle in (
        ("cosine", 0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * 0.25))),
        ("linear", 0.2 + 0.8 * 0.75),
    ):
        rates = multipliers(config(kind, 50, 10, min_ratio=0.2))
        np.testing.assert_allclose(rates[[0, 5, 10, 20, 50]], [0, 0.5, 1, middle, 0.2], atol=1e-6)


def test_without_warmup_the_first_step_has_the_peak_rate():
    assert multipliers(config("cosine", 50, 0))[0] == 1.0


PARAMS = {"base": {"scale": jnp.array([1.0, 2.0])}, "m": jnp.array([3.0]), "b": jnp.array([4.0])}
LABELS = {"base": {"scale": "base"}, "m": "adapter", "b": "adapter*16.0"}
GRADIENTS = jax.tree.map(lambda p: 0.5 * p, PARAMS)


def test_groups_are_adam_with_their_multiple_of_the_rate():
    tx = optim.adamw(Optimizer(), LABELS)
    updates, _ = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
    adam = optax.scale_by_adam(0.9, 0.999, 1e-8)
    expected, _ = adam.update(GRADIENTS, adam.init(PARAMS))
    np.testing.assert_allclose(updates["base"]["scale"], expected["base"]["scale"])
    np.testing.assert_allclose(updates["m"], expected["m"])
    np.testing.assert_allclose(updates["b"], 16 * expected["b"])


def test_decay_spares_the_scales_of_norms():
    tx = optim.adamw(Optimizer(weight_decay=0.1), LABELS)
    plain = optim.adamw(Optimizer(), LABELS)
    with_decay, _ = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
    without, _ = plain.update(GRADIENTS, plain.init(PARAMS), PARAMS)
    np.testing.assert_allclose(with_decay["base"]["scale"], without["base"]["scale"])
    np.testing.assert_allclose(with_decay["m"] - without["m"], 0.1 * PARAMS["m"], rtol=1e-5)


def test_a_reset_clears_moments_and_count_of_adapters_alone():
    tx = optim.adamw(Optimizer(), LABELS)
    _, state = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
    fresh, cleared = optim.clear_adapters(state, Restart(), jax.random.key(0))
    assert float(cleared) == 1.0
    initial = tx.init(PARAMS).inner_states
    for group in ("adapter", "adapter*16.0"):
        for got, expected in zip(
            jax.tree.leaves(fresh.inner_states[group]), jax.tree.leaves(initial[group]), strict=True
        ):
            np.testing.assert_array_equal(got, expected)
    kept = zip(
        jax.tree.leaves(fresh.inner_states["base"]), jax.tree.leaves(state.inner_states["base"]), strict=True
    )
    assert all(np.array_equal(a, b) for a, b in kept)
    assert int(optax.tree.get(fresh.inner_states["base"], "count")) == 1


@pytest.mark.parametrize("how", ["magnitude", "random"])
def test_pruning_clears_its_share_of_each_moment_and_keeps_the_count(how):
    params = {"m": jax.random.normal(jax.random.key(0), (3, 20, 20)).at[:, 15:].set(0)}  # padded, in a stack
    tx = optim.adamw(Optimizer(), {"m": "adapter"})
    _, state = tx.update(params, tx.init(params), params)
    fresh, cleared = optim.clear_adapters(state, Restart(optimizer=how, prune=0.8), jax.random.key(1))
    old, new = (optax.tree.get(s.inner_states["adapter"], "mu")["m"] for s in (state, fresh))
    kept = np.asarray(new) != 0
    np.testing.assert_array_equal(np.asarray(new)[kept], np.asarray(old)[kept])
    np.testing.assert_allclose(cleared, 0.8, atol=0.05)
    np.testing.assert_allclose(kept.sum() / (3 * 15 * 20), 0.2, atol=0.05)
    assert int(optax.tree.get(fresh.inner_states["adapter"], "count")) == 1
    for old_layer, new_layer in zip(np.abs(old), np.abs(new), strict=True):
        dropped = old_layer[(new_layer == 0) & (old_layer > 0)]
        smallest_go = dropped.max() <= new_layer[new_layer > 0].min()
        assert smallest_go == (how == "magnitude")
