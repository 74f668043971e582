"""Schedules against recorded numbers, optimizer groups, and what a reset clears."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from slow import slow

from mora_jax import DoRA, LoRA, assign
from mora_jax.errors import InputError
from train.config.run import RunConfig
from train.config.sections import GroupRule, Optimizer, Restart, Schedule
from train.step import optim
from train.step.optim import ArrayOptions
from train.step.spec import spec_of


def multipliers(config: RunConfig) -> np.ndarray:
    return np.asarray(
        jax.vmap(lambda s: optim.learning_rate(spec_of(config), s))(jnp.arange(config.steps + 1))
    )


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


def test_the_rate_climbs_again_in_every_cycle_of_growing_ones():
    """Between warm-ups it is the cosine's, and in one a straight line to it."""
    restart = Restart(10, 4, growth=1.5)
    rates = multipliers(config("jagged-cosine", 150, 6, restart))
    cosine = multipliers(config("cosine", 150, 6))
    starts = (10, 25, 48, 81, 132)
    expected = cosine.copy()
    for start in starts:
        expected[start : start + 4] = cosine[start + 4] * np.arange(4) / 4
    np.testing.assert_allclose(rates, expected, atol=1e-6)
    assert (rates[list(starts)] == 0).all()


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
OPTIONS = {
    "base/scale": ArrayOptions(adapter=False, lr_scale=1.0, weight_decay=0.0),
    "m": ArrayOptions(adapter=True, lr_scale=1.0, weight_decay=0.1),
    "b": ArrayOptions(adapter=True, lr_scale=16.0, weight_decay=0.2),
}
GRADIENTS = jax.tree.map(lambda p: 0.5 * p, PARAMS)
LABELS = optim.adapter_labels(OPTIONS)


def without_decay(options):
    return {path: dataclasses.replace(o, weight_decay=0.0) for path, o in options.items()}


def test_groups_are_adam_with_their_multiple_of_the_rate():
    tx = optim.optimizer(Optimizer(), without_decay(OPTIONS))
    updates, _ = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
    adam = optax.scale_by_adam(0.9, 0.999, 1e-8)
    expected, _ = adam.update(GRADIENTS, adam.init(PARAMS))
    np.testing.assert_allclose(updates["base"]["scale"], expected["base"]["scale"])
    np.testing.assert_allclose(updates["m"], expected["m"])
    np.testing.assert_allclose(updates["b"], 16 * expected["b"])


def test_each_array_has_its_own_decay():
    tx, plain = optim.optimizer(Optimizer(), OPTIONS), optim.optimizer(Optimizer(), without_decay(OPTIONS))
    with_decay, _ = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
    without, _ = plain.update(GRADIENTS, plain.init(PARAMS), PARAMS)
    np.testing.assert_allclose(with_decay["base"]["scale"], without["base"]["scale"])
    np.testing.assert_allclose(with_decay["m"] - without["m"], 0.1 * PARAMS["m"], rtol=1e-5)
    np.testing.assert_allclose(with_decay["b"] - without["b"], 16 * 0.2 * PARAMS["b"], rtol=1e-5)


MODEL = {
    "embed": {"embedding": jnp.ones((8, 4))},
    "up": {"kernel": jnp.ones((4, 8))},
    "down": {"kernel": jnp.ones((8, 4))},
    "norm": {"scale": jnp.ones(4)},
}
METHODS = assign([("up/kernel", LoRA(2, b_lr_scale=4.0)), ("down/kernel", DoRA(2)), (".*", "train")], MODEL)


def test_by_default_all_arrays_but_scales_and_magnitudes_decay():
    options = optim.array_options(Optimizer(weight_decay=0.1), METHODS)
    assert {path for path, o in options.items() if not o.weight_decay} == {
        "params/norm/scale",
        "adapters/down/kernel/magnitude_D",
    }
    assert {o.weight_decay for o in options.values()} == {0.0, 0.1}
    assert {path: o.lr_scale for path, o in options.items() if o.lr_scale != 1} == {
        "adapters/up/kernel/b_RD": 4.0
    }


