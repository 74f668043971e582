"""Log files of a run in a bucket: another machine has them up to the checkpoint."""

import json
import threading
from pathlib import Path

import pytest
from etils import epath

from mora_jax.errors import InputError
from train.run import upload
from train.run.metrics import LINES, Metrics, read_metrics
from train.run.upload import uploading
from train.storage import buckets


def write(metrics: Metrics, steps: range) -> None:
    for step in steps:
        metrics.write(step, {"loss": float(step)})


def steps_in(folder: str) -> list[int]:
    return [line["step"] for line in read_metrics(f"{folder}/{LINES}")]


def test_the_log_folder_on_a_disk_is_the_runs(tmp_path: Path):
    with uploading(str(tmp_path)) as here:
        assert here.log_dir == tmp_path
        here.upload()
    assert not list(tmp_path.iterdir())


def test_another_machine_resumes_at_the_checkpoint(bucket: str, monkeypatch, tmp_path: Path):
    run = f"{bucket}/runs/a"

    def killed() -> None:
        with uploading(run) as here, Metrics(str(here.log_dir), 10) as metrics:
            write(metrics, range(4))
            here.upload()  # as before a checkpoint is sealed
            write(metrics, range(4, 6))
            patch.setattr(upload.Upload, "upload", lambda self: None)  # nothing more is uploaded
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed()
    assert steps_in(run) == [0, 1, 2, 3]
    monkeypatch.setenv(buckets.CACHE, str(tmp_path / "another machine"))
    with uploading(run) as here:
        assert steps_in(str(here.log_dir)) == [0, 1, 2, 3]
        with Metrics(str(here.log_dir), 10, 3) as metrics:
            write(metrics, range(3, 10))
    assert steps_in(run) == list(range(10))
    events = [name for name in buckets.objects(run) if name.startswith("tensorboard/")]
    assert len(events) == 2


def test_missing_metrics_are_reported(bucket: str):
    with pytest.raises(InputError, match=r"s3://bucket/run/metrics.jsonl cannot be read: bucket/run/metrics"):
        read_metrics(f"{bucket}/run/{LINES}")


def test_files_left_on_this_machine_are_ignored(bucket: str):
    run = f"{bucket}/run"
    with uploading(run) as here, Metrics(str(here.log_dir), 10) as metrics:
        write(metrics, range(3))
    elsewhere = epath.Path(run) / LINES
    elsewhere.write_text(json.dumps({"step": 0, "loss": 7.0}) + "\n")
    (here.log_dir / "tensorboard/old").write_text("of a run that continued elsewhere")
    with uploading(run) as here:
        assert read_metrics(str(here.log_dir / LINES)) == [{"step": 0, "loss": 7.0}]
        assert not (here.log_dir / "tensorboard/old").exists()


def test_only_changed_log_files_are_uploaded(bucket: str):
    run, puts = f"{bucket}/run", []
    with uploading(run) as here:
        (here.log_dir / "lock").write_text("of this machine")
        (here.log_dir / LINES).write_text('{"step": 0}\n')
        (here.log_dir / "wandb").mkdir()
        (here.log_dir / "wandb/log").write_text("long")
        here.upload()
        first = buckets.objects(run)
        here.upload()
        puts.append(buckets.objects(run) == first)
        with (here.log_dir / LINES).open("a") as file:
            file.write('{"step": 1}\n')
    assert puts == [True]
    assert set(first) == {LINES}
    assert steps_in(run) == [0, 1]


def test_logs_are_uploaded_periodically(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(upload, "EVERY", 0.01)
    real, done = upload.Upload.upload, [threading.Event() for _ in range(3)]
    taken = iter(done)

    def again(self) -> None:
        event = next(taken, threading.Event())
        if event is done[0]:
            event.set()
            raise OSError("out of reach")  # it is retried
        real(self)
        event.set()

    monkeypatch.setattr(upload.Upload, "upload", again)
    with uploading(f"{bucket}/run") as here:
        (here.log_dir / LINES).write_text('{"step": 0}\n')
        assert all(event.wait(10) for event in done)
        assert steps_in(f"{bucket}/run") == [0]


def test_an_unreachable_store_at_the_end(bucket: str, monkeypatch: pytest.MonkeyPatch):
    def out_of_reach(self, data) -> int:
        raise TimeoutError(110, "Connection timed out")

    def run(error: type[BaseException] | None) -> None:
        with uploading(f"{bucket}/run") as here:
            (here.log_dir / LINES).write_text('{"step": 0}\n')
            monkeypatch.setattr(epath.Path, "write_bytes", out_of_reach)
            if error:
                raise error

    with pytest.raises(OSError, match=r"Connection timed out: 's3://bucket/run/metrics.jsonl'"):
        run(None)
    with pytest.raises(ZeroDivisionError):  # the first error is reported
        run(ZeroDivisionError)
