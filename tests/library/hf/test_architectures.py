"""Every architecture beside transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
from architectures import CONFIGS, LENGTH, random_params, tokens_BT
from hf_folders import assert_same

from mora_jax.hf import load_hf, save_hf
from mora_jax.models.llama import Compute, Llama

each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def logits(params, config, tokens) -> np.ndarray:
    return np.asarray(Llama(config, Compute(dtype="float32")).apply({"params": params}, jnp.array(tokens)))


@pytest.mark.slow
@each
def test_the_logits_are_those_of_transformers(tmp_path, config):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    params = random_params(config)
    save_hf(tmp_path / "ours", params, config)
    auto = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True, dtype=torch.float32)
    assert not any(info.values())
    assert model.config.model_type == config.model_type
    for length in (LENGTH, 20):
        with torch.no_grad():
            theirs = model(torch.tensor(tokens_BT(length))).logits.numpy()
        ours = logits(params, config, tokens_BT(length))
        print(np.abs(ours - theirs).max() / np.abs(theirs).max())
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    model.save_pretrained(tmp_path / "theirs")
    loaded, again = load_hf(tmp_path / "theirs")
    assert again == config
    assert_same(loaded, params)
