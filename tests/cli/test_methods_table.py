"""The table of methods for a model."""

import io

from rich.console import Console

from mora_jax.methods import METHODS, OPERATORS, DoRA, LoRA, MoRA, Rotate
from mora_jax.models.llama import LlamaConfig
from train.cli import methods

MODEL = LlamaConfig()  # the 250M model


def test_every_method_and_operator_has_a_row_with_its_figures():
    table = methods.survey(MODEL, 128)
    columns = {column.header: list(column.cells) for column in table.columns}
    assert len(columns["method"]) == 1 + len(METHODS) - 1 + len(OPERATORS)
    rows = {name: i for i, name in enumerate(columns["method"])}
    # 24 layers of four (768, 768), two (768, 2560) and one (2560, 768), by the formulas of the paper.
    lora = 24 * 128 * (4 * 2 * 768 + 3 * (768 + 2560))
    assert columns["trainable"][rows["lora"]] == f"{lora:,}"
    assert columns["trainable"][rows["mora share"]] == f"{24 * (4 * 443**2 + 3 * 652**2):,}"
    assert columns["768x768"][rows["mora share"]] == "443 / 443"
    assert columns["768x2560"][rows["mora rotate"]] == "652 / 768"
    assert columns["2560x768"][rows["lora"]] == "128"
    assert columns["768x768"][rows["full"]] == "768"


def test_what_a_restart_does():
    assert MoRA(4).restart_effect == "switch"
    assert MoRA(4, Rotate()).restart_effect == "same"
    assert LoRA(4).restart_effect == "redraw"
    assert DoRA(4).restart_effect == "no"


def test_the_table_fits_a_terminal():
    text = io.StringIO()
    Console(width=100, file=text).print(methods.survey(MODEL, 8))
    assert "mora decouple" in text.getvalue()
    assert "…" not in text.getvalue()
