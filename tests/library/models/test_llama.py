"""The model: recorded numbers of the authors' code, compute options against each other, causality."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import quick, slow

from mora_jax import sharding, trees
from mora_jax.errors import InputError
from mora_jax.methods import LoRA, MoRA, Rotate, Share
from mora_jax.models.batch import Batch
from mora_jax.models.llama import STACKED, Compute, Llama, LlamaConfig, abstract_params
from mora_jax.models.rope import Rope
from mora_jax.transform import assign, attach, bind, merge
from train.perf.plan.flops import product_flops

LINEARS = "layers/.*_proj/kernel"
TINY = LlamaConfig(
    vocab_size=320, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4,
)  # fmt: skip
GROUPED = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2,
)  # fmt: skip
F32 = Compute(dtype="float32", loss_chunk=16)
TOKENS = jax.random.randint(jax.random.key(9), (2, 16), 0, 50)


def random_params(config: LlamaConfig) -> dict:
    model = Llama(config, Compute(dtype="float32", layers="scan"))
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@pytest.fixture(scope="module")
def params() -> dict:
    return random_params(GROUPED)


@functools.partial(jax.jit, static_argnums=1)
def logits(params, compute: Compute) -> jax.Array:
    return Llama(GROUPED, compute).apply({"params": params}, TOKENS)


def loss(params, compute: Compute, weights_BT=None) -> jax.Array:
    batch = Batch(TOKENS, weights_BT)
    total, count = Llama(GROUPED, compute).apply({"params": params}, batch, method="loss")
    return total / count


WAYS = [("unrolled", "dots"), ("unrolled", "full"), ("scan", "none"), ("scan", "dots"), ("scan", "full")]


@functools.partial(jax.jit, static_argnums=1)
def logits_and_gradient(params, compute: Compute):
    return logits(params, compute), jax.grad(loss)(params, compute)


@pytest.mark.parametrize(
    ("layers", "remat"),
    quick([("scan", "full")], WAYS),
)
def test_layers_and_remat_change_no_value(params, layers, remat):
    other = Compute(dtype="float32", layers=layers, remat=remat, loss_chunk=16)
    (y, got), (y_, expected) = (logits_and_gradient(params, compute) for compute in (other, F32))
    np.testing.assert_allclose(y, y_, atol=1e-5)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("path", quick(["merged"], ["merged", "activation"]))
def test_a_scan_computes_no_product_twice_and_keeps_nothing_wide_in_float32(params, path):
    methods = assign([(LINEARS, MoRA(4)), (".*", "frozen")], params, STACKED)
    adapters = attach(jax.random.key(1), params, methods)

    def pullback(layers, remat):
        compute = Compute(layers=layers, remat=remat, loss_chunk=16, adapter_path=path)
        return lambda a: jax.vjp(lambda a: loss(bind(params, a, methods), compute), a)[1]

    def products(layers, remat):
        return product_flops(jax.make_jaxpr(lambda a: pullback(layers, remat)(a)(1.0))(adapters))

    plain = products("unrolled", "none")
    assert products("scan", "dots") == products("scan", "none") == products("unrolled", "dots") == plain
    assert products("scan", "full") == products("unrolled", "full") > plain
    kept = jax.tree.leaves(jax.eval_shape(pullback("scan", "dots"), adapters))
    wide = [a for a in kept if a.shape[1:3] == TOKENS.shape]  # over layers, then batch and tokens
    assert {a.dtype for a in wide} == {jnp.dtype(jnp.bfloat16)}


def test_remat_keeps_the_residual_stream_alone(params):
    """For each layer what enters it and what enters its MLP; the loss is another loop."""
    full = Compute(layers="scan", remat="full", loss_chunk=16)
    pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, full), p)[1], params)
    kept = [a.shape for a in jax.tree.leaves(pullback) if a.ndim > 2 and a.dtype == jnp.bfloat16]
    assert kept == 2 * [(GROUPED.num_hidden_layers, *TOKENS.shape, GROUPED.hidden_size)]


@pytest.mark.slow
def test_the_loss_is_the_mean_of_shifted_predictions(params):
    logp = jax.nn.log_softmax(logits(params, F32))[:, :-1]
    expected = -jnp.mean(jnp.take_along_axis(logp, TOKENS[:, 1:, None], axis=-1))
    np.testing.assert_allclose(loss(params, F32), expected, rtol=1e-6)


@pytest.mark.slow
def test_the_loss_has_products_with_its_hessian(params):
    """By forward mode over reverse mode, beside differences of the gradient."""
    gradient = jax.jit(lambda p: jax.grad(loss)(p, F32))
    at = jax.tree.map(lambda p: jnp.sin(jnp.arange(p.size)).reshape(p.shape), params)
    product = jax.jit(lambda p: jax.jvp(gradient, (p,), (at,))[1])(params)
    ahead = gradient(jax.tree.map(lambda p, a: p + 1e-3 * a, params, at))
    behind = gradient(jax.tree.map(lambda p, a: p - 1e-3 * a, params, at))
    for ours, after, before in zip(*map(jax.tree.leaves, (product, ahead, behind)), strict=True):
        expected = (after - before) / 2e-3
        assert np.linalg.norm(ours - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.slow
def test_rows_of_weight_zero_count_for_nothing(params):
    first = loss(params, F32, weights_BT=jnp.array([[1.0], [0.0]]) * jnp.ones(TOKENS.shape))
    total, count = Llama(GROUPED, F32).apply({"params": params}, Batch(TOKENS[:1]), method="loss")
    np.testing.assert_allclose(first, total / count, rtol=1e-6)
    assert int(count) == 15


def test_no_output_depends_on_a_later_token(params):
    """By the gradient of place t's logits with respect to the table: token i stands at place i, so row i is
    place i's input."""

    def place(table, t):
        tokens_BT = jnp.arange(16)[None]
        y = Llama(GROUPED, F32).apply({"params": params | {"embed_tokens": {"embedding": table}}}, tokens_BT)
        return jnp.sum(y[0, t] * jnp.linspace(-1, 1, GROUPED.vocab_size))

    @jax.jit
    def through(table, t):
        # The head is tied to the same table, so its own share of the gradient is taken out.
        return jax.grad(place)(table, t) - jax.grad(lambda table: head_part(params, table, t))(table)

    untied = params["embed_tokens"]["embedding"]
    for t in (0, 7, 15):
        through_inputs = np.asarray(through(untied, t))[:16]
        assert np.abs(through_inputs[: t + 1]).max(axis=1).min() > 1e-6
        np.testing.assert_allclose(through_inputs[t + 1 :], 0, atol=1e-6)


