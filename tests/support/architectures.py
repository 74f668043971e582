"""A tiny model of every architecture and option, and sequences that go beyond its context and its window."""

import jax
import numpy as np

from mora_jax.models.config import LlamaConfig
from mora_jax.models.llama import abstract_params
from mora_jax.models.rope import Rope

# Tokens of a sequence. The context is shorter for scaled positions, and every window is.
LENGTH = 80
CONTEXT = 32


def _config(**options) -> LlamaConfig:
    options = {"max_position_embeddings": 128, "rms_norm_eps": 1e-5, **options}
    return LlamaConfig(97, 48, 40, 2, 4, 2, **options)


def _scaled(type: str, **options) -> LlamaConfig:
    """A wide head and a small base, so that the pairs lie on all parts of a scaling."""
    rope = Rope(type, factor=4.0, **options)
    context = CONTEXT if type == "dynamic" else 128
    return _config(head_dim=16, rope_theta=20.0, rope=rope, max_position_embeddings=context)


CONFIGS = {
    "llama": _config(tie_word_embeddings=True),
    "llama, biases": _config(attention_bias=True, mlp_bias=True),
    "llama, head_dim": _config(head_dim=16),
    "llama, linear": _scaled("linear"),
    "llama, dynamic": _scaled("dynamic"),
    "llama, llama3": _scaled("llama3", original_max_position_embeddings=CONTEXT),
    "llama, yarn": _scaled("yarn", original_max_position_embeddings=CONTEXT, beta_fast=4.0, beta_slow=0.5),
    "llama, yarn, mscale": _scaled(
        "yarn",
        original_max_position_embeddings=CONTEXT,
        mscale=0.7,
        mscale_all_dim=1.2,
        truncate=False,
    ),
    "llama, yarn, attention_factor": _scaled(
        "yarn", original_max_position_embeddings=CONTEXT, attention_factor=1.5
    ),
    "mistral": _config(model_type="mistral"),
    "mistral, window": _config(model_type="mistral", sliding_window=7),
    "qwen2": _config(model_type="qwen2", tie_word_embeddings=True),
    "qwen2, window": _config(model_type="qwen2", sliding_window=7),
    "qwen3": _config(model_type="qwen3", head_dim=20),
    "qwen3, biases, window": _config(model_type="qwen3", attention_bias=True, sliding_window=7),
    "olmo2": _config(model_type="olmo2"),
    "olmo2, biases": _config(model_type="olmo2", attention_bias=True),
}


def tokens_BT(length: int = LENGTH) -> np.ndarray:
    """Returns two random sequences."""
    return np.random.default_rng(1).integers(0, 97, (2, length))


def random_params(config: LlamaConfig, seed: int = 0) -> dict:
    """Returns parameters that are all random, biases and norms too, so that attention is far from uniform."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(mean, 0.15, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))
