"""A run that diverges stops with a checkpoint from before."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import (
    Interrupted,
    arrays,
    killed,
    lines,
    signalled_at,
)

from train.config.sections import BadSteps, GroupRule, Restart, Schedule
from train.console import exits
from train.jobs import pretrain as loop
from train.jobs.export import export
from train.run import session
from train.run.checkpoint import Checkpoints
from train.run.step_log import IN_FLIGHT


def diverging(config):
    """A learning rate that is far too high."""
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=300.0),
        restart=Restart(),
        schedule=Schedule("cosine", warmup=2),
        bad_steps=BadSteps(window=2, factor=3.0, patience=4),
    )


def unsaved(config):
    """Without a save before the end: nothing waits for the steps in flight."""
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=0))


def streaks_of(config) -> list[int]:
    """The bad steps in a row after each update of a run that diverges; its folder is free again."""
    with pytest.raises(exits.Diverged):
        loop.pretrain(config)
    logged = lines(Path(config.run_dir))
    shutil.rmtree(config.run_dir)
    return [line["bad_in_a_row"] for line in logged if "loss" in line]


def test_a_run_that_diverges_stops_with_a_checkpoint_from_before(free, tiny_run):
    """For real; the next start tries again, and stops again."""
    config = diverging(free)
    folder = Path(config.run_dir)
    for _ in range(2):
        with pytest.raises(exits.Diverged, match=r"4 bad steps in a row \(update \d+: .* skipped so far"):
            loop.pretrain(config)
        streaks = [line["bad_in_a_row"] for line in lines(folder) if "loss" in line]
        assert 4 <= streaks[-1] <= 4 + IN_FLIGHT  # noticed late by the steps in flight
        with Checkpoints(str(folder / "checkpoints")) as saved:
            assert saved.latest_good() == (len(streaks), [])
    starts = [step for step, streak in enumerate(streaks) if streak == 1]
    assert len(starts) == 2
    saves = [step for step in (3, 6, 9, 12, 15, 18, 21) if starts[0] <= step < starts[1]]
    assert saves
    kept = [arrays(config, folder, step) for step in (saves[0], len(streaks))]
    for leaf, last in zip(*kept, strict=True):
        assert np.isfinite(leaf).all() or leaf.ndim == 1
        assert leaf.ndim < 2 or np.array_equal(leaf, last)  # nothing moved


@pytest.mark.slow
def test_a_bad_step_that_ends_the_run_is_detected_at_a_save(free):
    """Not an update later, and not only after the run has passed for finished."""
    config, folder = unsaved(diverging(free)), Path(free.run_dir)
    streaks = streaks_of(config)
    ends = streaks.index(4) + 1
    with pytest.raises(exits.Diverged, match=f"after {ends} updates"):
        loop.pretrain(
            dataclasses.replace(config, checkpoint=dataclasses.replace(free.checkpoint, every=ends))
        )
    assert [line["bad_in_a_row"] for line in lines(folder) if "loss" in line] == streaks[:ends]


@pytest.mark.slow
def test_a_run_that_diverges_and_is_asked_to_stop_has_diverged(free, monkeypatch):
    """The signal comes when the last bad step is not yet looked at."""
    config = unsaved(diverging(free))
    ends = streaks_of(config).index(4) + 1
    signalled_at(monkeypatch, ends - 1)
    with pytest.raises(exits.Diverged, match=f"after {ends} updates"):
        loop.pretrain(config)


@pytest.mark.slow
def test_no_restart_happens_once_the_patience_is_exhausted(free):
    """The last bad step is still in flight where the restart is due."""
    config = unsaved(diverging(free))
    ends = streaks_of(config).index(4) + 1
    with pytest.raises(exits.Diverged, match=f"after {ends} updates"):
        loop.pretrain(dataclasses.replace(config, restart=Restart(every=ends, warmup=1)))
    assert not any("restart" in line for line in lines(Path(config.run_dir)))


@pytest.mark.slow
def test_a_run_killed_before_it_reported_its_divergence_reports_it_first(free, monkeypatch):
    config = diverging(free)
    folder = Path(config.run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(session, "note_diverged", killed)
        with pytest.raises(Interrupted):
            loop.pretrain(config)
    logged = lines(folder)
    with pytest.raises(exits.Diverged, match="4 bad steps in a row"):
        loop.pretrain(config)
    assert lines(folder) == logged
    with pytest.raises(exits.Diverged):
        loop.pretrain(config)
    assert len(lines(folder)) > len(logged)  # that one has tried the batches that follow


def short(config, **optimizer):
    """A run of fewer updates than the patience, without a warm-up."""
    return dataclasses.replace(
        config,
        steps=4,
        optimizer=dataclasses.replace(config.optimizer, **optimizer),
        restart=Restart(),
        schedule=Schedule("cosine", warmup=0),
        bad_steps=BadSteps(window=0),
    )


@pytest.mark.slow
def test_a_run_whose_parameters_are_no_model_has_diverged(free):
    """The first update is finite, and too large for any later one."""
    config = short(free, learning_rate=1e6, groups=((".*", GroupRule(lr_scale=1e6)),))
    for _ in range(2):  # at its end, and when it is started again
        with pytest.raises(exits.Diverged, match="the validation loss after 4 updates is nan"):
            loop.pretrain(config)
    assert not (Path(config.run_dir) / "summary.json").exists()


@pytest.mark.slow
def test_a_run_without_a_good_update_has_diverged(free, tiny_run, tmp_path):
    """It has not trained, though its parameters are those of the start."""
    export(str(tiny_run.folder), str(tmp_path / "nan"))
    weights = tmp_path / "nan" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    config = dataclasses.replace(short(free), init_from=str(tmp_path / "nan"))
    with pytest.raises(exits.Diverged, match="all 4 updates were skipped"):
        loop.pretrain(config)
    assert [line["bad_in_a_row"] for line in lines(Path(config.run_dir)) if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_summary_of_no_model_does_not_finish_a_run(free):
    config = short(free)
    loop.pretrain(config)
    summary = Path(config.run_dir) / "summary.json"
    good = summary.read_text()
    summary.write_text('{"validation_loss": NaN}')
    assert loop.pretrain(config)["validation_loss"] > 0
    assert json.loads(summary.read_text())["validation_loss"] == json.loads(good)["validation_loss"]