def head_part(params, table, t):
    hidden = Llama(GROUPED, F32).apply({"params": params}, Batch(jnp.arange(16)[None]), method="hidden")
    return jnp.sum(hidden[0, t] @ table.T * jnp.linspace(-1, 1, GROUPED.vocab_size))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [slow(MoRA(4)), MoRA(4, Share(1), align=8), slow(LoRA(4))],
    ids=str,
)
@pytest.mark.parametrize(
    ("layers", "remat"),
    [
        slow("unrolled", "none"),
        ("scan", "full"),
        slow("unrolled", "full"),
        slow("scan", "none"),
    ],
)
def test_adapted_forward_is_the_merged_forward(params, method, layers, remat):
    methods = assign([(LINEARS, method), (".*", "frozen")], params, STACKED)
    adapters = jax.tree.map(
        lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape),
        attach(jax.random.key(1), params, methods),
    )
    if isinstance(method, MoRA) and method.align > 1:
        adapters = cut_to_r_hat(adapters, params, method)
    merged = logits(merge(params, adapters, methods), F32)
    assert float(jnp.abs(merged - logits(params, F32)).max()) > 0.1
    for path in ("merged", "activation"):
        compute = Compute(dtype="float32", layers=layers, remat=remat, adapter_path=path)
        np.testing.assert_allclose(logits(bind(params, adapters, methods), compute), merged, atol=2e-4)


def cut_to_r_hat(adapters, params, method: MoRA):
    shapes = trees.flatten(params)

    def cut(path, m):
        r = method.r_hat(*shapes[path.removesuffix("/m_RR")].shape[-2:])
        return jnp.zeros_like(m).at[:, :r, :r].set(m[:, :r, :r])

    return trees.unflatten({path: cut(path, m) for path, m in trees.flatten(adapters).items()})


def test_only_some_kernels_may_have_adapters(params):
    methods = assign([("layers/mlp/up_proj/kernel", LoRA(2)), (".*", "frozen")], params, STACKED)
    adapters = jax.tree.map(lambda a: a + 0.3, attach(jax.random.key(1), params, methods))
    got = logits(bind(params, adapters, methods), F32)
    np.testing.assert_allclose(got, logits(merge(params, adapters, methods), F32), atol=1e-4)


@pytest.mark.slow
def test_an_adapter_of_the_head_counts():
    params = random_params(TINY)
    methods = assign([("lm_head/kernel", LoRA(2)), (".*", "frozen")], params, STACKED)
    adapters = jax.tree.map(lambda a: a + 0.3, attach(jax.random.key(1), params, methods))
    forward = jax.jit(lambda variables: Llama(TINY, F32).apply(variables, TOKENS))
    got = forward({"params": bind(params, adapters, methods)})
    expected = forward({"params": merge(params, adapters, methods)})
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 16}, "does not divide into 16 heads"),
        ({"num_key_value_heads": 5}, "does not divide num_attention_heads"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"head_dim": -2}, "head_dim must be positive, or 0 for none"),
        ({"head_dim": 16, "hidden_size": 100}, "does not divide into 16 heads"),
        ({"model_type": "gemma"}, "model_type is one of llama, mistral, qwen2, qwen3, olmo2, not 'gemma'"),
        ({"sliding_window": 8}, "sliding_window is no option of model.model_type llama"),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias is no option of .* qwen2"),
        ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias is no option of .* qwen3"),
        ({"rope": Rope("dynamic", 2.0), "head_dim": 2}, "needs heads of width 4"),
        ({"rope": Rope("yarn", 2.0), "rope_theta": 1.0}, "needs model.rope_theta above 1"),
    ],
)
def test_an_impossible_model_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        LlamaConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "longrope"}, "type is one of default, linear, dynamic, llama3, yarn"),
        ({"factor": 2.0}, "factor has no effect with model.rope.type default"),
        ({"type": "linear", "truncate": False}, "truncate has no effect with model.rope.type linear"),
        ({"type": "linear", "factor": 0.9}, "factor must lie in"),
        ({"type": "yarn", "mscale": float("nan")}, "mscale must lie in"),
        ({"type": "llama3", "low_freq_factor": 4.0}, "low_freq_factor 4.0 must lie between 0 and"),
        ({"type": "yarn", "beta_slow": 0.0}, "beta_slow 0.0 must lie between 0 and"),
    ],
)
def test_an_impossible_scaling_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Rope(**fields)


