"""LLaMA and its like in Flax Linen: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Parameters are float32 and stacked over layers; products run in `Compute.dtype`. `mora_jax.bind` joins kernels
to their adapters.

Legend of shapes in names: B batch, T sequence, D hidden width, F MLP width, N query heads, K key/value heads,
H head width, V vocabulary, L layers.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.methods.base import Bound, padded
from mora_jax.methods.linear import TILE, Path, dense
from mora_jax.models.attention import HEADS, Visible, attention
from mora_jax.models.attention import Kernel as AttentionKernel
from mora_jax.models.batch import Batch
from mora_jax.models.cache import Cache, KeyValues
from mora_jax.models.config import LlamaConfig
from mora_jax.models.lookup import TABLE, TIED_HEAD, lookup
from mora_jax.models.loss import HEAD, cross_entropy
from mora_jax.models.rope import angles
from mora_jax.sharding import BATCH, COLUMNS, REPLICATED, ROWS, Layout, Rules

# Name of the residual stream between attention and MLP. The loop over layers keeps what enters each layer.
RESIDUAL = "residual"

# The kernels that are stacked over layers, by path.
STACKED = "layers/.*"

# The token embedding and the head, by path. A model with tied ones has the first alone.
EMBEDDINGS = ("embed_tokens/embedding", "lm_head/kernel")

# How the parameters may be divided over a mesh, by the end of their path.
LAYOUTS: Rules = (
    ("embed_tokens/embedding", TABLE),
    ("lm_head/kernel", HEAD),
    ("layers/(self_attn/[qkv]|mlp/(gate|up))_proj/kernel", COLUMNS),
    ("layers/(self_attn/o|mlp/down)_proj/kernel", ROWS),
    ("(.*_|.*/|)norm/scale|.*layernorm/scale", REPLICATED),
    ("layers/(self_attn/[qkv]|mlp/(gate|up))_proj/bias", Layout((P("tensor"), P()))),
    ("layers/(self_attn/o|mlp/down)_proj/bias", REPLICATED),
)
_TOKENS = Layout((P(BATCH, None),))
# The residual stream, which norms read and products add to: over `tensor`, too, each device has some tokens
# (sequence parallelism, arXiv:2205.05198), by sequences, or else by positions. Otherwise all devices would
# compute every norm. For one token a sequence the number of messages counts, not their size.
RESIDUAL_PARTS = Layout((P((*BATCH, "tensor"), None, None), P(BATCH, "tensor", None), P(BATCH, None, None)))
_HIDDEN = Layout((P(BATCH, None, None),))
_WIDE = Layout((P(BATCH, None, "tensor"), P(BATCH, None, None)))


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the model is computed; no option changes the result, except by rounding.

    Attributes:
      dtype: type of products and activations.
      attention: attention kernel: "xla" runs anywhere, "cudnn" is the fast one on NVIDIA GPUs (bfloat16),
        "splash" on TPUs (sequences of a multiple of 128 tokens).
      layers: "unrolled" runs fastest; "scan" compiles fastest.
      remat: what the backward pass recomputes. "none" keeps all activations; "dots" keeps the products and
        recomputes the steps between them, which scanned layers should do; "full" keeps only the residual
        stream, two states a layer, and takes least memory.
      loss_chunk: largest number of tokens whose logits a device holds at a time.
      adapter_path: forces how adapters are computed: "merged" into the kernels, the same with "compressed" or
        "folded" gradients, or by "activation"; "auto" chooses the fastest.
      gradient_sums: type in which devices of a mesh send each other their parts of gradients, to be summed.
        "bfloat16" halves what they send, and rounds each part and each sum of parts. It concerns kernels,
        embeddings, MoRA's matrices and what follows from a kernel's gradient, as with DoRA. Other adapters'
        gradients, such as LoRA's, are summed in `dtype` in any case.
    """

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: AttentionKernel = "xla"
    layers: Literal["unrolled", "scan"] = "unrolled"
    remat: Literal["none", "dots", "full"] = "none"
    loss_chunk: int = 8192
    adapter_path: Path = "auto"
    gradient_sums: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise InputError("compute.attention cudnn needs compute.dtype bfloat16")
        if self.loss_chunk < 1:
            raise InputError(f"compute.loss_chunk must be at least 1 token, not {self.loss_chunk}")


