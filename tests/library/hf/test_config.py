"""config.json: every spelling is read, and what is not computed is refused by the name of its field."""

import dataclasses
import json

import pytest
from architectures import CONFIGS
from hf_folders import CONFIG, rewrite_config

from mora_jax.errors import InputError
from mora_jax.hf import read_config
from mora_jax.hf.config import config_json
from mora_jax.models.config import LlamaConfig
from mora_jax.models.rope import Rope


@pytest.fixture
def folder(tmp_path):
    """A folder with nothing but config.json."""
    (tmp_path / "config.json").write_text(json.dumps(config_json(CONFIG, "float32", {})))
    return tmp_path


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
    assert read_config(folder) == CONFIG


def test_absent_fields_take_the_defaults_of_the_format(tmp_path):
    plain = LlamaConfig(97, 32, 48, 1, 4, 4)
    (tmp_path / "config.json").write_text(json.dumps(config_json(plain, "float32", {})))
    optional = ("num_key_value_heads", "rope_theta", "rms_norm_eps", "max_position_embeddings")
    rewrite_config(tmp_path, **dict.fromkeys(optional, ...), tie_word_embeddings=...)
    assert read_config(tmp_path) == plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "smollm3"}, "model_type is 'smollm3'; supported are llama, mistral, qwen2"),
        ({"model_type": ["llama"]}, "model_type is "),
        ({"model_type": ...}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is "),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": 1}, "attention_bias must be of type bool"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; only 0.0 is supported"),
        ({"no_rope_layers": [1, 0, 1]}, "no_rope_layers is "),
        ({"sliding_window": 16}, "sliding_window is 16; only None"),
        ({"rms_norm_epsilon": 1e-6}, "rms_norm_epsilon is .* not known .* did you mean rms_norm_eps?"),
        ({"embedding_multiplier": None}, "embedding_multiplier is None, a field that is not known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "model.Model"}}, "auto_map"),
        ({"rope_scaling": [2.0]}, "rope_scaling is .* not an object"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope_scaling: rope_type is"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling: rope_type is 'su'; supported are"),
        ({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}}, "'yarn' and 'linear'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor must be of type float"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope.factor must lie in"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "alpha": 3}}, "alpha is 3, no field of"),
        (
            {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 0}},
            "original_max_position_embeddings must lie in",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.0}},
            "attention_factor is 0",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters differ",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e3}}}, "full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is given twice"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": [1.0]}, "rope_theta must be of type float"),
        ({"rope_theta": 10**400}, "rope_theta must be of type float"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size must be of type int"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be of type bool"),
        ({"num_attention_heads": 5}, "config.json: .*5 heads"),
    ],
)
def test_config_is_refused(folder, changes, message):
    rewrite_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        read_config(folder)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_config_that_is_not_a_json_object_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        read_config(folder)


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
        read_config(folder)


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
        read_config(folder)


# Architectures


def read(tmp_path, **content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    return read_config(tmp_path)


def sizes(model_type, **fields):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {"model_type": model_type, **dict(zip(names, (96, 512, 64, 2, 32), strict=True)), **fields}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_written_is_read(tmp_path, config):
    assert read(tmp_path, **config_json(config, "float32", {})) == config


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", {"num_key_value_heads": 32}),
        ("mistral", {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}),
        ("qwen2", {"num_key_value_heads": 32, "max_position_embeddings": 32_768}),
        ("qwen3", {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "head_dim": 128}),
        ("olmo2", {"num_key_value_heads": 32, "rms_norm_eps": 1e-5}),
    ],
)
def test_absent_fields_take_the_defaults_of_their_architecture(tmp_path, model_type, expected):
    """Compared with the classes of transformers by `test_architectures`."""
    plain = LlamaConfig(96, 512, 64, 2, 32, model_type=model_type)
    assert read(tmp_path, **sizes(model_type)) == dataclasses.replace(plain, **expected)


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({}, 0),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, 8),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, 0),
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1}, 0),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}, 0),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}, 8),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 2}, 0),
    ],
)
def test_windows_of_qwen(tmp_path, fields, window):
    assert read(tmp_path, **sizes("qwen2", **fields)).sliding_window == window


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_sliding_window": True, "max_window_layers": 1}, "max_window_layers is 1: of 2 layers"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .* only one type"),
        ({"layer_types": ["full_attention"]}, "in all 2 layers"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types is "),
        ({"layer_types": ["sliding_attention"] * 2}, "which needs use_sliding_window"),
        ({"max_window_layers": "1"}, "max_window_layers must be of type int"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
    ],
)
def test_layers_that_differ_are_refused(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, **sizes("qwen2", **fields))


def test_the_window_of_mistral(tmp_path):
    assert read(tmp_path, **sizes("mistral", sliding_window=None)).sliding_window == 0
    assert read(tmp_path, **sizes("mistral", sliding_window=9)).sliding_window == 9


def test_both_spellings_of_scaled_positions(tmp_path):
    llama3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 4096, "rope_type": "llama3"}
    expected = Rope("llama3", 32.0, 4096)
    old = read(tmp_path, **sizes("llama", rope_scaling=llama3, rope_theta=5e5))
    new = read(tmp_path, **sizes("llama", rope_parameters=llama3 | {"rope_theta": 5e5}))
    assert old == new
    assert (old.rope, old.rope_theta) == (expected, 5e5)
    yarn = {"type": "yarn", "rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512}
    assert read(tmp_path, **sizes("llama", rope_scaling=yarn)).rope == Rope("yarn", 4.0, 512)
    llama3.pop("original_max_position_embeddings")
    assert read(tmp_path, **sizes("llama", rope_scaling=llama3)).rope == Rope("llama3", 32.0, 2048)


def test_fields_without_an_effect_are_passed_over(tmp_path):
    smollm2 = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": 1}}
    others = {"use_cache": True, "pretraining_tp": 1, "bos_token_id": 1, "torch_dtype": "bfloat16"}
    plain = sizes("llama")
    assert read(tmp_path, **plain, **smollm2, **others) == read(tmp_path, **plain)