def test_equal_models_have_equal_configs():
    """A head width that is given as the sizes imply it says nothing."""
    assert LlamaConfig(head_dim=48) == LlamaConfig() != LlamaConfig(head_dim=64)
    wide = LlamaConfig(head_dim=64)
    assert (wide.head_width, wide.q_width, wide.kv_width) == (64, 1024, 1024)


def test_cudnn_attention_is_bfloat16_only():
    with pytest.raises(InputError, match=r"needs compute\.dtype bfloat16"):
        Compute(dtype="float32", attention="cudnn")


NAMES = {
    "embed_tokens/embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}


def recorded(data, prefix: str, suffix: str, path: str) -> np.ndarray:
    """An array of a recorded model in this project's layout."""
    kernel = path.endswith("kernel")
    if path in NAMES:
        array = data[prefix + NAMES[path]]
        return array.T if kernel else array
    name = path.removeprefix("layers/").rpartition("/")[0].replace("/", ".")
    array = np.stack([data[f"{prefix}model.layers.{i}.{name}{suffix}"] for i in range(2)])
    return array.swapaxes(1, 2) if kernel else array


@pytest.fixture(params=[slow((1, Share(0, "wrap"))), (6, Rotate("wrap", "drop"))], ids=["type 1", "type 6"])
def tinyllama(golden, request):
    mora_type, operator = request.param
    data = np.load(golden / f"tinyllama_mora_type{mora_type}.npz")
    shapes = trees.flatten(abstract_params(TINY))
    params = trees.unflatten({path: jnp.array(recorded(data, "base/", ".weight", path)) for path in shapes})
    methods = assign([(LINEARS, MoRA(8, operator, r_hat_from="rounded")), (".*", "frozen")], params, STACKED)
    m = {f"{path}/m_RR": jnp.array(recorded(data, "M/", "", path)) for path, _ in methods.adapted()}
    return data, params, trees.unflatten(m), methods


@pytest.mark.parametrize("path", quick(["merged"], ["merged", "activation"]))
def test_logits_loss_and_gradients_match_the_authors_code(tinyllama, path):
    data, params, adapters, methods = tinyllama
    model = Llama(TINY, Compute(dtype="float32", adapter_path=path))
    tokens_BT = jnp.array(data["input_ids"], jnp.int32)

    def mean_loss(adapters):
        variables = {"params": bind(params, adapters, methods)}
        total, count = model.apply(variables, Batch(tokens_BT), method="loss")
        return total / count

    @jax.jit
    def everything(adapters):
        adapted = model.apply({"params": bind(params, adapters, methods)}, tokens_BT)
        merged = model.apply({"params": merge(params, adapters, methods)}, tokens_BT)
        return adapted, merged, jax.value_and_grad(mean_loss)(adapters)

    adapted, merged, (value, gradients) = everything(adapters)
    np.testing.assert_allclose(adapted, data["logits"], atol=1e-5)
    np.testing.assert_allclose(merged, data["merged_logits"], atol=1e-5)
    np.testing.assert_allclose(value, data["loss"], rtol=1e-6)
    for name, gradient in trees.flatten(gradients).items():
        expected = recorded(data, "gradM/", "", name.removesuffix("/m_RR"))
        np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-4)


def test_over_tensor_each_device_computes_the_norms_of_its_tokens(params):
    """Sequences or positions divide among four devices; for one token a sequence nothing is divided."""
    train = jax.jit(jax.grad(mean_logits))

    def tokens_of_norms(batch: int, length: int) -> set[int]:
        text = train.lower(params, jnp.zeros((batch, length), jnp.int32)).compile().as_text()
        shapes = re.findall(r"f32\[([\d,]+)\]\S* rsqrt\(", text)
        assert len(shapes) >= 7
        return {int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes}

    with jax.set_mesh(sharding.make_mesh(data=1, fsdp=1, tensor=4)):
        assert tokens_of_norms(4, 16) == {16}
        assert tokens_of_norms(2, 16) == {8}
        assert tokens_of_norms(4, 1) == {4}


def mean_logits(params, tokens_BT) -> jax.Array:
    return Llama(GROUPED, F32).apply({"params": params}, tokens_BT).mean()
