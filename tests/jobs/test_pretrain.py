"""A whole tiny run: what it writes, restarts, and going on exactly where it stopped."""

import contextlib
import dataclasses
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from mora_jax import sharding
from mora_jax.errors import InputError
from train.config import flags
from train.config.sections import BadSteps, Restart, Schedule
from train.console import exits
from train.data.rows.build import prepare
from train.data.rows.read import load_info
from train.jobs import pretrain as loop
from train.run.checkpoint import Checkpoints, SaveError
from train.run.folder import read_config
from train.run.metrics import read_metrics
from train.run.state import restore_state
from train.run.step_log import IN_FLIGHT
from train.step.step import train_step

TIMES = ("data_wait", "tokens_per_second")  # differ from run to run


class Interrupted(Exception):
    """Stands for whatever stops a program."""


@pytest.fixture
def free(tiny_run):
    """The tiny run's config, its own folder free before and after."""
    shutil.rmtree(tiny_run.config.run_dir, ignore_errors=True)
    yield tiny_run.config
    shutil.rmtree(tiny_run.config.run_dir, ignore_errors=True)


def lines(folder: Path) -> list[dict]:
    return read_metrics(str(folder / "metrics.jsonl"))


def without_times(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines(folder)]


def arrays(config, folder: Path, step: int) -> list[np.ndarray]:
    """Every array of a checkpoint: step, parameters, adapters, optimizer state."""
    with Checkpoints(str(folder / "checkpoints")) as saved:
        state, _ = restore_state(config, saved, step, sharding.make_mesh(1))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def stop_after(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """Lets `pretrain` do so many updates, and then fail to get a batch."""
    real = loop.train_batches

    def some(*args):
        batches = real(*args)
        for _ in range(updates + 1):  # one is fetched ahead
            yield next(batches)
        raise Interrupted

    monkeypatch.setattr(loop, "train_batches", some)


@pytest.mark.parametrize(
    ("updates", "saved"),
    [(4, 3), (7, 6)],
    ids=["before a restart", "exactly at a restart"],
)
def test_an_interrupted_run_goes_on_bit_for_bit(free, tiny_run, monkeypatch, updates, saved):
    assert free.restarts_at(saved) == (saved == 6)
    folder, compiled = Path(free.run_dir), train_step._cache_size()
    with monkeypatch.context() as patch:
        stop_after(patch, updates)
        with pytest.raises(Interrupted):
            loop.pretrain(free)
    assert max(int(path.name) for path in (folder / "checkpoints").iterdir()) == saved
    summary = loop.pretrain(free)
    expected = arrays(free, tiny_run.folder, 22)
    for ours, theirs in zip(arrays(free, folder, 22), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert any(leaf.ndim == 3 and np.any(leaf) for leaf in expected)
    assert without_times(folder) == without_times(tiny_run.folder)
    assert summary["validation_loss"] == tiny_run.summary["validation_loss"]
    assert train_step._cache_size() == compiled


def test_a_run_learns_and_restarts_through_both_group_types(tiny_run):
    told = lines(tiny_run.folder)
    restarts = [line for line in told if "restart" in line]
    assert [line["step"] for line in restarts] == list(range(2, 22, 2))
    assert [line["restart"] for line in restarts] == list(range(1, 11))
    assert [line["group_type"] for line in restarts] == ["1", "0"] * 5
    assert all(line["optimizer_cleared"] == 1.0 for line in restarts)
    losses = [line["loss"] for line in told if "loss" in line]
    assert losses[-1] < losses[0] - 0.5


def test_ten_restarts_compile_the_step_once_for_each_group_type(tiny_run):
    assert tiny_run.summary["restarts"] == 10
    assert tiny_run.compilations == {"train_step": 2, "restart_step": 2}


def test_every_update_and_evaluation_has_its_line(tiny_run):
    told = lines(tiny_run.folder)
    updates = [line for line in told if "loss" in line]
    assert [line["step"] for line in updates] == list(range(22))
    assert {"step", "loss", "grad_norm", "learning_rate", "data_wait", "tokens"} <= set(updates[0])
    assert [line["tokens"] for line in updates] == [(s + 1) * 4 * 32 for s in range(22)]
    assert [line["learning_rate"] == 0 for line in updates] == [True, False] * 11
    assert all("tokens_per_second" not in line for line in updates if line["step"] % 2 == 0)  # after a pause
    evaluations = [line for line in told if "validation_loss" in line]
    assert [line["step"] for line in evaluations] == [10, 21]
    np.testing.assert_allclose(
        [np.exp(line["validation_loss"]) for line in evaluations],
        [line["validation_perplexity"] for line in evaluations],
    )


def test_the_summary_and_the_picture(tiny_run):
    assert json.loads((tiny_run.folder / "summary.json").read_text()) == tiny_run.summary
    assert (tiny_run.summary["steps"], tiny_run.summary["tokens"]) == (22, 22 * 4 * 32)
    assert tiny_run.summary["validation_loss"] == lines(tiny_run.folder)[-1]["validation_loss"]
    assert tiny_run.summary["tokens_per_second"] > 0
    assert tiny_run.summary["unigram_perplexity"] > 1
    assert {"validation_perplexity", "restarts", "device"} <= tiny_run.summary.keys()
    assert (tiny_run.folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_what_a_checkpoint_says_of_itself(tiny_run):
    with Checkpoints(str(tiny_run.folder / "checkpoints")) as saved:
        assert saved.steps() == [3, 6, 9, 12, 15, 18, 21, 22]
        meta = {step: saved.read_meta(step) for step in (3, 6, 9)}
    info = load_info(tiny_run.config.data.directory)
    text = {"tokenizer_sha256": info.tokenizer_sha256, "rows": info.rows["train"]}
    rows = meta[6]["data"].pop("next_rows")
    assert meta[6]["data"] == {"step": 6, "seed": 0, **text}
    assert len(rows) == 4
    assert rows != meta[3]["data"]["next_rows"]
    assert meta[6]["random"].keys() == {"params", "adapters", "pruning", "dropout"}
    # The restart at update 6 comes after the saving at 6.
    assert [meta[step]["restarts"] for step in (3, 6, 9)] == [1, 2, 4]
    kernel = "layers/mlp/up_proj/kernel"
    groups = [meta[step]["methods"][kernel]["operator"]["group"] for step in (3, 6, 9)]
    assert groups == [1, 0, 0]


def test_a_damaged_checkpoint_is_told_of_and_the_one_before_taken(free, tiny_run, capsys):
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
def test_a_run_none_of_whose_checkpoints_is_good_is_not_begun_anew(free, tiny_run, lost):
    folder = Path(shutil.copytree(tiny_run.folder, free.run_dir))
    for checkpoint in (folder / "checkpoints").iterdir():
        if lost == "damaged":
            flip_a_bit(max(checkpoint.rglob("*"), key=lambda path: path.stat().st_size))
        else:
            (checkpoint / "manifest.json").unlink()
    before = contents(folder)
    message = (
        "has 8 checkpoints and none is good" if lost == "damaged" else "22 updates, saved every 3, and has no"
    )
    with pytest.raises(InputError, match=message):
        loop.pretrain(free)
    assert contents(folder) == before


def test_a_run_killed_in_its_first_save_is_begun_anew(free, tiny_run, monkeypatch):
    folder = Path(free.run_dir)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(Interrupted):
            loop.pretrain(free)
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    loop.pretrain(dataclasses.replace(free, checkpoint=dataclasses.replace(free.checkpoint, every=1)))
    assert without_times(folder) == without_times(tiny_run.folder)


def test_a_run_killed_before_its_folder_tells_of_it_is_begun_anew(free, tiny_run, monkeypatch):
    def killed(config):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(loop, "claim", killed)
        with pytest.raises(Interrupted):
            loop.pretrain(free)
    assert (Path(free.run_dir) / "metrics.jsonl").exists()
    loop.pretrain(free)
    assert without_times(Path(free.run_dir)) == without_times(tiny_run.folder)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("batch_size / microbatches 6 does not divide among 4 devices", {"mesh.data": 4, "batch_size": 6}),
        (r"eval\.batch_size 6 does not divide", {"mesh.data": 4, "eval.batch_size": 6}),
        (r"mesh\.data 64 needs 64 devices", {"mesh.data": 64}),
        ("fewer than one batch of 100000", {"batch_size": 100_000}),
        ("more than model.vocab_size 100", {"model.vocab_size": 100}),
        ("rows of 32 tokens, not data.sequence_length 16", {"data.sequence_length": 16}),
        ("is missing", {"init_from": "nowhere"}),
        ("cudnn needs an NVIDIA GPU", {"compute.attention": "cudnn", "compute.dtype": "bfloat16"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_leaves_no_run_behind(tiny_yaml, tmp_path, message, changes):
    words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    config = flags.read_config(str(tiny_yaml), ["--run-dir", str(tmp_path / "run"), *words])
    with pytest.raises(InputError, match=message):
        loop.pretrain(config)
    with pytest.raises(InputError, match="holds no run"):
        read_config(config.run_dir)


@pytest.mark.parametrize(
    ("every", "updates"), [(0, [7]), (3, [2, 5, 7]), (4, [3, 7])], ids=lambda value: str(value)
)
def test_what_is_due_after_which_update(tiny_run, every, updates):
    config = dataclasses.replace(tiny_run.config, steps=8)
    assert [step - 1 for step in range(9) if loop.due(every, step, config)] == updates


@contextlib.contextmanager
def files_up_to(limit: int) -> Iterator[None]:
    """No file may be longer than `limit` bytes: stands for a disk that is full for checkpoints alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_run_whose_checkpoint_cannot_be_saved_stops_and_goes_on(free, tiny_run, monkeypatch):
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


def signalled_at(monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """Sends SIGTERM to this program as the batch of an update is asked for."""
    real, asked = loop.next_batch, iter(range(update + 1))

    def next_batch(*args):
        if next(asked, None) == update:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # for the thread that hears it
        return real(*args)

    monkeypatch.setattr(loop, "next_batch", next_batch)


ENDED_IN_ITS_LAST_SAVE = """
import os, signal, sys, time
from train.cli import main as cli
from train.jobs import pretrain as loop
from train.run import manifest
real = loop.next_batch
def asked(*args):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)  # for the thread that hears it
    return real(*args)
def sealing(*args):
    time.sleep(1)  # the program is on its way out
    print("sealing", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
loop.next_batch, manifest.seal = asked, sealing
cli.main(["pretrain", *sys.argv[1:]])
"""


def test_a_second_signal_ends_the_last_save(tiny_yaml, tmp_path):
    words = [str(tiny_yaml), "--run-dir", str(tmp_path / "run"), "--checkpoint.every", "0"]
    with subprocess.Popen(
        [sys.executable, "-c", ENDED_IN_ITS_LAST_SAVE, *words], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"sealing\n"
        try:
            assert process.wait(20) == exits.INTERRUPTED
        finally:
            process.kill()


def equal_runs(config, folder: Path, other: Path) -> None:
    for ours, theirs in zip(arrays(config, folder, 22), arrays(config, other, 22), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert without_times(folder) == without_times(other)


@pytest.mark.parametrize("update", [0, 7])
def test_a_signal_saves_the_update_it_comes_in_and_the_same_command_goes_on(
    free, tiny_run, monkeypatch, update
):
    folder = Path(free.run_dir)
    with monkeypatch.context() as patch:
        signalled_at(patch, update)
        with pytest.raises(exits.Preempted, match=f"stopped after {update + 1} of 22 updates"):
            loop.pretrain(free)
    assert [line["step"] for line in lines(folder) if "loss" in line] == list(range(update + 1))
    with Checkpoints(str(folder / "checkpoints")) as saved:
        assert saved.latest_good() == (update + 1, [])
    loop.pretrain(free)
    equal_runs(free, folder, tiny_run.folder)


def evaluate_signalled(*args, real=loop.evaluate):
    """An evaluation that a signal comes into."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
    return real(*args)


def test_an_evaluation_that_a_signal_stops_is_made_up_for(free, tiny_run, monkeypatch):
    """At the first one and at the last one; twice each, so that a run also goes on without an update."""
    folder = Path(free.run_dir)
    for done, evaluations in ((11, 0), (11, 0), (22, 1), (22, 1)):
        with monkeypatch.context() as patch:
            evaluated = sum("validation_loss" in line for line in lines(folder)) if folder.exists() else 0
            later = iter([loop.evaluate] if done == 22 and evaluated == 0 else [])
            patch.setattr(loop, "evaluate", lambda *args, later=later: next(later, evaluate_signalled)(*args))
            with pytest.raises(exits.Preempted, match=f"stopped after {done} of 22"):
                loop.pretrain(free)
        assert sum("validation_loss" in line for line in lines(folder)) == evaluations
    loop.pretrain(free)
    equal_runs(free, folder, tiny_run.folder)


def test_an_evaluation_made_up_for_is_told_of_once(free, tiny_run, monkeypatch):
    """It is made up for, then the program dies before the next checkpoint: the next one makes it again."""
    folder = Path(free.run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", evaluate_signalled)
        with pytest.raises(exits.Preempted, match="stopped after 11 of 22"):
            loop.pretrain(free)
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        with pytest.raises(Interrupted):
            loop.pretrain(free)
    assert sum("validation_loss" in line for line in lines(folder)) == 1
    loop.pretrain(free)
    equal_runs(free, folder, tiny_run.folder)


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
    told = lines(Path(config.run_dir))
    shutil.rmtree(config.run_dir)
    return [line["bad_in_a_row"] for line in told if "loss" in line]


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
    kept = [arrays(config, folder, step) for step in (*saves, len(streaks))]
    assert len(kept) >= 2
    for leaf, last in zip(kept[0], kept[-1], strict=True):
        assert np.isfinite(leaf).all() or leaf.ndim == 1
        assert leaf.ndim < 2 or np.array_equal(leaf, last)  # nothing moved


def test_a_bad_step_that_ends_the_run_is_seen_where_a_save_is_due(free):
    """Not an update later, and not only after the run has passed for finished."""
    config, folder = unsaved(diverging(free)), Path(free.run_dir)
    streaks = streaks_of(config)
    ends = streaks.index(4) + 1
    with pytest.raises(exits.Diverged, match=f"after {ends} updates"):
        loop.pretrain(
            dataclasses.replace(config, checkpoint=dataclasses.replace(free.checkpoint, every=ends))
        )
    assert [line["bad_in_a_row"] for line in lines(folder) if "loss" in line] == streaks[:ends]


def test_a_run_that_diverges_and_is_asked_to_stop_has_diverged(free, monkeypatch):
    """The signal comes when the last bad step is not yet looked at."""
    config = unsaved(diverging(free))
    ends = streaks_of(config).index(4) + 1
    signalled_at(monkeypatch, ends - 1)
    with pytest.raises(exits.Diverged, match=f"after {ends} updates"):
        loop.pretrain(config)


def test_no_restart_is_made_once_the_patience_is_at_an_end(free):
    """The last bad step is still in flight where the restart is due."""
    config = unsaved(diverging(free))
    ends = streaks_of(config).index(4) + 1
    with pytest.raises(exits.Diverged, match=f"after {ends} updates"):
        loop.pretrain(dataclasses.replace(config, restart=Restart(every=ends, warmup=1)))
    assert not any("restart" in line for line in lines(Path(config.run_dir)))


def test_a_run_that_was_killed_before_it_said_that_it_diverged_says_so_first(free, monkeypatch):
    config = diverging(free)
    folder = Path(config.run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "note_diverged", killed)
        with pytest.raises(Interrupted):
            loop.pretrain(config)
    told = lines(folder)
    with pytest.raises(exits.Diverged, match="4 bad steps in a row"):
        loop.pretrain(config)
    assert lines(folder) == told
    with pytest.raises(exits.Diverged):
        loop.pretrain(config)
    assert len(lines(folder)) > len(told)  # that one has tried the batches that follow


def killed(*_: object) -> None:
    raise Interrupted


@pytest.mark.parametrize("stop", [1, 4])
def test_a_warm_start_is_pinned_to_what_it_began_from(tiny_run, tmp_path, monkeypatch, stop):
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


@pytest.mark.parametrize("what", ["", "lock"], ids=["the folder", "the lock"])
def test_a_run_whose_folder_is_removed_stops_at_the_next_save(free, monkeypatch, what):
    folder, real = Path(free.run_dir), loop.train_batches

    def removing(*args):
        for at, batch in enumerate(real(*args)):
            if at == 1:  # no save is under way
                shutil.rmtree(folder / what) if not what else (folder / what).unlink()
            yield batch

    monkeypatch.setattr(loop, "train_batches", removing)
    with pytest.raises(InputError, match="was removed while it was in use; nothing is saved"):
        loop.pretrain(free)
    assert folder.exists() == bool(what)


def test_a_run_whose_log_is_gone_is_stopped_as_any_other(tiny_yaml, tmp_path):
    """As by Ctrl-C for `mora pretrain ... 2>&1 | tee log`, which ends tee first; within the ten seconds."""
    folder = tmp_path / "run"
    words = ["pretrain", str(tiny_yaml), "--run-dir", str(folder), "--steps", "1000000"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen([sys.executable, "-m", "train.cli", *words], **pipe) as process:
        try:
            assert process.stdout
            while not (folder / "metrics.jsonl").exists() or len(lines(folder)) < 30:
                assert process.poll() is None
                time.sleep(0.1)
            process.stdout.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == exits.PREEMPTED
        finally:
            process.kill()
    updates = sum("loss" in line for line in lines(folder))
    with Checkpoints(str(folder / "checkpoints")) as saved:
        assert saved.latest_good() == (updates, [])


@pytest.mark.parametrize("summary", [None, "", "{", "[]"], ids=["absent", "empty", "cut off", "a list"])
def test_a_run_that_only_had_to_conclude(free, tiny_run, summary):
    folder = Path(shutil.copytree(tiny_run.folder, free.run_dir))
    (folder / "summary.json").unlink()
    if summary is not None:
        (folder / "summary.json").write_text(summary)
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [line | ({"tokens_per_second": float(line["step"])} if "loss" in line else {}) for line in told]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    expected = tiny_run.summary | {"tokens_per_second": 10.5}  # of 0 to 21
    assert loop.pretrain(free) == expected
    assert json.loads((folder / "summary.json").read_text()) == expected


@pytest.fixture(scope="module")
def large_data(tiny_text, tmp_path_factory) -> Path:
    """Rows that do not fit into what a reader holds in memory."""
    folder = tmp_path_factory.mktemp("large")
    words = np.random.default_rng(0).choice(["abab", "cd", "ghi", "fed", "jaja"], (1500, 200))
    lines = "".join(json.dumps({"text": " ".join(text)}) + "\n" for text in words)
    (folder / "c4.json.gz").write_bytes(gzip.compress(lines.encode()))
    source, validation = str(folder / "c4.json.gz"), str(tiny_text / "c4-validation.*")
    prepare(source, validation, str(tiny_text / "t.model"), 32, str(folder / "data"), workers=1)
    return folder / "data"


def cut(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 3)


def blank(shard: Path) -> None:
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.seek(size // 3)
        file.write(bytes(size // 3))


@pytest.mark.parametrize(
    ("split", "harm", "message"),
    [
        ("train", cut, r"the train rows take \d+ bytes, not"),
        ("train", blank, "cannot be read: Corrupted"),
        ("train", Path.unlink, ""),
        ("validation", cut, r"the validation rows take \d+ bytes, not"),
        ("validation", blank, "cannot be read: "),
        ("validation", Path.unlink, r"the validation rows take \d+ bytes, not"),
    ],
)
def test_a_shard_that_is_harmed_in_mid_run(free, large_data, tmp_path, monkeypatch, split, harm, message):
    """The run stops and says so. A training shard that is removed is open and still read; the next start
    misses it. Validation shards are opened for each evaluation."""
    data = Path(shutil.copytree(large_data, tmp_path / "data"))
    config = dataclasses.replace(free, data=dataclasses.replace(free.data, directory=str(data)))
    real, asked = loop.next_batch, iter(range(22))

    def next_batch(*args):
        if next(asked) == 4:
            harm(next(data.glob(f"*-{split}.array_record-*")))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "next_batch", next_batch)
        with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
            loop.pretrain(config)
    with Checkpoints(str(Path(config.run_dir) / "checkpoints")) as saved:
        step, damaged = saved.latest_good()
    assert (step == 22, damaged) == (not message, [])
    assert step is not None
    assert step >= 3
    if harm is not blank:
        with pytest.raises(InputError, match=rf"the {split} rows take \d+ bytes, not"):
            loop.pretrain(config)