class Kernel(nn.Module):
    """Returns one kernel with its adapter and its bias, so that one product can span several kernels."""

    shape: tuple[int, int]
    std: float
    bias: bool = False

    @nn.compact
    def __call__(self) -> "Parts":
        w = self.param("kernel", nn.initializers.normal(self.std), self.shape)
        layout = sharding.find("/".join((*self.path, "kernel")), LAYOUTS)
        bias_D = self.param("bias", nn.initializers.zeros, self.shape[1:]) if self.bias else None
        return Parts(w, layout, bias_D)


class Parts(NamedTuple):
    """A kernel, bound to its adapter if it has one, how it may be divided over a mesh, and its bias."""

    w: Array | Bound
    layout: Layout
    bias_D: Array | None


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * scale_D.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    Given the keys and values of earlier tokens, it also returns those of the tokens of x.
    """

    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(
        self, x_BTD: Array, rope: tuple[Array, Array], visible: Visible, past: KeyValues | None = None
    ) -> tuple[Array, KeyValues | None]:
        c, kind = self.config, self.config.architecture
        widths = {"q_proj": c.q_width, "k_proj": c.kv_width, "v_proj": c.kv_width}
        biased = c.attention_bias or kind.qkv_bias
        kernels = [
            Kernel((c.hidden_size, width), c.initializer_range, biased, name=name)()
            for name, width in widths.items()
        ]
        q, k, v = _dense(self, sharding.joined(x_BTD, _parts(x_BTD)), kernels)
        if kind.qk_norm == "width":
            q, k = self._norms(q, k)
        q, k, v = (sharding.constrain(y.reshape(*y.shape[:-1], -1, c.head_width), HEADS) for y in (q, k, v))
        if kind.qk_norm == "head":
            q, k = self._norms(q, k)
        q_BTNH, new = _rotate(q, rope), KeyValues(_rotate(k, rope), v)
        seen = past.with_new(new, visible.first) if past else new
        y_BTNH = attention(q_BTNH, seen.k_BSKH, seen.v_BSKH, visible, self.compute.attention)
        out = Kernel((c.q_width, c.hidden_size), c.initializer_range, c.attention_bias, name="o_proj")()
        y_BTD = _dense(self, y_BTNH.reshape(*x_BTD.shape[:2], c.q_width), [out])[0]
        return sharding.parted(y_BTD, _parts(y_BTD)), new if past else None

    def _norms(self, q: Array, k: Array) -> tuple[Array, Array]:
        eps = self.config.rms_norm_eps
        return RMSNorm(eps, name="q_norm")(q), RMSNorm(eps, name="k_norm")(k)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c = self.config
        wide = (c.hidden_size, c.intermediate_size)
        kernels = [
            Kernel(wide, c.initializer_range, c.mlp_bias, name=name)() for name in ("gate_proj", "up_proj")
        ]
        # Products have full tiles for any width: the padding beyond F is zero, and so is silu(0) * 0.
        x_BTD = sharding.joined(x_BTD, _parts(x_BTD))
        ys_BTF = _dense(self, x_BTD, kernels, sharding.tile(c.intermediate_size, TILE))
        gate_BTF, up_BTF = (sharding.constrain(y_BTF, _WIDE) for y_BTF in ys_BTF)
        down = Kernel((wide[1], wide[0]), c.initializer_range, c.mlp_bias, name="down_proj")()
        y_BTD = _dense(self, jax.nn.silu(gate_BTF) * up_BTF, [down])[0]
        return sharding.parted(y_BTD, _parts(y_BTD))


class Block(nn.Module):
    """One transformer layer in the form that `nn.scan` takes: from carry to carry."""

    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(
        self, x_BTD: Array, rope: tuple[Array, Array], visible: Visible, past: KeyValues | None = None
    ) -> tuple[Array, KeyValues | None]:
        kind = self.config.architecture
        attend_norm, mlp_norm = (RMSNorm(self.config.rms_norm_eps, name=name) for name in kind.norms)
        attend = Attention(self.config, self.compute, name="self_attn")
        mlp = MLP(self.config, self.compute, name="mlp")
        y_BTD, new = attend(x_BTD if kind.norms_after else attend_norm(x_BTD), rope, visible, past)
        y_BTD = attend_norm(y_BTD) if kind.norms_after else y_BTD
        x_BTD = _added(x_BTD, y_BTD)
        x_BTD = checkpoint_name(x_BTD, RESIDUAL)
        y_BTD = mlp_norm(mlp(x_BTD)) if kind.norms_after else mlp(mlp_norm(x_BTD))
        return _added(x_BTD, y_BTD), new


def _added(x_BTD: Array, y_BTD: Array) -> Array:
    """Returns x + y, added as matrices.

    XLA adds x within the product that makes y. If x had to be reshaped for that, it would be copied first, so
    that the product can overwrite it (docs/performance.md). Over `tensor` devices sum the product first.
    """
    if sharding.divides_products():
        return sharding.constrain(x_BTD + y_BTD, _parts(x_BTD))
    x_TD, y_TD = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, y_BTD))
    sum_TD = _by_sequences(x_TD + y_TD, x_BTD.shape[0])
    return sum_TD.reshape(x_BTD.shape)


def _by_sequences(x_TD: Array, sequences: int) -> Array:
    return sharding.constrain(x_TD, _TOKENS) if sequences % sharding.batch_shards() == 0 else x_TD


def _parts(x_BTD: Array) -> Layout:
    return RESIDUAL_PARTS if x_BTD.shape[1] > 1 else _HIDDEN


class Llama(nn.Module):
    """The language model.

    Attributes:
      config: sizes and options.
      compute: how it is computed.
    """

    config: LlamaConfig
    compute: Compute = Compute()

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(
            c.vocab_size, c.hidden_size, embedding_init=nn.initializers.normal(c.initializer_range)
        )
        self.layers = _stack(Block, c.num_hidden_layers, self.compute)(c, self.compute)
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = Kernel((c.hidden_size, c.vocab_size), c.initializer_range)

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Returns the logits (float32) for the token after each position."""
        x_BTD, w_DV = self.hidden(Batch(tokens_BT)), self.head()
        return jnp.matmul(x_BTD, w_DV.astype(x_BTD.dtype), preferred_element_type=jnp.float32)

    def loss(self, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the summed loss (nats) of the tokens that count, by their weights, and the sum of these."""
        x_BTD, tokens_BT = self.hidden(batch), batch.tokens_BT
        # Every position is computed, so that shapes stay powers of two; the last one predicts nothing.
        weights_BT = batch.target_weights()
        x_TD = _by_sequences(x_BTD.reshape(-1, x_BTD.shape[-1]), x_BTD.shape[0])
        targets_T = jnp.roll(tokens_BT, -1, axis=1).reshape(-1)
        shards = math.gcd(sharding.batch_shards(), x_TD.shape[0])
        chunk = shards * largest_divisor(x_TD.shape[0] // shards, self.compute.loss_chunk)
        sums, layout = self.compute.gradient_sums, self.head_layout()
        total = cross_entropy(x_TD, self.head(), targets_T, weights_BT.reshape(-1), chunk, sums, layout)
        return jnp.asarray(total), weights_BT.sum()

    def hidden(self, batch: Batch) -> Float[Array, "B T D"]:
        """Returns the normalised hidden states that the head takes."""
        x_BTD, c = self._embedded(batch.tokens_BT), self.config
        segments_BT = batch.segments_BT
        of_all_rows = segments_BT is None and batch.positions_BT is None
        rope = self._rope(x_BTD.shape[1], None if of_all_rows else batch.positions())
        visible = Visible(c.sliding_window, segments_BT=segments_BT, most_segments=batch.most_segments)
        x_BTD, _ = self.layers(x_BTD, rope, visible, None)
        return sharding.joined(self.norm(x_BTD), _parts(x_BTD))

    def extend(self, tokens_BT: Int[Array, "B T"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        """Returns the logits (float32) for the token after the last one, and the cache with all of them.

        Sequences must stay within the context, where rope.type dynamic scales nothing.
        """
        x_BTD = self._embedded(tokens_BT)
        rope = self._rope(1, cache.positions(tokens_BT.shape[1]))
        visible = Visible(self.config.sliding_window, cache.starts_B, cache.end)
        x_BTD, new = self.layers(x_BTD, rope, visible, cache.layers)
        x_BD, w_DV = self.norm(x_BTD[:, -1]), self.head()
        logits_BV = jnp.matmul(x_BD, w_DV.astype(x_BD.dtype), preferred_element_type=jnp.float32)
        return logits_BV, cache.extended(new)

    def _rope(self, length: int, positions_BT: Array | None) -> tuple[Array, Array]:
        """Returns cos and sin of the angles: (B, T, J), or (T, J) if every row has the positions 0, 1, ..."""
        c = self.config
        at_T = None if positions_BT is None else positions_BT.ravel()
        rope = angles(c.rope, length, c.head_width, c.rope_theta, c.max_position_embeddings, at_T)
        if positions_BT is None:
            return rope
        cos_BTJ, sin_BTJ = (a.reshape(*positions_BT.shape, -1) for a in rope)
        return cos_BTJ, sin_BTJ

    def _embedded(self, tokens_BT: Array) -> Array:
        table_VD, compute = self.embed_tokens.embedding, self.compute
        x_BTD: Any = lookup(table_VD, tokens_BT, TABLE, compute.dtype, compute.gradient_sums)
        return sharding.parted(x_BTD, _parts(x_BTD))

    def head(self) -> Float[Array, "D V"]:
        """Returns the effective kernel from hidden states to logits."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.embedding.T
        w = self.lm_head().w
        return w.method.weight(w.arrays, w.w) if isinstance(w, Bound) else w

    def head_layout(self) -> Layout:
        """Returns how the head may be divided over a mesh."""
        return TIED_HEAD if self.config.tie_word_embeddings else HEAD


def abstract_params(config: LlamaConfig) -> Any:
    """Returns the shapes and types of a model's parameters, layers stacked, without computing them."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _traced_params(config))


@functools.lru_cache(maxsize=64)
def _traced_params(config: LlamaConfig) -> Any:
    tokens_BT = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    init = Llama(config, Compute(layers="scan")).init
    return jax.eval_shape(init, jax.random.key(0), tokens_BT)["params"]


def _stack(block: type[nn.Module], length: int, compute: Compute) -> Any:
    unrolled = compute.layers == "unrolled"
    if compute.remat != "none":
        residual = jax.checkpoint_policies.save_only_these_names(RESIDUAL)
        policy = _is_product if compute.remat == "dots" else residual
        # A loop keeps XLA from sharing computations between the passes; unrolled layers need the barrier.
        block = nn.remat(block, prevent_cse=unrolled, policy=policy)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
        length=length,
        unroll=length if unrolled else 1,
    )


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
    """Returns whether a layer keeps a value for its backward pass: products do, those of `dense` among them.

    A scan without a policy would keep every float32 step between them too.
    """
    return primitive.name in ("dot_general", "custom_vjp_call")


def _dense(module: Attention | MLP, x: Array, kernels: list[Parts], tile: int = 1) -> list[Array]:
    ws, layouts, biases = zip(*kernels, strict=True)
    key = module.make_rng("dropout") if module.has_rng("dropout") else None
    # Unrolled layers that keep activations also keep the kernels, which are much smaller. Recomputed layers
    # keep them from their second forward pass on. A policy for products would keep those of all layers.
    compute = module.compute
    keep = compute.remat == "full" or (compute.remat == "none" and compute.layers == "unrolled")
    ys = dense(x, ws, None, compute.adapter_path, key, tile, layouts, keep, compute.gradient_sums)
    return [y if b_D is None else y + _like(b_D, y) for y, b_D in zip(ys, biases, strict=True)]


def _like(bias_D: Array, y: Array) -> Array:
    """Returns a bias in the type and the number of axes of the outputs, padded to their tiles."""
    bias_D = padded(bias_D.astype(y.dtype), 0, y.shape[-1])
    return bias_D.reshape((1,) * (y.ndim - 1) + (-1,))


def _rotate(x_BTNH: Array, rope: tuple[Array, Array]) -> Array:
    """Returns every head with its pairs (j, j + H/2) rotated by the angle of the position."""
    of_all_rows = rope[0].ndim == 2
    cos, sin = (a[None, :, None, :] if of_all_rows else a[:, :, None, :] for a in rope)
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTNH.dtype)


def largest_divisor(n: int, limit: int) -> int:
    """Returns the largest divisor of n that is at most `limit`."""
    return max(i for i in range(1, min(n, limit) + 1) if n % i == 0)
