"""One update, one restart: what moves, what does not, and what is held."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from slow import quick

from mora_jax import transform, trees
from mora_jax.methods import DoRA, LoRA, MoRA, Rotate, Spectral
from mora_jax.models.batch import Batch
from mora_jax.models.llama import Compute, Llama, LlamaConfig
from train.config.run import RunConfig
from train.config.sections import BadSteps, Data, Evaluation, Log, Optimizer, Params, Restart, Schedule
from train.run.state import assign_methods
from train.step import optim
from train.step.spec import spec_of
from train.step.state import init_params, init_state, random_state
from train.step.step import eval_step, orient_step, restart_step, train_step

CONFIG = RunConfig(
    steps=8,
    batch_size=4,
    model=LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    ),
    compute=Compute(dtype="float32", layers="scan", remat="dots", loss_chunk=16),
    data=Data("nowhere", 16),
    method=MoRA(4, align=8),
    optimizer=Optimizer(learning_rate=1e-2),
    schedule=Schedule("jagged-cosine", warmup=1),
    restart=Restart(every=3, warmup=1),
)  # fmt: skip
METHODS = {
    "full": "full",
    "frozen": "frozen",
    "lora": LoRA(4, 128.0),
    "dora": DoRA(4, 128.0),
    "mora": MoRA(4, align=8),
    "lora+": LoRA(4, 128.0, b_lr_scale=4.0),
    "asylora": LoRA(4, 128.0, train_factors="b", a_init="orthogonal"),
    "rotate": MoRA(4, Rotate(), align=8),
}
RESTARTED = ("lora", "lora+", "asylora", "mora", "rotate")
# Many tests share the compiled step of the paper's method.
QUICK = ("mora",)


def with_method(name: str) -> RunConfig:
    restart, schedule = (
        (CONFIG.restart, CONFIG.schedule) if name in RESTARTED else (Restart(), Schedule("cosine", 1))
    )
    return dataclasses.replace(CONFIG, method=METHODS[name], restart=restart, schedule=schedule)


def tokens(seed: int) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (4, 16), 0, 64)


@functools.cache
def parameters() -> Any:
    """What every config here begins with."""
    return jax.jit(init_params, static_argnums=0)(spec_of(CONFIG))


def started(config: RunConfig):
    assert (config.model, config.seed) == (CONFIG.model, CONFIG.seed)
    methods = assign_methods(config)
    params = jax.tree.map(jnp.copy, parameters())  # an update takes the arrays that it is given
    return methods, init_state(spec_of(config), methods, params)


def trained(config: RunConfig, updates: int):
    methods, state = started(config)
    for step in range(updates):
        tokens_BT = tokens(step)[: config.batch_size]
        state, metrics = train_step(spec_of(config), methods, state, Batch(tokens_BT))
    return methods, state, metrics


def test_a_step_depends_on_nothing_that_it_does_not_compute():
    """Runs that differ in the rest share the compiled step."""
    other = dataclasses.replace(CONFIG, run_dir="elsewhere", log=Log("project"), eval=Evaluation(every=3))
    assert spec_of(other) == spec_of(CONFIG)
    assert hash(spec_of(other)) == hash(spec_of(CONFIG))
    assert spec_of(dataclasses.replace(CONFIG, seed=1)) != spec_of(CONFIG)


@pytest.mark.parametrize("name", quick(("lora", "mora"), METHODS))
def test_exactly_the_trainable_leaves_move(name):
    config = with_method(name)
    methods, before = started(config)
    before = jax.tree.map(np.asarray, before)
    _, after, _ = trained(config, 3)  # the first rate is 0, and then A waits for B
    groups = methods.trainable()
    old = trees.flatten({"params": before.params, "adapters": before.adapters})
    new = trees.flatten({"params": after.params, "adapters": after.adapters})
    moved = {path for path in old if not np.array_equal(old[path], new[path])}
    assert moved == groups.keys()


@pytest.mark.parametrize("name", quick(QUICK, METHODS))
def test_frozen_parameters_have_no_byte_of_optimizer_state(name):
    methods, state = started(with_method(name))
    trainable, _ = transform.partition(state.params, state.adapters, methods)
    groups = {o.label for o in optim.array_options(Optimizer(), methods).values()}
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    moments = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(trainable))
    counts = 4 * len(groups)
    assert held == moments + counts


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in METHODS if n != "full"])
def test_a_bfloat16_base_trains_as_the_same_values_in_float32(name):
    """Adapters, trained parameters and moments are float32 in both; the base keeps its bits."""
    config = dataclasses.replace(with_method(name), restart=Restart(), schedule=Schedule("cosine", 0))
    narrow = dataclasses.replace(config, base_dtype="bfloat16")
    wide = dataclasses.replace(config, compute=dataclasses.replace(config.compute, adapter_path="activation"))
    methods, state = started(narrow)
    types = {path: str(leaf.dtype) for path, leaf in trees.flatten(state.params).items()}
    assert types == {p: "float32" if methods[p] == "train" else "bfloat16" for p in types}
    keys = iter(jax.random.split(jax.random.key(1), 99))
    noise = jax.tree.map(lambda a: a + 0.02 * jax.random.normal(next(keys), a.shape), state.adapters)
    state = dataclasses.replace(state, adapters=noise)
    before = jax.tree.map(np.asarray, state.params)
    same = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else jnp.copy(a), state)
    for step in range(2):
        state, metrics = train_step(spec_of(narrow), methods, state, Batch(tokens(step)))
        same, metrics_ = train_step(spec_of(wide), methods, same, Batch(tokens(step)))
        np.testing.assert_allclose(metrics["loss"], metrics_["loss"], rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], metrics_["grad_norm"], rtol=1e-5)
    moved = {
        path
        for path in types
        if not np.array_equal(*(trees.flatten(t)[path] for t in (before, state.params)))
    }
    assert moved == methods.trained()
    ours, theirs = ((s.adapters, s.opt_state) for s in (state, same))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype in (jnp.float32, jnp.int32)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_frozen_kernels_get_no_gradient_computed():
    """The compiled step of a frozen base must not hold a product that makes a kernel's gradient."""
    frozen, full = (flops(with_method(name)) for name in ("frozen", "full"))
    assert frozen < 0.8 * full


