"""LLaMA in Flax Linen: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Parameters are float32 and stacked over layers; products run in `Compute.dtype`. `mora_jax.bind` joins kernels
to their adapters.

Legend of shapes in names: B batch, T sequence, D hidden width, F MLP width, N query heads, K key/value heads,
H head width, V vocabulary, L layers.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mora_jax import sharding
from mora_jax.errors import InputError, check_float32
from mora_jax.methods.base import Bound
from mora_jax.methods.linear import TILE, Path, dense
from mora_jax.models.attention import HEADS, attention
from mora_jax.models.attention import Kernel as AttentionKernel
from mora_jax.models.loss import HEAD, cross_entropy
from mora_jax.sharding import BATCH, COLUMNS, REPLICATED, ROWS, Layout, Rules

# Name of the residual stream between attention and MLP. The loop over layers keeps what enters each layer.
RESIDUAL = "residual"

# The kernels that are stacked over layers, by path.
STACKED = "layers/.*"

# How the parameters may be divided over a mesh, by the end of their path.
LAYOUTS: Rules = (
    ("embed_tokens/embedding", ROWS),
    ("lm_head/kernel", HEAD),
    ("layers/(self_attn/[qkv]|mlp/(gate|up))_proj/kernel", COLUMNS),
    ("layers/(self_attn/o|mlp/down)_proj/kernel", ROWS),
    ("(.*_|.*/|)norm/scale|.*layernorm/scale", REPLICATED),
)
_HIDDEN = Layout((P(BATCH, None, None),))
_WIDE = Layout((P(BATCH, None, "tensor"), P(BATCH, None, None)))

# The largest values that are accepted, so that a bad config is refused before it costs memory or hours.
_MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "max_position_embeddings": 2**31 - 1,
    "rope_theta": 1e30,
    "rms_norm_eps": 1.0,
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of the model, named as in Hugging Face's config.json.

    Attributes:
      vocab_size: tokens in the vocabulary.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP.
      num_hidden_layers: transformer layers.
      num_attention_heads: query heads; they divide hidden_size into equal, even widths.
      num_key_value_heads: key/value heads; must divide num_attention_heads.
      max_position_embeddings: longest sequence, in tokens.
      rope_theta: base of the rotary frequencies.
      rms_norm_eps: added to the mean square in RMSNorm.
      initializer_range: standard deviation of the normal initialisation.
      tie_word_embeddings: whether the head is the transposed embedding.
    """

    vocab_size: int = 32_100
    hidden_size: int = 768
    intermediate_size: int = 2560
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            if not value > 0:
                raise InputError(f"model.{name} must be positive, not {value}")
            if value > most:
                raise InputError(f"model.{name} must be at most {most:,}, not {value}")
            check_float32(f"model.{name}", value)
        if not 0 <= self.initializer_range <= 1:
            raise InputError(f"model.initializer_range must lie in [0, 1], not {self.initializer_range}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise InputError(
                f"model.hidden_size {self.hidden_size} does not divide into "
                f"{self.num_attention_heads} heads of even width"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"model.num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads


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
    """

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: AttentionKernel = "xla"
    layers: Literal["unrolled", "scan"] = "unrolled"
    remat: Literal["none", "dots", "full"] = "none"
    loss_chunk: int = 8192
    adapter_path: Path = "auto"

    def __post_init__(self) -> None:
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise InputError("compute.attention cudnn needs compute.dtype bfloat16")
        if self.loss_chunk < 1:
            raise InputError(f"compute.loss_chunk must be at least 1 token, not {self.loss_chunk}")


class Kernel(nn.Module):
    """Returns one kernel with its adapter, so that one product can span several kernels."""

    shape: tuple[int, int]
    std: float

    @nn.compact
    def __call__(self) -> "Parts":
        w = self.param("kernel", nn.initializers.normal(self.std), self.shape)
        layout = sharding.find("/".join((*self.path, "kernel")), LAYOUTS)
        return Parts(w, layout)


class Parts(NamedTuple):
    """A kernel, bound to its adapter if it has one, and how it may be divided over a mesh."""

    w: Array | Bound
    layout: Layout


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
    """Causal grouped-query attention with rotary positions."""

    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD: Array, rope: tuple[Array, Array]) -> Array:
        c = self.config
        q_width, kv_width = c.hidden_size, c.num_key_value_heads * c.head_dim
        widths = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
        kernels = [Kernel((c.hidden_size, w), c.initializer_range, name=name)() for name, w in widths.items()]
        q, k, v = (
            sharding.constrain(y.reshape(*y.shape[:-1], -1, c.head_dim), HEADS)
            for y in _dense(self, x_BTD, kernels)
        )
        q_BTNH, k_BTKH = _rotate(q, rope), _rotate(k, rope)
        y_BTNH = attention(q_BTNH, k_BTKH, v, self.compute.attention)
        out = Kernel((q_width, c.hidden_size), c.initializer_range, name="o_proj")()
        return _dense(self, y_BTNH.reshape(*x_BTD.shape[:2], q_width), [out])[0]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c = self.config
        wide = (c.hidden_size, c.intermediate_size)
        kernels = [Kernel(wide, c.initializer_range, name=name)() for name in ("gate_proj", "up_proj")]
        # Products have full tiles for any width: the padding beyond F is zero, and so is silu(0) * 0.
        ys_BTF = _dense(self, x_BTD, kernels, sharding.tile(c.intermediate_size, TILE))
        gate_BTF, up_BTF = (sharding.constrain(y_BTF, _WIDE) for y_BTF in ys_BTF)
        down = Kernel((c.intermediate_size, c.hidden_size), c.initializer_range, name="down_proj")()
        return _dense(self, jax.nn.silu(gate_BTF) * up_BTF, [down])[0]


class Block(nn.Module):
    """One transformer layer in the form that `nn.scan` takes: from carry to carry."""

    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD: Array, rope: tuple[Array, Array]) -> tuple[Array, None]:
        eps = self.config.rms_norm_eps
        normed_BTD = RMSNorm(eps, name="input_layernorm")(x_BTD)
        y_BTD = Attention(self.config, self.compute, name="self_attn")(normed_BTD, rope)
        x_BTD = sharding.constrain(x_BTD + y_BTD, _HIDDEN)
        x_BTD = checkpoint_name(x_BTD, RESIDUAL)
        normed_BTD = RMSNorm(eps, name="post_attention_layernorm")(x_BTD)
        y_BTD = MLP(self.config, self.compute, name="mlp")(normed_BTD)
        return sharding.constrain(x_BTD + y_BTD, _HIDDEN), None


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
        x_BTD, w_DV = self.hidden(tokens_BT), self.head()
        return jnp.matmul(x_BTD, w_DV.astype(x_BTD.dtype), preferred_element_type=jnp.float32)

    def loss(
        self, tokens_BT: Int[Array, "B T"], weights_B: Float[Array, "B"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the summed next-token loss (nats) and the number of predictions, weighted by sequence."""
        x_BTD = self.hidden(tokens_BT)
        # Every position is computed, so that shapes stay powers of two; the last one predicts nothing.
        length = tokens_BT.shape[1]
        weights_BT = weights_B[:, None] * (jnp.arange(length) < length - 1)[None, :]
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        targets_T = jnp.roll(tokens_BT, -1, axis=1).reshape(-1)
        shards = math.gcd(sharding.batch_shards(), x_TD.shape[0])
        chunk = shards * _largest_divisor(x_TD.shape[0] // shards, self.compute.loss_chunk)
        total = cross_entropy(x_TD, self.head(), targets_T, weights_BT.reshape(-1), chunk)
        return jnp.asarray(total), weights_BT.sum()

    def hidden(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the normalised hidden states that the head takes."""
        dtype = jnp.dtype(self.compute.dtype)
        table_VD = sharding.gathered(self.embed_tokens.embedding, ROWS)
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)
        x_BTD = sharding.constrain(x_BTD, _HIDDEN)
        x_BTD, _ = self.layers(x_BTD, _rope(tokens_BT.shape[1], self.config.head_dim, self.config.rope_theta))
        return self.norm(x_BTD)

    def head(self) -> Float[Array, "D V"]:
        """Returns the effective kernel from hidden states to logits."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.embedding.T
        w = self.lm_head().w
        return w.method.weight(w.arrays, w.w) if isinstance(w, Bound) else w


def abstract_params(config: LlamaConfig) -> Any:
    """Returns the shapes and types of a model's parameters, layers stacked, without computing them."""
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
        in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
        length=length,
        unroll=length if unrolled else 1,
    )


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
    """Returns whether a layer keeps a value for its backward pass: products do, those of `dense` among them.

    A scan without a policy would keep every float32 step between them too.
    """
    return primitive.name in ("dot_general", "custom_vjp_call")


def _dense(module: Attention | MLP, x: Array, kernels: list[Parts], tile: int = 1) -> list[Array]:
    ws, layouts = zip(*kernels, strict=True)
    key = module.make_rng("dropout") if module.has_rng("dropout") else None
    return dense(x, ws, None, module.compute.adapter_path, key, tile, layouts)


def _rope(length: int, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Returns cos and sin of position * theta^(-2j/H), each (T, H/2), float32."""
    exponents_J = jnp.arange(head_dim // 2, dtype=jnp.float32) * (2 / head_dim)
    angles_TJ = jnp.arange(length, dtype=jnp.float32)[:, None] / (theta**exponents_J)[None, :]
    return jnp.cos(angles_TJ), jnp.sin(angles_TJ)


def _rotate(x_BTNH: Array, rope: tuple[Array, Array]) -> Array:
    """Returns every head with its pairs (j, j + H/2) rotated by the angle of the position."""
    cos, sin = (a[None, :, None, :] for a in rope)
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTNH.dtype)


def _largest_divisor(n: int, limit: int) -> int:
    return max(i for i in range(1, min(n, limit) + 1) if n % i == 0)
