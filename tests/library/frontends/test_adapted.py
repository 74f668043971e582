"""`adapted`: unmodified functions with adapters compute what they compute at the merged parameters."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from slow import quick, slow

from mora_jax import (
    Decouple,
    DoRA,
    InputError,
    LoRA,
    MoRA,
    On,
    Rotate,
    Share,
    State,
    Truncate,
    adapted,
    assign,
    attach,
    bind,
    dense,
    merge,
    partition,
    restart,
    trees,
    value_and_grad,
)

METHODS = [
    slow(MoRA(2)),
    slow(MoRA(2, Share(1, pad="wrap"))),
    slow(MoRA(2, Share((0, 1)), align=8)),
    slow(MoRA(2, Truncate())),
    slow(MoRA(2, Decouple())),
    MoRA(2, Rotate()),
    slow(LoRA(2, alpha=4.0)),
    DoRA(2),
]
# Functions of a kernel and an input, by the layout that they need.
PRODUCTS = {
    "x @ w": (lambda w, x: x @ w, (12, 20), (4, 12), {}),
    "w.T @ x": (lambda w, x: w.T @ x, (12, 20), (12, 4), {}),
    "(out, in)": (lambda w, x: x @ w.T, (20, 12), (4, 12), {"inputs": (1,)}),
    "query": (lambda w, x: jnp.einsum("btd,dnh->btnh", x, w), (12, 2, 10), (2, 3, 12), {"inputs": (0,)}),
    "output": (lambda w, x: jnp.einsum("btnh,nhd->btd", x, w), (3, 4, 20), (2, 5, 3, 4), {"inputs": (0, 1)}),
    "gemma": (lambda w, x: jnp.einsum("btd,ndh->btnh", x, w), (2, 12, 10), (2, 3, 12), {"inputs": (1,)}),
    "joined": (lambda w, x: jnp.einsum("bd,sdh->sbh", x, w), (3, 12, 20), (4, 12), {"stack": (0,)}),
    "experts": (lambda w, x: jnp.einsum("ebd,edh->ebh", x, w), (3, 12, 20), (3, 4, 12), {"stack": (0,)}),
    "reshaped": (lambda w, x: x @ w.reshape(12, 20), (12, 2, 10), (4, 12), {"inputs": (0,)}),
    "indexed": (lambda w, x: (x @ w[0]) @ w[1], (2, 14, 14), (4, 14), {"stack": (0,)}),
    "scanned": (
        lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, w),
        (3, 14, 14),
        (4, 14),
        {"stack": (0,)},
    ),
    "reused in a scan": (
        lambda w, x: jax.lax.scan(lambda y, x: (jnp.tanh(y @ w + x), y), x[0], x),
        (14, 14),
        (3, 14),
        {},
    ),
    "checkpoint": (lambda w, x: jax.checkpoint(lambda x: jnp.sin(x @ w))(x), (12, 20), (4, 12), {}),
    "vmap": (lambda w, x: jax.vmap(lambda x: x @ w)(x), (12, 20), (4, 12), {}),
}


def noise(key: jax.Array, tree):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure,
        [a + 0.2 * jax.random.normal(k, a.shape, a.dtype) for a, k in zip(leaves, keys, strict=True)],
    )


def random_adapters(params, methods, seed: int = 1):
    """Returns random arrays; those of MoRA are cut to r_hat as training leaves them."""
    flat = {}
    for i, (path, on) in enumerate(methods.kernels()):
        axes = on.axes(params[path].shape)
        w = axes.matrices(params[path])
        example = functools.partial(on.method.example, std=0.2)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), max(len(w), 1))
        stacked = w.ndim == 3
        flat[path] = jax.vmap(example)(keys, w) if stacked else example(keys[0], w)
    return flat


def weighted_sum(outputs) -> jax.Array:
    """Returns a scalar whose gradients differ from entry to entry."""
    return sum(jnp.sum(jnp.sin(y + jnp.arange(y.size).reshape(y.shape))) for y in jax.tree.leaves(outputs))  # pyright: ignore[reportReturnType]


def check(f, params, adapters, methods, *inputs, tolerance=1e-5):
    """Compares outputs, and gradients for adapters, with those of the merged parameters."""

    def ours(adapters):
        outputs = adapted(f, methods)(params, *inputs, adapters=adapters)
        return weighted_sum(outputs), outputs

    def theirs(adapters):
        outputs = f(merge(params, adapters, methods), *inputs)
        return weighted_sum(outputs), outputs

    found = [jax.jit(jax.grad(g, has_aux=True))(adapters) for g in (ours, theirs)]
    size = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(found[1]))
    for got, expected in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(got, expected, atol=tolerance * size)


def products_with_adapters(f, *args) -> int:
    """Returns how many products of `dense` a function's program has, each scan's body counted once."""
    return str(jax.make_jaxpr(f)(*args)).count("custom_vjp_call[")


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", quick(["experts"], ["x @ w", "output", "experts"]))
def test_every_method_on_every_kind_of_layout(name, method):
    f, shape, x_shape, axes = PRODUCTS[name]
    params = {"w": jax.random.normal(jax.random.key(0), shape)}
    methods = assign([("w", On(method, **axes))], params)
    x = jax.random.normal(jax.random.key(2), x_shape)
    check(lambda p, x: f(p["w"], x), params, random_adapters(params, methods), methods, x)


@pytest.mark.parametrize("name", quick(["(out, in)", "query", "gemma", "checkpoint", "vmap"], PRODUCTS))
def test_products_are_exact_and_never_form_the_effective_kernel(name):
    f, shape, x_shape, axes = PRODUCTS[name]
    params = {"w": jax.random.normal(jax.random.key(0), shape)}
    methods = assign([("w", On(MoRA(2), **axes))], params)
    adapters = random_adapters(params, methods)
    x = jax.random.normal(jax.random.key(2), x_shape)
    check(lambda p, x: f(p["w"], x), params, adapters, methods, x)
    call = adapted(lambda p, x: f(p["w"], x), methods, "activation")
    count = products_with_adapters(lambda p, x, a: call(p, x, adapters=a), params, x, adapters)
    assert count == (2 if name == "indexed" else 1)


@pytest.mark.parametrize(
    "f",
    [
        slow(lambda w, x: jax.lax.conv(x[None, :, :, None], w[:, :, None, None], (1, 1), "SAME")),
        lambda w, x: jnp.take(w, jnp.array([1, 0, 3]), axis=0),
        lambda w, x: x @ w + jnp.sum(w**2),
        lambda w, x: jax.nn.relu(w) @ x.T,
        lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda w: w.sum(), lambda w: w.mean(), w),
        lambda w, x: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] @ w), (0, x))[1],
        lambda w, x: jnp.matmul(x, w, precision="highest"),
        lambda w, x: jax.jit(lambda w: w.T)(w),
        lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32),
    ],
    ids=["conv", "lookup", "penalty", "relu", "cond", "while", "precision", "returned", "rounded"],
)
def test_every_other_use_takes_the_effective_kernel(f):
    params = {"w": jax.random.normal(jax.random.key(0), (12, 12))}
    methods = assign([("w", MoRA(2))], params)
    adapters = random_adapters(params, methods)
    x = jax.random.normal(jax.random.key(2), (12, 12))
    call = adapted(lambda p, x: f(p["w"], x), methods)
    expected = f(merge(params, adapters, methods)["w"], x)
    np.testing.assert_allclose(call(params, x, adapters=adapters), expected, atol=1e-4)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h, h, mask=nn.make_causal_mask(x[..., 0]))
        return x + nn.Dense(16)(nn.gelu(nn.Dense(24)(nn.LayerNorm()(x)))), None


SAVED = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
WAYS = {
    "jit": nn.jit,
    "remat": functools.partial(nn.remat, policy=SAVED),
    "scan": functools.partial(nn.scan, variable_axes={"params": 0}, split_rngs={"params": True}, length=2),
}


class GPT(nn.Module):
    """A model with the table tied to the head. `ways` transform its blocks."""

    ways: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 16, name="embed")
        x, block = embed(tokens), Block
        for way in self.ways:
            block = WAYS[way](block)
        if "scan" in self.ways:
            x, _ = block(name="layers")(x, None)
        else:
            for i in range(2):
                x, _ = block(name=f"layers_{i}")(x)
        return embed.attend(nn.LayerNorm()(x))


def rules_of(stack: tuple[int, ...]):
    first = len(stack)
    return [
        (".*(query|key|value)/kernel", On(MoRA(2), inputs=(first,), stack=stack)),
        (".*out/kernel", On(LoRA(2), inputs=(first, first + 1), stack=stack)),
        (".*Dense_0/kernel", On(MoRA(2, Rotate()), inputs=(first,), stack=stack)),
        (".*Dense_1/kernel", On(DoRA(2), inputs=(first,), stack=stack)),
        ("embed/embedding", On(LoRA(2), inputs=(1,))),
        (".*scale", "train"),
        (".*", "frozen"),
    ]


@pytest.mark.parametrize(
    "ways",
    [
        slow(()),
        ("remat", "scan"),
        slow(("remat",)),
        slow(("jit",)),
        slow(("jit", "scan")),
    ],
    ids="-".join,
)
def test_a_linen_model_as_it_is(ways):
    tokens = jnp.arange(10).reshape(2, 5)
    model = GPT(ways)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    methods = assign(rules_of((0,) if "scan" in ways else ()), params)
    adapters = noise(jax.random.key(1), attach(jax.random.key(1), params, methods))
    apply = adapted(model.apply, methods)

    @jax.jit
    def ours(params, adapters):
        logits = apply({"params": params}, tokens, adapters=adapters)
        return weighted_sum(logits), logits

    @jax.jit
    def theirs(params, adapters):
        logits = model.apply({"params": merge(params, adapters, methods)}, tokens)
        return weighted_sum(logits), logits

    found = [jax.grad(f, (0, 1), has_aux=True)(params, adapters) for f in (ours, theirs)]
    trained = [jax.tree.leaves(partition(*gradients, methods)[0]) for gradients, _ in found]
    logits = [[logits] for _, logits in found]
    for got, expected in (trained, logits):
        size = max(float(jnp.abs(array).max()) for array in expected)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * size)
    kernels = len(list(methods.kernels()))
    assert products_with_adapters(ours, params, adapters) == kernels  # the lookup takes the effective table


def test_a_module_level_jit_meets_the_new_method_after_a_restart():
    """Methods held by closure under `nn.jit` would be silently stale."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(nn.Dense)(12)(x)

    model, x = Model(), jax.random.normal(jax.random.key(0), (4, 12))
    params = model.init(jax.random.key(1), x)["params"]
    methods = assign([(".*kernel", MoRA(2)), (".*", "frozen")], params)
    for _ in range(3):
        adapters = noise(jax.random.key(2), attach(jax.random.key(1), params, methods))
        got = adapted(model.apply, methods)({"params": params}, x, adapters=adapters)
        expected = model.apply({"params": merge(params, adapters, methods)}, x)
        np.testing.assert_allclose(got, expected, atol=1e-5)
        methods = methods.after_restart()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


