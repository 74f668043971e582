"""NNX models with adapters: outputs, gradients, state, restarts, and what other code sees of a kernel."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from slow import quick

from mora_jax import DoRA, InputError, LoRA, Methods, MoRA, On, Share, Spectral
from mora_jax import nnx as mora_nnx
from mora_jax.nnx import AdapterParam, FixedAdapterParam

KEY = jax.random.key(0)
D, HEADS, VOCABULARY = 8, 2, 11


class Mixer(nnx.Module):
    """A module with a kernel of its own, a submodule with another, and state that changes."""

    def __init__(self, rngs: nnx.Rngs):
        self.w = nnx.Param(0.3 * jax.random.normal(rngs.params(), (D, HEADS, 6)))
        self.inner = nnx.Linear(12, 12, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        y = jnp.einsum("btd,dhe->bthe", x, self.w)
        return self.back(self.drop(self.inner(y.reshape(*y.shape[:2], -1))))

    def back(self, y):
        return jnp.einsum("bthe,dhe->btd", y.reshape(*y.shape[:2], HEADS, 6), self.w[...])


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, D, decode=False, deterministic=False, dropout_rate=0.1, rngs=rngs
        )
        self.mixer = Mixer(rngs)
        self.batch_norm = nnx.BatchNorm(D, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.batch_norm(self.mixer(x))


class Model(nnx.Module):
    """A language model that uses its embedding in three ways, with lists of layers of two kinds."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, D, rngs=rngs)
        self.conv = nnx.Conv(D, D, (3,), rngs=rngs)
        self.blocks = nnx.List([Block(rngs)])
        self.tail = nnx.data([nnx.Linear(D, D, rngs=rngs), {"last": nnx.Linear(D, D, rngs=rngs)}])

    def __call__(self, tokens):
        x = self.conv(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        x = self.tail[1]["last"](jnp.tanh(self.tail[0](x)))
        return self.embed.attend(x) + x @ self.embed.embedding[...].T


RULES = [
    ("embed/embedding", On(LoRA(2), inputs=(1,))),
    ("conv/kernel", On(MoRA(2), inputs=(0, 1))),
    (".*/(query|key|value)/kernel", On(MoRA(2), inputs=(0,))),
    (".*/out/kernel", On(LoRA(2), inputs=(0, 1))),
    (".*/mixer/w", On(MoRA(2), inputs=(0,))),
    ("tail/0/kernel", DoRA(2)),
    (".*/kernel", LoRA(2, train_factors="b")),
    (".*", "frozen"),
]
TOKENS = jax.random.randint(KEY, (2, 5), 0, VOCABULARY)


def randomised(model: Any, seed: int = 7) -> Any:
    """Returns the model as after some training, since zeros would prove nothing."""
    for i, (_, node) in enumerate(nnx.iter_graph(model)):
        if isinstance(node, AdapterParam | FixedAdapterParam):
            key = jax.random.fold_in(jax.random.key(seed), i)
            node.set_value(node[...] + 0.2 * jax.random.normal(key, node.shape))
    return model


def adapted(model: Any, rules: Any) -> Any:
    return randomised(mora_nnx.adapt(model, rules, nnx.Rngs(1)))


def close(found: Any, expected: Any) -> None:
    """Compares arrays to 1e-5 of the largest entry of each."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Returns the equations of a program, without those inside of `dense`."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name != "custom_vjp_call":
            for value in eqn.params.values():
                inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
                if isinstance(inner, Jaxpr):
                    yield from equations(inner)


def others(model: Any) -> Any:
    """Returns all that changes in calls: random counts, batch statistics and counters."""
    return nnx.as_pure(nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.RngKey))))


def loss(model: Any, *args: Any) -> tuple[jax.Array, Any]:
    """Returns a loss, and with it the output and the state after the call."""
    y = model(*args)
    return jnp.mean(jnp.square(y - 1)), (y, others(model))


@nnx.jit
def call(model: Any, *args: Any) -> Any:
    return model(*args)


@nnx.jit
def gradients_of(model: Any, *args: Any) -> Any:
    """Returns what `loss` returns, and its gradients for adapters."""
    return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam), has_aux=True)(model, *args)


@nnx.jit
def merged_gradients_of(model: Any, *args: Any) -> Any:
    """Returns the same, by way of merged kernels."""
    graph, trained, rest = nnx.split(model, AdapterParam, ...)

    def merged_loss(trained: Any) -> Any:
        return loss(mora_nnx.merged(nnx.merge(graph, trained, rest)), *args)

    return jax.value_and_grad(merged_loss, has_aux=True)(trained)


def test_a_model_with_adapters_equals_the_merged_model():
    model = adapted(Model(nnx.Rngs(0)), RULES)
    expected = merged_gradients_of(nnx.clone(model), TOKENS)
    found = gradients_of(model, TOKENS)
    assert len(jax.tree.leaves(found[1])) == len(jax.tree.leaves(nnx.state(model, AdapterParam))) > 13
    close(nnx.as_pure(found), nnx.as_pure(expected))
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(found[1]))
    close(others(model), expected[0][1][1])  # dropout drew, and batch statistics changed, in the same way
    assert int(model.blocks[0].mixer.calls[...]) == 1
    again, _ = gradients_of(model, TOKENS)
    assert np.abs(again[1][0] - found[0][1][0]).max() > 1e-3  # another mask of dropout


def test_classes_stay_and_the_given_model_too():
    plain = Model(nnx.Rngs(0))
    graph, state = nnx.split(plain)
    before = [graph, jax.tree.structure(plain), jax.tree.leaves(state)]
    model = adapted(plain, RULES)
    assert isinstance(model, Model)
    assert isinstance(model.blocks[0].attention.query, nnx.LinearGeneral)
    assert type(model.blocks[0].mixer).__name__ == "Mixer"
    merged = mora_nnx.merged(model)
    assert type(merged.blocks[0].mixer) is Mixer
    for unchanged in (plain, merged):
        assert [nnx.graphdef(unchanged), jax.tree.structure(unchanged)] == before[:2]
    assert all(a is b for a, b in zip(jax.tree.leaves(nnx.state(plain)), before[2], strict=True))


class Projection(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.w = nnx.Param(0.3 * jax.random.normal(rngs.params(), (D, HEADS, 6)))

    def __call__(self, x):
        return jnp.einsum("btd,dhe->bthe", x, self.w)


LAYERS = {
    "linear": (lambda r: nnx.Linear(D, 6, rngs=r), [("kernel", LoRA(2))]),
    "general": (
        lambda r: nnx.LinearGeneral((5, D), (3, 4), axis=(1, 2), rngs=r),
        [("kernel", On(LoRA(2), inputs=(0, 1)))],
    ),
    "einsum": (
        lambda r: nnx.Einsum("btd,hde->bthe", (HEADS, D, 6), rngs=r),
        [("kernel", On(LoRA(2), inputs=(1,), stack=(0,)))],
    ),
    "attention": (
        lambda r: nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=r),
        [("out/kernel", On(LoRA(2), inputs=(0, 1))), (".*/kernel", On(LoRA(2), inputs=(0,)))],
    ),
    "own module": (Projection, [("w", On(LoRA(2), inputs=(0,)))]),
    "remat": (lambda r: nnx.Sequential(nnx.Linear(D, 6, rngs=r)), [(".*/kernel", LoRA(2))]),
    "in bfloat16": (lambda r: nnx.Linear(D, 6, param_dtype=jnp.bfloat16, rngs=r), [("kernel", LoRA(2))]),
}


@pytest.mark.parametrize("name", quick(["einsum", "attention", "own module", "remat"], LAYERS))
def test_products_are_those_of_dense_and_no_kernel_is_merged(name):
    make, rules = LAYERS[name]
    model = adapted(make(nnx.Rngs(0)), [*rules, (".*", "frozen")])
    call = nnx.remat(lambda model, x: model(x)) if name == "remat" else (lambda model, x: model(x))
    graph, state = nnx.split(model)
    program = jax.make_jaxpr(lambda state, x: call(nnx.merge(graph, state), x))(state, jnp.ones((2, 5, D)))
    found = list(equations(program.jaxpr))
    products = [eqn.outvars[0].aval.size for eqn in found if eqn.primitive.name == "dot_general"]
    adapters = list(mora_nnx.methods(model).kernels())
    assert sum(eqn.primitive.name == "custom_vjp_call" for eqn in found) == len(adapters) > 0
    kernels = {
        v.size for path, v in dict(nnx.to_flat_state(nnx.state(model))).items() if path[-1] in ("kernel", "w")
    }
    assert kernels.isdisjoint(products)


class Stack(nnx.Module):
    """Layers that `nnx.vmap` makes and `nnx.scan` applies."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Mixer(rngs)

        self.layers = make(rngs)
        self.table = nnx.Param(0.3 * jax.random.normal(rngs.params(), (3, D, D)))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return jnp.tanh(x + layer(x))

        x = run(self.layers, x)
        return jax.lax.scan(lambda x, w: (x @ w, None), x, self.table[...])[0]


STACKED = [
    ("layers/w", On(MoRA(2), inputs=(1,), stack=(0,))),
    ("layers/inner/kernel", On(LoRA(2, train_factors="b"), inputs=(-2,), stack=(0,))),
    ("table", On(DoRA(2), stack=(0,))),
    (".*", "frozen"),
]


@pytest.mark.slow
def test_scanned_layers_have_adapters_of_their_own():
    model = adapted(Stack(nnx.Rngs(0)), STACKED)
    assert vars(model.layers)["w_m_RR"].shape[0] == 3
    x = jax.random.normal(KEY, (2, 4, D))
    expected = merged_gradients_of(nnx.clone(model), x)
    found = gradients_of(model, x)
    close(nnx.as_pure(found), nnx.as_pure(expected))
    assert model.layers.calls[...].tolist() == [1, 1, 1]
    graph, state = nnx.split(model)
    program = jax.make_jaxpr(lambda state: nnx.merge(graph, state)(x))(state)
    assert sum(eqn.primitive.name == "custom_vjp_call" for eqn in equations(program.jaxpr)) == 3


@pytest.mark.slow
def test_a_scan_that_slices_only_the_kernels_is_refused():
    model = adapted(Stack(nnx.Rngs(0)), STACKED)
    axes = nnx.StateAxes({AdapterParam: None, ...: 0})
    with pytest.raises(InputError, match=r"Mixer.w has shape \(8, 2, 6\).*slice both alike"):
        nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, None))(model.layers, jnp.ones((2, 4, D)))


