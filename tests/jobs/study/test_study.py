"""`mora study` as a whole: real runs, killed and resumed; foreign folders; Slurm."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from studies import LORA, PLAIN, study

from mora_jax.errors import InputError
from train.cli.main import main
from train.config.study import read_study
from train.console import exits
from train.jobs.study import study as job
from train.run.metrics import read_metrics
from train.storage.lock import LOCK


@pytest.fixture
def file(tiny_yaml: Path, tmp_path: Path) -> Path:
    """A study of two tiny runs."""
    plain = {
        "base": str(tiny_yaml),
        "run_dir": str(tmp_path / "s"),
        "variants": {"LoRA": LORA},
        "axes": {"optimizer.learning_rate": [1e-2, 2e-2]},
    }
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def start(file: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "train.cli", "study", str(file), "--jobs", "2", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_runs(process: subprocess.Popen) -> None:
    """Waits until a study, which holds its folder then, has started its two runs."""
    assert process.stderr
    started = 0
    while started < 2:
        line = process.stderr.readline()
        assert line, "the study has ended"
        started += "started on" in line


@pytest.mark.slow
def test_a_study_is_stopped_killed_and_resumed(file: Path, tmp_path: Path):
    longer, folder = (
        ("--set", "steps=3000", "eval.every=500", "checkpoint.every=250", "checkpoint.keep=2"),
        tmp_path / "s",
    )
    for number, status in ((signal.SIGINT, exits.PREEMPTED), (signal.SIGKILL, -signal.SIGKILL)):
        process = start(file, *longer)
        wait_for_runs(process)
        second = start(file, *longer)  # takes some seconds, in which the runs train
        out, err = second.communicate(timeout=60)
        assert second.returncode == exits.BAD_INPUT
        assert "is in use by process" in err
        assert process.poll() is None, "the runs are too short for this test"
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == status
    process = start(file, *longer)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert out == (folder / "table.md").read_text()
    for run in read_study(str(file)).runs:
        steps = [
            line["step"] for line in read_metrics(f"{run.config.run_dir}/metrics.jsonl") if "loss" in line
        ]
        assert steps == list(range(3000))
    assert (folder / "loss.png").exists()
    done = start(file, *longer)
    assert done.communicate(timeout=60)[0] == out


def test_a_folder_of_another_study_or_run_is_refused(file: Path, tmp_path: Path):
    made = read_study(str(file))
    with job.claimed(made):
        pass
    other = study(tmp_path / "s", set={"data.directory": made.runs[0].config.data.directory})
    renamed = {**yaml.safe_load(file.read_text()), "variants": {"other": LORA}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(renamed))
    with pytest.raises(InputError, match="holds another study, with runs such as LoRA_lr1e-2_seed0"):
        job.report(read_study(str(tmp_path / "other.yaml")))
    run = Path(made.runs[0].config.run_dir)
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"seed": 5}))
    with pytest.raises(InputError, match=r"LoRA_lr1e-2_seed0 holds a run with \S+ .*, not "):
        job.report(made)
    (tmp_path / "s" / "config.yaml").write_text("")
    with pytest.raises(InputError, match="is the folder of a run, not of a study"):
        job.report(other)


def test_a_missing_data_set_is_refused_before_any_run_starts(tmp_path: Path):
    with (
        pytest.raises(InputError, match="nowhere"),
        job.claimed(study(tmp_path / "s", set={"data.directory": str(tmp_path / "nowhere")})),
    ):
        pass
    assert not (tmp_path / "s").exists()


def sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Puts a fake sbatch and srun on the path."""
    for name, line in (("sbatch", text), ("srun", 'shift; echo "$@"; exit 75'), ("scontrol", 'echo "$@"')):
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_study_is_submitted_to_slurm(file: Path, tmp_path: Path, monkeypatch, capsys):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    sbatch(bin_folder, monkeypatch, f'echo "$@" > {tmp_path}/words; echo Submitted batch job 7')
    main(["study", str(file), "--submit", "slurm", "--sbatch=--gres=gpu:1 --time=08:00:00"])
    assert capsys.readouterr().out == "Submitted batch job 7\n"
    script = tmp_path / "s/study.sbatch"
    assert (tmp_path / "words").read_text() == f"--gres=gpu:1 --time=08:00:00 {script}\n"
    assert "#SBATCH --array=0-1\n" in script.read_text()
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7"}
    ended = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (75, "requeue 7_1\n")
    log = (tmp_path / "s/logs/LoRA_lr2e-2_seed0.log").read_text()
    assert "-m train.cli pretrain" in log
    assert log.endswith("/LoRA_lr2e-2_seed0\n")


def test_slurm_says_no_or_is_not_there(file: Path, tmp_path: Path, monkeypatch):
    made = read_study(str(file))
    with pytest.raises(InputError, match="there is no sbatch here"):
        job.submit_study(made, "")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    sbatch(bin_folder, monkeypatch, "echo invalid partition >&2; exit 1")
    with pytest.raises(InputError, match=r"sbatch refuses .*study.sbatch: invalid partition"):
        job.submit_study(made, "")
    with pytest.raises(InputError, match="excludes halving"):
        job.submit_study(study(tmp_path / "s", halving={"at": [0.5]}), "")


@pytest.mark.slow  # test_table.py writes one of runs without data
def test_the_report_needs_no_data(tmp_path: Path, capsys):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**PLAIN, "run_dir": str(tmp_path / "s")}))
    main(["study", str(tmp_path / "s.yaml"), "--report"])
    assert "| ReMoRA | waiting | waiting |" in capsys.readouterr().out
    assert not (tmp_path / "s" / LOCK).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--report", "--submit", "slurm"], "give either --report or --submit"),
        (["--sbatch", "x"], "--sbatch needs --submit slurm"),
    ],
)
def test_bad_flags_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["study", "s.yaml", *words])
    assert stop.value.code == exits.BAD_INPUT
    assert message in capsys.readouterr().err
