"""Every architecture beside transformers: with it, and without it by numbers recorded from it."""

import jax.numpy as jnp
import numpy as np
import pytest
from architectures import CONFIGS, LENGTH, random_params, tokens_BT
from architectures_golden import FILE, logits, read_by_transformers, some_logits
from hf_folders import assert_same
from slow import quick

from mora_jax.hf import load_hf
from mora_jax.hf.config import read_config
from mora_jax.hf.formats import FORMATS
from mora_jax.models.llama import Compute, Llama
from mora_jax.models.rope import angles

# What makes the other quick tests of an architecture redundant: one with a window, and every place of norms
# and biases. Scaled positions are compared by themselves.
QUICK = ("llama, biases", "olmo2")


def ours(params, config, tokens) -> np.ndarray:
    return np.asarray(Llama(config, Compute(dtype="float32")).apply({"params": params}, jnp.array(tokens)))


def assert_near(ours: np.ndarray, theirs: np.ndarray, size: float) -> None:
    assert np.abs(ours - theirs).max() < 1e-5 * size


@pytest.mark.parametrize("name", quick(QUICK, CONFIGS))
def test_the_logits_are_those_recorded_of_transformers(name):
    found = ours(random_params(CONFIGS[name]), CONFIGS[name], tokens_BT())
    assert_near(some_logits(found), np.load(FILE)[f"logits/{name}"], np.abs(found).max())


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.rope.type != "default"])
def test_scaled_positions_are_those_recorded_of_transformers(name):
    c = CONFIGS[name]
    found = angles(c.rope, LENGTH, c.head_width, c.rope_theta, c.max_position_embeddings)
    recorded = np.load(FILE)[f"positions/{name}"]
    np.testing.assert_allclose(np.stack(found)[:, 1::13], recorded, atol=2e-5)
    assert np.abs(recorded).max() > 0.9


# With transformers


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="needs the extra `parity`")
    return pytest.importorskip("transformers", reason="needs the extra `parity`")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_are_those_of_transformers(tmp_path, transformers, name):
    """Beyond the context and the window, and within the context; and its own folder is read as the same."""
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    model = read_by_transformers(config, tmp_path / "ours")
    assert type(model).__name__ == FORMATS[config.model_type].model_class
    for length in (LENGTH, 20):
        theirs = logits(model, length)
        assert_near(ours(params, config, tokens_BT(length)), theirs, np.abs(theirs).max())
        if length == LENGTH:
            assert_near(np.load(FILE)[f"logits/{name}"], some_logits(theirs), np.abs(theirs).max())
    model.save_pretrained(tmp_path / "theirs")
    loaded, again = load_hf(tmp_path / "theirs")
    assert again == config
    assert_same(loaded, params)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FORMATS)
def test_absent_fields_mean_what_they_mean_to_transformers(tmp_path, transformers, model_type):
    sizes = {"vocab_size": 96, "hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 32, "model_type": model_type}
    (tmp_path / "config.json").write_text(str(sizes).replace("'", '"'))
    given, theirs = read_config(tmp_path), transformers.AutoConfig.for_model(**sizes)
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(given, name) == getattr(theirs, name), name
    assert given.head_width == (getattr(theirs, "head_dim", None) or 512 // 32)
    assert given.sliding_window == (getattr(theirs, "sliding_window", None) or 0)
    assert given.rope_theta == theirs.rope_parameters["rope_theta"]