@pytest.mark.slow
def test_ensembles_are_made_and_merged_in_vmap():
    rules = [("kernel", LoRA(2)), (".*", "frozen")]
    make = nnx.vmap(lambda key: mora_nnx.adapt(nnx.Linear(D, D, rngs=nnx.Rngs(key)), rules, nnx.Rngs(key)))
    models = randomised(make(jax.random.split(KEY, 3)))
    apply = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))
    close(apply(models, X), apply(nnx.vmap(mora_nnx.merged)(models), X))
    with pytest.raises(InputError, match=r"Linear.kernel was adapted as .* has shape \(3, 8, 8\) now"):
        mora_nnx.merged(models)


def test_layers_that_are_alike_have_one_definition():
    rules = [("kernel", LoRA(2)), (".*", "frozen")]
    one, other = (adapted(nnx.Linear(D, D, rngs=nnx.Rngs(i)), rules) for i in (0, 1))
    assert nnx.graphdef(one) == nnx.graphdef(other)
    assert nnx.graphdef(one) != nnx.graphdef(
        adapted(mora_nnx.merged(one), [("kernel", LoRA(2, 4.0)), (".*", "frozen")])
    )


# What is trained.


def trained_step(wrt: Any) -> tuple[Any, list[int]]:
    """Returns a compiled step, and a list that grows whenever it is traced."""
    traces = []

    @nnx.jit
    def step(model, optimizer, x):
        traces.append(1)
        gradients, _ = nnx.grad(loss, argnums=nnx.DiffState(0, wrt), has_aux=True)(model, x)
        optimizer.update(model, gradients)

    return step, traces