def flops(config: RunConfig) -> float:
    methods, state = started(config)
    return (
        train_step.lower(spec_of(config), methods, state, Batch(tokens(0))).compile().cost_analysis()["flops"]
    )


@pytest.mark.slow  # a later test has microbatches of unequal weight
@pytest.mark.parametrize("microbatches", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(microbatches):
    _, whole, metrics = trained(CONFIG, 3)
    _, parts, metrics_ = trained(dataclasses.replace(CONFIG, microbatches=microbatches), 3)
    for a, b in zip(jax.tree.leaves(metrics), jax.tree.leaves(metrics_), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    moved = transform.merge(whole.params, whole.adapters, assign_methods(CONFIG))
    moved_ = transform.merge(parts.params, parts.adapters, assign_methods(CONFIG))
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(moved_), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("name", quick(QUICK, RESTARTED))
def test_a_restart_changes_no_output_and_clears_the_adapters(name):
    config = with_method(name)
    methods, state, _ = trained(config, 3)
    model = Llama(config.model, config.compute)
    before, _ = eval_step(model, methods, state.params, state.adapters, Batch(tokens(7)))
    unmerged, _ = eval_step(
        model, methods, state.params, jax.tree.map(jnp.zeros_like, state.adapters), Batch(tokens(7))
    )
    state, cleared = restart_step(spec_of(config), methods, state)
    after, _ = eval_step(model, methods.after_restart(), state.params, state.adapters, Batch(tokens(7)))
    np.testing.assert_allclose(after, before, rtol=1e-5)
    assert abs(float(unmerged) - float(before)) > 1e-3
    assert float(cleared) == 1.0
    assert int(state.step) == 3


def test_another_way_of_drawing_is_another_random_state():
    """As it would be by default in another version of JAX."""
    config = RunConfig(seed=3)
    drawn = random_state(spec_of(config), 7)
    assert drawn != random_state(spec_of(config), 8)
    assert len({tuple(numbers) for numbers in drawn.values()}) == len(drawn)
    with jax.threefry_partitionable(False):
        other = random_state(spec_of(config), 7)
    assert all(other[stream] != drawn[stream] for stream in drawn)


@pytest.mark.slow
def test_a_restart_draws_new_random_factors():
    config = with_method("asylora")
    methods, state = started(config)
    first = jax.tree.map(np.asarray, trees.flatten(state.adapters))
    again = trees.flatten(restart_step(spec_of(config), methods, state)[0].adapters)
    path = "layers/mlp/up_proj/kernel/a_KR"
    assert not np.allclose(first[path], again[path])


def is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.slow
def test_muon_moves_the_adapters_by_its_rate_and_keeps_padding_zero():
    optimizer = Optimizer(learning_rate=1e-2, matrices="muon")
    config = dataclasses.replace(with_method("mora"), optimizer=optimizer)
    methods, state, _ = trained(config, 2)  # the first update has a rate of 0
    padded = 0
    for path, on in methods.kernels():
        m_LRR = np.asarray(trees.flatten(state.adapters)[f"{path}/m_RR"])
        side = on.method.r_hat(*trees.flatten(state.params)[path].shape[-2:])
        padded += side < m_LRR.shape[-1]
        assert not m_LRR[:, side:].any()
        assert not m_LRR[:, :, side:].any()
        # Of an orthogonal matrix all singular values are alike; entries are 0.2 of the rate.
        sizes = np.linalg.svd(m_LRR[:, :side, :side], compute_uv=False) / (1e-2 * 0.2 * side**0.5)
        assert np.median(sizes) == pytest.approx(1, abs=0.3)
    assert padded == 3
    _, cleared = restart_step(spec_of(config), methods, state)
    assert float(cleared) == 1.0


@pytest.mark.slow
def test_the_gradient_is_clipped_and_its_norm_is_logged_unclipped():
    loose = dataclasses.replace(CONFIG, optimizer=Optimizer(learning_rate=1e-2, clip_norm=0))
    tight = dataclasses.replace(CONFIG, optimizer=Optimizer(learning_rate=1e-2, clip_norm=1e-3))
    norms, moments = [], []
    for config in (loose, tight):
        _, state, metrics = trained(config, 1)
        norms.append(float(metrics["grad_norm"]))
        adam = jax.tree.leaves(state.opt_state, is_leaf=is_adam)
        moments.append(float(optax.tree.norm([s.mu for s in adam if is_adam(s)])))
    assert norms[0] > 0.1
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-6)
    # The first moment is a tenth of the first gradient.
    np.testing.assert_allclose(moments, [0.1 * norms[0], 0.1 * 1e-3], rtol=2e-3)


def test_the_first_rate_is_that_of_step_zero_and_rates_follow_the_step():
    _, _, metrics = trained(CONFIG, 1)
    assert float(metrics["learning_rate"]) == 0.0
    _, state, metrics = trained(CONFIG, 2)
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2, rtol=1e-6)
    assert int(state.step) == 2


