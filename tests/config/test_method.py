"""A run's method as YAML keys and flags: those of the chosen method and operator, and no others."""

import dataclasses
from typing import ClassVar, Literal

import pytest

from mora_jax.errors import InputError
from mora_jax.methods import METHODS, OPERATORS, Decouple, DoRA, LoRA, Method, MoRA, Rotate, Share
from train.config import flags
from train.config.method import attributes
from train.config.run import RunConfig


@pytest.fixture
def method(tmp_path):
    """Reads a config file and flags, and returns the method."""

    def read(text: str, *args: str):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return flags.read_config(str(path), args).method

    return read


@pytest.mark.parametrize(
    ("text", "args", "expected"),
    [
        ("{}", "", MoRA(align=128)),
        ("method: {}", "", MoRA(align=128)),
        ("method: {name: mora, align: 1}", "", MoRA()),
        ("method: {group: [0, 1]}", "", MoRA(operator=Share((0, 1)), align=128)),
        ("method: {name: lora, alpha: 1e1}", "", LoRA(alpha=10.0)),
        ("method: {name: lora}", "--method.alpha None", LoRA()),
        ("method: {name: lora, alpha: }", "", LoRA()),
        ("method: {name: full}", "", "full"),
        ("{}", "--method.rank 8 --method.group 1", MoRA(8, Share(1), align=128)),
        ("{}", "--method.group 0 1", MoRA(operator=Share((0, 1)), align=128)),
        ("{}", "--method.name=frozen", "frozen"),
        ("{}", "--method.name lora --method.rslora True", LoRA(rslora=True)),
        ("{}", "--method.b_lr_scale 2 --method.name lora", LoRA(b_lr_scale=2.0)),
        ("{}", "--method.name lora --method.name dora", DoRA()),
        ("{}", "--method.operator rotate --method.surplus drop", MoRA(128, Rotate(surplus="drop"), 128)),
    ],
)  # fmt: skip
def test_what_is_given(method, text, args, expected):
    assert method(text, *args.split()) == expected


@pytest.mark.parametrize(
    ("text", "args", "expected"),
    [
        ("{rank: 8, align: 8, group: 1, dropout: 0.1}", "--method.name lora", LoRA(8, dropout=0.1)),
        ("{rank: 8, align: 8, group: 1, pad: wrap}", "--method.operator rotate", MoRA(8, Rotate("wrap"), 8)),
        ("{name: lora, rank: 8, alpha: 4}", "--method.name mora", MoRA(8, align=128)),
        ("{name: lora, rank: 8, alpha: 4}", "--method.name dora --method.rank 2", DoRA(2, 4.0)),
        ("{rank: 8, operator: rotate}", "--method.name mora", MoRA(8, Rotate(), 128)),
        ("{name: full}", "--method.name mora", MoRA(align=128)),
        ("{rank: 8}", "--method.name full", "full"),
        ("{name: lora, rank: 8}", "--method.name mora --method.operator decouple", MoRA(8, Decouple(), 128)),
    ],
)
def test_a_change_on_the_command_line_keeps_the_fields_of_the_file_that_fit(method, text, args, expected):
    """Also where the command line gives values of its own."""
    assert method(f"method: {text}", *args.split()) == expected


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        ("{}", "--method.alpha 8", "method mora has no field alpha with operator share (it has rank"),
        ("{}", "--method.rnak=8", "method mora has no field rnak with operator share; did you mean rank?"),
        ("{}", "--method.name lora --method.align 8", "method lora has no field align"),
        ("{}", "--method.name lora --method.operator share", "method lora has no field operator"),
        ("{}", "--method.operator rotate --method.group 1", "mora has no field group with operator rotate"),
        ("{}", "--method.name full --method.rank 8", "method full has no field rank (it has none)"),
        ("{}", "--method.name mroa", "method.name 'mroa': there is no such method; did you mean mora?"),
        ("{}", "--method.operator shar", "no operator is named 'shar'; did you mean share?"),
        ("{}", "--method.rank 0", "MoRA's rank is at least 1, not 0"),
        ("{}", "--method.rank many", "'many'"),
        ("{}", "--method.group 2", "--method.group"),
        ("{}", "--method.name", "--method.name"),
        ("{}", "--method.adapt x", "--method.adapt is now --params.adapt"),
        ("{}", "--method.train=", "--method.train is now --params.train"),
        # What the file's own method does not have is a mistake, whatever the command line changes.
        ("{alpha: 8}", "--method.name lora", "c.yaml: method mora has no field alpha"),
    ],
)  # fmt: skip
def test_what_a_method_does_not_have(method, text, args, message):
    with pytest.raises(InputError) as error:
        method(f"method: {text}", *args.split())
    assert message in str(error.value)


@dataclasses.dataclass(frozen=True)
class New(Method):
    """Something new.

    Attributes:
      width: of it, in kernels.
      kind: its kind.
    """

    width: int = 3
    kind: Literal["a", "b"] = "a"
    rank: int = 8
    name: ClassVar[str] = "new"


def test_a_new_method_has_its_flags_and_their_help(monkeypatch, method, capsys):
    monkeypatch.setitem(METHODS, "new", New)
    assert method("{}", "--method.name", "new", "--method.width", "5") == New(5)
    assert method("method: {name: new, kind: b}") == New(kind="b")
    with pytest.raises(InputError, match="method new has no field align"):
        method("{}", "--method.name", "new", "--method.align", "5")
    with pytest.raises(SystemExit):
        method("{}", "--method.name", "new", "--help")
    out = capsys.readouterr().out
    assert "{mora,lora,dora,spectral,new,full,frozen}" in "".join(out.split())
    assert "of it, in kernels. (default: 3)" in out
    assert "--method.kind {a,b}" in out
    assert "--method.align" not in out


def test_help_shows_the_flags_of_the_chosen_operator(method, capsys):
    with pytest.raises(SystemExit):
        method("method: {operator: rotate}", "--help")
    out = capsys.readouterr().out
    assert "--method.surplus" in out
    assert "--method.group" not in out
    assert "(default: rotate)" in out


@pytest.mark.parametrize("cls", [*METHODS.values(), *OPERATORS.values()])
def test_every_field_of_a_method_is_explained(cls):
    texts = attributes(cls)
    assert all(texts.get(field.name) for field in dataclasses.fields(cls))


def test_the_default_method_is_a_default():
    assert RunConfig().method == flags.config_from_plain({}).method == MoRA(align=128)