X = jax.random.normal(KEY, (3, D))


def mlp(rules: Any) -> nnx.Module:
    return adapted(nnx.Sequential(*(nnx.Linear(D, D, rngs=nnx.Rngs(i)) for i in range(2))), rules)


def test_the_optimizer_changes_adapters_and_nothing_else():
    model = mlp([("layers/0/kernel", LoRA(2, train_factors="b")), (".*/kernel", MoRA(2)), (".*", "frozen")])
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=AdapterParam)
    before = dict(nnx.to_flat_state(nnx.as_pure(nnx.state(model))))
    step, _ = trained_step(AdapterParam)
    step(model, optimizer, X)
    after = dict(nnx.to_flat_state(nnx.as_pure(nnx.state(model))))
    changed = {path[-1] for path in after if (after[path] != before[path]).any()}
    assert changed == {"kernel_b_RD", "kernel_m_RR"}
    assert isinstance(vars(model.layers[0])["kernel_a_KR"], FixedAdapterParam)


@pytest.mark.slow
def test_trained_parameters_and_lora_plus():
    model = mlp([("layers/0/kernel", LoRA(2, b_lr_scale=16.0)), (".*/1/bias", "train"), (".*", "frozen")])
    optimizer = mora_nnx.optimizer(model, optax.sgd(1e-2))
    before = nnx.clone(model)
    gradients, _ = nnx.grad(loss, argnums=nnx.DiffState(0, mora_nnx.trainable), has_aux=True)(model, X)
    step, _ = trained_step(mora_nnx.trainable)
    step(model, optimizer, X)
    moved = jax.tree.map(jnp.subtract, nnx.as_pure(nnx.state(model)), nnx.as_pure(nnx.state(before)))
    moved, gradients = dict(nnx.to_flat_state(moved)), dict(nnx.to_flat_state(nnx.as_pure(gradients)))
    scales = {("layers", 0, "kernel_a_KR"): 1, ("layers", 0, "kernel_b_RD"): 16, ("layers", 1, "bias"): 1}
    assert gradients.keys() == scales.keys() == {path for path in moved if (moved[path] != 0).any()}
    for path, scale in scales.items():
        np.testing.assert_allclose(moved[path], -1e-2 * scale * gradients[path], rtol=1e-3, atol=1e-6)
    assert mora_nnx.methods(model)["layers/1/bias"] == "train"
    assert nnx.graphdef(mora_nnx.merged(model)) == nnx.graphdef(
        mora_nnx.merged(mlp([(".*/kernel", LoRA(2)), (".*", "frozen")]))
    )