def any_tree(kind: str):
    """Returns parameters of two layers in some container, and how to get at a layer's kernel and bias."""
    w, b = jax.random.normal(jax.random.key(0), (2, 12, 12)), jax.random.normal(jax.random.key(1), (2, 12))
    match kind:
        case "Haiku":
            tree = {f"mlp/~/linear_{i}": {"w": w[i], "b": b[i]} for i in range(2)}
            return tree, lambda tree, i: [tree[f"mlp/~/linear_{i}"][name] for name in "wb"]
        case "dataclasses in a list":
            return [Layer(w[i], b[i]) for i in range(2)], lambda tree, i: (tree[i].kernel, tree[i].bias)
        case "FrozenDict":
            tree = FrozenDict({str(i): {"w": w[i], "b": b[i]} for i in range(2)} | {"empty": {}})
            return tree, lambda tree, i: (tree[str(i)]["w"], tree[str(i)]["b"])
    return {i: (w[i], b[i]) for i in range(2)}, lambda tree, i: tree[i]


@pytest.mark.parametrize(
    "kind", [slow("Haiku"), "dataclasses in a list", "FrozenDict", slow("int keys and tuples")]
)
def test_parameters_in_any_container_come_back_in_it(kind):
    params, layer = any_tree(kind)
    kernels = [path for path, leaf in trees.flatten(params).items() if leaf.ndim == 2]
    state = State.init(jax.random.key(0), params, [("|".join(kernels), MoRA(2)), (".*", "train")])
    state = state.with_trainable(noise(jax.random.key(1), state.trainable))
    x = jax.random.normal(jax.random.key(2), (4, 12))

    def loss(params, x):
        for i in range(2):
            w, b = layer(params, i)
            x = jnp.tanh(x @ w + b[None])
        return jnp.sum(x)

    merged = state.merged()
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    value, gradients = jax.jit(value_and_grad(loss))(state, x)
    np.testing.assert_allclose(value, loss(merged, x), atol=1e-5)
    expected = jax.jit(jax.grad(lambda t: loss(state.with_trainable(t).merged(), x)))(state.trainable)
    for got, wanted in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    again, _, _ = restart(jax.random.key(3), merged, state.adapters, state.methods)
    assert jax.tree.structure(again) == jax.tree.structure(params)


