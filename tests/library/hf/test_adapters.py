"""Adapters in folders of PEFT: what is written, what is read back, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hf_folders import CONFIG, TIED, assert_same
from peft_folders import FROZEN, merged, random_adapted, read_folder, write_folder
from slow import quick, slow

from mora_jax import (
    DoRA,
    LoRA,
    MoRA,
    On,
    Rotate,
    Share,
    Truncate,
    hf,
    load_adapter,
    save_adapter,
    trees,
)
from mora_jax.errors import InputError
from mora_jax.hf.adapter_load import read_adapter
from mora_jax.hf.names import places
from mora_jax.hf.weights import fingerprint, read_weights

SMALL = dataclasses.replace(CONFIG, num_hidden_layers=2)
SMALL_TIED = dataclasses.replace(TIED, num_hidden_layers=2)
K, UP, DOWN = (f"layers/{name}_proj/kernel" for name in ("self_attn/k", "mlp/up", "mlp/down"))
SOME = "layers/(self_attn/k|mlp/up|mlp/down)_proj/kernel"
REST = "embed_tokens/embedding|.*norm/scale|lm_head/kernel"

# Rules, and the fields of the written config that matter.
CASES = {
    "lora": (
        [(SOME, LoRA(4, alpha=8))],
        {"r": 4, "lora_alpha": 8, "rank_pattern": {}, "modules_to_save": None},
    ),
    "rslora": ([(SOME, LoRA(4, alpha=7.5, rslora=True))], {"use_rslora": True, "lora_alpha": 7.5}),
    "plus": ([(SOME, LoRA(4, b_lr_scale=16.0, dropout=0.1))], {"lora_alpha": 4, "lora_dropout": 0.1}),
    "dora": ([(SOME, DoRA(4, alpha=8))], {"use_dora": True, "alpha_pattern": {}}),
    "patterns": (
        [(UP, LoRA(6, alpha=3)), (SOME, LoRA(4, alpha=8))],
        {
            "r": 6,
            "lora_alpha": 3,
            "rank_pattern": {"k_proj": 4, "down_proj": 4},
            "alpha_pattern": {"k_proj": 8, "down_proj": 8},
        },
    ),
    "both scales": ([(UP, LoRA(6, rslora=True)), (SOME, LoRA(4))], {"use_rslora": False}),
    "saved": (
        [(SOME, LoRA(2)), (REST, "train")],
        {
            "modules_to_save": [
                "embed_tokens",
                "input_layernorm",
                "post_attention_layernorm",
                "model.norm",
                "lm_head",
            ]
        },
    ),
    "final norm": ([(SOME, LoRA(2)), ("norm/scale", "train")], {"modules_to_save": ["model.norm"]}),
    "head": ([("lm_head/kernel", LoRA(2))], {"target_modules": ["lm_head"], "revision": "v1"}),
}


def tensors_of(params, config):
    """Returns a model's tensors as Hugging Face folders hold them."""
    flat = trees.flatten(params)
    return {
        name: np.asarray(flat[place.path][place.index]).T
        if place.transpose
        else flat[place.path][place.index]
        for name, place in places(config).items()
    }


def saved(tmp_path, rules, config=SMALL, **how):
    adapted = random_adapted([*rules, FROZEN], config)
    out = tmp_path / "adapter"
    save_adapter(out, *adapted[1:], config, base="org/base@v1", **how)
    return adapted, out


