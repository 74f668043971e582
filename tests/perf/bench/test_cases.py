"""Named sizes, and the words that choose a method."""

import dataclasses
import math
from typing import ClassVar

import pytest
from slow import slow

from mora_jax import trees
from mora_jax.errors import InputError
from mora_jax.methods import METHODS, LoRA, MoRA, Rotate, Share
from mora_jax.models.llama import abstract_params
from train.perf.bench.cases import SIZES, with_method
from train.perf.bench.record import label, method_row


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("250m", 247.5),
        slow("1.3b", 1339.5),
        slow("7b", 6738.4),
        slow("llama-3.2-1b", 1235.8),
        slow("qwen-2.5-0.5b", 494.0),
        ("tiny", 0.119),
    ],
)
def test_sizes_have_the_parameters_that_their_names_say(size: str, millions: float):
    params = abstract_params(SIZES[size]().config.model)
    count = sum(math.prod(leaf.shape) for leaf in trees.flatten(params).values())
    assert count / 1e6 == pytest.approx(millions, abs=0.05 if millions > 1 else 0.001)


def test_words_choose_method_rank_operator_and_path():
    config = SIZES["250m"]().config
    assert with_method(config, "mora").method == MoRA(128, Share(), align=64)
    assert with_method(config, "mora-rotate:8").method == MoRA(8, Rotate(), align=64)
    lora = with_method(config, "lora:256/activation")
    assert isinstance(lora.method, LoRA)
    assert (lora.method.rank, lora.compute.adapter_path) == (256, "activation")
    assert with_method(config, "full").method == "full"
    assert with_method(config, "frozen").parameter_rules()[-1] == (".*", "frozen")
    assert with_method(config, "config").method == config.method


def test_a_new_method_needs_an_entry_in_methods_only(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class New(LoRA):
        name: ClassVar[str] = "new"

    monkeypatch.setitem(METHODS, "new", New)
    case = SIZES["tiny"]()
    assert with_method(case.config, "new:3").method == New(3)
    assert with_method(case.config, "new").method == New(8)
    assert method_row(case, "new:3") == {"framework": "jax", "name": "new", "rank": 3, "path": "auto"}
    assert label(method_row(case, "new:3")) == "New r 3"


def test_every_word_of_every_size_gives_a_config():
    for size in SIZES.values():
        case = size()
        for word in case.methods:
            with_method(case.config, word).parameter_rules()


@pytest.mark.parametrize(
    "word", ["", "mora:", "nix", "mora-", "mora-share:8/", "lora:8/merged/activation", "mora:x"]
)
def test_words_of_another_form_are_refused(word: str):
    with pytest.raises(InputError, match="is not a method"):
        with_method(SIZES["tiny"]().config, word)


def test_unknown_operators_and_paths_are_refused():
    config = SIZES["tiny"]().config
    with pytest.raises(InputError, match="no operator is named 'turn'"):
        with_method(config, "mora-turn")
    with pytest.raises(InputError, match="unknown path 'fast'; known are auto"):
        with_method(config, "mora/fast")
    with pytest.raises(InputError, match="method lora has no operator"):
        with_method(config, "lora-share")
    with pytest.raises(InputError, match="rank"):
        with_method(config, "mora:0")
