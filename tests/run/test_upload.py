"""Files that grow, of a run in a bucket: on another machine they are what they were, as far as it counts."""

import json
import threading
from pathlib import Path

import pytest
from etils import epath

from mora_jax.errors import InputError
from train.run import upload
from train.run.metrics import LINES, Metrics, read_metrics
from train.run.upload import mirrored
from train.storage import buckets


def tell(metrics: Metrics, steps: range) -> None:
    for step in steps:
        metrics.write(step, {"loss": float(step)})


def steps_in(folder: str) -> list[int]:
    return [line["step"] for line in read_metrics(f"{folder}/{LINES}")]


def test_on_a_disk_it_is_the_folder_itself(tmp_path: Path):
    with mirrored(str(tmp_path)) as here:
        assert here.folder == tmp_path
        here.take_up()
    assert not list(tmp_path.iterdir())


def test_another_machine_goes_on_where_the_checkpoint_is(bucket: str, monkeypatch, tmp_path: Path):
    run = f"{bucket}/runs/a"

    def killed() -> None:
        with mirrored(run) as here, Metrics(str(here.folder), 10) as metrics:
            tell(metrics, range(4))
            here.take_up()  # as before a checkpoint is sealed
            tell(metrics, range(4, 6))
            patch.setattr(upload.Mirror, "take_up", lambda self: None)  # nothing more is taken up
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed()
    assert steps_in(run) == [0, 1, 2, 3]
    monkeypatch.setenv(buckets.CACHE, str(tmp_path / "another machine"))
    with mirrored(run) as here:
        assert steps_in(str(here.folder)) == [0, 1, 2, 3]
        with Metrics(str(here.folder), 10, 3) as metrics:
            tell(metrics, range(3, 10))
    assert steps_in(run) == list(range(10))
    events = [name for name in buckets.objects(run) if name.startswith("tensorboard/")]
    assert len(events) == 2


def test_metrics_that_are_not_there_are_told_of(bucket: str):
    with pytest.raises(InputError, match=r"s3://bucket/run/metrics.jsonl cannot be read: bucket/run/metrics"):
        read_metrics(f"{bucket}/run/{LINES}")


def test_what_is_left_on_this_machine_does_not_count(bucket: str):
    run = f"{bucket}/run"
    with mirrored(run) as here, Metrics(str(here.folder), 10) as metrics:
        tell(metrics, range(3))
    elsewhere = epath.Path(run) / LINES
    elsewhere.write_text(json.dumps({"step": 0, "loss": 7.0}) + "\n")
    (here.folder / "tensorboard/old").write_text("of a run that went on elsewhere")
    with mirrored(run) as here:
        assert read_metrics(str(here.folder / LINES)) == [{"step": 0, "loss": 7.0}]
        assert not (here.folder / "tensorboard/old").exists()


def test_only_what_is_new_is_taken_up_and_only_what_grows(bucket: str):
    run, puts = f"{bucket}/run", []
    with mirrored(run) as here:
        (here.folder / "lock").write_text("of this machine")
        (here.folder / LINES).write_text('{"step": 0}\n')
        (here.folder / "wandb").mkdir()
        (here.folder / "wandb/log").write_text("long")
        here.take_up()
        first = buckets.objects(run)
        here.take_up()
        puts.append(buckets.objects(run) == first)
        with (here.folder / LINES).open("a") as file:
            file.write('{"step": 1}\n')
    assert puts == [True]
    assert set(first) == {LINES}
    assert steps_in(run) == [0, 1]


def test_it_is_taken_up_every_so_often(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(upload, "EVERY", 0.01)
    real, done = upload.Mirror.take_up, [threading.Event() for _ in range(3)]
    taken = iter(done)

    def take_up(self) -> None:
        event = next(taken, threading.Event())
        if event is done[0]:
            event.set()
            raise OSError("out of reach")  # it is tried again
        real(self)
        event.set()

    monkeypatch.setattr(upload.Mirror, "take_up", take_up)
    with mirrored(f"{bucket}/run") as here:
        (here.folder / LINES).write_text('{"step": 0}\n')
        assert all(event.wait(10) for event in done)
        assert steps_in(f"{bucket}/run") == [0]


def test_a_store_out_of_reach_at_the_end(bucket: str, monkeypatch: pytest.MonkeyPatch):
    def out_of_reach(self, data) -> int:
        raise TimeoutError(110, "Connection timed out")

    def run(error: type[BaseException] | None) -> None:
        with mirrored(f"{bucket}/run") as here:
            (here.folder / LINES).write_text('{"step": 0}\n')
            monkeypatch.setattr(epath.Path, "write_bytes", out_of_reach)
            if error:
                raise error

    with pytest.raises(OSError, match=r"Connection timed out: 's3://bucket/run/metrics.jsonl'"):
        run(None)
    with pytest.raises(ZeroDivisionError):  # what was met first is what is told
        run(ZeroDivisionError)