def test_the_first_group_that_matches_sets_rate_and_decay():
    groups = (
        (".*/b_RD", GroupRule(lr_scale=0.5)),
        ("(up|down)/.*", GroupRule(lr_scale=2.0, weight_decay=0.3)),
        ("norm/scale", GroupRule(weight_decay=0.4)),
    )
    options = optim.array_options(Optimizer(weight_decay=0.1, groups=groups), METHODS)
    found = {path: (o.label, o.weight_decay) for path, o in options.items()}
    assert found == {
        "params/embed/embedding": ("base", 0.1),
        "params/norm/scale": ("base", 0.4),
        "adapters/up/kernel/a_KR": ("adapter*2.0", 0.3),
        "adapters/up/kernel/b_RD": ("adapter*2.0", 0.1),  # 0.5 of LoRA+'s 4
        "adapters/down/kernel/a_KR": ("adapter*2.0", 0.3),
        "adapters/down/kernel/b_RD": ("adapter*0.5", 0.1),
        "adapters/down/kernel/magnitude_D": ("adapter*2.0", 0.3),
    }


def test_a_group_that_decides_nothing_is_refused():
    groups = (("embed/embeding", GroupRule(lr_scale=2.0)),)
    with pytest.raises(InputError, match=r"optimizer\.groups: rule 'embed/embeding' matches no parameter"):
        optim.array_options(Optimizer(groups=groups), METHODS)


def test_embedding_and_head_have_their_multiple_of_the_rate():
    model = {
        "embed_tokens": {"embedding": jnp.ones((8, 4))},
        "layers": {"mlp": {"kernel": jnp.ones((4, 4))}},
        "lm_head": {"kernel": jnp.ones((4, 8))},
    }
    groups = (("lm_head/kernel", GroupRule(lr_scale=0.5)),)
    config = Optimizer(embedding_lr_scale=3.0, groups=groups)
    adapted = [("layers/mlp/kernel", LoRA(2))]
    options = optim.array_options(config, assign([*adapted, (".*", "train")], model))
    assert {path: o.lr_scale for path, o in options.items()} == {
        "params/embed_tokens/embedding": 3.0,
        "params/lm_head/kernel": 1.5,
        "adapters/layers/mlp/kernel/a_KR": 1.0,
        "adapters/layers/mlp/kernel/b_RD": 1.0,
    }
    with pytest.raises(InputError, match="neither the embedding nor the head is trained; leave it 1"):
        optim.array_options(Optimizer(embedding_lr_scale=2.0), assign([*adapted, (".*", "frozen")], model))


def test_a_reset_clears_moments_and_count_of_adapters_alone():
    tx = optim.optimizer(Optimizer(), OPTIONS)
    _, state = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
    fresh, cleared = optim.clear_adapters(state, Restart(), jax.random.key(0), LABELS)
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


def test_the_mean_of_second_moments_keeps_the_size_of_the_next_update():
    params = {"m": jax.random.normal(jax.random.key(0), (3, 20, 20)).at[:, 15:].set(0)}  # padded, in a stack
    options = {"m": ArrayOptions(adapter=True, lr_scale=1.0, weight_decay=0.0)}
    tx = optim.optimizer(Optimizer(), options)
    _, state = tx.update(params, tx.init(params), params)
    how = Restart(optimizer="mean")
    after, cleared = optim.clear_adapters(state, how, jax.random.key(1), optim.adapter_labels(options))
    old, new = (s.inner_states["adapter"] for s in (state, after))
    assert not np.asarray(optax.tree.get(new, "mu")["m"]).any()
    old_nu, nu = (np.asarray(optax.tree.get(s, "nu")["m"]) for s in (old, new))
    for old_layer, layer in zip(old_nu, nu, strict=True):  # each kernel has a mean of its own
        np.testing.assert_allclose(layer[:15], np.full((15, 20), old_layer[:15].mean()), rtol=1e-5)
        assert not layer[15:].any()
    assert int(optax.tree.get(new, "count")) == 1
    np.testing.assert_allclose(cleared, 0.5)


@pytest.mark.parametrize("how", ["magnitude", "random"])
def test_pruning_clears_its_share_of_each_moment_and_keeps_the_count(how):
    params = {"m": jax.random.normal(jax.random.key(0), (3, 20, 20)).at[:, 15:].set(0)}  # padded, in a stack
    options = {"m": ArrayOptions(adapter=True, lr_scale=1.0, weight_decay=0.0)}
    tx = optim.optimizer(Optimizer(), options)
    _, state = tx.update(params, tx.init(params), params)
    how_much = Restart(optimizer=how, prune=0.8)
    fresh, cleared = optim.clear_adapters(state, how_much, jax.random.key(1), optim.adapter_labels(options))
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