def test_sharded_parameters_stay_sharded_and_compute_the_same():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = {"up": jax.random.normal(jax.random.key(0), (16, 24)), "down": jnp.ones((24, 16))}
    places = {"up": jax.P("data", "model"), "down": jax.P("model", "data")}
    state = State.init(jax.random.key(0), params, [("up", MoRA(2)), ("down", LoRA(2))])
    state = state.with_trainable(noise(jax.random.key(1), state.trainable))
    sharded = jax.tree.map(lambda w, p: jax.device_put(w, jax.NamedSharding(mesh, p)), params, places)
    x = jax.random.normal(jax.random.key(2), (8, 16))
    x_sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))

    def loss(params, x):
        return jnp.mean(jnp.sin(jnp.tanh(x @ params["up"]) @ params["down"]))

    step = jax.jit(value_and_grad(loss))
    expected, gradients = step(state, x)
    on_mesh = dataclasses.replace(state, params=sharded)
    value, found = step(on_mesh, x_sharded)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, wanted in zip(*map(jax.tree.leaves, (found, gradients)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    for path, w in on_mesh.merged().items():
        assert w.sharding == sharded[path].sharding
        np.testing.assert_allclose(w, state.merged()[path], rtol=1e-5)


@pytest.mark.slow
def test_outputs_and_other_collections_are_those_of_the_function():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.Dense(12)(x)
            return {"y": nn.BatchNorm(use_running_average=not train)(x), "shape": x.shape}

    model, x = Model(), jax.random.normal(jax.random.key(0), (4, 12))
    variables = model.init(jax.random.key(1), x, train=False)
    methods = assign([("Dense_0/kernel", MoRA(2)), (".*", "frozen")], variables["params"])
    adapters = noise(jax.random.key(2), attach(jax.random.key(1), variables["params"], methods))
    call = adapted(functools.partial(model.apply, mutable=["batch_stats"]), methods)
    outputs, state = call(variables, x, train=True, adapters=adapters)
    merged = variables | {"params": merge(variables["params"], adapters, methods)}
    expected, expected_state = model.apply(merged, x, train=True, mutable=["batch_stats"])
    assert outputs["shape"] == (4, 12)
    np.testing.assert_allclose(outputs["y"], expected["y"], atol=1e-5)
    for got, wanted in zip(*map(jax.tree.leaves, (state, expected_state)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_a_bfloat16_base_is_not_rounded():
    """An update of 1e-4 vanishes in bfloat16 weights of 1. A product keeps it; nothing else is allowed."""
    params = {"w": jnp.ones((16, 16), jnp.bfloat16)}
    methods = assign([("w", MoRA(2))], params)
    adapters = {"w": {"m_RR": jnp.full((8, 8), 1e-4)}}
    call = adapted(lambda p, x: x @ p["w"].astype(jnp.float32), methods)
    x = jnp.ones((3, 16))
    np.testing.assert_allclose(call(params, x, adapters=adapters) - 16, 16e-4, rtol=1e-2)
    wide = adapted(lambda p, x: jnp.sum(p["w"].astype(jnp.float32)) + x.sum(), methods)
    np.testing.assert_allclose(wide(params, x, adapters=adapters), 256 * (1 + 1e-4) + 48, rtol=1e-5)
    with pytest.raises(InputError, match=r"w is stored in bfloat16 and read by .*round it away"):
        adapted(lambda p: p["w"] * 2, methods)(params, adapters=adapters)


def test_dropout_is_applied_or_refused():
    params = {"w": jnp.eye(16)}
    methods = assign([("w", LoRA(16, dropout=0.5))], params)
    adapters = {"w": {"a_KR": jnp.eye(16), "b_RD": jnp.eye(16)}}
    call = adapted(lambda p, x: x @ p["w"], methods)
    x = jnp.ones((64, 16))
    with pytest.raises(InputError, match="lora has dropout: pass dropout_key"):
        call(params, x, adapters=adapters)
    np.testing.assert_allclose(call(params, x, adapters=adapters, dropout_key=None), 2.0)
    dropped = call(params, x, adapters=adapters, dropout_key=jax.random.key(0))
    assert set(np.unique(dropped)) == {1.0, 3.0}  # the base alone, or an update of 1 / (1 - 0.5)
    with pytest.raises(InputError, match=r"w is read by .*dropout of lora cannot apply"):
        adapted(lambda p: p["w"] * 2, methods)(params, adapters=adapters, dropout_key=jax.random.key(0))


def test_layers_of_a_scan_drop_different_inputs():
    params = {"w": jnp.zeros((2, 16, 16))}
    methods = assign([("w", On(LoRA(16, dropout=0.5), stack=(0,)))], params)
    eye = jnp.broadcast_to(jnp.eye(16), (2, 16, 16))
    call = adapted(lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1], methods)
    ys = call(
        params, jnp.ones((4, 16)), adapters={"w": {"a_KR": eye, "b_RD": eye}}, dropout_key=jax.random.key(0)
    )
    assert not np.array_equal(ys[0], ys[1])


def test_a_function_that_reads_no_adapted_kernel_is_refused():
    params = {"w": jnp.ones((8, 8)), "v": jnp.ones((8, 8))}
    methods = assign([("w", MoRA(2)), (".*", "frozen")], params)
    adapters = attach(jax.random.key(0), params, methods)
    with pytest.raises(InputError, match="reads none of the adapted kernels: 'w'"):
        adapted(lambda p, x: x @ p["v"], methods)(params, jnp.ones((2, 8)), adapters=adapters)


def test_missing_kernels_and_arrays_are_named():
    params = {"w": jnp.ones((8, 8))}
    methods = assign([("w", MoRA(2))], params)
    adapters = attach(jax.random.key(0), params, methods)
    call = adapted(lambda p: p["v"], methods)
    with pytest.raises(InputError, match="the parameters have no 'w', which the methods adapt"):
        call({"v": jnp.ones((8, 8))}, adapters=adapters)
    with pytest.raises(InputError, match="the adapters have no arrays of mora for 'w'"):
        call(params, adapters={})


def test_bind_under_a_model_that_does_not_call_dense_is_refused():
    model, x = nn.Dense(8), jnp.ones((2, 8))
    params = model.init(jax.random.key(0), x)["params"]
    methods = assign([("kernel", MoRA(2)), (".*", "frozen")], params)
    bound = bind(params, attach(jax.random.key(0), params, methods), methods)
    with pytest.raises(InputError, match="the model reads kernel itself, and would ignore its mora adapter"):
        model.apply({"params": bound}, x)
    on = assign([("kernel", On(MoRA(2), inputs=(1,))), (".*", "frozen")], params)
    with pytest.raises(InputError, match=r"kernel: dense takes kernels \(in, out\), not On"):
        bind(params, attach(jax.random.key(0), params, on), on)


@pytest.mark.slow  # test_state.py restarts
def test_a_state_goes_through_ten_restarts_with_two_compilations_and_never_the_wrong_method():
    model, x = (
        nn.Sequential([nn.Dense(12), nn.tanh, nn.Dense(8)]),
        jax.random.normal(jax.random.key(0), (4, 8)),
    )
    params = model.init(jax.random.key(0), x)["params"]
    rules = [(".*kernel", MoRA(2)), (".*bias", "train"), (".*", "frozen")]
    state = State.init(jax.random.key(1), params, rules)
    optimizer = state.optimizer(optax.adam(1e-2))
    opt_state, compiled = optimizer.init(state.trainable), 0

    def loss(params, x):
        return jnp.mean((model.apply({"params": params}, x) - x[::-1]) ** 2)

    @jax.jit
    def step(state, opt_state, x):
        nonlocal compiled
        compiled += 1
        value, gradients = value_and_grad(loss)(state, x)
        updates, opt_state = optimizer.update(gradients, opt_state, state.trainable)
        return state.updated(updates), opt_state, value

    losses = []
    restart = jax.jit(lambda key, state, opt_state: state.restart(key, opt_state, optimizer))
    for i in range(11):
        state, opt_state, value = step(state, opt_state, x)
        losses.append(float(value))
        before = loss(state.merged(), x)
        state, opt_state = restart(jax.random.key(i), state, opt_state)
        np.testing.assert_allclose(adapted(loss)(state, x), before, rtol=1e-5)
    assert compiled == 2
    assert losses[-1] < losses[0]
    other = assign(rules, params)
    assert other != state.methods
    with pytest.raises(InputError, match="a State has methods of its own"):
        adapted(loss, other)(state, x)


@pytest.mark.slow
def test_layers_of_a_stack_that_are_indexed_drop_different_inputs():
    params = {"w": jnp.zeros((2, 16, 16))}
    methods = assign([("w", On(LoRA(16, dropout=0.5), stack=(0,)))], params)
    eye = jnp.broadcast_to(jnp.eye(16), (2, 16, 16))
    call = adapted(lambda p, x: [x @ p["w"][i] for i in range(2)], methods)
    adapters = {"w": {"a_KR": eye, "b_RD": eye}}
    ys = call(params, jnp.ones((4, 16)), adapters=adapters, dropout_key=jax.random.key(0))
    assert not np.array_equal(*ys)


@pytest.mark.slow
def test_a_dropout_key_is_taken_where_no_method_has_dropout():
    params = {"w": jnp.ones((8, 8))}
    methods = assign([("w", MoRA(2))], params)
    adapters = random_adapters(params, methods)
    x = jnp.ones((2, 8))
    call = adapted(lambda p, x: x @ p["w"], methods)
    plain = call(params, x, adapters=adapters)
    np.testing.assert_array_equal(call(params, x, adapters=adapters, dropout_key=jax.random.key(0)), plain)
    own = adapted(lambda p, x, dropout_key: x @ p["w"] + dropout_key, methods)
    np.testing.assert_array_equal(own(params, x, adapters=adapters, dropout_key=1.0), plain + 1)


def test_what_is_no_array_is_returned_as_it_is():
    params = {"w": jnp.ones((8, 8))}
    methods = assign([("w", MoRA(2))], params)
    call = adapted(lambda p, x: {"y": x @ p["w"], "note": "hi", "width": 8}, methods)
    outputs = call(params, jnp.ones((2, 8)), adapters=random_adapters(params, methods))
    assert (outputs["note"], outputs["width"]) == ("hi", 8)
    assert type(outputs["width"]) is int


@pytest.mark.slow
def test_a_function_may_return_its_parameters_only():
    params = {"w": jnp.ones((8, 8))}
    methods = assign([("w", MoRA(2))], params)
    adapters = random_adapters(params, methods)
    returned = adapted(lambda p: p, methods)(params, adapters=adapters)
    np.testing.assert_allclose(returned["w"], merge(params, adapters, methods)["w"], atol=1e-6)


@pytest.mark.slow
def test_a_hessian_goes_through_two_layers():
    params = {"up": jax.random.normal(jax.random.key(0), (6, 6)), "down": jnp.ones((6, 6))}
    methods = assign([(".*", MoRA(1))], params)
    adapters = random_adapters(params, methods)
    x = jax.random.normal(jax.random.key(1), (3, 6))

    def f(params, x):
        return jnp.sum(jnp.tanh(x @ params["up"]) @ params["down"])

    got = jax.jit(jax.hessian(lambda a: adapted(f, methods)(params, x, adapters=a)))(adapters)
    expected = jax.jit(jax.hessian(lambda a: f(merge(params, a, methods), x)))(adapters)
    for ours, theirs in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow
def test_a_custom_vjp_may_index_a_constant_of_the_program():
    @jax.custom_vjp
    def scaled(x, table):
        return x * table[0]

    def backward(table, g):
        return g * jax.lax.fori_loop(0, 2, lambda i, total: total + table[i], 0.0), None

    scaled.defvjp(lambda x, table: (scaled(x, table), table), backward)
    params = {"w": jnp.ones((8, 8))}
    methods = assign([("w", MoRA(2))], params)
    call = adapted(lambda p, x: jnp.sum(scaled(x @ p["w"], np.array([2.0, 3.0], np.float32))), methods)
    adapters = random_adapters(params, methods)
    gradient = jax.grad(lambda a: call(params, jnp.ones((2, 8)), adapters=a))(adapters)
    assert np.asarray(gradient["w"]["m_RR"]).any()


@pytest.mark.slow
def test_explicit_meshes_compute_the_same():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    params = {"w": jax.random.normal(jax.random.key(0), (16, 16))}
    methods = assign([("w", MoRA(2))], params)
    adapters = random_adapters(params, methods)
    x = jax.random.normal(jax.random.key(1), (8, 16))

    def f(params, x):
        return jnp.sum(jnp.sin(x @ params["w"]))

    expected = jax.grad(lambda a: f(merge(params, a, methods), x))(adapters)
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(x, jax.P("data"))
        call = adapted(f, methods, "merged")
        got = jax.jit(jax.grad(lambda a: call(params, on_mesh, adapters=a)))(adapters)
    np.testing.assert_allclose(got["w"]["m_RR"], expected["w"]["m_RR"], atol=1e-4)


@pytest.mark.slow
def test_a_stack_is_bound_for_each_of_its_layers():
    params = {"w": jax.random.normal(jax.random.key(0), (2, 8, 8))}
    methods = assign([("w", On(MoRA(2), stack=(0,)))], params)
    adapters, x = random_adapters(params, methods), jnp.ones((3, 8))
    bound = bind(params, adapters, methods)["w"]
    with pytest.raises(InputError, match=r"w is a stack of kernels \(2, 8, 8\)"):
        dense(x, [bound])
    merged = merge(params, adapters, methods)["w"]
    np.testing.assert_allclose(dense(x, [bound[1]])[0], x @ merged[1], atol=1e-5)


def test_adapters_of_other_methods_are_refused():
    params = {"w": jnp.ones((8, 8)), "v": jnp.ones((8, 8))}
    methods = assign([("w", MoRA(2)), ("v", "frozen")], params)
    wide = attach(jax.random.key(0), params, assign([("w", MoRA(4)), ("v", "frozen")], params))
    with pytest.raises(InputError, match=r"w/m_RR has shape \(8, 8\), and MoRA\(rank=2.* makes \(5, 5\)"):
        merge(params, wide, methods)
    more = attach(jax.random.key(0), params, assign([(".*", MoRA(2))], params))
    with pytest.raises(InputError, match="the methods adapt nothing with v/m_RR"):
        adapted(lambda p, x: x @ p["w"], methods)(params, jnp.ones((2, 8)), adapters=more)


@pytest.mark.parametrize(
    ("leaf", "choice", "message"),
    [
        (jnp.ones((8, 8), jnp.int8), MoRA(2), "w has type int8: only floating arrays"),
        (jnp.ones((8, 8), jnp.complex64), DoRA(2), "w has type complex64"),
        (jnp.ones((), jnp.int32), "train", "w has type int32"),
        (1.0, "train", "w is no array but 1.0"),
    ],
)
def test_arrays_that_cannot_be_trained_are_refused(leaf, choice, message):
    with pytest.raises(InputError, match=message):
        assign([("w", choice)], {"w": leaf})


@pytest.mark.parametrize("rules", [{"w": MoRA(2)}, [("w", MoRA(2), 1)], ["w"]])
def test_rules_are_a_list_of_pairs(rules):
    with pytest.raises(InputError, match="rules are a list of pairs"):
        assign(rules, {"w": jnp.ones((8, 8))})


def test_one_array_may_be_all_parameters():
    state = State.init(jax.random.key(0), jnp.ones((8, 8)), [(".*", "train")])
    assert state.trainable["params"].shape == (8, 8)
    with pytest.raises(InputError, match="the first argument is a State, not dict"):
        value_and_grad(lambda p: p)({})