# Restarts.


@pytest.mark.slow  # test_spectral_bases_are_fixed_until_a_restart_draws_others restarts, too
def test_a_compiled_step_meets_each_method_once_over_restarts():
    model = mlp([(".*/kernel", MoRA(2, Share(0))), (".*", "frozen")])
    optimizer = nnx.Optimizer(model, optax.adam(optax.linear_schedule(1e-2, 0.0, 9)), wrt=AdapterParam)
    step, traces = trained_step(AdapterParam)
    rngs, seen = nnx.Rngs(3), []
    for _ in range(3):
        seen.append(mora_nnx.methods(model)["layers/0/kernel"])
        for _ in range(2):
            step(model, optimizer, X)
        old, old_optimizer, y = model, optimizer, call(model, X)
        model, optimizer = mora_nnx.restarted(model, optimizer, rngs)
        close(call(model, X), y)
        close(call(old, X), y)
        adam, schedule = optimizer.opt_state
        assert all((x == 0).all() for x in jax.tree.leaves(nnx.as_pure(adam)))
        assert int(schedule.count[...]) == int(optimizer.step[...]) == 2 * len(seen)
        assert int(old_optimizer.opt_state[0].count[...]) == 2
    assert seen == [MoRA(2, Share(0)), MoRA(2, Share(1)), MoRA(2, Share(0))]
    assert len(traces) == 2


@pytest.mark.slow
def test_a_restart_keeps_the_moments_of_trained_parameters():
    model = mlp([(".*/kernel", LoRA(2)), (".*/bias", "train")])
    optimizer = mora_nnx.optimizer(model, optax.adam(1e-2))
    step, _ = trained_step(mora_nnx.trainable)
    step(model, optimizer, X)
    new, cleared = mora_nnx.restarted(model, optimizer, nnx.Rngs(0))
    kept, old = cleared.opt_state.inner_states["base"], optimizer.opt_state.inner_states["base"]
    close(nnx.as_pure(kept), nnx.as_pure(old))
    assert not any(x.any() for x in jax.tree.leaves(nnx.as_pure(cleared.opt_state.inner_states["adapter"])))
    step(new, cleared, X)
    with pytest.raises(InputError, match="one state for adapters and others"):
        mora_nnx.restarted(model, nnx.Optimizer(model, optax.adam(1e-2), wrt=mora_nnx.trainable), nnx.Rngs(0))


