"""The configs of GaLore's protocol: each value as GaLore's scripts have it, and the published sizes."""

import math
import re
from pathlib import Path

import jax
import pytest

from mora_jax.methods import LoRA, MoRA
from mora_jax.models.llama import abstract_params
from train.config import flags
from train.run.state import assign_methods

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs/galore").glob("*.yaml"))
PAGE = (ROOT / "docs/paper.md").read_text().partition("## GaLore's protocol")[2]
# Hidden and intermediate size, layers, heads, steps, rank, parameters.
PROTOCOL = {
    "60m": (512, 1376, 8, 8, 10_000, 128, 58.1e6),
    "130m": (768, 2048, 12, 12, 20_000, 256, 134.1e6),
    "350m": (1024, 2736, 24, 16, 60_000, 256, 368.0e6),
    "1b": (2048, 5461, 24, 32, 100_000, 512, 1339.1e6),
}
# The flags of the other methods' runs, as the page has them for 60M.
METHODS = dict(re.findall(r"--run-dir runs/galore_60m_(\w+)(.*)", PAGE))


def test_there_is_a_config_for_each_size():
    assert {path.stem for path in CONFIGS} == PROTOCOL.keys()
    assert METHODS.keys() == {"full", "lora", "mora", "relora", "remora"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_has_the_values_of_the_protocol(path):
    *sizes, steps, rank, parameters = PROTOCOL[path.stem]
    config = flags.read_config(str(path))
    model = config.model
    heads = model.num_attention_heads
    assert [model.hidden_size, model.intermediate_size, model.num_hidden_layers, heads] == sizes
    assert (model.vocab_size, model.rms_norm_eps, model.initializer_range) == (32_000, 1e-6, 0.02)
    assert not model.tie_word_embeddings
    entries = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model)))
    assert abs(entries - parameters) < 0.05e6
    assert f"| `configs/galore/{path.name}` | {parameters / 1e6:,.1f}M | {steps:,} | {rank} |" in PAGE
    assert (config.steps, config.batch_size, config.data.sequence_length) == (steps, 512, 256)
    assert (config.schedule.warmup, config.schedule.min_ratio) == (steps // 10, 0.1)
    assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.0, 0.0)
    assert config.restart.every == steps // 5


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_flags_make_the_other_methods(path, kind):
    config = flags.read_config(str(path), METHODS[kind].split())
    rank, restarts = PROTOCOL[path.stem][5], kind.startswith("re")
    assert config.warnings() == []
    assert bool(config.restart.every) == restarts
    assert config.schedule.kind == ("jagged-cosine" if restarts else "cosine")
    match kind.removeprefix("re"):
        case "full":
            assert config.method == "full"
        case "lora":
            assert config.method == LoRA(rank)
        case "mora":
            assert config.method == MoRA(rank, align=128)
    assert len(list(assign_methods(config).adapted())) == (0 if kind == "full" else 7)
