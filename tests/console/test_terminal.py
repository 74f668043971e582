"""What is said on the terminal is said as it is."""

import warnings
from pathlib import Path

import pytest
from rich.table import Table

from train.console import terminal

ROOT = Path(__file__).parents[2]


def test_text_is_not_markup(capsys):
    text = "N[/x] :warning: [red]"
    table = Table(text, title=text)
    table.add_row(text)
    terminal.console(width=100).print(text, table)
    assert capsys.readouterr().out.count(text) == 4


def test_a_file_gets_every_cell_whole(capsys):
    path = "a/" * 200 + "run"
    table = Table("path", title="runs")
    table.add_row(path)
    terminal.console().print(table)
    assert path in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "train").rglob("*.py")), ids=lambda p: p.stem)
def test_consoles_are_made_only_in_terminal(path: Path):
    assert ("Console(" in path.read_text()) == (path.name == "terminal.py")


def test_warnings_are_printed_on_stderr(capsys):
    terminal.warn(f"{n} [/x]" for n in ("one", "two"))
    assert capsys.readouterr() == ("", "mora: warning: one [/x]\nmora: warning: two [/x]\n")


@pytest.mark.filterwarnings("always")
def test_warnings_of_libraries_are_lines_of_ours(capsys):
    with terminal.one_line_warnings():
        warnings.warn("the disk\nis full", UserWarning, stacklevel=1)
    assert capsys.readouterr() == ("", "mora: warning: the disk\\nis full\n")
    with pytest.warns(match="after"):
        warnings.warn("after", UserWarning, stacklevel=1)


def test_warnings_are_escaped(capsys):
    terminal.warn(["a\nmora: fine", "\x1b[31mred\udcff"])
    assert capsys.readouterr().err.splitlines() == [
        r"mora: warning: a\nmora: fine",
        r"mora: warning: \x1b[31mred\udcff",
    ]