@pytest.mark.slow
def test_a_restart_may_prune_moments():
    model = mlp([(".*/kernel", LoRA(2)), (".*", "frozen")])
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=AdapterParam)
    step, _ = trained_step(AdapterParam)
    step(model, optimizer, X)
    _, pruned = mora_nnx.restarted(model, optimizer, nnx.Rngs(0), how="magnitude", share=0.5)
    zeros = [(x == 0).mean() for x in jax.tree.leaves(nnx.as_pure(pruned.opt_state[0].mu))]
    np.testing.assert_allclose(zeros, 0.5, atol=0.15)


def test_methods_that_cannot_be_restarted_are_refused():
    model = mlp([(".*/kernel", DoRA(2)), (".*", "frozen")])
    with pytest.raises(InputError, match="layers/0/kernel: dora cannot be restarted"):
        mora_nnx.restarted(model, nnx.Optimizer(model, optax.sgd(1.0), wrt=AdapterParam), nnx.Rngs(0))


def test_saved_methods_restore_a_model_that_was_restarted():
    rules = [
        ("layers/0/kernel", MoRA(2)),
        (".*/kernel", On(LoRA(2), inputs=(1,))),
        (".*/1/bias", "train"),
        (".*", "frozen"),
    ]
    model = mlp(rules)
    model, _ = mora_nnx.restarted(model, mora_nnx.optimizer(model, optax.adam(1.0)), nnx.Rngs(0))
    saved = mora_nnx.methods(randomised(model)).to_json()
    again = mora_nnx.adapt(mora_nnx.merged(mlp(rules)), Methods.from_json(saved), nnx.Rngs(0))
    nnx.update(again, nnx.state(model))
    assert nnx.graphdef(again) == nnx.graphdef(model)
    close(call(again, X), call(model, X))
    assert "train" in mora_nnx.describe(again)


def test_spectral_bases_are_fixed_until_a_restart_draws_others():
    rules, rngs = [("kernel", Spectral(2)), (".*", "frozen")], nnx.Rngs(1)
    model = mora_nnx.adapt(nnx.Linear(D, D, rngs=nnx.Rngs(0)), rules, rngs)
    vars(model)["kernel_m_RR"][...] += jax.random.normal(KEY, vars(model)["kernel_m_RR"].shape)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=AdapterParam)
    step, _ = trained_step(AdapterParam)
    seen = []
    for _ in range(3):
        close(call(model, X), call(mora_nnx.merged(model), X))
        before = nnx.clone(model)
        step(model, optimizer, X)
        m_RR, u_KR, v_RD = (
            [vars(m)[f"kernel_{n}"][...] for m in (before, model)] for n in ("m_RR", "u_KR", "v_RD")
        )
        assert np.abs(m_RR[1] - m_RR[0]).max() > 1e-3
        np.testing.assert_array_equal(u_KR[1], u_KR[0])
        np.testing.assert_array_equal(v_RD[1], v_RD[0])
        seen.append(np.concatenate([u_KR[0], v_RD[0].T]))
        y = call(model, X)
        model, optimizer = mora_nnx.restarted(model, optimizer, rngs)
        close(call(model, X), y)
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(seen, 2)) > 0.1


# What code may do with a module.


class Odd(nnx.Module):
    """Methods that cannot run on a copy of the module, or return no arrays."""

    def __init__(self, rngs: nnx.Rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (D, D)))
        self.inner = nnx.Linear(D, D, rngs=rngs)
        self.count = 0
        self.total = jnp.zeros(())

    def parts(self):
        return self.inner, self.w

    def counted(self, x):
        self.count += 1
        return x @ self.w[...], {"name": "counted", "count": self.count}

    def summed(self, x):
        self.total = self.total + 1
        return x @ self.w[...]

    def branching(self, x):
        return x @ self.w[...] if x.sum() > -1e9 else x

    def sowing(self, x):
        self.seen = nnx.Intermediate(x @ self.w[...])
        return self.seen[...]

    def dropped(self, x, rngs, variable):
        variable[...] += 1
        return jax.random.bernoulli(rngs.dropout(), 0.5, x.shape) * (x @ self.w[...])

    def named(self, x):
        return {"y": x @ self.w[...], "name": "odd", "width": D, "nothing": None}

    def writing(self):
        self.w[...] = jnp.zeros((D, D))


