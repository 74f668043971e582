"""A run that was killed or stopped resumes exactly where it was."""

import contextlib
import dataclasses
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from slow import quick
from tiny_runs import (
    Interrupted,
    arrays,
    lines,
    stop_after,
    without_times,
)

from mora_jax.errors import InputError
from train.data.rows.info import load_info
from train.jobs import pretrain as loop
from train.run import resume
from train.run.checkpoint import Checkpoints, SaveError
from train.step.step import train_step


@pytest.mark.slow  # test_stop.py resumes at a restart, and test_old_runs.py where the log is longer
@pytest.mark.parametrize(
    ("updates", "saved"), [(4, 3), (7, 6)], ids=["before a restart", "exactly at a restart"]
)
def test_an_interrupted_run_resumes_bit_for_bit(free, tiny_run, monkeypatch, updates, saved):
    assert free.restarts_at(saved) == (saved == 6)
    folder = Path(free.run_dir)
    train_step.clear_cache()  # whatever earlier tests left
    with monkeypatch.context() as patch:
        stop_after(patch, updates)
        with pytest.raises(Interrupted):
            loop.pretrain(free)
    with Checkpoints(str(folder / "checkpoints")) as found:
        assert found.folders()[-1] == saved
    summary = loop.pretrain(free)
    expected = arrays(free, tiny_run.folder, 22)
    for ours, theirs in zip(arrays(free, folder, 22), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert any(leaf.ndim == 3 and np.any(leaf) for leaf in expected)
    assert without_times(folder) == without_times(tiny_run.folder)
    assert summary["validation_loss"] == tiny_run.summary["validation_loss"]
    assert train_step._cache_size() == tiny_run.compilations["train_step"]


@pytest.mark.slow
def test_a_run_with_growing_cycles_resumes_bit_for_bit(free, tmp_path, monkeypatch):
    restart = dataclasses.replace(free.restart, growth=1.5)
    whole, parts = (dataclasses.replace(free, restart=restart, run_dir=str(tmp_path / n)) for n in "ab")
    assert [step for step in range(22) if whole.restarts_at(step)] == [2, 5, 10, 16]
    loop.pretrain(whole)
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Interrupted):
            loop.pretrain(parts)
    loop.pretrain(parts)
    assert without_times(tmp_path / "b") == without_times(tmp_path / "a")
    for ours, theirs in zip(
        arrays(parts, tmp_path / "b", 22), arrays(whole, tmp_path / "a", 22), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(free, tiny_run, capsys):
    folder = Path(free.run_dir)
    shutil.copytree(tiny_run.folder, folder)
    largest = max((folder / "checkpoints/22").rglob("*"), key=lambda path: path.stat().st_size)
    flip_a_bit(largest)
    loop.pretrain(free)
    assert "is damaged" in capsys.readouterr().err
    for ours, theirs in zip(arrays(free, folder, 22), arrays(free, tiny_run.folder, 22), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize("lost", ["damaged", "without manifests"])
def test_a_run_without_a_good_checkpoint_does_not_start_from_scratch(free, tiny_run, lost):
    folder = Path(shutil.copytree(tiny_run.folder, free.run_dir))
    for checkpoint in (folder / "checkpoints").iterdir():
        if lost == "damaged":
            flip_a_bit(max(checkpoint.rglob("*"), key=lambda path: path.stat().st_size))
        else:
            (checkpoint / "manifest.json").unlink()
    before = contents(folder)
    message = (
        "has 8 checkpoints and none is good" if lost == "damaged" else "22 updates, saved every 3, but has no"
    )
    with pytest.raises(InputError, match=message):
        loop.pretrain(free)
    assert contents(folder) == before


@pytest.mark.slow
def test_a_run_killed_in_its_first_save_starts_from_scratch(free, tiny_run, monkeypatch):
    folder = Path(free.run_dir)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(Interrupted):
            loop.pretrain(free)
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    loop.pretrain(dataclasses.replace(free, checkpoint=dataclasses.replace(free.checkpoint, every=1)))
    assert without_times(folder) == without_times(tiny_run.folder)


@pytest.mark.slow
def test_a_run_killed_before_it_claimed_its_folder_starts_from_scratch(free, tiny_run, monkeypatch):
    def killed(config):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(resume, "claim", killed)
        with pytest.raises(Interrupted):
            loop.pretrain(free)
    assert (Path(free.run_dir) / "metrics.jsonl").exists()
    loop.pretrain(free)
    assert without_times(Path(free.run_dir)) == without_times(tiny_run.folder)


@contextlib.contextmanager
def files_up_to(limit: int) -> Iterator[None]:
    """No file may be longer than `limit` bytes: stands for a disk that is full for checkpoints alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow  # tests/run/test_checkpoint_failures.py has saves that fail
def test_a_run_whose_save_fails_stops_and_resumes(free, tiny_run, monkeypatch):
    folder = Path(free.run_dir)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            loop.pretrain(free)
    with files_up_to(100_000), pytest.raises(SaveError, match="could not be saved: File too large"):
        loop.pretrain(free, resume=True)
    assert max(line["step"] for line in lines(folder)) < 21  # it did not train to the end
    with Checkpoints(str(folder / "checkpoints")) as saved:
        assert saved.latest_good() == (3, [])
    summary = loop.pretrain(free, resume=True)
    assert summary["validation_loss"] == tiny_run.summary["validation_loss"]
    assert without_times(folder) == without_times(tiny_run.folder)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {path.name for path in (tiny_run.folder / "checkpoints").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 4])
def test_a_warm_start_keeps_the_weights_it_started_from(tiny_run, tmp_path, monkeypatch, stop):
    """Killed before or after its first save is due; the other run has other weights meanwhile."""
    source = tmp_path / "source"
    shutil.copytree(tiny_run.folder, source)
    config = dataclasses.replace(
        tiny_run.config, init_from=str(source), run_dir=str(tmp_path / "undisturbed")
    )
    loop.pretrain(config)
    again = dataclasses.replace(config, run_dir=str(tmp_path / "killed"))
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(Interrupted):
            loop.pretrain(again)
    shutil.rmtree(source)
    loop.pretrain(again)
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "undisturbed")


@pytest.mark.parametrize("what", quick([""], ["", "lock"]), ids=["the folder", "the lock"])
def test_a_run_whose_folder_is_removed_stops_at_the_next_save(free, monkeypatch, what):
    folder, real = Path(free.run_dir), loop.train_batches

    def removing(*args):
        for at, batch in enumerate(real(*args)):
            if at == 1:  # no save is under way
                shutil.rmtree(folder / what) if not what else (folder / what).unlink()
            yield batch

    monkeypatch.setattr(loop, "train_batches", removing)
    with pytest.raises(InputError, match="was removed during the run; nothing is saved"):
        loop.pretrain(free)
    assert folder.exists() == bool(what)


@pytest.mark.parametrize(
    "summary", quick(["{"], [None, "", "{", "[]"]), ids=["absent", "empty", "cut off", "a list"]
)
def test_a_run_without_its_summary_only_concludes(free, tiny_run, summary):
    folder = Path(shutil.copytree(tiny_run.folder, free.run_dir))
    (folder / "summary.json").unlink()
    if summary is not None:
        (folder / "summary.json").write_text(summary)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [
        line | ({"tokens_per_second": float(line["step"])} if "loss" in line else {}) for line in logged
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    expected = tiny_run.summary | {"tokens_per_second": 10.5}  # of 0 to 21
    assert loop.pretrain(free) == expected
    assert json.loads((folder / "summary.json").read_text()) == expected


@pytest.mark.slow  # tests/data/test_read.py skips rows
def test_a_warm_start_can_go_on_in_the_data_of_its_source(tiny_run, tmp_path, monkeypatch, capsys):
    """The rows are a function of the step alone, so that a killed run resumes in them."""
    config = dataclasses.replace(tiny_run.config, init_from=str(tiny_run.folder), run_dir=str(tmp_path / "a"))
    read = []
    real = loop.train_batches
    monkeypatch.setattr(loop, "train_batches", lambda *args: read.append(args[3:]) or real(*args))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            loop.pretrain(config)
    said = " ".join(capsys.readouterr().err.split())
    assert "begins with rows that" in said
    assert "--data.skip-rows 88 continues behind them" in said
    further = dataclasses.replace(
        config, run_dir=str(tmp_path / "b"), data=dataclasses.replace(config.data, skip_rows=88)
    )
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            loop.pretrain(further)
    assert "begins with rows" not in capsys.readouterr().err
    summary = loop.pretrain(further)
    assert [args[0] for args in read] == [0, 0, 3]
    assert [args[2] for args in read] == [0, 88, 88]
    assert summary["epochs"] == 88 / load_info(config.data.directory).rows["train"]
    with pytest.raises(InputError, match=r"holds a run with data\.skip_rows 88, not 0"):
        loop.pretrain(dataclasses.replace(config, run_dir=further.run_dir))


def test_a_run_longer_than_its_data_says_so(tiny_run):
    info = load_info(tiny_run.config.data.directory)
    short, long = (dataclasses.replace(tiny_run.config, steps=n) for n in (22, info.rows["train"]))
    assert loop.repeats(short, info) == []
    assert loop.repeats(long, info) == [
        f"the run reads the {info.rows['train']:,} training rows 4.00 times (epochs)"
    ]