DROPPING = dataclasses.replace(
    CONFIG,
    batch_size=2,
    method=MoRA(4, align=8, dropout=0.5),
    params=Params(adapt="layers/.*/[qkv]_proj/kernel"),
    schedule=Schedule("jagged-cosine", 0),
)


@pytest.mark.slow
def test_dropout_differs_from_microbatch_to_microbatch():
    methods, state, _ = trained(DROPPING, 2)
    twice = dataclasses.replace(DROPPING, batch_size=4, microbatches=2)
    rows = tokens(7)[:2]
    losses = [
        float(
            train_step(spec_of(config), methods, jax.tree.map(jnp.copy, state), Batch(tokens_BT))[1]["loss"]
        )
        for config, tokens_BT in ((DROPPING, rows), (twice, jnp.repeat(rows, 2, axis=0)))
    ]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.1)


@pytest.mark.slow
def test_dropout_differs_from_step_to_step_and_spares_evaluation():
    config = DROPPING
    methods, state, _ = trained(config, 3)
    model = Llama(config.model, config.compute)
    losses = [eval_step(model, methods, state.params, state.adapters, Batch(tokens(7)))[0] for _ in range(2)]
    assert float(losses[0]) == float(losses[1])
    seen = []
    for step in (3, 4, 5):
        same = jax.tree.map(jnp.copy, state.replace(step=jnp.int32(step)))
        _, metrics = train_step(spec_of(config), methods, same, Batch(tokens(7)[:2]))
        seen.append(float(metrics["loss"]))
    assert len(set(seen)) == 3


