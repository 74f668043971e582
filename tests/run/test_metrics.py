import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from mora_jax.errors import InputError
from train.run import metrics as metrics_module
from train.run.metrics import Metrics, add_scores, read_metrics


def lines_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def events_of(folder: Path) -> list[Event]:
    """Every event of every file, oldest file first."""
    events = []
    for path in sorted((folder / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):  # a record: length (8 bytes), its check (4), data, its check (4)
            length = int.from_bytes(content[at : at + 8], "little")
            events.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 16 + length
    return events


def train(folder: Path, first: int, last: int, total: int = 10) -> None:
    with Metrics(str(folder), total, first) as metrics:
        for step in range(first, last):
            if step == 4:
                metrics.write(step, {"restart": 1, "group_type": "1"})
            metrics.write(step, {"loss": 0.1 * step + first, "learning_rate": 1e-3})
            if step == 5:
                metrics.write(step, {"validation_loss": 2.0})


def test_a_line_for_each_write(tmp_path: Path):
    train(tmp_path, 0, 6)
    assert lines_of(tmp_path)[4] == {"step": 4, "restart": 1, "group_type": "1"}
    assert lines_of(tmp_path)[5] == {"step": 4, "loss": 0.1 * 4, "learning_rate": 1e-3}
    assert read_metrics(str(tmp_path / "metrics.jsonl")) == lines_of(tmp_path)


def test_lines_are_written_at_once(tmp_path: Path):
    with Metrics(str(tmp_path), 10) as metrics:
        metrics.write(0, {"loss": 1.0})
        assert lines_of(tmp_path) == [{"step": 0, "loss": 1.0}]


def test_numbers_that_are_not_finite_are_legal_json_and_come_back(tmp_path: Path):
    values = {"loss": math.nan, "grad_norm": math.inf, "learning_rate": -math.inf}
    with Metrics(str(tmp_path), 10) as metrics:
        metrics.write(0, values)
    assert lines_of(tmp_path) == [
        {"step": 0, "loss": "NaN", "grad_norm": "Infinity", "learning_rate": "-Infinity"}
    ]
    (back,) = read_metrics(str(tmp_path / "metrics.jsonl"))
    assert math.isnan(back["loss"])
    assert (back["grad_norm"], back["learning_rate"]) == (math.inf, -math.inf)


def test_a_resumed_run_logs_no_update_twice(tmp_path: Path):
    train(tmp_path, 0, 8)
    before = [line for line in lines_of(tmp_path) if line["step"] < 4]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed here
    train(tmp_path, 4, 10)
    lines = lines_of(tmp_path)
    assert lines[: len(before)] == before
    assert [line["step"] for line in lines if "loss" in line] == list(range(10))
    assert [line["loss"] for line in lines if "loss" in line][4] == 0.1 * 4 + 4
    assert sum("restart" in line for line in lines) == sum("validation_loss" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("left", "warning"),
    [
        (range(6), ""),
        (range(2), "lacks updates 2 to 5; they are done and not repeated"),
        ((0, 1, 2, 4, 5), "lacks updates 3; they"),
        ((1, 4), "lacks updates 0, 2 to 3, 5; they"),
        ((), "lacks updates 0 to 5; they"),
    ],
)
def test_missing_updates_are_warned_of(tmp_path: Path, capsys, left, warning: str):
    train(tmp_path, 0, 8)
    lines = [line for line in lines_of(tmp_path) if line["step"] in left or "loss" not in line]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train(tmp_path, 6, 10)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == bool(warning)
    assert warning in "".join(warnings)


def test_many_gaps_are_not_all_named():
    assert metrics_module._spans(list(range(0, 20, 2))) == "0, 2, 4 and more"
    assert metrics_module._spans([]) == ""


def test_a_fresh_run_drops_all_lines(tmp_path: Path):
    train(tmp_path, 0, 8)
    train(tmp_path, 0, 1)
    assert lines_of(tmp_path) == [{"step": 0, "loss": 0.0, "learning_rate": 1e-3}]


def test_a_truncated_last_line_is_not_read(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1}')
    assert read_metrics(str(path)) == [{"step": 0, "loss": 1.0}]


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', "\xff", "[" * 100_000])
def test_any_other_broken_line_is_named(tmp_path: Path, line: str):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line.encode("latin-1") + b'\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2: not a JSON object"):
        read_metrics(str(path))
    with pytest.raises(InputError, match="line 2"):
        Metrics(str(tmp_path), 10, 1)


@pytest.mark.parametrize("step", ['"1"', "-1", "true", "9" * 4000])
def test_a_line_with_an_invalid_step_is_broken(tmp_path: Path, step: str):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
    with pytest.raises(InputError, match="line 1: not a JSON object with a step"):
        read_metrics(str(tmp_path / "metrics.jsonl"))


def test_a_line_of_any_length_is_read_in_bounds(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for end in ("", "\n"):
        path.write_text(f'{{"step": 0}}\n{{"step": 1, "x": "{"x" * metrics_module._LONGEST}"}}{end}')
        with pytest.raises(InputError, match="line 2"):
            read_metrics(str(path))


@pytest.mark.parametrize("name", ["metrics.jsonl", "wandb_id.txt"])
def test_a_pipe_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is not a regular file"):
        Metrics(str(tmp_path), 10, wandb="paper")


@pytest.mark.parametrize("name", ["tensorboard", "metrics.jsonl"])
def test_a_place_that_cannot_be_written_to_is_bad_input(tmp_path: Path, name: str):
    if name == "tensorboard":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).symlink_to(tmp_path)
    with pytest.raises(InputError, match=f"{name} (must be a folder|is not a regular file)"):
        Metrics(str(tmp_path), 10)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"none.jsonl cannot be read: No such file"):
        read_metrics(str(tmp_path / "none.jsonl"))


