"""Sizes and options of the model, and the architectures of LLaMA's shape."""

import dataclasses
from typing import Literal, TypeAlias

from mora_jax.errors import InputError, check_float32
from mora_jax.models.rope import Rope

ModelType: TypeAlias = Literal["llama", "mistral", "qwen2", "qwen3", "olmo2"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What sets an architecture apart, beside its sizes.

    Attributes:
      options: fields of `LlamaConfig` that not every architecture has.
      qkv_bias: whether q, k and v have biases in any case.
      qk_norm: what the norms of queries and keys span: each "head", or all heads, their "width"; "" for none.
      norms: names of the norms of attention and MLP.
      norms_after: whether these take the outputs of attention and MLP; otherwise they take their inputs.
      even_heads: whether hidden_size must be a multiple of num_attention_heads even if head_dim is given.
    """

    options: tuple[str, ...] = ()
    qkv_bias: bool = False
    qk_norm: Literal["", "head", "width"] = ""
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    norms_after: bool = False
    even_heads: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(("attention_bias", "mlp_bias"), even_heads=True),
    "mistral": Architecture(("sliding_window",)),
    "qwen2": Architecture(("sliding_window",), qkv_bias=True),
    "qwen3": Architecture(("attention_bias", "sliding_window"), qk_norm="head"),
    "olmo2": Architecture(
        ("attention_bias",),
        qk_norm="width",
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        norms_after=True,
    ),
}

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
_MOST_OR_NONE = {"head_dim": 2**14, "sliding_window": 2**31 - 1}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of the model, named as in Hugging Face's config.json.

    Attributes:
      vocab_size: tokens in the vocabulary.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP.
      num_hidden_layers: transformer layers.
      num_attention_heads: query heads.
      num_key_value_heads: key/value heads; must divide num_attention_heads.
      max_position_embeddings: longest sequence, in tokens; rope.type dynamic extends it.
      rope_theta: base of the rotary frequencies.
      rms_norm_eps: added to the mean square in RMSNorm.
      initializer_range: standard deviation of the normal initialisation.
      tie_word_embeddings: whether the head is the transposed embedding.
      model_type: architecture. "llama" is that of Llama 2 and 3, TinyLlama, SmolLM2 and Yi. "qwen2" has
        biases of q, k and v, "qwen3" norms of each query and key. "olmo2" has norms of all queries and of all
        keys, and its other norms behind attention and MLP.
      head_dim: width of a head, even; 0 for hidden_size / num_attention_heads.
      attention_bias: whether q, k, v and o have biases; of llama, qwen3 and olmo2.
      mlp_bias: whether gate, up and down have biases; of llama.
      sliding_window: positions that a position attends to, itself and those before it; 0 for all of them; of
        mistral, qwen2 and qwen3.
      rope: scaling of the rotary positions.
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
    model_type: ModelType = "llama"
    head_dim: int = 0
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int = 0
    rope: Rope = dataclasses.field(default_factory=Rope)

    def __post_init__(self) -> None:
        for name, most in (_MOST | _MOST_OR_NONE).items():
            value = getattr(self, name)
            if name in _MOST_OR_NONE and not value >= 0:
                raise InputError(f"model.{name} must be positive, or 0 for none, not {value}")
            if name in _MOST and not value > 0:
                raise InputError(f"model.{name} must be positive, not {value}")
            if value > most:
                raise InputError(f"model.{name} must be at most {most:,}, not {value}")
            check_float32(f"model.{name}", value)
        if not 0 <= self.initializer_range <= 1:
            raise InputError(f"model.initializer_range must lie in [0, 1], not {self.initializer_range}")
        self._check_architecture()
        self._check_heads()
        if self.rope.type == "dynamic" and self.head_width < 4:
            raise InputError(f"model.rope.type dynamic needs heads of width 4, not {self.head_width}")
        if self.rope.type == "yarn" and not self.rope_theta > 1:
            raise InputError(f"model.rope.type yarn needs model.rope_theta above 1, not {self.rope_theta}")

    def _check_architecture(self) -> None:
        if self.model_type not in ARCHITECTURES:
            raise InputError(
                f"model.model_type is one of {', '.join(ARCHITECTURES)}, not {self.model_type!r}"
            )
        for name in {option for each in ARCHITECTURES.values() for option in each.options}:
            if getattr(self, name) and name not in self.architecture.options:
                raise InputError(f"model.{name} is no option of model.model_type {self.model_type}")

    def _check_heads(self) -> None:
        if self.head_dim % 2:
            raise InputError(f"model.head_dim must be even, not {self.head_dim}")
        parts = self.num_attention_heads * (1 if self.head_dim else 2)
        if (self.architecture.even_heads or not self.head_dim) and self.hidden_size % parts:
            raise InputError(
                f"model.hidden_size {self.hidden_size} does not divide into "
                f"{self.num_attention_heads} heads of even width"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"model.num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim * self.num_attention_heads == self.hidden_size:
            object.__setattr__(self, "head_dim", 0)  # equal models have equal configs

    @property
    def architecture(self) -> Architecture:
        """What sets the model's architecture apart."""
        return ARCHITECTURES[self.model_type]

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def q_width(self) -> int:
        """Width of all queries."""
        return self.num_attention_heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of all keys, and of all values."""
        return self.num_key_value_heads * self.head_width