def poisoned(state, path: tuple[str, ...]):
    """The state with one NaN in one parameter, as numpy arrays."""
    params = jax.tree.map(np.array, state.params)
    leaf = params
    for key in path:
        leaf = leaf[key]
    leaf.flat[0] = np.nan
    return jax.tree.map(np.asarray, state.replace(params=params))


@pytest.mark.parametrize("name", quick(QUICK, ["mora", "lora+", "full"]))
def test_a_bad_step_changes_nothing_but_the_counts(name):
    config = with_method(name)
    methods, state, _ = trained(config, 2)
    before = poisoned(state, ("norm", "scale"))
    after, metrics = train_step(spec_of(config), methods, jax.tree.map(jnp.asarray, before), Batch(tokens(2)))
    assert np.isnan(float(metrics["loss"]))
    assert (int(metrics["skipped_steps"]), int(metrics["bad_in_a_row"]), int(after.step)) == (1, 1, 3)
    for part in ("params", "adapters", "opt_state"):
        old, new = (jax.tree.leaves(getattr(s, part)) for s in (before, after))
        assert len(old) == len(new)
        for a, b in zip(old, new, strict=True):
            np.testing.assert_array_equal(a, b)
    counts = [leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.dtype == jnp.int32]
    assert counts
    assert {int(count) for count in counts} == {2}


@pytest.mark.slow  # the test before skips a step, test_spikes.py finds spikes
def test_a_spike_is_skipped_and_training_goes_on():
    config = dataclasses.replace(with_method("rotate"), bad_steps=BadSteps(window=2, factor=1.5))
    methods, state, _ = trained(config, 2)
    state = state.replace(spikes=state.spikes.replace(norms_W=state.spikes.norms_W / 100))
    before = jax.tree.map(np.asarray, state.adapters)
    state, metrics = train_step(spec_of(config), methods, state, Batch(tokens(2)))
    assert int(metrics["skipped_steps"]) == 1
    jax.tree.map(np.testing.assert_array_equal, before, state.adapters)
    state, _ = restart_step(spec_of(config), methods, state)
    state, metrics = train_step(spec_of(config), methods.after_restart(), state, Batch(tokens(3)))
    assert (int(metrics["skipped_steps"]), int(metrics["bad_in_a_row"])) == (1, 0)
    state, metrics = train_step(spec_of(config), methods.after_restart(), state, Batch(tokens(4)))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(state.adapters))


@pytest.mark.slow  # test_dense.py compares values and gradients of the paths
@pytest.mark.parametrize("name", ["mora", "lora"])
def test_two_hundred_updates_by_either_path_are_one_curve(name):
    """Rounding alone sets the paths apart: by a part in ten thousand of the loss at most.

    At three times this rate LoRA's curve is chaotic: weights changed by a ten millionth move it by 3%.
    """
    curves = {}
    for path in ("merged", "activation"):
        config = dataclasses.replace(
            with_method(name),
            steps=200,
            compute=dataclasses.replace(CONFIG.compute, adapter_path=path),
            optimizer=Optimizer(learning_rate=1e-3),
            schedule=Schedule("jagged-cosine", warmup=10),
            restart=Restart(every=80, warmup=10),
        )
        methods, state = started(config)
        curves[path] = []
        for step in range(config.steps):
            if config.restarts_at(step):
                state, _ = restart_step(spec_of(config), methods, state)
                methods = methods.after_restart()
            state, metrics = train_step(spec_of(config), methods, state, Batch(tokens(step % 8)))
            curves[path].append(float(metrics["loss"]))
    assert curves["merged"][-1] < 0.9 * curves["merged"][0]
    np.testing.assert_allclose(curves["merged"], curves["activation"], rtol=1e-4)


def test_the_mean_is_over_the_tokens_that_count_in_all_microbatches():
    """Microbatches of unequal weight: a mean of means would be another loss and gradient."""
    methods, state, _ = trained(CONFIG, 2)
    weights_BT = jnp.asarray(np.random.default_rng(0).uniform(size=tokens(7).shape) < 0.3, jnp.float32)
    batch = Batch(tokens(7), weights_BT.at[::2].set(0).at[0, 3].set(1))
    found = []
    for microbatches in (1, 2):
        config = dataclasses.replace(CONFIG, microbatches=microbatches)
        _, metrics = train_step(spec_of(config), methods, jax.tree.map(jnp.copy, state), batch)
        found.append((metrics["loss"], metrics["grad_norm"]))
        model = Llama(config.model, config.compute)
        total, count = eval_step(model, methods, state.params, state.adapters, batch)
        np.testing.assert_allclose(metrics["loss"], total / count, rtol=1e-5)
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_a_batch_of_which_nothing_counts_has_no_loss():
    methods, state, _ = trained(CONFIG, 2)
    batch = Batch(tokens(7), jnp.zeros(tokens(7).shape))
    after, metrics = train_step(spec_of(CONFIG), methods, state, batch)
    assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (0, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))


