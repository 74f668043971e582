"""Small Hugging Face folders, for tests: their models, and changes to their files."""

import dataclasses
import json

import jax
import numpy as np
import safetensors.numpy

from mora_jax.models.llama import LlamaConfig, abstract_params
from mora_jax.trees import flatten

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_theta=5_000.0,
    rms_norm_eps=1e-5,
)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)


def random_params(config):
    """Returns parameters that are all random, the norms' scales too, so that swapping any two is noticed."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0.3, 0.2, leaf.shape).astype(np.float32), abstract_params(config)
    )


def assert_same(params, others):
    """Asserts that two trees have equal paths and equal numbers."""
    a, b = flatten(params), flatten(others)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def rewrite_config(folder, **changes):
    """Changes fields of config.json; `...` removes one."""
    content = json.loads((folder / "config.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(content))


def rewrite_weights(folder, change):
    """Writes model.safetensors again, after `change` has edited the dict of its tensors."""
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)
