"""Every step is logged, late but in order, and only undisturbed steps count for the speed."""

import jax.numpy as jnp
import pytest

from train.run import step_log
from train.run.step_log import IN_FLIGHT, StepLog


class Lines(list):
    """Takes the place of Metrics."""

    def write(self, step, values):
        self.append((step, values))


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test turns by hand."""

    class Clock:
        now = 100.0

    def read() -> float:
        Clock.now += 2**-10
        return Clock.now

    monkeypatch.setattr(step_log.time, "perf_counter", read)
    return Clock


def add(log: StepLog, step: int, bad: int = 0) -> None:
    scalars = {"loss": step / 2, "grad_norm": 0.5, "skipped_steps": 2 * bad, "bad_in_a_row": bad}
    log.add(step, {name: jnp.float32(value) for name, value in scalars.items()}, 0.125 * step)


def test_steps_are_logged_late_and_in_order(lines, clock):
    log = StepLog(lines, 100)
    for step in range(5):
        add(log, step)
        assert len(lines) == max(0, step + 1 - IN_FLIGHT)
    log.drain()
    assert [step for step, _ in lines] == [0, 1, 2, 3, 4]


def test_the_values_of_a_line(lines, clock):
    log = StepLog(lines, 100)
    add(log, 3)
    log.drain()
    expected = {"loss": 1.5, "grad_norm": 0.5, "skipped_steps": 0, "bad_in_a_row": 0}
    expected |= {"data_wait": 0.375, "tokens": 400}
    assert lines == [(3, expected)]
    assert all(type(value) in (int, float) for value in lines[0][1].values())


def test_the_rate_is_that_of_undisturbed_steps(lines, clock):
    log = StepLog(lines, 100)
    for step, seconds in enumerate([50.0, 50.0, 50.0, 4.0, 2.0]):  # the first one compiles
        clock.now += seconds
        add(log, step)
    rates = [values.get("tokens_per_second") for _, values in lines]
    # Step 0 is read after step 2 is dispatched, 1 after 3, and 2 after 4.
    assert rates[0] is None
    assert rates[1:] == pytest.approx([100 / 4.0, 100 / 2.0], rel=1e-2)
    assert log.rates == rates[1:]


def test_a_pause_counts_for_no_rate(lines, clock):
    log = StepLog(lines, 100)
    for step in range(10):
        if step == 5:
            log.drain()
            clock.now += 1000.0  # an evaluation
        clock.now += 2.0
        add(log, step)
    log.drain()
    assert [step for step, _ in lines] == list(range(10))
    assert min(log.rates) > 100 / 3.0
    assert "tokens_per_second" not in dict(lines)[5]


def test_steps_that_were_done_before_they_are_read_count_for_no_rate(lines, clock):
    log = StepLog(lines, 100)
    for step in range(5):
        clock.now += 2.0
        add(log, step)
    log.drain()  # reads steps 3 and 4 one right after the other
    assert [("tokens_per_second" in values) for _, values in lines] == [False, True, True, False, False]


def test_the_median_rate(lines, clock):
    log = StepLog(lines, 100)
    clock.now += 20.0
    add(log, 0)
    assert log.median_rate() == pytest.approx(100 / 20.0, rel=1e-2)  # no step was timed by itself
    log.rates = [1.0, 100.0, 3.0]
    assert log.median_rate() == 3.0


def test_a_note_is_a_line_of_its_own(lines, clock):
    log = StepLog(lines, 100)
    log.note(7, {"restart": 1})
    assert lines == [(7, {"restart": 1})]


def test_the_last_bad_step_is_described(lines, clock):
    log = StepLog(lines, 100)
    for step, bad in enumerate([0, 1, 2, 0, 0]):
        add(log, step, bad)
        assert log.bad_in_a_row == (0, 0, 0, 1, 2)[step]  # late, as the step itself
    assert log.last_bad == "update 2: loss 1, gradient norm 0.5; 4 skipped so far"
    log.drain()
    assert log.bad_in_a_row == 0
