"""The count of needed operations, compared with counts by hand."""

import pytest

from mora_jax import transform
from mora_jax.methods import LoRA, MoRA
from mora_jax.models.llama import STACKED, LlamaConfig, abstract_params
from mora_jax.transform import Rules
from train.config.sections import LINEARS
from train.perf.bench import flops

MODEL = LlamaConfig(100, 8, 12, 3, 2, 2, 16)
LINEAR_WEIGHTS = 3 * (4 * 8 * 8 + 3 * 8 * 12)
HEAD = 8 * 100


def count(rules: Rules, model: LlamaConfig = MODEL) -> flops.Flops:
    params = abstract_params(model)
    return flops.needed(params, transform.assign(rules, params, STACKED))


def test_a_trained_weight_counts_six_and_a_frozen_one_four():
    assert count([(".*", "train")]) == flops.Flops(6 * (LINEAR_WEIGHTS + HEAD), 0)
    frozen = count([("lm_head/kernel|embed_tokens/embedding|.*scale", "train"), (".*", "frozen")])
    assert frozen == flops.Flops(4 * LINEAR_WEIGHTS + 6 * HEAD, 0)


def test_adapters_count_by_their_exact_parameters():
    lora = count([(LINEARS, LoRA(2)), (".*", "frozen")])
    assert lora == flops.Flops(4 * (LINEAR_WEIGHTS + HEAD), 6 * 3 * 2 * (4 * (8 + 8) + 3 * (8 + 12)))
    # r_hat is isqrt(16 * 2) = 5 and isqrt(20 * 2) = 6; the padding of m to 8x8 does not count
    mora = count([(LINEARS, MoRA(2, align=8)), (".*", "frozen")])
    assert mora.adapters == 6 * 3 * (4 * 5**2 + 3 * 6**2)


def test_a_tied_embedding_counts_as_the_head():
    tied = LlamaConfig(100, 8, 12, 3, 2, 2, 16, tie_word_embeddings=True)
    assert count([(".*", "train")], tied).base == 6 * (LINEAR_WEIGHTS + HEAD)


def test_the_250m_model_needs_41_ms_at_750_tflops():
    model = LlamaConfig()
    rules = [("layers/.*_proj/kernel", "frozen"), (".*", "train")]
    per_step = count(rules, model).base * 64 * 512
    assert per_step / 750e12 * 1e3 == pytest.approx(41, abs=0.5)
