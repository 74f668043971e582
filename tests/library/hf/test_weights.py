"""Weights: round trips, reading onto a mesh, transformers' own reading and writing, and every refusal."""

import collections
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from hf_folders import CONFIG, TIED, assert_same, random_params, rewrite_weights
from jax.sharding import NamedSharding
from peft_folders import FROZEN, random_adapted
from slow import slow

from mora_jax import DoRA, LoRA, On, merge, sharding
from mora_jax.errors import InputError
from mora_jax.hf import load_hf, save_hf
from mora_jax.hf.config import config_json
from mora_jax.hf.safetensors import Stored, read_headers
from mora_jax.hf.weights import read_weights, stored_types, write_weights
from mora_jax.models.llama import LAYOUTS, Compute, Llama, LlamaConfig
from mora_jax.trees import flatten, unflatten

SIZES = [*map(slow, [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 2, 4)]), (2, 2, 2)]
both = pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])


def logits(params, config, tokens_BT):
    return Llama(config, Compute(dtype="float32")).apply({"params": params}, tokens_BT)


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


def test_bfloat16_rounds_once_and_is_recorded(tmp_path):
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


def test_jax_arrays_are_saved_too(tmp_path):
    params = random_params(CONFIG)
    save_hf(tmp_path / "hf", jax.tree.map(jnp.asarray, params), CONFIG)
    assert_same(params, load_hf(tmp_path / "hf")[0])


# Sharded over devices


@pytest.mark.parametrize("config", [CONFIG, slow(TIED)], ids=["untied", "tied"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_loading_onto_a_mesh_gives_the_same_model(tmp_path, config, sizes):
    params, mesh = random_params(config), sharding.make_mesh(*sizes)
    save_hf(tmp_path / "hf", params, config, max_shard_bytes=20_000)
    loaded, _ = load_hf(tmp_path / "hf", mesh)
    assert_same(params, loaded)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == sharding.shardings(loaded, mesh, LAYOUTS)
    save_hf(tmp_path / "again", loaded, config, max_shard_bytes=20_000)  # from the mesh
    for file in (tmp_path / "hf").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_process_reads_every_row_that_its_devices_hold_once(folder, monkeypatch):
    """Rows are read once; columns are cut out of the rows."""
    read = collections.Counter()
    real = Stored.rows

    def rows(self, start, stop):
        read[self.start] += (stop - start) * self.nbytes // self.shape[0]
        return real(self, start, stop)

    monkeypatch.setattr(Stored, "rows", rows)
    stored = read_headers(epath.Path(folder))
    load_hf(folder, sharding.make_mesh(1, 4, 2))
    assert read == {tensor.start: tensor.nbytes for tensor in stored.values()}
    # Pretend that this process has the first half of the devices only.
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


@pytest.mark.slow
def test_the_host_never_holds_the_whole_model(tmp_path, monkeypatch):
    """numpy's peak: to read, the parts of one parameter and a few tensors of one layer."""
    wide = LlamaConfig(97, 512, 1024, 8, 4, 4)
    params = random_params(wide)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    tensor = 512 * 1024 * 4
    assert largest == 8 * tensor
    tracemalloc.start()
    try:
        save_hf(tmp_path / "hf", params, wide)
        assert tracemalloc.get_traced_memory()[1] - tracemalloc.get_traced_memory()[0] < 4 * tensor
        # Simulated devices would keep the host's buffers; these ones keep nothing.
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


@pytest.mark.slow
@both
def test_transformers_reads_our_folder(tmp_path, transformers, tokens_BT, config):
    params = random_params(config)
    save_hf(tmp_path / "hf", params, config, max_shard_bytes=30_000, special_ids={"eos_token_id": 5})
    model, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert str(model.dtype) == "torch.float32"
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, 5)
    np.testing.assert_allclose(logits(params, config, tokens_BT), hf_logits(model, tokens_BT), atol=1e-4)


@pytest.mark.slow
@both
@pytest.mark.parametrize("limit", ["5GB", "20KB"])
def test_we_read_transformers_folder(tmp_path, transformers, tokens_BT, config, limit):
    import torch

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_json(config, "float32", {})))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.2)
    model.save_pretrained(tmp_path, max_shard_size=limit)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (limit == "20KB")
    params, read = load_hf(tmp_path)
    assert read == config
    np.testing.assert_allclose(logits(params, read, tokens_BT), hf_logits(model, tokens_BT), atol=1e-4)


