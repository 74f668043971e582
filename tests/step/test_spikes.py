"""Which steps are bad, and what is remembered of the good ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax.errors import InputError
from train.config.sections import BadSteps
from train.step import spikes

HOW = BadSteps(window=4, factor=3.0, patience=3)


def run(steps, how=HOW, seen=None):
    """Judges (loss, norm) after (loss, norm): the verdicts, and what is remembered in the end."""
    seen = spikes.init(how) if seen is None else seen
    judge = jax.jit(spikes.judge, static_argnums=0)
    verdicts = []
    for loss, norm in steps:
        bad, seen = judge(how, seen, jnp.float32(loss), jnp.float32(norm))
        verdicts.append(bool(bad))
    return verdicts, seen


GOOD = [(2.0, 1.0), (2.1, 0.9), (1.9, 1.1), (2.0, 1.0)]


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("before", [[], GOOD], ids=["at the start", "later"])
def test_what_is_not_finite_is_bad_from_the_first_step_on(loss, before):
    assert run([*before, (loss, 1.0)])[0][-1]
    assert run([*before, (2.0, loss)])[0][-1]


@pytest.mark.parametrize(
    ("step", "bad"),
    [
        ((2.0 + np.log(3) - 0.01, 1.0), False),
        ((2.0 + np.log(3) + 0.01, 1.0), True),
        ((2.0, 2.99), False),
        ((2.0, 3.01), True),
        ((0.0, 0.0), False),
    ],
)
def test_a_spike_is_a_multiple_of_the_median(step, bad):
    assert run([*GOOD, step])[0] == [False] * 4 + [bad]


def test_no_spike_before_the_window_is_full():
    assert run([*GOOD[:3], (9.0, 99.0)])[0] == [False] * 4
    assert run([*GOOD, (9.0, 99.0)])[0] == [False] * 4 + [True]


def test_only_the_last_good_steps_are_remembered():
    bad = [(np.nan, 1.0), (2.0, np.inf)]
    verdicts, seen = run([(5.0, 5.0), *GOOD[:2], *bad, *GOOD[2:]])
    assert verdicts == [False] * 3 + [True] * 2 + [False] * 2
    np.testing.assert_array_equal(seen.losses_W, np.float32([loss for loss, _ in GOOD]))
    np.testing.assert_array_equal(seen.norms_W, np.float32([norm for _, norm in GOOD]))
    assert (int(seen.skipped), int(seen.in_a_row)) == (2, 0)


def test_after_the_patience_nothing_is_good_until_the_run_is_started_again():
    verdicts, seen = run([*GOOD, *[(np.nan, 1.0)] * 3, *GOOD])
    assert verdicts == [False] * 4 + [True] * 7
    assert (int(seen.skipped), int(seen.in_a_row)) == (7, 7)
    assert run(GOOD, seen=spikes.with_patience(HOW, seen))[0] == [False] * 4


def test_going_on_in_the_middle_of_bad_steps_gives_no_patience_back():
    _, seen = run([*GOOD, *[(np.nan, 1.0)] * 2])
    assert int(spikes.with_patience(HOW, seen).in_a_row) == 2


def test_a_gradient_that_stays_high_at_an_ordinary_loss_is_a_new_level():
    """Half of a patience of 6 is skipped; a window of 4 must fill again before another spike is seen."""
    how, high = BadSteps(window=4, factor=3.0, patience=6), [(2.0, 50.0)] * 7
    verdicts, seen = run([*GOOD, *high, (2.0, 500.0)], how)
    assert verdicts == [False] * 4 + [True] * 3 + [False] * 4 + [True]
    np.testing.assert_array_equal(seen.norms_W, np.float32([50.0] * 4))
    np.testing.assert_array_equal(seen.losses_W, np.float32([2.0] * 4))


def test_a_gradient_that_stays_high_at_a_high_loss_is_no_level():
    how = BadSteps(window=4, factor=3.0, patience=6)
    assert run([*GOOD, *[(9.0, 50.0)] * 8], how)[0] == [False] * 4 + [True] * 8
    assert run([*GOOD, *[(2.0, np.inf)] * 8], how)[0] == [False] * 4 + [True] * 8


def test_a_restart_forgets_gradients_and_not_losses():
    _, seen = run(GOOD)
    seen = spikes.after_restart(HOW, seen)
    assert run([(2.0, 99.0)], seen=seen)[0] == [False]
    assert run([(9.0, 1.0)], seen=seen)[0] == [True]


def test_without_a_window_only_what_is_not_finite_is_bad():
    verdicts, seen = run([*GOOD, (99.0, 1e9), (np.nan, 1.0)], BadSteps(window=0))
    assert verdicts == [False] * 5 + [True]
    assert all(leaf.size for leaf in jax.tree.leaves(seen))  # orbax saves no empty arrays


def test_after_a_bad_step_the_old_tree_stays_bit_for_bit():
    old = {"a": jnp.float32([1.0, -0.0]), "n": jnp.int32(3)}
    new = {"a": jnp.float32([np.nan, 2.0]), "n": jnp.int32(4)}
    for bad, expected in ((True, old), (False, new)):
        kept = spikes.unless(jnp.bool_(bad), new, old)
        for name in old:
            np.testing.assert_array_equal(
                np.asarray(kept[name]).view(np.uint32), np.asarray(expected[name]).view(np.uint32)
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": -1}, "bad_steps.window must be at least 0"),
        ({"factor": 1.0}, "bad_steps.factor must be above 1"),
        ({"patience": 0}, "bad_steps.patience must be at least 1"),
    ],
)
def test_values_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        BadSteps(**changes)