def check_merged(adapted, out, config, patterns=True):
    """Asserts that a reader of PEFT's folders gets the model that was trained."""
    read = merged(out, tensors_of(adapted.base, config), patterns)
    ours = tensors_of(adapted.merged(), config)
    for name in ours:
        np.testing.assert_allclose(read[name], ours[name], atol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", quick(("dora", "patterns", "saved"), CASES))
def test_a_folder_means_the_trained_model_and_comes_back(tmp_path, name):
    rules, expected = CASES[name]
    adapted, out = saved(tmp_path, rules)
    said = json.loads((out / "adapter_config.json").read_text())
    assert {key: said[key] for key in expected} == expected
    assert said["base_model_name_or_path"] == "org/base"
    check_merged(adapted, out, SMALL)
    params, adapters, methods = load_adapter(out, adapted.base, SMALL)
    assert_same(params, adapted.params)
    assert_same(adapters, adapted.adapters)
    assert methods.trained() == adapted.methods.trained()
    ranks = {path: (type(m), m.rank) for path, m in methods.adapted()}  # pyright: ignore[reportAttributeAccessIssue]
    assert ranks == {path: (type(m), m.rank) for path, m in adapted.methods.adapted()}  # pyright: ignore[reportAttributeAccessIssue]


def test_a_tied_head_is_in_the_file_too(tmp_path):
    adapted, out = saved(tmp_path, [(SOME, LoRA(2)), ("embed_tokens/embedding", "train")], SMALL_TIED)
    config, tensors = read_folder(out)
    assert config["ensure_weight_tying"] is True
    np.testing.assert_array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert_same(load_adapter(out, adapted.base, SMALL_TIED)[0], adapted.params)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    write_folder(out, config, tensors)
    with pytest.raises(
        InputError, match="ties its head to embed_tokens, and the file trains only one, or both"
    ):
        load_adapter(out, adapted.base, SMALL_TIED)


@pytest.mark.parametrize(
    ("operator", "pad_rank"),
    [
        (Share((0, 1), "wrap"), False),
        slow(Share(0, "zero"), True),
        slow(Share(1), False),
        slow(Truncate(), True),
    ],
    ids=str,
)
def test_mora_is_lora_without_loss_even_for_readers_that_ignore_patterns(tmp_path, operator, pad_rank):
    adapted, out = saved(tmp_path, [(SOME, MoRA(3, operator))], pad_rank=pad_rank)
    config, tensors = read_folder(out)
    ranks = {name.split(".")[4]: len(t) for name, t in tensors.items() if ".lora_A" in name}
    if pad_rank:
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (16, 16, {})
        assert set(ranks.values()) == {16}
    else:
        assert ranks == {"k_proj": 12, "up_proj": 15, "down_proj": 15}
        assert (config["r"], config["lora_alpha"]) == (15, 15)
        assert config["rank_pattern"] == config["alpha_pattern"] == {"k_proj": 12}
    for patterns in (True, False):
        check_merged(adapted, out, SMALL, patterns)


def test_padding_of_m_is_left_out(tmp_path):
    adapted, out = saved(tmp_path, [(K, MoRA(3, align=16))])
    assert {len(t) for name, t in read_folder(out)[1].items() if ".lora_A" in name} == {12}
    check_merged(adapted, out, SMALL)


@pytest.mark.slow
def test_padded_ranks_have_one_scale(tmp_path):
    rules = [(UP, LoRA(6, alpha=3, rslora=True)), (SOME, LoRA(4, alpha=8))]
    adapted, out = saved(tmp_path, rules, pad_rank=True)
    config, _ = read_folder(out)
    assert (config["r"], config["alpha_pattern"], config["rank_pattern"]) == (8, {}, {})
    check_merged(adapted, out, SMALL, patterns=False)


def test_bfloat16_is_stored(tmp_path):
    adapted, out = saved(tmp_path, [(SOME, LoRA(4))], dtype="bfloat16")
    size = (out / "adapter_model.safetensors").stat().st_size
    rounded = jax.tree.map(lambda a: np.asarray(a, "bfloat16").astype(np.float32), adapted.adapters)
    assert_same(load_adapter(out, adapted.base, SMALL)[1], rounded)
    assert size < 0.6 * sum(4 * a.size for a in jax.tree.leaves(adapted.adapters)) + 4096


@pytest.mark.parametrize(
    ("rules", "how", "message"),
    [
        (
            [(SOME, MoRA(3, Rotate()))],
            {},
            r"_proj/kernel: mora \(rank 3, operator rotate\) has no place in a file of",
        ),
        ([(SOME, MoRA(3, Truncate()))], {"form": "mora"}, "no place in the files of MoRA's authors"),
        ([(SOME, LoRA(3))], {"form": "mora"}, "no place in the files of MoRA's authors"),
        ([(UP, MoRA(4, Share(1))), (SOME, MoRA(4, Share((1, 0))))], {"form": "mora"}, "have one mora_type"),
        (
            [(SOME, MoRA(4, Share(1)))],
            {"form": "mora", "pad_rank": True},
            "ranks are padded in files of LoRA",
        ),
        ([(UP, DoRA(3)), (SOME, LoRA(3))], {}, "DoRA and other methods have no place in one file"),
        ([(SOME, LoRA(513))], {"pad_rank": True}, "vLLM serves ranks up to 512, not 513"),
        ([(REST, "train")], {}, "nothing is adapted"),
        ([("embed.*", On(LoRA(3), inputs=(1,)))], {}, "embedding is no linear layer"),
        (
            [(UP, On(LoRA(3), inputs=(2,), stack=(0,)))],
            {},
            "up_proj/kernel is no linear layer of the model, adapted",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_refused(tmp_path, rules, how, message):
    with pytest.raises(InputError, match=message):
        saved(tmp_path, rules, **how)
    assert not list(tmp_path.iterdir())


# Files of others


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of LoRA with trained norms, as its parts."""
    folder = tmp_path_factory.mktemp("adapter")
    _, out = saved(folder, [(SOME, LoRA(4, alpha=8)), ("norm/scale", "train")])
    return read_folder(out)


def set_to(name, value):
    return lambda config, tensors: config.update({name: value})


A_K = "model.layers.1.self_attn.k_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to("r", 8), r"another shape: .*k_proj\.lora_A\.weight \[4, 32\] instead of \[8, 32\]"),
        (set_to("rank_pattern", {"k_proj": 2}), r"k_proj\.lora_A\.weight \[4, 32\] instead of \[2, 32\]"),
        (set_to("target_modules", ["k_proj", "qkv_proj"]), "target_modules names 'qkv_proj', which the base"),
        (set_to("target_modules", ["k_proj", "up_proj"]), r"unexpected: .*down_proj\.lora_A"),
        (set_to("target_modules", "all-linear"), r"missing: .*gate_proj\.lora_A"),
        (set_to("target_modules", "k_proj("), "target_modules is a list of names or a regex, not 'k_proj"),
        (set_to("target_modules", ["embed_tokens"]), "target_modules names 'embed_tokens'"),
        (set_to("target_modules", None), "target_modules is missing"),
        (set_to("modules_to_save", ["score"]), "modules_to_save names 'score', which the base does not have"),
        (set_to("modules_to_save", ["norm"]), r"missing: .*input_layernorm\.weight"),
        (set_to("modules_to_save", None), r"unexpected: model\.norm\.weight"),
        (set_to("peft_type", "IA3"), "peft_type is 'IA3'; 'LORA' is supported"),
        (lambda config, tensors: config.pop("peft_type"), "peft_type is missing"),
        (lambda config, tensors: config.pop("r"), ": r is missing"),
        (set_to("bias", "all"), "bias is 'all'; 'none' is supported"),
        (set_to("init_lora_weights", "pissa"), r"init_lora_weights is 'pissa'; .*of a changed base are not"),
        (set_to("init_lora_weights", "olora"), "init_lora_weights is 'olora'"),
        (set_to("use_qalora", True), "use_qalora is True; adapters with this field are not supported"),
        (set_to("layers_to_transform", 0), "layers_to_transform is 0"),
        (set_to("layers_to_transform", [1]), r"layers_to_transform is \[1\]"),
        (set_to("exclude_modules", ["q_proj"]), r"exclude_modules is \['q_proj'\]"),
        (set_to("fan_in_fan_out", True), "fan_in_fan_out is True"),
        (set_to("lora_bias", True), "lora_bias is True"),
        (set_to("of_the_future", {"beta": 1}), "of_the_future is {'beta': 1}; adapters with this"),
        (set_to("r", 0), "r is a number above 0, not 0"),
        (set_to("r", 4.5), "of type int, not 4.5"),
        (set_to("lora_alpha", "8"), "lora_alpha is a number, not '8'"),
        (set_to("use_rslora", "yes"), "use_rslora is true or false, not 'yes'"),
        (set_to("rank_pattern", ["k_proj"]), "rank_pattern is a mapping of regexes to ranks"),
        (set_to("use_dora", True), r"missing: .*lora_magnitude_vector"),
        (lambda config, tensors: config.update(use_mora=True, mora_type=5), "an adapter of mora_type 5"),
        (lambda config, tensors: config.update(use_mora=True, use_dora=True), "mora_type 1 with use_dora"),
        (lambda config, tensors: tensors.pop(A_K), f"missing: {A_K}"),
        (lambda config, tensors: tensors.update(other=np.ones(2, np.float32)), "unexpected: other"),
        (lambda config, tensors: tensors.update({A_K: tensors[A_K][:, :31]}), r"\[4, 31\] instead of"),
        (lambda config, tensors: tensors.update({A_K: tensors[A_K].astype(np.int8)}), "is of type I8"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, written, change, message):
    config, tensors = dict(written[0]), dict(written[1])
    change(config, tensors)
    write_folder(tmp_path, config, tensors)
    shapes = {name: place.shape for name, place in places(SMALL).items()}
    with pytest.raises(InputError, match=message) as error:
        read_adapter(tmp_path, shapes)
    assert "\n" not in str(error.value)


def test_fields_without_an_effect_are_read(tmp_path, written):
    fields = {
        "revision": "main",
        "lora_bias": False,
        "of_the_future": None,
        "peft_version": "9",
        "eva_config": {},
    }
    write_folder(tmp_path, written[0] | fields, written[1])
    read_adapter(tmp_path, {name: place.shape for name, place in places(SMALL).items()})


@pytest.mark.parametrize(
    "targets", [r".*\.(k|up|down)_proj", r"model\.layers\.\d+\.(self_attn\.k|mlp\.(up|down))_proj"]
)
def test_targets_may_be_a_regex(tmp_path, written, targets):
    write_folder(tmp_path, written[0] | {"target_modules": targets}, written[1])
    found = read_adapter(tmp_path, {name: place.shape for name, place in places(SMALL).items()})
    assert len(found.kernels) == 6


def test_another_base_is_refused(tmp_path, written):
    wide = dataclasses.replace(SMALL, hidden_size=64)
    write_folder(tmp_path / "a", *written)
    with pytest.raises(
        InputError, match=r"do not fit the base or their config: .*\[4, 32\] instead of \[4, 64\]"
    ):
        read_adapter(tmp_path / "a", {name: place.shape for name, place in places(wide).items()})
    with pytest.raises(InputError, match=r"missing: .*layers\.2"):
        read_adapter(tmp_path / "a", {name: place.shape for name, place in places(CONFIG).items()})


def test_a_base_of_other_values_is_refused(tmp_path):
    adapted = random_adapted([(SOME, LoRA(4)), FROZEN], SMALL)
    hf.save_hf(tmp_path / "base", adapted.base, SMALL)
    print_ = fingerprint(read_weights(tmp_path / "base", SMALL))
    save_adapter(tmp_path / "a", *adapted[1:], SMALL, base="b", base_hash=print_)
    load_adapter(tmp_path / "a", adapted.base, SMALL, base=tmp_path / "base")
    table_VD = np.array(trees.flatten(adapted.base)["embed_tokens/embedding"])
    table_VD[3, 1] += 1  # one number, in no special place
    other = trees.replaced(adapted.base, {"embed_tokens/embedding": table_VD})
    hf.save_hf(tmp_path / "other", other, SMALL)
    with pytest.raises(
        InputError, match=r"was trained beside another base than .*other: their weights differ"
    ):
        load_adapter(tmp_path / "a", other, SMALL, base=tmp_path / "other")


def test_layers_that_differ_are_merged_only(tmp_path, written):
    config, tensors = dict(written[0]), dict(written[1])
    config["rank_pattern"] = {r"1\.self_attn\.k_proj": 2}
    for name in ("A", "B"):
        key = f"model.layers.1.self_attn.k_proj.lora_{name}.weight"
        tensors[key] = tensors[key][:2] if name == "A" else tensors[key][:, :2]
    write_folder(tmp_path, config, tensors)
    adapted = random_adapted([FROZEN], SMALL)
    with pytest.raises(InputError, match="layers differ in how layers/self_attn/k_proj/kernel is adapted"):
        load_adapter(tmp_path, adapted.base, SMALL)


def test_a_pickle_is_not_opened(tmp_path, written):
    write_folder(tmp_path, *written)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(
        InputError, match=r"holds a pickle, adapter_model\.bin, which can run code and is never"
    ):
        read_adapter(tmp_path, {name: place.shape for name, place in places(SMALL).items()})
