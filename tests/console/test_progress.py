import io
import re

import pytest
from rich.console import Console

from train.console import progress as progress_module
from train.console.progress import Bar, progress


def a_console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=100), out


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the module believes it is."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_every_ten_seconds(clock: list[float]):
    console, out = a_console(terminal=False)
    with progress("reading", 60, "rows", console) as advance:
        for _ in range(60):
            clock[0] += 0.5
            advance(1)
    lines = out.getvalue().splitlines()
    assert [re.match(r"reading (\d+)/60 rows", line)[1] for line in lines] == ["20", "40", "60"]
    assert all(len(line) < 80 for line in lines)


def test_the_last_line_is_printed_after_long_work(clock: list[float]):
    console, out = a_console(terminal=False)
    with progress("reading", 30, "rows", console) as advance:
        for _ in range(30):
            clock[0] += 0.5
            advance(1)
    assert out.getvalue().splitlines()[-1].startswith("reading 30/30 rows")


def test_short_work_prints_nothing_without_a_terminal():
    console, out = a_console(terminal=False)
    with progress("reading", 5, "rows", console) as advance:
        advance(5)
    assert out.getvalue() == ""


def test_facts_are_shown_in_place_of_the_speed(clock: list[float]):
    console, out = a_console(terminal=False)
    with Bar("training", 1000, "steps", console, start=400) as bar:
        clock[0] += 11
        bar.advance(1, "loss 3.5")
    assert out.getvalue().startswith("training 401/1,000 steps")
    assert out.getvalue().endswith("· loss 3.5\n")


def test_a_time_left_that_is_given_is_shown(clock: list[float]):
    console, out = a_console(terminal=False)
    with Bar("training", 1000, "steps", console) as bar:
        clock[0] += 11
        bar.advance(1, "loss 3.5", left=61.2)
    assert "· 0:01:01 left ·" in out.getvalue()


def test_bars_are_drawn_inside_one_another_on_a_terminal():
    console, out = a_console(terminal=True)
    with (
        Bar("training", 3, "steps", console) as bar,
        progress("evaluating", None, "rows", console) as advance,
    ):
        bar.advance(2, "loss 3.5")
        advance(7)
    drawn = out.getvalue()
    assert "training 2/3 steps" in drawn
    assert "evaluating 7 rows" in drawn
    assert "━" in drawn


@pytest.mark.parametrize("terminal", [True, False])
def test_a_description_is_not_markup(clock: list[float], terminal: bool):
    out = io.StringIO()
    shown = Console(file=out, force_terminal=terminal, width=100, markup=False)
    with progress("reading N[/x]", 2, "rows", shown) as advance:
        clock[0] += 11
        advance(1)
    assert "reading N[/x] 1/2 rows" in out.getvalue()
