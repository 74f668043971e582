"""Greedy generation beside transformers': every architecture, windows, scaled positions, unequal prompts."""

import numpy as np
import pytest
from architectures import CONFIGS, random_params
from architectures_golden import read_by_transformers

from mora_jax.models.generate import Sampling, generate
from mora_jax.models.llama import Compute, Llama

NEW = 11  # beyond every window; within the context of "llama, dynamic"
NAMES = (
    "llama",
    "llama, biases",
    "llama, dynamic",
    "llama, llama3",
    "llama, yarn, mscale",
    "mistral, window",
    "qwen2, window",
    "qwen3, biases, window",
    "olmo2",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_are_those_of_transformers(tmp_path, name):
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    pytest.importorskip("transformers", reason="needs the extra `parity`")
    config = CONFIGS[name]
    theirs = read_by_transformers(config, tmp_path / "hf")
    prompts = [
        np.random.default_rng(i).integers(0, 97, length).tolist() for i, length in enumerate((5, 21, 1))
    ]
    found = generate(
        Llama(config, Compute(dtype="float32", layers="scan")), random_params(config), prompts, Sampling(NEW)
    )
    for prompt, new in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert new == expected[0, len(prompt) :].tolist()