# Orienting


@functools.cache
def gradients() -> dict[str, np.ndarray]:
    """Those of the first batch, at the first parameters."""

    @jax.jit
    @jax.grad
    def gradient(params):
        model = Llama(CONFIG.model, CONFIG.compute)
        total, count = model.apply({"params": params}, Batch(tokens(0)), method=Llama.loss)
        return total / count

    return {path: np.asarray(leaf) for path, leaf in trees.flatten(gradient(parameters())).items()}


def fitted(method: Spectral):
    """Each kernel's bases that a step fits, in two microbatches, and the gradient of the whole batch."""
    config = dataclasses.replace(CONFIG, method=method, microbatches=2)
    methods, state = started(config)
    found = trees.flatten(orient_step(spec_of(config), methods, state, Batch(tokens(0))).adapters)
    paths = [path for path, _ in methods.orientable()]
    assert len(paths) == 7
    return [(found[f"{path}/u_KR"], found[f"{path}/v_RD"], gradients()[path]) for path in paths]


@pytest.mark.slow  # tests/jobs/test_orient.py has a run with bases
def test_bases_are_those_of_the_gradient_of_the_batch():
    for u_LKR, v_LRD, g_LKD in fitted(Spectral(4, multiple=8)):
        g_LRR = jnp.einsum("lkr,lkd,lsd->lrs", u_LKR, g_LKD, v_LRD)
        held = jnp.linalg.norm(g_LRR, axis=(1, 2))
        singular = np.linalg.svd(g_LKD, compute_uv=False)[:, : u_LKR.shape[2]]
        np.testing.assert_allclose(held, np.linalg.norm(singular, axis=1), rtol=1e-4)


@pytest.mark.slow
def test_sampled_bases_are_singular_vectors_of_the_gradient_of_the_batch():
    for u_LKR, v_LRD, g_LKD in fitted(Spectral(4, multiple=8, bases="sampled")):
        left_LKC, s_LC, _ = np.linalg.svd(g_LKD, full_matrices=False)
        chosen_LR = np.abs(left_LKC.swapaxes(1, 2) @ u_LKR).argmax(1)
        assert (chosen_LR >= u_LKR.shape[2]).any(1).all()  # not the leading ones
        s_LR = np.take_along_axis(s_LC, chosen_LR, 1)
        g_LRR = np.abs(np.einsum("lkr,lkd,lsd->lrs", u_LKR, g_LKD, v_LRD)) / s_LC[:, :1, None]
        expected_LRR = np.eye(s_LR.shape[1]) * (s_LR / s_LC[:, :1])[:, None]
        np.testing.assert_allclose(g_LRR, expected_LRR, atol=1e-3)


@pytest.mark.slow
def test_sampled_bases_are_others_at_each_restart_and_seed():
    method = Spectral(4, multiple=8, bases="sampled")
    config = dataclasses.replace(CONFIG, method=method, microbatches=2)  # compiled above
    methods, state = started(config)
    other_seed = dataclasses.replace(spec_of(config), seed=1)
    found = []
    for spec, step in ((spec_of(config), 3), (spec_of(config), 6), (other_seed, 3), (spec_of(config), 3)):
        at_step = dataclasses.replace(jax.tree.map(jnp.copy, state), step=jnp.int32(step))
        fitted = trees.flatten(orient_step(spec, methods, at_step, Batch(tokens(0))).adapters)
        found.append({path: np.asarray(fitted[f"{path}/u_KR"]) for path, _ in methods.orientable()})
    for path, u_LKR in found[0].items():
        for other in found[1:3]:
            assert (np.abs(u_LKR - other[path]).max((1, 2)) > 0.1).all(), path  # in each layer
        np.testing.assert_array_equal(u_LKR, found[3][path])
