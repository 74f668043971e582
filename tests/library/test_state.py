"""`State`: what is trained, optimizers by group, and restarts that clear the adapters' optimizer state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from slow import slow

from mora_jax import DoRA, InputError, LoRA, MoRA, State, trees, value_and_grad

PARAMS = {
    "up": {"kernel": jax.random.normal(jax.random.key(0), (8, 12)), "bias": jnp.zeros(12)},
    "down": [jax.random.normal(jax.random.key(1), (12, 8)), jnp.zeros(8)],
}
X = jax.random.normal(jax.random.key(2), (16, 8))
LORA_PLUS = [
    ("up/kernel", MoRA(2)),
    ("down/0", LoRA(2, b_lr_scale=4.0)),
    (".*bias", "train"),
    (".*", "frozen"),
]


def loss(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return jnp.mean((h @ params["down"][0] + params["down"][1][None] - x) ** 2)


def trained(rules, tx, steps: int = 3):
    """Returns a state after some updates, its optimizer and that one's state."""
    state = State.init(jax.random.key(3), PARAMS, rules)
    optimizer = state.optimizer(tx)
    opt_state = optimizer.init(state.trainable)

    @jax.jit
    def step(state, opt_state):
        _, gradients = value_and_grad(loss)(state, X)
        updates, opt_state = optimizer.update(gradients, opt_state, state.trainable)
        return state.updated(updates), opt_state

    for _ in range(steps):
        state, opt_state = step(state, opt_state)
    return state, optimizer, opt_state


def arrays(opt_state) -> int:
    """Returns the numbers that an optimizer holds, without counts."""
    return sum(leaf.size for leaf in jax.tree.leaves(opt_state) if leaf.ndim)


def test_only_what_is_trained_moves_and_has_optimizer_state():
    state, _, opt_state = trained(LORA_PLUS, optax.adam(1e-2))
    assert int(state.step) == 3
    before = trees.flatten(PARAMS)
    for path, leaf in trees.flatten(state.params).items():
        assert np.array_equal(leaf, before[path]) == (path != "up/bias"), path
    size = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    assert size == 6**2 + 2 * (12 + 8) + 12
    assert arrays(opt_state) == 2 * size
    assert jax.tree.structure(state.merged()) == jax.tree.structure(PARAMS)


def test_updates_are_scaled_by_the_groups_multiples():
    state, _, _ = trained(LORA_PLUS, optax.sgd(1e-3), steps=1)
    start = State.init(jax.random.key(3), PARAMS, LORA_PLUS)
    _, gradients = jax.jit(value_and_grad(loss))(start, X)
    for name, scale in (("up/kernel/m_RR", 1), ("down/0/b_RD", 4)):
        moved = trees.flatten(state.adapters)[name] - trees.flatten(start.adapters)[name]
        expected = -1e-3 * scale * trees.flatten(gradients)[f"adapters/{name}"]
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-9)


def test_a_transformation_may_depend_on_the_group():
    rules = [("up/kernel", DoRA(2)), (".*bias", "train"), (".*", "frozen")]
    seen = []

    def by_group(group):
        seen.append((group.adapter, group.weight_decay))
        return optax.sgd(1e-2) if group.adapter else optax.set_to_zero()

    state, _, _ = trained(rules, by_group)
    assert set(seen) == {(False, True), (True, True), (True, False)}
    np.testing.assert_array_equal(state.params["up"]["bias"], PARAMS["up"]["bias"])
    assert np.asarray(state.adapters["up"]["kernel"]["b_RD"]).any()


@pytest.mark.parametrize("chained", [slow(False), True])
def test_a_restart_resets_the_adapters_state_alone_and_schedules_go_on(chained):
    schedule = optax.linear_schedule(1e-2, 0.0, 100)
    state, optimizer, opt_state = trained(LORA_PLUS, optax.adam(schedule))
    if chained:
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
        opt_state = (optax.EmptyState(), opt_state)
    after, new = state.restart(jax.random.key(4), opt_state, optimizer)
    assert jax.tree.structure(new) == jax.tree.structure(opt_state)
    np.testing.assert_allclose(loss(after.merged(), X), loss(state.merged(), X), rtol=1e-5)
    assert after.methods["up/kernel"].pattern == "1"
    before, now = ((s[1] if chained else s).inner_states for s in (opt_state, new))
    for label in before:
        old, fresh = (jax.tree.leaves(states[label], is_leaf=is_part) for states in (before, now))
        for a, b in zip(old, fresh, strict=True):
            if isinstance(a, optax.ScaleByScheduleState):
                assert int(b.count) == 3
            elif isinstance(a, optax.ScaleByAdamState):
                assert int(b.count) == (3 if label == "base" else 0)
                assert any(np.asarray(x).any() for x in jax.tree.leaves(b.mu)) == (label == "base")


