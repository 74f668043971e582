"""The queue of a study, with fake runs: what is trained, skipped, retried, stopped and given up."""

import os
import signal
import threading
import time

import pytest
from studies import Fakes, starts, study

from train.console import exits
from train.jobs.study.devices import Device
from train.jobs.study.outcomes import failure_file
from train.storage.lock import LOCK, lock_file

GPUS = tuple(Device(f"GPU {i}", {"CUDA_VISIBLE_DEVICES": str(i)}) for i in range(2))


def states(queue) -> dict[str, str]:
    return {name: outcome.state for name, outcome in queue.found.items()}


@pytest.fixture
def fakes(tmp_path):
    return Fakes(
        study(tmp_path / "s", set={"steps": 12, "eval.every": 2, "schedule.warmup": 2}, variants=LORA)
    )


LORA = {"LoRA": {"method.name": "lora", "restart.every": 0, "schedule.kind": "cosine"}}


@pytest.mark.slow
def test_runs_are_trained_once_and_then_skipped(fakes):
    for _ in range(2):
        queue, _ = fakes.work()
        assert set(states(queue).values()) == {"finished"}
        assert [starts(run) for run in fakes.study.runs] == [1, 1]


def test_failed_and_diverged_runs_are_rows_and_the_rest_is_trained(fakes):
    first, second = (run.name for run in fakes.study.runs)
    fakes.behaviours = {first: "fail once"}
    queue, _ = fakes.work()
    assert states(queue) == {first: "failed", second: "finished"}
    assert queue.found[first].note == "status 2: it is broken"
    queue, _ = fakes.work()  # the next start tries again
    assert states(queue)[first] == "finished"
    assert not failure_file(fakes.study, fakes.study.runs[0]).exists()


@pytest.mark.slow
def test_a_diverged_run_is_not_started_again(fakes):
    fakes.behaviours = {fakes.study.runs[0].name: "diverge"}
    for _ in range(2):
        queue, _ = fakes.work()
    assert [*states(queue).values()] == ["diverged", "finished"]
    assert starts(fakes.study.runs[0]) == 1


@pytest.mark.slow
def test_a_killed_run_is_started_again_while_it_advances(fakes):
    first, second = fakes.study.runs
    fakes.behaviours = {first.name: "killed once", second.name: "killed"}
    queue, _ = fakes.work()
    assert [*states(queue).values()] == ["finished", "failed"]
    assert starts(first) == 2
    assert starts(second) == 4
    assert queue.found[second.name].note.startswith("status -9")


def test_the_runs_of_a_lost_gpu_go_to_the_others(fakes):
    fakes.devices, fakes.alive = GPUS, lambda device: device != GPUS[1]
    fakes.behaviours = {run.name: "gpu 1" for run in fakes.study.runs}
    queue, view = fakes.work()
    assert set(states(queue).values()) == {"finished"}
    assert [said for said in view.said if "no longer" in said] == [
        "warning: GPU 1 can no longer be used; its runs go to the others"
    ]


def test_a_run_that_fails_on_a_good_gpu_failed(fakes):
    fakes.devices = GPUS
    fakes.behaviours = {run.name: "fail" for run in fakes.study.runs}
    queue, _ = fakes.work()
    assert queue.lost == []
    assert set(states(queue).values()) == {"failed"}


def test_without_a_gpu_left_the_runs_stay_unfinished(fakes):
    fakes.devices, fakes.alive = GPUS[1:], lambda device: False
    fakes.behaviours = {run.name: "gpu 1" for run in fakes.study.runs}
    queue, view = fakes.work()
    assert queue.unfinished() == [*fakes.study.runs]
    assert "warning: GPU 1 can no longer be used; no other is left" in view.said


def test_a_signal_stops_the_runs_and_the_next_start_resumes_them(fakes):
    fakes.jobs = 2
    fakes.study = study(fakes.study.run_dir, set={"steps": 60, "schedule.warmup": 2}, variants=LORA)

    def stop() -> None:
        while not all(starts(run) for run in fakes.study.runs):  # before that, the signal would end the tests
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(exits.Preempted, match="the same command continues"):
        fakes.work()
    queue, _ = fakes.work()
    assert set(states(queue).values()) == {"finished"}
    assert [starts(run) for run in fakes.study.runs] == [2, 2]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_a_run_that_another_program_trains_is_waited_for(fakes, monkeypatch):
    first, _ = fakes.study.runs
    until = time.monotonic() + 1
    holder = "train.jobs.study.queue.lock.holder"
    monkeypatch.setattr(
        holder, lambda folder: "x" * (time.monotonic() < until and folder == first.config.run_dir)
    )
    queue, view = fakes.work()
    assert [said.split("_")[1] for said in view.said if "started" in said] == ["lr2e-3", "lr1e-3"]
    assert set(states(queue).values()) == {"finished"}


@pytest.mark.slow  # test_verdicts.py decides both
def test_halving_stops_the_worse_runs_and_further_seeds_follow(tmp_path):
    plain = {"set": {"steps": 60, "eval.every": 2, "schedule.warmup": 2}, "halving": {"at": [0.5]}}
    made = study(tmp_path / "s", variants=LORA, seeds_at_best=[1], **plain)
    losses = {run.name: 2.0 + (run.rate == 1e-3) for run in made.runs}
    fakes = Fakes(made, losses, jobs=2)
    for _ in range(2):
        queue, _ = fakes.work()
        kinds = {name: verdict.kind for name, verdict in queue.verdicts.items()}
        assert kinds == {
            "LoRA_lr1e-3_seed0": "stopped",
            "LoRA_lr2e-3_seed0": "ended",
            "LoRA_lr1e-3_seed1": "unused",
            "LoRA_lr2e-3_seed1": "ended",
        }
    assert 30 < queue.found["LoRA_lr1e-3_seed0"].step < 60


@pytest.mark.slow
def test_the_holder_of_a_lock_is_found(tmp_path):
    import subprocess
    import sys

    from train.storage.lock import holder

    run_dir = str(tmp_path / "run")
    assert holder(run_dir) == ""
    program = (
        "import sys, time; from pathlib import Path; from train.storage.lock import lock_file\n"
        "with lock_file(Path(sys.argv[1]), '--x', 'x'): print('held', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", program, f"{run_dir}/{LOCK}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        assert holder(run_dir).startswith(f"process {process.pid}")
        process.kill()
    assert holder(run_dir) == ""
    with lock_file(tmp_path / "run" / LOCK, "--x", "x"):
        pass