@pytest.fixture(scope="module")
def odd() -> Odd:
    return adapted(Odd(nnx.Rngs(0)), [("w", MoRA(2)), (".*/kernel", LoRA(2)), (".*", "frozen")])


def test_any_read_of_a_kernel_sees_its_adapter(odd):
    plain = mora_nnx.merged(odd)
    close(odd.w[...], plain.w[...])
    close(odd.parts()[1][...], plain.w[...])
    close(odd.inner.kernel @ X.T, plain.inner.kernel @ X.T)
    assert odd.parts()[0] is odd.inner
    assert type(odd.w).__mro__[1] is nnx.Param
    assert np.abs(odd.w[...] - vars(odd)["w"][...]).max() > 1e-2


@pytest.mark.slow
def test_methods_do_to_the_module_what_they_do_without_adapters(odd):
    results, modules = [], (nnx.clone(odd), mora_nnx.merged(odd))
    for module in modules:
        rngs, variable = nnx.Rngs(5), nnx.Variable(jnp.zeros(()))
        calls = [getattr(module, name) for name in ("counted", "summed", "branching", "sowing", "named")]
        results.append([*(call(X) for call in calls), module.dropped(X, rngs, variable)])
        assert (module.count, int(module.total)) == (1, 1)
        assert (int(variable[...]), int(rngs.dropout.count[...])) == (1, 1)
    found, expected = ([leaf for leaf in jax.tree.leaves(r) if not isinstance(leaf, str)] for r in results)
    close(found, expected)
    assert results[0][4]["name"] == "odd"
    close(modules[0].seen[...], modules[1].seen[...])


def test_setting_an_adapted_kernel_is_refused(odd):
    for change in (odd.writing, lambda: odd.w.set_value(X), lambda: setattr(odd, "w", nnx.Param(X))):
        with pytest.raises(InputError, match="change it in the merged model"):
            change()


def test_nnx_and_jax_see_the_stored_kernel(odd):
    stored = vars(odd)["w"]
    assert dict(nnx.to_flat_state(nnx.state(odd)))[("w",)][...] is stored[...]
    other = nnx.clone(odd)
    nnx.update(other, jax.tree.map(jnp.zeros_like, nnx.state(other)))
    assert not vars(other)["w"][...].any()
    mapped = jax.tree.map(lambda x: x, odd)
    assert type(mapped) is type(odd)
    assert vars(mapped)["w"][...] is stored[...]
    doubled = nnx.recursive_map(
        lambda path, v: v.copy(value=2 * v[...]) if path == ("w",) else v, nnx.clone(odd)
    )
    close(vars(doubled)["w"][...], 2 * stored[...])
    popped = nnx.pop(nnx.clone(odd), nnx.PathContains("w"))
    assert dict(nnx.to_flat_state(popped))[("w",)][...] is stored[...]


