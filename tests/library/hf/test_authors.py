"""Adapters in files of MoRA's authors, compared with numbers recorded from their code."""

import numpy as np
import pytest
from hf_folders import CONFIG
from peft_folders import FROZEN, random_adapted, read_folder, write_folder
from slow import quick, slow

from mora_jax import MoRA, Rotate, Share, hf, load_adapter, save_adapter
from mora_jax.errors import InputError
from mora_jax.hf.adapter_load import read_adapter
from mora_jax.methods.peft import A, B, PeftAdapter
from mora_jax.models.llama import Compute, Llama, LlamaConfig

UP = "model.layers.0.mlp.up_proj"
OPERATORS = {
    1: Share(0, "wrap", 4),
    2: Share(1, "wrap", 4),
    3: Share((1, 0), "wrap", 4),
    4: Share((0, 1), "wrap", 4),
}
OPERATORS[6] = Rotate("wrap", "drop")
QUICK, SHAPES = "k60_d60_r8", ["k176_d64_r8", "k40_d300_r4", "k32_d300_r4"]
every_shape = [QUICK, *(slow(shape) for shape in SHAPES)]


def their_config(mora_type, rank, **more):
    targets = {"target_modules": ["up_proj"], "peft_type": "LORA", "lora_alpha": 8}
    return {**targets, "r": rank, "use_mora": True, "mora_type": mora_type, **more}


def update(folder, mora_type, m, k, d, rank):
    """Returns the update, as PyTorch lays it out, of a file with one matrix."""
    tensors = {f"{UP}.lora_{name}.weight": m for name in "AB"}
    write_folder(folder, their_config(mora_type, rank), tensors)
    shapes = {"model.embed_tokens.weight": (9, k), "lm_head.weight": (9, k), f"{UP}.weight": (d, k)}
    kernel = read_adapter(folder, shapes).kernels[f"{UP}.weight"]
    method = kernel.method
    assert (method.operator, method.rank) == (OPERATORS[mora_type], rank)  # pyright: ignore[reportAttributeAccessIssue]
    return np.asarray(method.weight(kernel.arrays(method), np.zeros((k, d), np.float32))).T


@pytest.mark.parametrize("mora_type", quick([6], [1, 2, 4, 6]))
@pytest.mark.parametrize("shape", every_shape)
def test_their_layers_compute_as_recorded(golden, tmp_path, mora_type, shape):
    data = np.load(golden / f"mora_type{mora_type}_{shape}.npz")
    found = update(tmp_path, mora_type, data["M"], int(data["k"]), int(data["d"]), int(data["r"]))
    np.testing.assert_allclose(found, data["fwd_operator"], atol=1e-5)


@pytest.mark.parametrize("shape", every_shape[:3])
def test_type_3_compresses_as_type_2_and_decompresses_as_type_1(golden, tmp_path, shape):
    """Nothing is recorded of type 3. With D M C for each type, D1 M1 C1 (D2 M4 C1)^+ D2 M2 C2 is D1 M C2."""
    one, two, four = (np.load(golden / f"mora_type{n}_{shape}.npz") for n in (1, 2, 4))
    inverse = np.linalg.pinv(four["fwd_operator"].astype(np.float64), rcond=1e-6)
    expected = one["fwd_operator"] @ inverse @ two["fwd_operator"]
    m = one["M"].astype(np.float64) @ np.linalg.inv(four["M"].astype(np.float64)) @ two["M"]
    found = update(tmp_path, 3, m.astype(np.float32), int(one["k"]), int(one["d"]), int(one["r"]))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow  # the layers' test has the same promise
