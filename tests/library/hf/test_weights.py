"""The Hugging Face folder: round trips, transformers' own reading and writing, and every refusal."""

import collections
import dataclasses
import json
import os
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from jax.sharding import NamedSharding

from mora_jax import sharding
from mora_jax.errors import InputError
from mora_jax.hf import load_hf, save_hf, whole_folder
from mora_jax.hf.safetensors import Stored, read_headers
from mora_jax.models.llama import Compute, Llama, LlamaConfig
from mora_jax.trees import flatten, unflatten

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
both = pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])


def random_params(config):
    """Every leaf random, the scales of the norms too: a mix-up of any two must show."""
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0.3, 0.2, leaf.shape).astype(np.float32), shapes)


def logits(params, config, tokens_BT):
    return Llama(config, Compute(dtype="float32")).apply({"params": params}, tokens_BT)


def assert_same(params, others):
    a, b = flatten(params), flatten(others)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture
def folder(tmp_path):
    save_hf(tmp_path / "hf", random_params(CONFIG), CONFIG)
    return tmp_path / "hf"


def rewrite_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(content))


def rewrite_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


@both
@pytest.mark.parametrize("limit", [10**9, 9_000], ids=["one file", "sharded"])
def test_round_trip_is_exact(tmp_path, config, limit):
    params = random_params(config)
    save_hf(tmp_path / "hf", params, config, max_shard_bytes=limit)
    assert (len(list(tmp_path.glob("hf/*.safetensors"))) > 2) == (limit < 10**9)
    loaded, loaded_config = load_hf(tmp_path / "hf")
    assert loaded_config == config
    assert_same(params, loaded)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}


def test_shards_keep_to_the_limit(tmp_path):
    save_hf(tmp_path / "hf", random_params(CONFIG), CONFIG, max_shard_bytes=20_000)
    sizes = [
        sum(tensor.nbytes for tensor in safetensors.numpy.load_file(file).values())
        for file in (tmp_path / "hf").glob("*.safetensors")
    ]
    assert max(sizes) <= 20_000
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)


def test_bfloat16_rounds_once_and_says_so(tmp_path):
    params = random_params(CONFIG)
    save_hf(tmp_path / "hf", params, CONFIG, dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16).astype(np.float32), params)
    assert_same(rounded, load_hf(tmp_path / "hf")[0])
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_float16_is_read(folder):
    half = {}

    def halve(tensors):
        tensors.update({name: tensor.astype(np.float16) for name, tensor in tensors.items()})
        half.update(tensors)

    rewrite_weights(folder, halve)
    loaded, _ = load_hf(folder)
    np.testing.assert_array_equal(loaded["norm"]["scale"], half["model.norm.weight"].astype(np.float32))


def test_save_takes_jax_arrays(tmp_path):
    params = random_params(CONFIG)
    save_hf(tmp_path / "hf", jax.tree.map(jnp.asarray, params), CONFIG)
    assert_same(params, load_hf(tmp_path / "hf")[0])


# Divided over devices


@both
@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)], ids=str)
def test_what_is_read_onto_a_mesh_is_the_same_model(tmp_path, config, sizes):
    params, mesh = random_params(config), sharding.make_mesh(*sizes)
    save_hf(tmp_path / "hf", params, config, max_shard_bytes=20_000)
    loaded, _ = load_hf(tmp_path / "hf", mesh)
    assert_same(params, loaded)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == sharding.shardings(loaded, mesh)
    save_hf(tmp_path / "again", loaded, config, max_shard_bytes=20_000)  # from the mesh
    for file in (tmp_path / "hf").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_process_reads_what_its_devices_hold(folder, monkeypatch):
    """Rows, and each of them once; columns of rows are cut out of them."""
    read = collections.Counter()
    real = Stored.rows

    def rows(self, start, stop):
        read[self.start] += (stop - start) * self.nbytes // self.shape[0]
        return real(self, start, stop)

    monkeypatch.setattr(Stored, "rows", rows)
    stored = read_headers(epath.Path(folder))
    load_hf(folder, sharding.make_mesh(1, 4, 2))
    assert read == {tensor.start: tensor.nbytes for tensor in stored.values()}
    # As if this process had the first half of the devices alone.
    read.clear()
    mesh, real_map = sharding.make_mesh(1, 4, 2), NamedSharding.addressable_devices_indices_map

    def half(self, shape):
        return dict(list(real_map(self, shape).items())[:4])

    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", half)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda shape, place, held: held)
    held, _ = load_hf(folder, mesh)
    for name, path in (("o_proj", "self_attn"), ("down_proj", "mlp")):
        ours = flatten(random_params(CONFIG))[f"layers/{path}/{name}/kernel"]
        parts = held["layers"][path][name]["kernel"]
        assert sum(part.nbytes for part in parts) == ours.nbytes // 2
        tensor = stored[f"model.layers.1.{path}.{name}.weight"]
        assert read[tensor.start] == tensor.nbytes // 2