MATRICES = {
    "self_attn": {"kernel": jnp.ones((3, 8, 12)), "bias": jnp.ones((3, 12))},
    "norm": {"scale": jnp.ones((3, 8))},
    "embed_tokens": {"embedding": jnp.ones((16, 8))},
    "lm_head": {"kernel": jnp.ones((8, 16))},
}


def test_muon_updates_kernels_and_matrices_of_adapters_alone():
    full = assign([(".*", "train")], MATRICES)
    adapted = assign([("self_attn/kernel", DoRA(2)), (".*", "train")], MATRICES, stacked="self_attn/kernel")
    for methods, expected in (
        (full, {"params/self_attn/kernel"}),
        (adapted, {f"adapters/self_attn/kernel/{name}" for name in ("a_KR", "b_RD")}),
    ):
        options = optim.array_options(Optimizer(matrices="muon"), methods)
        assert {path for path, o in options.items() if o.muon} == expected
        assert not any(o.muon for o in optim.array_options(Optimizer(), methods).values())


@pytest.mark.parametrize("shape", [slow((3, 16, 40)), (3, 40, 16), slow((24, 24))])
@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_updates_of_muon_are_orthogonal_and_as_large_as_those_of_adam(shape, products):
    u, s, vt = np.linalg.svd(np.random.default_rng(0).normal(size=shape), full_matrices=False)
    gradient = (u * np.geomspace(1, 0.1, s.shape[-1])) @ vt
    exact, tx = optim.muon(0.95), optim.muon(0.95, products=products)
    grads = {"w": jnp.asarray(gradient)}
    updates, _ = tx.update(grads, tx.init(grads))
    rounding = jnp.linalg.norm(updates["w"] - exact.update(grads, tx.init(grads))[0]["w"])
    rounding /= jnp.linalg.norm(updates["w"])
    assert (rounding == 0) if products == "float32" else (0 < rounding < 0.03)
    sizes = np.linalg.svd(np.asarray(updates["w"]), compute_uv=False) / (0.2 * np.sqrt(max(shape[-2:])))
    assert sizes.min() > 0.6
    assert sizes.max() < 1.3
    nearest = u @ vt
    overlap = (nearest * updates["w"]).sum() / np.linalg.norm(nearest) / np.linalg.norm(updates["w"])
    assert overlap > 0.97


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e-22, 1e-18, 1e18])
def test_muon_keeps_its_size_and_is_finite_for_gradients_of_any_size(size):
    gradient = size * jax.random.normal(jax.random.key(0), (2, 16, 40)).at[:, 12:].set(0).at[:, :, 30:].set(0)
    updates, _ = optim.muon(0.0).update(gradient, optim.muon(0.0).init(gradient))
    assert not updates[:, 12:].any()
    assert not updates[:, :, 30:].any()
    alone, _ = optim.muon(0.0).update(gradient[:, :12, :30], optim.muon(0.0).init(gradient[:, :12, :30]))
    np.testing.assert_allclose(updates[:, :12, :30], alone, atol=1e-5)
    rms = float(jnp.sqrt(jnp.mean(alone**2)))
    # XLA may flush numbers below float32's normal ones to zero, which moves nothing.
    assert rms == pytest.approx(0.2 if size > 1e-37 else rms and 0.2, rel=0.2)


def test_momentum_of_muon_is_nesterovs_and_a_restart_clears_it():
    options = {"m": ArrayOptions(adapter=True, lr_scale=1.0, weight_decay=0.0, muon=True)}
    tx = optim.optimizer(Optimizer(momentum=0.5), options)
    first, second = (jax.random.normal(jax.random.key(i), (8, 8)) for i in range(2))
    _, state = tx.update({"m": first}, tx.init({"m": first}), {"m": first})
    updates, state = tx.update({"m": second}, state, {"m": first})
    alone = optim.muon(0.0)
    expected, _ = alone.update(1.5 * second + 0.25 * first, alone.init(first))
    np.testing.assert_allclose(updates["m"], expected, atol=1e-5)
    after, cleared = optim.clear_adapters(state, Restart(), jax.random.key(0), optim.adapter_labels(options))
    assert float(cleared) == 1.0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(after))
    updates, _ = tx.update({"m": second}, after, {"m": first})
    expected, _ = alone.update(second, alone.init(first))
    np.testing.assert_allclose(updates["m"], expected, atol=1e-5)