def is_part(node) -> bool:
    return isinstance(node, optax.ScaleByAdamState | optax.ScaleByScheduleState)


def test_pruning_keeps_the_largest_moments():
    state, optimizer, opt_state = trained([("up/kernel", MoRA(4)), (".*", "frozen")], optax.adam(1e-2))
    _, new = state.restart(jax.random.key(4), opt_state, optimizer, "magnitude", 0.75)
    old_mu, mu = (
        np.abs(optax.tree.get(s, "mu")["adapters"]["up"]["kernel"]["m_RR"]) for s in (opt_state, new)
    )
    assert np.count_nonzero(mu) / np.count_nonzero(old_mu) == pytest.approx(0.25, abs=0.05)
    assert mu[mu > 0].min() >= old_mu[mu == 0].max()


def test_what_cannot_be_restarted_or_pruned_is_refused():
    state, optimizer, opt_state = trained([("up/kernel", DoRA(2)), (".*", "frozen")], optax.adam(1e-2), 0)
    with pytest.raises(InputError, match="up/kernel: dora cannot be restarted"):
        state.restart(jax.random.key(0), opt_state, optimizer)
    state, optimizer, opt_state = trained([("up/kernel", MoRA(2)), (".*", "frozen")], optax.sgd(1e-2), 0)
    with pytest.raises(InputError, match=r"magnitude pruning needs an optimizer with optax\.scale_by_adam"):
        state.restart(jax.random.key(0), opt_state, optimizer, "magnitude")
    with pytest.raises(InputError, match="no optimizer state of adapters"):
        state.restart(jax.random.key(0), optax.sgd(1.0).init(state.trainable), optax.sgd(1.0))


@pytest.mark.slow
def test_injected_rates_go_on_after_a_restart():
    schedule = optax.piecewise_constant_schedule(1.0, {2: 1e-6})
    for tx in (optax.sgd(schedule), optax.inject_hyperparams(optax.sgd)(schedule)):
        state, optimizer, opt_state = trained([("up/kernel", MoRA(2)), (".*", "frozen")], tx)
        state, opt_state = state.restart(jax.random.key(4), opt_state, optimizer)
        _, gradients = value_and_grad(loss)(state, X)
        updates, _ = optimizer.update(gradients, opt_state, state.trainable)
        assert 0 < max(float(jnp.abs(u).max()) for u in jax.tree.leaves(updates)) < 1e-5


@pytest.mark.slow
def test_gradients_collected_before_a_restart_are_not_applied_after_it():
    state = State.init(jax.random.key(3), PARAMS, LORA_PLUS)
    optimizer = optax.MultiSteps(state.optimizer(optax.sgd(1.0)), 2)
    opt_state = optimizer.init(state.trainable)
    _, gradients = value_and_grad(loss)(state, X)
    _, opt_state = optimizer.update(gradients, opt_state, state.trainable)
    assert np.asarray(opt_state.acc_grads["adapters"]["up"]["kernel"]["m_RR"]).any()
    _, after = state.restart(jax.random.key(4), opt_state, optimizer)
    assert not np.asarray(after.acc_grads["adapters"]["up"]["kernel"]["m_RR"]).any()
    assert np.asarray(after.acc_grads["params"]["up"]["bias"]).any()


@pytest.mark.parametrize(
    ("how", "share"), [("zero", 0.5), ("Reset", 0.5), ("random", 1.5), ("magnitude", 90)]
)
def test_what_a_restart_clears_is_checked(how, share):
    state, optimizer, opt_state = trained([("up/kernel", MoRA(2)), (".*", "frozen")], optax.adam(1e-2), 0)
    with pytest.raises(InputError, match=r"how is one of reset|lies in \[0, 1\]"):
        state.restart(jax.random.key(0), opt_state, optimizer, how, share)