class Pair(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Param(jax.random.normal(rngs.params(), (D, 6)))
        self.down = nnx.Param(jax.random.normal(rngs.params(), (6, D)))

    def __call__(self, x):
        return (x @ self.up) @ self.down[...]


@pytest.mark.slow
def test_a_module_may_own_several_kernels():
    model = adapted(Pair(nnx.Rngs(0)), [(".*", LoRA(2))])
    close(call(model, X), call(mora_nnx.merged(model), X))
    restarted, _ = mora_nnx.restarted(
        model, nnx.Optimizer(model, optax.sgd(1.0), wrt=AdapterParam), nnx.Rngs(0)
    )
    assert nnx.graphdef(restarted) == nnx.graphdef(model)


class Tied(nnx.Module):
    """Two modules and a method that share one kernel."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(D, D, rngs=rngs)
        self.second = nnx.Linear(D, D, rngs=rngs)
        self.second.kernel = self.w = self.first.kernel
        self.again = self.first

    def __call__(self, x):
        return self.again(self.second(self.first(x))) @ self.w[...]


def test_shared_kernels_share_one_adapter():
    model = adapted(Tied(nnx.Rngs(0)), [("again/kernel", LoRA(2)), (".*", "frozen")])
    assert len(nnx.to_flat_state(nnx.state(model, AdapterParam))) == 2
    merged = mora_nnx.merged(model)
    assert merged.w is merged.second.kernel is merged.first.kernel
    close(call(model, X), call(merged, X))


@pytest.mark.slow
def test_kernels_in_bfloat16_are_multiplied_and_nothing_else():
    embed = nnx.Embed(VOCABULARY, D, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = adapted(embed, [("embedding", On(LoRA(2), inputs=(1,)))])
    x = X.astype(jnp.bfloat16)
    exact = x.astype(jnp.float32) @ mora_nnx.merged(adapted_float32(embed)).embedding[...].T
    np.testing.assert_allclose(model.attend(x).astype(jnp.float32), exact, atol=0.1)
    with pytest.raises(InputError, match="embedding is stored in bfloat16"):
        model(TOKENS)
    with pytest.raises(InputError, match="embedding is stored in bfloat16"):
        _ = model.embedding


def adapted_float32(embed: nnx.Embed) -> nnx.Embed:
    """Returns an embedding with the same values and adapters in float32."""
    wide = nnx.Embed(VOCABULARY, D, rngs=nnx.Rngs(0))
    nnx.update(wide, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(embed)))
    return adapted(wide, [("embedding", On(LoRA(2), inputs=(1,)))])


def test_trees_without_shared_references():
    with nnx.set_graph_mode(False):
        model = mlp([(".*/kernel", MoRA(2)), (".*", "frozen")])
        close(call(model, X), call(mora_nnx.merged(model), X))


# What is refused.


class Held(nnx.Module):
    def __init__(self):
        self.ws = nnx.List([nnx.Param(jnp.ones((D, D)))])
        self.pair = nnx.data((nnx.Param(jnp.ones((D, D))),))
        self.w, self.w_m_RR = nnx.Param(jnp.ones((D, D))), 1


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("w", LoRA(2, dropout=0.1)), (".*", "frozen")], "w: NNX models apply no dropout of lora's inputs"),
        (
            [("w", Spectral(2, bases="sampled")), (".*", "frozen")],
            r"w: nothing fits the adapters of an NNX model to gradients, which Spectral\(.*'sampled'",
        ),
        ([("ws/0", MoRA(2)), (".*", "frozen")], "kernels in an nnx.List cannot be adapted"),
        ([("pair/0", MoRA(2)), (".*", "frozen")], "'pair/0': kernels in a list or dict"),
        ([("w", MoRA(2)), (".*", "frozen")], "Held has an attribute w_m_RR"),
        ([("w", "frozen")], "no rule covers 'pair/0'"),
        (Methods((("v", MoRA(2)),)), "the model has no 'v'"),
    ],
)
def test_what_cannot_be_adapted_is_refused(rules, message):
    with pytest.raises(InputError, match=message):
        mora_nnx.adapt(Held(), rules, nnx.Rngs(0))


def test_a_model_is_adapted_once(odd):
    with pytest.raises(InputError, match="has adapters already"):
        mora_nnx.adapt(odd, [(".*", "frozen")], nnx.Rngs(0))


@pytest.mark.slow
def test_the_library_imports_nnx_only_when_asked():
    code = "import sys, mora_jax; assert 'flax.nnx' not in sys.modules; mora_jax.nnx.adapt"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_kernels_that_another_module_normalises_are_refused(wrapper):
    model = wrapper(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    with pytest.raises(InputError, match=f"kernel is normalised by an nnx.{wrapper.__name__}"):
        mora_nnx.adapt(model, [(".*kernel", MoRA(2)), (".*", "frozen")], nnx.Rngs(2))


def test_a_view_cannot_be_changed():
    model = mora_nnx.adapt(
        nnx.Linear(8, 8, rngs=nnx.Rngs(0)), [("kernel", MoRA(2)), (".*", "frozen")], nnx.Rngs(2)
    )
    for change in (lambda k: k.set_metadata(a=1), lambda k: k.update_from_state(nnx.Param(k.get_value()))):
        with pytest.raises(InputError, match="effective kernel"):
            change(model.kernel)
