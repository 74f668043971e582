"""Methods by name, and the flat form that configs and flags hold."""

import dataclasses
from typing import ClassVar

import pytest

from mora_jax.errors import InputError
from mora_jax.methods import METHODS, OPERATORS, Decouple, DoRA, LoRA, Method, MoRA, Operator, Rotate, Share
from mora_jax.methods.registry import fitting, flat_fields, from_json, to_flat


@pytest.mark.parametrize(
    "method",
    [
        LoRA(4, 8.0, b_lr_scale=16.0),
        DoRA(4),
        MoRA(8, Share((0, 1), cycle=4), align=128),
        *(MoRA(4, operator()) for operator in OPERATORS.values()),
    ],
    ids=str,
)
def test_a_method_survives_the_flat_form(method):
    flat = to_flat(method)
    assert not any(isinstance(value, dict) for value in flat.values())
    assert from_json(flat) == method


def test_fields_left_out_of_the_flat_form_take_their_defaults():
    assert from_json({"name": "mora", "operator": "rotate", "pad": "wrap"}) == MoRA(operator=Rotate("wrap"))
    assert from_json({"name": "mora", "group": 1}) == MoRA(operator=Share(1))
    assert from_json({"name": "dora"}) == DoRA()


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        (
            {"name": "mora", "alpha": 8},
            "method mora has no field alpha with operator share .it has rank, ",
        ),
        ({"name": "mora", "grp": 1}, "has no field grp with operator share; did you mean group?"),
        ({"name": "mora", "operator": "rotate", "group": 1}, "no field group with operator rotate"),
        ({"name": "mora", "operator": "rotat"}, "no operator is named 'rotat'; did you mean rotate?"),
        ({"name": "mora", "operator": None}, r"operator: give a name \(truncate, share"),
        ({"name": "mora", "operator": ["share"]}, r"operator: give a name \(truncate, share"),
        ({"name": "lora", "operator": "share"}, "method lora has no field operator .it has rank, alpha"),
        ({"name": "mora", "operator": {"name": "share"}, "group": 1}, "method mora has no field group"),
    ],
)
def test_what_no_flat_form_says(flat, message):
    with pytest.raises(InputError, match=message):
        from_json(flat)


def test_a_form_fitted_to_another_method_keeps_the_fields_that_both_have():
    mora = to_flat(MoRA(8, Share(1, "wrap"), align=128, dropout=0.1))
    assert fitting(mora, "lora") == {"name": "lora", "rank": 8, "dropout": 0.1}
    assert from_json(fitting(mora, "mora", "rotate")) == MoRA(8, Rotate("wrap"), 128, 0.1)
    assert from_json(fitting(mora, "mora")) == MoRA(8, Share(1, "wrap"), 128, 0.1)
    assert from_json(fitting({"name": "lora", "rank": 2, "alpha": 3.0}, "mora")) == MoRA(2)


@dataclasses.dataclass(frozen=True)
class _Half(Decouple):
    share: float = 0.5
    name: ClassVar[str] = "half"


@dataclasses.dataclass(frozen=True)
class _New(Method):
    width: int = 3
    bias: float | None = None
    operator: Operator = Rotate("wrap")  # noqa: RUF009
    name: ClassVar[str] = "new"


def test_a_new_method_and_a_new_operator_need_an_entry_only(monkeypatch):
    monkeypatch.setitem(METHODS, "new", _New)
    monkeypatch.setitem(OPERATORS, "half", _Half)
    fields = flat_fields(_New, "half")
    assert list(fields) == ["width", "bias", "operator", "reorder", "seed", "draw", "pad", "surplus", "share"]
    assert fields["operator"].default == "half"
    assert (fields["share"].owner, fields["width"].owner) == (_Half, _New)
    assert flat_fields(_New)["pad"].default == "wrap"  # of the method's own default, not of the operator
    method = _New(5, None, _Half(share=0.25))
    assert from_json(to_flat(method)) == method
    assert from_json({"name": "new", "bias": "1e-3"}).bias == 1e-3  # pyright: ignore
