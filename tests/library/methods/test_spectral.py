"""Bases from gradients, and the sizes of updates."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from slow import slow

from mora_jax import InputError, On, Spectral, State, assign, attach, orient

KEY = jax.random.key(6)  # of what is drawn, if something is
each_bases = pytest.mark.parametrize("bases", ["leading", "sampled"])
one_of_bases = pytest.mark.parametrize("bases", ["leading", slow("sampled")])


@pytest.mark.parametrize(("k", "d"), [(24, 40), slow(40, 24), slow(24, 24)])
def test_bases_are_the_leading_singular_vectors(k, d):
    method = Spectral(rank=3)
    gradient = np.random.default_rng(0).normal(size=(k, d)) * np.geomspace(1, 1e-3, d)
    arrays = method.oriented(method.init(jax.random.key(0), jnp.zeros((k, d))), jnp.asarray(gradient))
    side = method.r_hat(k, d)
    u, s, vt = np.linalg.svd(gradient)
    kept = np.asarray(arrays["u_KR"] @ (arrays["u_KR"].T @ gradient @ arrays["v_RD"].T) @ arrays["v_RD"])
    best = (u[:, :side] * s[:side]) @ vt[:side]
    np.testing.assert_allclose(kept, best, atol=2e-3 * s[0])
    for basis in (arrays["u_KR"], arrays["v_RD"].T):
        np.testing.assert_allclose(basis.T @ basis, np.eye(side), atol=1e-5)


def chosen_vectors(arrays, gradient) -> np.ndarray:
    """Which singular vectors the bases are: those of each side, each once, leading ones first."""
    u, _, vt = np.linalg.svd(gradient, full_matrices=False)
    left, right = np.abs(u.T @ arrays["u_KR"]), np.abs(vt @ arrays["v_RD"].T)
    chosen = left.argmax(0)
    assert (np.diff(chosen) > 0).all()
    for places in (left, right):
        np.testing.assert_allclose(places, np.eye(len(left))[:, chosen], atol=1e-3)
    return chosen


@pytest.mark.parametrize(("k", "d"), [(24, 40), (40, 24)])
def test_sampled_bases_are_different_singular_vectors(k, d):
    method = Spectral(rank=3, bases="sampled")
    gradient = np.random.default_rng(0).normal(size=(k, d)).astype(np.float32)
    arrays = method.init(jax.random.key(0), jnp.zeros((k, d)))
    found = [method.oriented(arrays, jnp.asarray(gradient), jax.random.key(i)) for i in range(3)]
    assert len({tuple(chosen_vectors(bases, gradient)) for bases in found}) == 3


@pytest.mark.slow
def test_singular_vectors_are_drawn_in_proportion_to_their_values():
    sizes = np.array([8.0, 4.0, 2.0, 1.0, 1.0], np.float32)
    method = Spectral(rank=1, multiple=3, bases="sampled")  # r_hat 3
    arrays = method.init(jax.random.key(0), jnp.zeros((5, 5)))
    keys = jax.random.split(jax.random.key(1), 4000)
    u_NKR = jax.vmap(lambda key: method.oriented(arrays, jnp.diag(sizes), key)["u_KR"])(keys)
    got = (np.abs(u_NKR) > 0.5).any(2).mean(0)
    shares = np.zeros(5)  # by hand: three draws without replacement
    for order in itertools.permutations(range(5), 3):
        left, chance = sizes.sum(), 1.0
        for i in order:
            chance, left = chance * sizes[i] / left, left - sizes[i]
        shares[list(order)] += chance
    np.testing.assert_allclose(got, shares, atol=0.03)


@pytest.mark.slow
def test_kernels_draw_apart_and_the_same_for_a_key():
    """Kernels of one shape, layers of a stack, kernels of another shape, and one kernel at each key."""
    params = {"kernel": jnp.zeros((3, 24, 40)), "other": jnp.zeros((24, 40)), "turned": jnp.zeros((40, 24))}
    methods = assign([(".*", Spectral(1, bases="sampled"))], params, stacked="kernel")  # 8 of 24 vectors
    adapters = attach(jax.random.key(0), params, methods)
    one = jax.random.normal(jax.random.key(1), (24, 40))  # of all, so that only keys tell them apart
    gradients = {"kernel": jnp.stack([one] * 3), "other": one, "turned": one.T}
    found, again, others = (orient(adapters, methods, gradients, jax.random.key(i)) for i in (2, 2, 3))
    jax.tree.map(np.testing.assert_array_equal, found, again)
    u = np.linalg.svd(one)[0]
    draws = {
        tuple(np.abs(u.T @ basis).argmax(0))
        for drawn in (found, others)
        for basis in (*drawn["kernel"]["u_KR"], drawn["other"]["u_KR"], drawn["turned"]["v_RD"].T)
    }
    assert len(draws) == 2 * 5


def test_sampled_bases_without_a_key_and_other_bases_are_refused():
    state = State.init(jax.random.key(0), {"w": jnp.zeros((8, 12))}, [("w", Spectral(2, bases="sampled"))])
    with pytest.raises(InputError, match="sampled need a random key"):
        state.oriented({"w": jnp.ones((8, 12))})
    with pytest.raises(InputError, match="bases are leading or sampled, not 'random'"):
        Spectral(bases="random")  # pyright: ignore[reportArgumentType]


@each_bases
def test_a_gradient_of_zeros_leaves_finite_orthonormal_bases(bases):
    method = Spectral(rank=3, bases=bases)
    arrays = method.init(jax.random.key(0), jnp.zeros((24, 40)))
    arrays = method.oriented(arrays, jnp.zeros((24, 40)), KEY)
    for basis in (arrays["u_KR"], arrays["v_RD"].T):
        np.testing.assert_allclose(basis.T @ basis, np.eye(method.r_hat(24, 40)), atol=1e-5)


@each_bases
def test_bases_hold_all_of_a_gradient_of_low_rank(bases):
    method, rng = Spectral(rank=1, bases=bases), np.random.default_rng(0)  # r_hat 8
    gradient = (rng.normal(size=(24, 3)) @ rng.normal(size=(3, 40))).astype(np.float32)
    arrays = method.oriented(method.init(jax.random.key(0), jnp.zeros((24, 40))), jnp.asarray(gradient), KEY)
    u_KR, v_RD = np.asarray(arrays["u_KR"]), np.asarray(arrays["v_RD"])
    kept = u_KR @ (u_KR.T @ gradient @ v_RD.T) @ v_RD
    np.testing.assert_allclose(kept, gradient, atol=1e-4 * np.linalg.norm(gradient, 2))
    for basis in (u_KR, v_RD.T):
        np.testing.assert_allclose(basis.T @ basis, np.eye(method.r_hat(24, 40)), atol=1e-5)


@pytest.mark.slow
@each_bases
def test_entries_of_the_update_are_as_large_as_those_of_m(bases):
    method, w = Spectral(rank=8, bases=bases), jnp.zeros((96, 160))
    gradient = jax.random.normal(jax.random.key(1), w.shape)
    arrays = method.oriented(method.init(jax.random.key(0), w), gradient, KEY)
    m_RR = jax.random.normal(jax.random.key(2), arrays["m_RR"].shape)
    update = method.weight(arrays | {"m_RR": m_RR}, w)
    assert float(jnp.std(update)) == pytest.approx(float(jnp.std(m_RR)), rel=0.02)


@pytest.mark.slow  # a later test has stacks, too
def test_stacks_are_fitted_layer_by_layer():
    params = {"kernel": jnp.zeros((3, 8, 12)), "other": jnp.zeros((8, 8))}
    methods = assign([("kernel", Spectral(2)), ("other", "train")], params, stacked="kernel")
    adapters = attach(jax.random.key(0), params, methods)
    gradient = jax.random.normal(jax.random.key(1), (3, 8, 12))
    found = orient(adapters, methods, {"kernel": gradient, "other": jnp.zeros((8, 8))})["kernel"]
    for layer in range(3):
        alone = Spectral(2).oriented({n: a[layer] for n, a in adapters["kernel"].items()}, gradient[layer])
        for name, array in alone.items():
            np.testing.assert_allclose(found[name][layer], array, atol=1e-5)


@one_of_bases
def test_one_fitted_step_takes_more_of_the_loss_than_a_random_one(bases):
    target = jax.random.normal(jax.random.key(3), (32, 3)) @ jax.random.normal(jax.random.key(4), (3, 32))
    state = State.init(jax.random.key(0), {"w": jnp.zeros((32, 32))}, [("w", Spectral(2, bases=bases))])

    def loss(params):
        return jnp.sum((params["w"] - target) ** 2)

    @jax.jit
    def after_a_step(state):
        def of_m(trainable):
            return loss(state.with_trainable(trainable).merged())

        tx = optax.sgd(1e-3)
        updates, _ = tx.update(jax.grad(of_m)(state.trainable), tx.init(state.trainable))
        return loss(state.updated(updates).merged())

    fitted = state.oriented(jax.grad(loss)(state.merged()), KEY)
    np.testing.assert_array_equal(fitted.merged()["w"], state.merged()["w"])
    assert after_a_step(fitted) < after_a_step(state) < float(loss(state.merged()))


@one_of_bases
def test_a_gradient_that_is_not_finite_changes_nothing_of_its_kernel(bases):
    params = {"kernel": jnp.zeros((3, 8, 12))}
    methods = assign([("kernel", Spectral(2, bases=bases))], params, stacked="kernel")
    adapters = attach(jax.random.key(0), params, methods)
    bad = jax.random.normal(jax.random.key(1), (3, 8, 12)).at[1, 2, 3].set(jnp.nan)
    found = orient(adapters, methods, {"kernel": bad}, KEY)["kernel"]
    for name, array in adapters["kernel"].items():
        np.testing.assert_array_equal(found[name][1], array[1])
        assert np.isfinite(found[name]).all()
    assert np.abs(found["u_KR"][0] - adapters["kernel"]["u_KR"][0]).max() > 1e-2


def side_by_side(method, key=None):
    """Kernels that are fitted at once: the arrays of each before and after, and its gradient.

    Stacks and single kernels of one shape, some on other axes, and one of another.
    """
    shapes = {"a": (3, 8, 12), "b": (8, 12), "c": (2, 2, 8, 12), "d": (2, 4, 12), "e": (12, 8)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    rules = [
        ("a", On(method, stack=(0,))),
        ("c", On(method, stack=(0, 1))),
        ("d", On(method, inputs=(0, 1))),
        (".*", method),
    ]
    methods = assign(rules, params)
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda a: a + rng.normal(size=a.shape).astype(np.float32), attach(jax.random.key(0), params, methods)
    )
    gradients = {name: jnp.asarray(rng.normal(size=s).astype(np.float32)) for name, s in shapes.items()}
    found = orient(adapters, methods, gradients, key)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, adapters)
    for name, gradient in gradients.items():
        matrices = gradient.reshape(-1, *((12, 8) if name == "e" else (8, 12)))
        for i, matrix in enumerate(matrices):
            before, after = (
                {n: a.reshape(len(matrices), *a.shape[-2:])[i] for n, a in tree[name].items()}
                for tree in (adapters, found)
            )
            yield before, after, matrix


def test_kernels_side_by_side_are_fitted_as_each_is_alone():
    for before, after, gradient in side_by_side(Spectral(2)):
        for name, array in Spectral(2).oriented(before, gradient).items():
            np.testing.assert_allclose(after[name], array, atol=1e-5)


@pytest.mark.slow
def test_kernels_side_by_side_have_sampled_singular_vectors_of_their_own():
    for before, after, gradient in side_by_side(Spectral(2, bases="sampled"), KEY):
        assert len(chosen_vectors(after, gradient)) == 6
        np.testing.assert_array_equal(after["m_RR"], before["m_RR"])


@each_bases
def test_kernels_of_one_shape_are_decomposed_by_one_program(monkeypatch, bases):
    params = {"a": jnp.zeros((3, 8, 12)), "b": jnp.zeros((8, 12)), "c": jnp.zeros((12, 8))}
    methods = assign([(".*", Spectral(2, bases=bases))], params, stacked="a")
    traced, oriented = [], Spectral.oriented

    def seen(self, arrays, gradient, key):
        traced.append(gradient.shape)
        return oriented(self, arrays, gradient, key)

    monkeypatch.setattr(Spectral, "oriented", seen)
    jax.eval_shape(lambda g: orient(attach(jax.random.key(0), params, methods), methods, g, KEY), params)
    assert traced == [(8, 12), (12, 8)]


def test_a_gradient_that_is_missing_or_of_another_shape_is_refused():
    params = {"kernel": jnp.zeros((3, 8, 12))}
    state = State.init(jax.random.key(0), params, [("kernel", On(Spectral(2), stack=(0,)))])
    with pytest.raises(InputError, match="there is no gradient of kernel"):
        state.oriented({"other": params["kernel"]})
    with pytest.raises(InputError, match=r"kernel: a gradient of \(3, 12, 8\) is not of the kernel"):
        state.oriented({"kernel": jnp.zeros((3, 12, 8))})


@each_bases
def test_an_update_is_not_lost(bases):
    params = {"kernel": jax.random.normal(jax.random.key(1), (8, 12))}
    state = State.init(jax.random.key(0), params, [("kernel", Spectral(2, bases=bases))])
    noise = 0.1 * jax.random.normal(jax.random.key(3), state.adapters["kernel"]["m_RR"].shape)
    trained = state.with_trainable(jax.tree.map(lambda m: m + noise, state.trainable))
    with pytest.raises(InputError, match="kernel has an update, which would be lost; restart first"):
        trained.oriented(params, KEY)
    tx = trained.optimizer(optax.adam(1e-3))
    restarted, _ = trained.restart(jax.random.key(2), tx.init(trained.trainable), tx)
    random, restarted = restarted, restarted.oriented(params, KEY)
    assert np.abs(restarted.adapters["kernel"]["u_KR"] - random.adapters["kernel"]["u_KR"]).max() > 0.1
    np.testing.assert_allclose(restarted.merged()["kernel"], trained.merged()["kernel"], atol=1e-6)


def test_other_methods_are_left_alone():
    params = {"kernel": jnp.zeros((8, 8))}
    methods = assign([("kernel", "train")], params)
    assert not list(methods.orientable())
    assert orient({}, methods, {}) == {}


@pytest.mark.slow
def test_stacks_of_decompositions_end_on_two_cores():
    """XLA's CPU client hangs there if several batches of them run side by side."""
    code = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, jax.numpy as jnp
from mora_jax import LoRA, assign, attach
params = {f"w{i}": jax.ShapeDtypeStruct((4, 64, 64), jnp.float32) for i in range(7)}
methods = assign([(".*", LoRA(32, a_init="orthogonal"))], params, stacked=".*")
zeros = jax.tree.map(lambda w: jnp.zeros(w.shape), params)
for seed in range(10):
    jax.block_until_ready(jax.jit(attach, static_argnums=2)(jax.random.key(seed), zeros, methods))
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=90, env=env)