def test_the_model_is_never_whole_on_the_host(tmp_path, monkeypatch):
    """What numpy holds at most: of reading, one parameter's parts, and a few tensors of one layer."""
    wide = LlamaConfig(97, 512, 1024, 8, 4, 4)
    params = random_params(wide)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    tensor = 512 * 1024 * 4
    assert largest == 8 * tensor
    tracemalloc.start()
    try:
        save_hf(tmp_path / "hf", params, wide)
        assert tracemalloc.get_traced_memory()[1] - tracemalloc.get_traced_memory()[0] < 4 * tensor
        # Simulated devices would use the host's buffers as they are: these take nothing.
        monkeypatch.setattr(jax, "device_put", lambda part, device: part.nbytes)
        monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda shape, place, held: sum(held))
        del params
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        loaded, _ = load_hf(tmp_path / "hf", sharding.make_mesh(1, 8))
        assert tracemalloc.get_traced_memory()[1] - before < largest + 4 * tensor
    finally:
        tracemalloc.stop()
    assert loaded["layers"]["mlp"]["down_proj"]["kernel"] == largest


# With transformers


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="needs the extra `parity`")
    return pytest.importorskip("transformers", reason="needs the extra `parity`")


def hf_logits(model, tokens_BT):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(tokens_BT)).logits.numpy()


@pytest.fixture
def tokens_BT():
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 33))


@both
def test_transformers_reads_our_folder(tmp_path, transformers, tokens_BT, config):
    params = random_params(config)
    save_hf(tmp_path / "hf", params, config, max_shard_bytes=30_000, special_ids={"eos_token_id": 5})
    model, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert str(model.dtype) == "torch.float32"
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, 5)
    np.testing.assert_allclose(logits(params, config, tokens_BT), hf_logits(model, tokens_BT), atol=1e-4)


@both
@pytest.mark.parametrize("limit", ["5GB", "20KB"])
def test_we_read_transformers_folder(tmp_path, transformers, tokens_BT, config, limit):
    import torch

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**dataclasses.asdict(config)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.2)
    model.save_pretrained(tmp_path, max_shard_size=limit)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (limit == "20KB")
    params, read = load_hf(tmp_path)
    assert read == config
    np.testing.assert_allclose(logits(params, read, tokens_BT), hf_logits(model, tokens_BT), atol=1e-4)


# What a config may look like


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


def test_absent_fields_have_the_format_s_defaults(tmp_path):
    plain = LlamaConfig(97, 32, 48, 1, 4, 4)
    save_hf(tmp_path / "hf", random_params(plain), plain)
    optional = ("num_key_value_heads", "rope_theta", "rms_norm_eps", "max_position_embeddings")
    rewrite_config(tmp_path / "hf", **dict.fromkeys(optional, ...), tie_word_embeddings=...)
    assert load_hf(tmp_path / "hf")[1] == plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"model_type": ...}, "model_type None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0}}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e3}}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is given twice"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": [1.0]}, "rope_theta must be of type float"),
        ({"rope_theta": 10**400}, "rope_theta must be of type float"),
        ({"head_dim": 16}, "head_dim 16"),
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
def test_config_that_is_no_json_object(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        load_hf(folder)


# What the weights may look like


def test_weights_that_the_config_determines_are_ignored(folder):
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    rewrite_weights(folder, lambda tensors: tensors.update(inv_freq))
    assert_same(load_hf(folder)[0], random_params(CONFIG))


def test_tied_head_may_be_stored_twice_but_not_differ(tmp_path):
    save_hf(tmp_path / "hf", random_params(TIED), TIED)

    def store_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    rewrite_weights(tmp_path / "hf", store_head)
    assert_same(load_hf(tmp_path / "hf")[0], random_params(TIED))
    rewrite_weights(tmp_path / "hf", lambda tensors: tensors.update({"lm_head.weight": np.ones((97, 32))}))
    with pytest.raises(InputError, match="F64"):
        load_hf(tmp_path / "hf")
    ones = np.ones((97, 32), np.float32)
    rewrite_weights(tmp_path / "hf", lambda tensors: tensors.update({"lm_head.weight": ones}))
    with pytest.raises(InputError, match=r"lm_head\.weight differs"):
        load_hf(tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "missing: lm_head.weight"),
        (lambda t: t.update({"score.weight": np.ones(3, np.float32)}), "unexpected: score.weight"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}),
            r"of another shape: model.norm.weight \[31\] instead of \[32\]",
        ),
        (lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}), "norm.weight' is of type I8"),
    ],
)
def test_weights_are_refused(folder, change, message):
    rewrite_weights(folder, change)
    with pytest.raises(InputError, match=message):
        load_hf(folder)


def test_damaged_weights_are_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        load_hf(folder)
    file.unlink()
    with pytest.raises(InputError, match="neither"):
        load_hf(folder)


