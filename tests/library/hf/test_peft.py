"""PEFT itself reads our folders, and we read PEFT's, with equal logits. All arrays are random."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest
from architectures import CONFIGS
from hf_folders import CONFIG, TIED
from peft_folders import FROZEN, random_adapted

from mora_jax import DoRA, LoRA, MoRA, Share, Truncate, hf, load_adapter, merge, save_adapter
from mora_jax.models.llama import Compute, Llama

pytestmark = pytest.mark.slow  # test_adapters has quick twins with a reader that knows LoRA's definition

LINEARS = "layers/.*_proj/kernel"
TRAINED = ".*norm/scale|embed_tokens/embedding"
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 24))
RULES = {
    "lora": [(LINEARS, LoRA(4, alpha=8))],
    "rslora": [(LINEARS, LoRA(4, alpha=7.5, rslora=True))],
    "dora": [(LINEARS, DoRA(4, alpha=8))],
    "patterns": [("layers/mlp/.*", LoRA(6, alpha=3)), (LINEARS, LoRA(4, alpha=8))],
    "saved": [(LINEARS, LoRA(4)), (f"{TRAINED}|lm_head/kernel", "train")],
    "saved, tied": [(LINEARS, LoRA(4)), (TRAINED, "train")],
    "truncate": [(LINEARS, MoRA(3, Truncate()))],
    "padded": [(LINEARS, MoRA(3))],
    **{
        f"share {group} {pad}": [(LINEARS, MoRA(3, Share(group, pad)))]
        for group in (0, 1, (0, 1), (1, 0))
        for pad in ("zero", "wrap")
    },
}


@pytest.fixture(scope="module")
def peft():
    """PEFT; with `torch` and `transformers` it comes with the extra `parity`."""
    pytest.importorskip("torch", reason="needs the extra `parity`")
    pytest.importorskip("transformers", reason="needs the extra `parity`")
    return pytest.importorskip("peft", reason="needs the extra `parity`")


@pytest.fixture(autouse=True)
def quiet():
    """PEFT and transformers warn of their own future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def model_of(folder):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits_of(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def ours(params, config):
    return np.asarray(Llama(config, Compute(dtype="float32")).apply({"params": params}, TOKENS))


def check(found, expected, base):
    """Asserts that logits agree, and that the adapter matters."""
    size = np.abs(expected).max()
    assert np.abs(expected - base).max() > 0.05 * size
    np.testing.assert_allclose(found, expected, atol=1e-5 * size)


@pytest.mark.parametrize("name", RULES)
def test_peft_reads_our_folder(tmp_path, peft, name):
    config = TIED if "tied" in name else CONFIG
    adapted = random_adapted([*RULES[name], FROZEN], config)
    base = str(tmp_path / "base")
    hf.save_hf(base, adapted.base, config)
    save_adapter(tmp_path / "a", *adapted[1:], config, base=base, pad_rank=name == "padded")
    theirs = logits_of(peft.PeftModel.from_pretrained(model_of(base), str(tmp_path / "a")))
    check(theirs, ours(adapted.merged(), config), ours(adapted.base, config))


@pytest.mark.parametrize("name", ["llama, biases", "qwen2, window", "qwen3", "olmo2"])
def test_every_architecture_has_its_names(tmp_path, peft, name):
    config = CONFIGS[name]
    adapted = random_adapted([(LINEARS, MoRA(3)), (".*norm/scale", "train"), FROZEN], config)
    base = str(tmp_path / "base")
    hf.save_hf(base, adapted.base, config)
    save_adapter(tmp_path / "a", *adapted[1:], config, base=base)
    theirs = logits_of(peft.PeftModel.from_pretrained(model_of(base), str(tmp_path / "a")))
    check(theirs, ours(adapted.merged(), config), ours(adapted.base, config))


PEFT_OPTIONS = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "up_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "down_proj"], "use_dora": True},
    "dora, rslora": {"r": 4, "target_modules": ["k_proj"], "use_dora": True, "use_rslora": True},
    "patterns": {
        "target_modules": r".*\.(k_proj|up_proj|down_proj)",
        "rank_pattern": {"up_proj": 6, r"mlp\.down_proj": 2},
        "alpha_pattern": {"up_proj": 3},
    },
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "saved": {
        "target_modules": ["v_proj"],
        "modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"],
    },
    "saved, tied": {
        "target_modules": ["v_proj"],
        "modules_to_save": ["embed_tokens", "model.norm"],
        "ensure_weight_tying": True,
    },
}


@pytest.fixture
def theirs(tmp_path, peft, request):
    """A base, and an adapter that PEFT made, whose arrays are random; and the logits of both."""
    import torch

    config = TIED if "tied" in request.param else CONFIG
    base = random_adapted([FROZEN], config).base
    hf.save_hf(tmp_path / "base", base, config)
    torch.manual_seed(0)
    model = peft.get_peft_model(
        model_of(tmp_path / "base"), peft.LoraConfig(**PEFT_OPTIONS[request.param], task_type="CAUSAL_LM")
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(tmp_path / "a")
    return base, config, logits_of(model), tmp_path


@pytest.mark.parametrize("theirs", PEFT_OPTIONS, indirect=True)
def test_we_read_pefts_folder(theirs):
    base, config, expected, folder = theirs
    params, adapters, methods = load_adapter(folder / "a", base, config)
    merged = jax.jit(lambda params, adapters: merge(params, adapters, methods))(params, adapters)
    check(ours(merged, config), expected, ours(base, config))
    hf.merge_adapters(folder / "base", [(folder / "a", 1.0)], folder / "out")
    check(ours(hf.load_hf(folder / "out")[0], config), expected, ours(base, config))


def test_weighted_adapters_are_pefts(tmp_path, peft):
    """PEFT's combination "cat" is the exact sum of updates."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=2)
    a, b = (
        random_adapted([(LINEARS, LoRA(r, alpha=8)), FROZEN], config, seed) for r, seed in ((4, 0), (2, 1))
    )
    hf.save_hf(tmp_path / "base", a.base, config)
    for name, adapted in (("a", a), ("b", b)):
        save_adapter(
            tmp_path / name, a.base, adapted.adapters, adapted.methods, config, base=str(tmp_path / "base")
        )
    model = peft.PeftModel.from_pretrained(model_of(tmp_path / "base"), str(tmp_path / "a"), adapter_name="a")
    model.load_adapter(str(tmp_path / "b"), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.25], "both", combination_type="cat")
    model.set_adapter("both")
    hf.merge_adapters(tmp_path / "base", [(tmp_path / "a", 0.5), (tmp_path / "b", 0.25)], tmp_path / "out")
    check(ours(hf.load_hf(tmp_path / "out")[0], config), logits_of(model), ours(a.base, config))
