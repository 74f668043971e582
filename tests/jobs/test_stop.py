"""A run that a signal stops saves its last update, and the same command resumes it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slow import slow
from tiny_runs import Interrupted, equal_runs, lines, signalled_at, stop_after

from train.console import exits
from train.jobs import pretrain as loop
from train.run.checkpoint import Checkpoints

ENDED_IN_ITS_LAST_SAVE = """
import os, signal, sys, time
from train.cli import main as cli
from train.jobs import pretrain as loop
from train.run import manifest
real = loop.next_batch
def asked(*args):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)  # for the thread that receives it
    return real(*args)
def sealing(*args):
    time.sleep(1)  # the program is on its way out
    os.write(1, b"sealing\\n")  # standard output is held until the end
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
loop.next_batch, manifest.seal = asked, sealing
cli.main(["pretrain", *sys.argv[1:]])
"""


@pytest.mark.slow  # tests/runtime/test_preempt.py sends second signals without a run
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


@pytest.mark.parametrize("update", [slow(0), 7])
def test_a_signal_saves_the_current_update_and_the_same_command_resumes(free, tiny_run, monkeypatch, update):
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


@pytest.mark.slow
def test_an_evaluation_stopped_by_a_signal_is_repeated(free, tiny_run, monkeypatch):
    """At the first one and at the last one; twice each, so that a run also resumes without an update."""
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


@pytest.mark.slow
def test_a_repeated_evaluation_is_logged_once(free, tiny_run, monkeypatch):
    """It is repeated, then the program dies before the next checkpoint, and the next one repeats it."""
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


@pytest.mark.slow
def test_a_run_whose_log_has_no_reader_stops_as_usual(tiny_yaml, tmp_path):
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