def test_tensorboard_gets_the_numbers(tmp_path: Path):
    train(tmp_path, 0, 6)
    events = events_of(tmp_path)
    scalars = {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}
    assert scalars[(5, "validation_loss")] == 2.0
    assert scalars[(3, "loss")] == pytest.approx(0.3)
    assert (4, "restart") in scalars
    assert not any(tag == "group_type" for _, tag in scalars)
    train(tmp_path, 4, 6)
    starts = [e.step for e in events_of(tmp_path) if e.HasField("session_log")]
    assert starts == [0, 4]  # what TensorBoard hides from there on is written again


def test_only_the_writing_process_writes(tmp_path: Path):
    with Metrics(str(tmp_path / "run"), 10, writes=False) as metrics:
        metrics.write(0, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_missing_wandb_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'mora_jax\[wandb\]'"):
        Metrics(str(tmp_path), 10, wandb="project")


class FakeWandb(types.SimpleNamespace):
    """Takes what is sent to Weights & Biases."""

    def __init__(self) -> None:
        super().__init__(inits=[], logged=[], finished=0)

    def init(self, **options: Any) -> "FakeWandb":
        self.inits.append(options)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "update")

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_resumes_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 3):
        with Metrics(str(tmp_path / "a_run"), 10, start, "paper", {"model": {"layers": 2}}) as metrics:
            metrics.write(start, {"loss": 1.5, "group_type": "0"})
    assert [o["config"] for o in fake.inits] == [{"model": {"layers": 2}}] * 2
    assert fake.logged == [{"update": 0, "loss": 1.5}, {"update": 3, "loss": 1.5}]
    assert fake.finished == 2
    assert {o["project"] for o in fake.inits} == {"paper"}
    assert {o["name"] for o in fake.inits} == {"a_run"}
    assert len({o["id"] for o in fake.inits}) == 1
    assert all(o["resume"] == "allow" for o in fake.inits)


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_scores_are_added_to_a_run_that_may_be_training(place, request, tmp_path, monkeypatch):
    top = tmp_path if place == "disk" else request.getfixturevalue("bucket")
    run_dir = epath.Path(top) / "a_run"
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    if place == "disk":
        run_dir.mkdir()
    (run_dir / "wandb_id.txt").write_text("its-id")
    scores = {"lm_eval/mmlu/acc": 0.25, "lm_eval/mmlu/f1": math.nan}
    add_scores(str(run_dir), [(21, scores), (23, {"lm_eval/mmlu/acc": 0.5})], "paper")
    (file,) = (run_dir / "tensorboard" / "lm_eval").iterdir()
    copy = tmp_path / "copy" / "tensorboard"
    copy.mkdir(parents=True)
    (copy / file.name).write_bytes(file.read_bytes())
    _, *events = events_of(tmp_path / "copy")  # the first one is the version
    found = [(event.step, [v.tag for v in event.summary.value]) for event in events]
    assert found == [(step, ["lm_eval/mmlu/acc"]) for step in (21, 23)]
    assert [logged["update"] for logged in fake.logged] == [21, 23]
    assert fake.logged[0]["lm_eval/mmlu/acc"] == 0.25
    assert [(o["id"], o["name"], o["project"]) for o in fake.inits] == [("its-id", "a_run", "paper")]
    assert fake.finished == 1


def test_the_bar_shows_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shown = []
    monkeypatch.setattr(metrics_module.Bar, "advance", lambda self, n, facts, left: shown.append((n, facts)))
    with Metrics(str(tmp_path), 10, 3) as metrics:
        metrics.write(3, {"restart": 2, "group_type": "1"})
        speed = {"tokens_per_second": 1234.5, "tokens": 400}
        metrics.write(3, {"loss": 2.0, "learning_rate": 1e-3} | speed)
        metrics.write(3, {"validation_loss": 9.0})
        metrics.write(5, {"loss": 1.0})
    assert shown == [
        (1, "loss 2.000 · lr 1.0e-03 · 1,234 tokens/s · restarts 2"),
        (2, "loss 1.000 · lr 1.0e-03 · 1,234 tokens/s · restarts 2"),
    ]


def test_the_time_left_is_that_of_the_median_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    left = []
    monkeypatch.setattr(metrics_module.Bar, "advance", lambda self, n, facts, seconds: left.append(seconds))
    with Metrics(str(tmp_path), 10) as metrics:
        metrics.write(0, {"loss": 2.0, "tokens": 100})  # its time is that of the compilation
        for step, seconds in enumerate([0.5, 0.5, 60.0, 0.5], start=1):
            tokens = 100 * (step + 1)
            metrics.write(step, {"loss": 2.0, "tokens": tokens, "tokens_per_second": 100 / seconds})
    assert left == [None, *(0.5 * n for n in (8, 7, 6, 5))]


@pytest.mark.parametrize("value", ['"fast"', "[1]", "null", "true", "{}", "1" + "0" * 400])
@pytest.mark.parametrize("name", ["loss", "tokens_per_second", "restart", "anything"])
def test_a_value_that_is_no_number_is_named(tmp_path, name, value):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0, "loss": 1, "group_type": "0"}}\n{{"step": 1, "{name}": {value}}}\n')
    with pytest.raises(InputError, match=f"metrics.jsonl, line 2: {name} is .*, not a number that a float"):
        read_metrics(str(path))


def test_a_log_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match=r"metrics\.jsonl is a link, .* remove it"):
        Metrics(str(tmp_path / "run"), 1)
    assert not (tmp_path / "outside").exists()