@pytest.fixture
def sharded(tmp_path):
    save_hf(tmp_path / "hf", random_params(CONFIG), CONFIG, max_shard_bytes=30_000)
    return tmp_path / "hf"


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hosts", "a/b", "..", ""])
def test_index_that_leaves_the_folder(sharded, name):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(InputError, match="not a file of this folder"):
        load_hf(sharded)


@pytest.mark.parametrize("name", ["a\0.safetensors", "x" * 300, "model.safetensors\n", "модель"])
def test_index_with_a_name_that_no_file_should_have(sharded, name):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(InputError, match="not a file of this folder"):
        load_hf(sharded)


def with_header(folder, header, data=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64]}}, "header describes"),
        ({"w": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 0]}}, "do not fit its shape"),
        ({"w": {"dtype": "F32", "shape": [0], "data_offsets": [0]}}, "no valid data_offsets for 'w'"),
        ({"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, None]}}, "no valid data_offsets for 'w'"),
        ({"w": {"dtype": "F32", "shape": [2**80], "data_offsets": [0, 0]}}, "no valid shape for 'w'"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}, "no valid shape for 'w'"),
        ({"w": {"dtype": "F32", "shape": "x"}}, "no valid shape for 'w'"),
        ({"w": []}, "no valid shape for 'w'"),
        ({"w": {"dtype": ["F32"], "shape": [0]}}, r"is of type \['F32'\]; only F32"),
        ([], "its header is not a JSON object"),
        (b"{" * 50_000, "is not JSON"),
        (b"[" * 50_000, "is not JSON"),
    ],
)
def test_headers_are_refused_before_memory_is_taken(folder, header, message):
    with_header(folder, header)
    with pytest.raises(InputError, match=message):
        load_hf(folder)


@pytest.mark.parametrize("offsets", [(0, 0), (1, 5), (-4, 8), (2**70, 4)], ids=str)
def test_tensors_that_do_not_lie_side_by_side_are_refused(folder, offsets):
    """All sizes fit, but what is read as one tensor would be another's bytes, or none of the file's."""
    places = {
        f"w{i}": {"dtype": "F32", "shape": [1], "data_offsets": [o, o + 4]} for i, o in enumerate(offsets)
    }
    with_header(folder, places, bytes(8))
    with pytest.raises(InputError, match="does not begin where the tensor before it ends"):
        load_hf(folder)


def test_a_file_that_shrinks_while_it_is_read(folder):
    file = epath.Path(folder / "model.safetensors")
    tensor = read_headers(epath.Path(folder))["model.norm.weight"]
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(tensor.start + 4)
    with pytest.raises(InputError, match=f"{file} is damaged: it ends within a tensor"):
        tensor.rows(0, 32)


def test_a_header_that_says_it_is_endless(folder):
    (folder / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="its header cannot be that long"):
        load_hf(folder)


def test_a_table_of_rotary_frequencies_of_any_size_is_refused(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite_weights(folder, lambda tensors: tensors.update({name: np.ones(33, np.float32)}))
    with pytest.raises(InputError, match="larger than a table of rotary frequencies"):
        load_hf(folder)


def test_pipes_are_not_waited_for(folder):
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(InputError, match=name):
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
def test_configs_that_would_harm_are_refused(folder, content, message):
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
def test_numbers_out_of_all_measure_are_refused_at_once(folder, changes):
    rewrite_config(folder, **changes)
    with pytest.raises(InputError, match=f"model.{next(iter(changes))} must"):
        load_hf(folder)


def test_index_without_a_map(sharded):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {"x": 1}}')
    with pytest.raises(InputError, match="weight_map"):
        load_hf(sharded)


def test_missing_and_doubled_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    content = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(InputError, match="which another file of the folder holds too"):
        load_hf(sharded)
    second.write_bytes(content)
    first.unlink()
    with pytest.raises(InputError, match=f"{first.name} is missing"):
        load_hf(sharded)


# Writing


def test_save_refuses_params_of_another_config(tmp_path):
    with pytest.raises(InputError, match="unexpected: lm_head/kernel"):
        save_hf(tmp_path / "hf", random_params(CONFIG), TIED)
    narrow = flatten(random_params(CONFIG)) | {"norm/scale": np.ones(31, np.float32)}
    with pytest.raises(InputError, match="norm/scale"):
        save_hf(tmp_path / "hf", unflatten(narrow), CONFIG)
    assert not list(tmp_path.iterdir())


def test_save_leaves_what_is_there(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        save_hf(folder, random_params(CONFIG), CONFIG)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_half_written_folder_has_not_the_name(tmp_path):
    def fail_half_way():
        with whole_folder(tmp_path / "hf") as folder:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert not (tmp_path / "hf").exists()
    (tmp_path / "hf").mkdir()  # an empty folder is no obstacle, nor what the failure left
    save_hf(tmp_path / "hf", random_params(CONFIG), CONFIG)
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]
    assert load_hf(tmp_path / "hf")[1] == CONFIG
