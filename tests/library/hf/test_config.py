"""config.json: every form of a plain LLaMA is read, and every other model is refused."""

import pytest
from hf_folders import CONFIG, random_params, rewrite_config

from mora_jax.errors import InputError
from mora_jax.hf import load_hf, save_hf
from mora_jax.models.llama import LlamaConfig


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 5_000.0}},
        {"rope_scaling": None, "rope_parameters": {"rope_theta": 5_000, "rope_type": "default"}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 5_000},
        {"architectures": ..., "head_dim": ..., "hidden_act": ..., "initializer_range": ...},
    ],
)
def test_config_forms_that_mean_the_same(folder, changes):
    rewrite_config(folder, **changes)
    assert load_hf(folder)[1] == CONFIG


def test_absent_fields_take_the_defaults_of_the_format(tmp_path):
    plain = LlamaConfig(97, 32, 48, 1, 4, 4)
    save_hf(tmp_path / "hf", random_params(plain), plain)
    optional = ("num_key_value_heads", "rope_theta", "rms_norm_eps", "max_position_embeddings")
    rewrite_config(tmp_path / "hf", **dict.fromkeys(optional, ...), tie_word_embeddings=...)
    assert load_hf(tmp_path / "hf")[1] == plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": ...}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is "),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0}}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e3}}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is given twice"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": [1.0]}, "rope_theta must be of type float"),
        ({"rope_theta": 10**400}, "rope_theta must be of type float"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size must be of type int"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be of type bool"),
        ({"num_attention_heads": 5}, "config.json: .*5 heads"),
    ],
)
def test_config_is_refused(folder, changes, message):
    rewrite_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        load_hf(folder)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_config_that_is_not_a_json_object_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        load_hf(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "is not JSON"),
        (b"\xff", "not UTF-8"),
        (b"1" * 5000, "is not JSON"),
        (b" " * (2**24 + 1), "at most 16,777,216 are read"),
    ],
)
def test_oversized_and_malformed_configs_are_refused(folder, content, message):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_hf(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**30},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": float("inf")},
        {"initializer_range": -1.0},
    ],
)
def test_absurd_numbers_are_refused_at_once(folder, changes):
    rewrite_config(folder, **changes)
    with pytest.raises(InputError, match=f"model.{next(iter(changes))} must"):
        load_hf(folder)