# What is ignored, and what is refused


def test_weights_that_the_config_determines_are_ignored(folder):
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    rewrite_weights(folder, lambda tensors: tensors.update(inv_freq))
    assert_same(load_hf(folder)[0], random_params(CONFIG))


def test_an_oversized_table_of_rotary_frequencies_is_refused(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite_weights(folder, lambda tensors: tensors.update({name: np.ones(33, np.float32)}))
    with pytest.raises(InputError, match="too large for a table of rotary frequencies"):
        load_hf(folder)


def test_a_tied_head_may_be_stored_but_must_not_differ(tmp_path):
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
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
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


def test_save_refuses_params_of_another_config(tmp_path):
    with pytest.raises(InputError, match="unexpected: lm_head/kernel"):
        save_hf(tmp_path / "hf", random_params(CONFIG), TIED)
    narrow = flatten(random_params(CONFIG)) | {"norm/scale": np.ones(31, np.float32)}
    with pytest.raises(InputError, match="norm/scale"):
        save_hf(tmp_path / "hf", unflatten(narrow), CONFIG)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "dtype"), [(np.nan, "float32"), (-np.inf, "bfloat16"), (3.4e38, "bfloat16")], ids=str
)
def test_weights_that_are_not_finite_are_refused(tmp_path, value, dtype):
    """The last is finite in float32 alone."""
    params = random_params(CONFIG)
    params["norm"]["scale"] = np.array(params["norm"]["scale"])
    params["norm"]["scale"][3] = value
    with pytest.raises(InputError, match=r"^model\.norm\.weight holds NaN or infinity"):
        save_hf(tmp_path / "hf", params, CONFIG, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("axes", ["layers first", slow("one kernel")])
def test_adapters_are_merged_as_they_are_written(tmp_path, axes):
    """Into a bfloat16 base, in float32."""
    kernel = "layers/mlp/up_proj/kernel"
    method = On(LoRA(2), (-2,), (0,)) if axes == "layers first" else On(LoRA(2), (0, 1))
    rules = [(kernel, method), ("lm_head/kernel", DoRA(2)), FROZEN]
    made = random_adapted(rules, CONFIG)
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), made.params)
    save_hf(tmp_path / "m", narrow, CONFIG, adapters=made.adapters, methods=made.methods)
    wide = jax.tree.map(lambda a: a.astype(np.float32), narrow)
    expected = flatten(merge(wide, made.adapters, made.methods))
    for path, leaf in flatten(load_hf(tmp_path / "m")[0]).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-6, err_msg=path)
    assert np.abs(expected[kernel] - flatten(wide)[kernel]).max() > 0.1


def test_the_types_that_hold_a_folder_without_rounding(tmp_path):
    params = random_params(CONFIG)
    save_hf(tmp_path / "m", params, CONFIG)
    assert set(stored_types(tmp_path / "m").values()) == {np.dtype(np.float32)}
    save_hf(tmp_path / "n", params, CONFIG, "bfloat16")
    stored = read_weights(tmp_path / "n", CONFIG)
    one = next(name for name in stored if name.endswith("layers.1.mlp.up_proj.weight"))
    specs = {n: jax.ShapeDtypeStruct(t.shape, "float32" if n == one else t.dtype) for n, t in stored.items()}
    values = {name: tensor.array() for name, tensor in stored.items()}
    write_weights(tmp_path / "n", specs, values.__getitem__)
    types = stored_types(tmp_path / "n")
    assert {path for path, dtype in types.items() if dtype == np.float32} == {"layers/mlp/up_proj/kernel"}
    assert flatten(load_hf(tmp_path / "n", types=types)[0])["norm/scale"].dtype == jnp.bfloat16
