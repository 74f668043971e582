"""Adapters merged into folders: values, types, other files, and nothing half written."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from hf_folders import CONFIG, TIED, rewrite_weights
from peft_folders import FROZEN, random_adapted, read_folder, write_folder
from slow import slow

from mora_jax import DoRA, LoRA, MoRA, hf, save_adapter, trees
from mora_jax.errors import InputError

SOME = "layers/(self_attn/k|mlp/up|mlp/down)_proj/kernel"
UP = "layers/mlp/up_proj/kernel"
SMALL = dataclasses.replace(CONFIG, num_hidden_layers=2)


def folders(tmp_path, rules, config=SMALL, name="a", seed=0):
    """Writes a base and an adapter, and returns what the adapter was made of."""
    adapted = random_adapted([*rules, FROZEN], config, seed)
    if not (tmp_path / "base").exists():
        hf.save_hf(tmp_path / "base", adapted.base, config)
    save_adapter(tmp_path / name, *adapted[1:], config, base=str(tmp_path / "base"))
    return adapted


@pytest.mark.slow  # the next test merges two adapters
@pytest.mark.parametrize(
    "rules",
    [
        [(SOME, LoRA(4, alpha=8)), (".*norm/scale|embed_tokens/embedding", "train")],
        slow([(SOME, DoRA(4))]),
        slow([(SOME, MoRA(3))]),
    ],
    ids=["lora", "dora", "mora"],
)
@pytest.mark.parametrize(
    "config",
    [slow(SMALL), dataclasses.replace(TIED, num_hidden_layers=2)],
    ids=["untied", "tied"],
)
def test_a_merged_folder_is_the_trained_model(tmp_path, rules, config):
    adapted = folders(tmp_path, rules, config)
    count = hf.merge_adapters(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    assert count == 6 + (6 if len(rules) > 1 else 0)
    params, read = hf.load_hf(tmp_path / "out")
    assert read == config
    ours = trees.flatten(adapted.merged())
    for path, leaf in trees.flatten(params).items():
        np.testing.assert_allclose(leaf, ours[path], atol=2e-6, err_msg=path)


def test_several_adapters_are_added_with_their_weights(tmp_path):
    one = folders(tmp_path, [(UP, LoRA(4)), ("norm/scale", "train")])
    two = folders(tmp_path, [(UP, LoRA(2))], name="b", seed=1)
    two = two._replace(params=one.base)  # the seed changed the base too
    both = [(tmp_path / "a", 0.5), (tmp_path / "b", -0.25)]
    hf.merge_adapters(tmp_path / "base", both, tmp_path / "out")
    base, a, b = (trees.flatten(tree) for tree in (one.base, one.merged(), two.merged()))
    for path, leaf in trees.flatten(hf.load_hf(tmp_path / "out")[0]).items():
        expected = base[path] + 0.5 * (a[path] - base[path]) - 0.25 * (b[path] - base[path])
        np.testing.assert_allclose(leaf, expected, atol=2e-6, err_msg=path)


def test_layers_may_differ(tmp_path):
    adapted = folders(tmp_path, [(UP, LoRA(4))])
    config, tensors = read_folder(tmp_path / "a")
    tensors = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" in name}
    write_folder(tmp_path / "a", config | {"target_modules": r".*\.1\.mlp\.up_proj"}, tensors)
    assert hf.merge_adapters(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out") == 1
    params, _ = hf.load_hf(tmp_path / "out")
    k, ours, base = (
        tree["layers"]["mlp"]["up_proj"]["kernel"] for tree in (params, adapted.merged(), adapted.base)
    )
    np.testing.assert_array_equal(k[0], base[0])
    np.testing.assert_allclose(k[1], ours[1], atol=2e-6)


def test_types_of_the_base_are_kept_or_changed_once(tmp_path):
    adapted = folders(tmp_path, [(UP, LoRA(4))])
    import ml_dtypes

    def halve(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float16 if "norm" in name else ml_dtypes.bfloat16)

    rewrite_weights(tmp_path / "base", halve)
    hf.merge_adapters(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    found = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    assert {str(t.dtype) for name, t in found.items() if "norm" in name} == {"float16"}
    assert {str(t.dtype) for name, t in found.items() if "norm" not in name} == {"bfloat16"}
    hf.merge_adapters(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "wide", "float32")
    params, _ = hf.load_hf(tmp_path / "wide")
    rounded = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16).astype(np.float32), adapted.base)
    expected = adapted._replace(params=rounded).merged()["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_allclose(params["layers"]["mlp"]["up_proj"]["kernel"], expected, atol=2e-6)
    up = found["model.layers.0.mlp.up_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(
        up.T, params["layers"]["mlp"]["up_proj"]["kernel"][0].astype(ml_dtypes.bfloat16)
    )
    assert json.loads((tmp_path / "wide/config.json").read_text())["torch_dtype"] == "float32"


def test_other_files_are_copied_and_other_weights_are_not(tmp_path):
    folders(tmp_path, [(UP, LoRA(4))])
    (tmp_path / "base/tokenizer.json").write_text("{}")
    (tmp_path / "base/pytorch_model.bin").write_text("pickle")
    (tmp_path / "base/runs").mkdir()
    hf.merge_adapters(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    found = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert found.keys() == {"config.json", "model.safetensors", "tokenizer.json"}
    assert found["config.json"] == (tmp_path / "base/config.json").read_bytes()


@pytest.mark.slow
def test_no_more_than_some_tensors_are_held_at_a_time(tmp_path):
    import tracemalloc

    config = dataclasses.replace(SMALL, num_hidden_layers=32, hidden_size=64, intermediate_size=128)
    adapted = folders(tmp_path, [("layers/mlp/up_proj/kernel", LoRA(4))], config)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(adapted.base))
    hf.merge_adapters(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "once")  # compiles
    del adapted
    tracemalloc.start()
    hf.merge_adapters(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < size / 4


def test_nothing_is_left_of_a_merge_that_fails(tmp_path):
    folders(tmp_path, [(UP, LoRA(4))])
    config, tensors = read_folder(tmp_path / "a")
    write_folder(tmp_path / "a", config, tensors, base_sha256="another")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="was trained beside another base"):
        hf.merge_adapters(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    write_folder(tmp_path / "a", config, tensors)
    file = tmp_path / "base/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="is damaged"):
        hf.merge_adapters(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.fixture
def kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    return tmp_path


def test_a_folder_that_is_not_empty_is_kept(kept):
    folders(kept, [(UP, LoRA(4))])
    with pytest.raises(InputError, match="exists already"):
        hf.merge_adapters(kept / "base", [(kept / "a", 1.0)], kept / "out")
    assert [path.name for path in (kept / "out").iterdir()] == ["thesis.tex"]