@pytest.mark.parametrize("mora_type", [1, 6])
def test_their_model_computes_as_recorded(golden, tmp_path, mora_type):
    data = np.load(golden / f"tinyllama_mora_type{mora_type}.npz")
    config = LlamaConfig(320, 64, 176, 2, 4, 4, 128, rms_norm_eps=1e-6)
    tensors = {name.removeprefix("base/"): data[name] for name in data.files if name.startswith("base/")}
    matrices = {
        f"{name.removeprefix('M/')}.lora_{ab}.weight": data[name]
        for name in data.files
        if name.startswith("M/")
        for ab in "AB"
    }
    write_folder(tmp_path / "adapter", their_config(mora_type, 8, target_modules="all-linear"), matrices)
    hf.save_hf(tmp_path / "zeros", random_adapted([FROZEN], config).base, config)
    (tmp_path / "zeros/model.safetensors").unlink()
    import safetensors.numpy

    safetensors.numpy.save_file(tensors, tmp_path / "zeros/model.safetensors", {"format": "pt"})
    hf.merge_adapters(tmp_path / "zeros", [(tmp_path / "adapter", 1)], tmp_path / "merged")
    params, _ = hf.load_hf(tmp_path / "merged")
    logits = Llama(config, Compute(dtype="float32")).apply({"params": params}, data["input_ids"])
    np.testing.assert_allclose(logits, data["logits"], atol=1e-5)


@pytest.mark.parametrize(
    ("mora_type", "operator"), quick([(3, OPERATORS[3]), (6, OPERATORS[6])], OPERATORS.items())
)
@pytest.mark.parametrize("rank", [2, slow(3)])
def test_ours_is_written_as_theirs(tmp_path, mora_type, operator, rank):
    """r_hat is 12.6 and 15.49 before rounding: ours is 12 and 15, and theirs would be 13 and 15."""
    method = MoRA(rank, operator, align=16)
    path = "layers/mlp/up_proj/kernel"
    adapted = random_adapted([(path, method), FROZEN], CONFIG)
    r_hat = method.r_hat(32, 48)
    m = adapted.adapters["layers"]["mlp"]["up_proj"]["kernel"]["m_RR"]
    m[:, r_hat:] = m[:, :, r_hat:] = 0
    save_adapter(tmp_path / "a", *adapted[1:], CONFIG, base="b", form="mora")
    config, tensors = read_folder(tmp_path / "a")
    assert (config["use_mora"], config["mora_type"]) == (True, mora_type)
    theirs = int(np.sqrt((32 + 48) * config["r"]) + 0.5) // operator.multiple * operator.multiple
    assert theirs == r_hat
    for name in ("lora_A", "lora_B"):
        np.testing.assert_array_equal(tensors[f"{UP}.{name}.weight"], m[0, :r_hat, :r_hat].T)
    _, arrays, methods = load_adapter(tmp_path / "a", adapted.base, CONFIG)
    (read,) = (method for _, method in methods.adapted())
    assert read.r_hat(32, 48) == r_hat  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_array_equal(arrays["layers"]["mlp"]["up_proj"]["kernel"]["m_RR"], m[:, :r_hat, :r_hat])


def test_what_they_compute_otherwise_is_not_theirs():
    """Padding matters where r_hat does not divide the inputs, surplus where there are more input blocks."""
    assert Share(0, "zero").authors_type(16, 32, 48) == 1
    assert Share(0, "zero").authors_type(15, 32, 48) == 0
    assert Share((1, 0), "zero").authors_type(15, 32, 48) == 3
    assert Rotate("wrap", "fold").authors_type(14, 32, 48) == 6
    assert Rotate("wrap", "fold").authors_type(14, 48, 32) == 0
    assert Rotate("zero", "drop").authors_type(14, 48, 32) == 0


def test_two_matrices_are_not_theirs(tmp_path):
    m = np.ones((12, 12), np.float32)
    with pytest.raises(InputError, match="lora_A and lora_B differ, and MoRA has one matrix"):
        MoRA(2, r_hat_from="rounded").peft_arrays({A: m, B: m + 1}, 32, 48)  # pyright: ignore[reportArgumentType]
    assert MoRA.from_peft(PeftAdapter({}, 2, 2, mora_type=5)) is None
