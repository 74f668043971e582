"""A run's log: metrics.jsonl, TensorBoard's events, optionally Weights & Biases, and the progress bar.

`metrics.jsonl` is the source of truth. Each line is one JSON object. Its `step` is n for update n (from 0),
for the restart just before that update, and for the evaluation just after it. JSON has no NaN: numbers that
are not finite are the strings "NaN", "Infinity" and "-Infinity", which `read_metrics` turns back into floats.
"""

import collections
import contextlib
import json
import math
import socket
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter

from mora_jax.errors import InputError
from mora_jax.io import is_plain_file, json_text, read_text
from train.console.progress import Bar
from train.console.terminal import warn
from train.storage.files import make_folder, naming_errors, open_own, writable, write_whole

LINES = "metrics.jsonl"
EVENTS = "tensorboard"
_WANDB_ID = "wandb_id.txt"
# Files and folders that are appended to, and so cannot be written in a bucket.
LOG_FILES = (LINES, EVENTS, _WANDB_ID)
# Seconds between two flushes of TensorBoard's events.
EVENTS_EVERY = 30.0
# Updates whose median duration gives the time left.
_RECENT = 100
# Gaps in the lines of an earlier program that a warning names.
_NAMED_GAPS = 3
# Bytes of a line; the run's own have a few hundred.
_LONGEST = 1 << 20
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

# The values that may be text.
_TEXTS = ("group_type",)

Values = Mapping[str, float | int | str]
Sink = Callable[[int, Values], None]


class Metrics:
    """Writes a run's metrics to all their places. A context manager.

    A run that resumes at step `start` first drops what was written of later steps, so that no update is
    logged twice. A failed write, as on a full disk, raises an OSError that names the file: a run does not
    train without its log.
    """

    def __init__(
        self,
        run_dir: str,
        total: int,
        start: int = 0,
        wandb: str = "",
        config: dict[str, Any] | None = None,
        writes: bool | None = None,
        evaluated: bool = True,
    ) -> None:
        """Args:
          run_dir: the run's folder, on a disk.
          total: updates of the whole run.
          start: updates done before.
          wandb: project in Weights & Biases; empty for none.
          config: the run's config as plain data, which Weights & Biases shows.
          writes: whether this process writes and shows anything; None for process 0 alone.
          evaluated: whether the evaluation just before `start` is kept; else it is dropped and repeated.

        Raises:
          InputError: if Weights & Biases is asked for but not installed, metrics.jsonl cannot be read, or one
            of the places cannot be written to.
        """
        self._closing = contextlib.ExitStack()
        self._sinks: list[Sink] = []
        if jax.process_index() == 0 if writes is None else writes:
            folder = Path(run_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with self._closing:
                self._sinks.append(_json_lines(self._closing, folder / LINES, start, evaluated))
                self._sinks.append(_tensorboard(self._closing, folder / EVENTS, start))
                if wandb:
                    self._sinks.append(_wandb(self._closing, folder, wandb, config or {}))
                self._sinks.append(_bar(self._closing, total, start))
                self._closing = self._closing.pop_all()

    def write(self, step: int, values: Values) -> None:
        """Writes one line.

        Args:
          step: the update, from 0.
          values: scalars; only numbers go to TensorBoard and Weights & Biases.
        """
        for sink in self._sinks:
            sink(step, values)

    def close(self) -> None:
        """Closes every file."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # On a full disk, files cannot be closed either. The first error is the one to report.
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            self.close()


def add_scores(run_dir: str, scores: Sequence[tuple[int, Values]], wandb: str = "") -> None:
    """Adds scalars to what TensorBoard and Weights & Biases show of a run, which may be training meanwhile.

    TensorBoard's events go to a folder of their own: it reads one growing file of a folder at a time.

    Args:
      run_dir: the run's folder, on a disk or in a bucket.
      scores: updates, from 0, and scalars by name, such as "lm_eval/mmlu/acc"; what precedes the first slash
        names the folder.
      wandb: the run's project in Weights & Biases; empty for none.

    Raises:
      InputError: if Weights & Biases is asked for but not installed, or the folder cannot be written to.
    """
    with contextlib.ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory()))
        with contextlib.ExitStack() as events:
            write = _tensorboard(events, folder / EVENTS, None)
            for step, values in scores:
                write(step, values)
        names = scores[0][1]
        for file in (folder / EVENTS).iterdir():
            there = epath.Path(run_dir) / EVENTS / next(iter(names)).partition("/")[0]
            make_folder(there)
            write_whole(there / file.name, file.read_bytes())
        if wandb:
            write = _wandb(closing, folder, wandb, {}, epath.Path(run_dir))
            for step, values in scores:
                write(step, values)


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Returns all complete lines of a metrics.jsonl. A truncated last line is ignored.

    Raises:
      InputError: if there is no such file, it is not a plain one (a pipe, a device), or another line is not a
        JSON object with a step.
    """
    file = epath.Path(path)
    if file.exists() and not is_plain_file(file):
        raise InputError(f"{path} is not a regular file")
    try:
        with file.open("rb") as stream:
            return [_parse(path, number, line) for number, line in enumerate(_complete_lines(stream), 1)]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _complete_lines(stream: Any) -> Iterator[bytes]:
    """Yields lines with their ends. A line that is too long is cut, and then is not JSON."""
    while (line := stream.readline(_LONGEST)).endswith(b"\n") or len(line) == _LONGEST:
        yield line


def _parse(path: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    step = values.get("step") if isinstance(values, dict) else None
    if not isinstance(values, dict) or type(step) is not int or not 0 <= step < 2**31:
        raise InputError(f"{path}, line {number}: not a JSON object with a step; remove the line")
    found = {name: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for name, v in values.items()}
    for name, value in found.items():
        if not (_is_number(value) or (name in _TEXTS and isinstance(value, str))):
            raise InputError(
                f"{path}, line {number}: {name[:50]} is {str(value)[:50]!r}, not a number that a float "
                "holds; correct or remove the line"
            )
    return found


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and isinstance(float(value), float)
    except OverflowError:
        return False


def _render(step: int, values: Values) -> str:
    return json_text({"step": step, **values}) + "\n"


def _json_lines(closing: contextlib.ExitStack, path: Path, start: int, evaluated: bool) -> Sink:
    with writable(path, f"{path} cannot be written to"):
        logged = _drop_later_lines(path, start, evaluated) if path.exists() else set()
        file = closing.enter_context(open_own(path, "ab"))  # a buffer would fail again at the end
    if missing := _spans(sorted(set(range(start)) - logged)):
        warn([f"{path} lacks updates {missing}; they are done and not repeated"])

    def write(step: int, values: Values) -> None:
        line = _render(step, values).encode()
        with naming_errors(path):
            while line:
                line = line[file.write(line) :]

    return write


def _drop_later_lines(path: Path, start: int, evaluated: bool) -> set[int]:
    """Drops lines that will be written again, and a truncated last line. A kill leaves the old or new file.

    Returns:
      The updates in the lines that are left.
    """

    def stays(line: dict[str, Any]) -> bool:
        repeated = not evaluated and line["step"] == start - 1 and "validation_loss" in line
        return line["step"] < start and not repeated

    kept = [line for line in read_metrics(str(path)) if stays(line)]
    logged = {line["step"] for line in kept if "loss" in line}
    write_whole(path, "".join(_render(line.pop("step"), line) for line in kept))
    return logged


def _spans(steps: list[int]) -> str:
    """Returns ascending numbers in a short form, such as `3, 20 to 41`."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and spans[-1][1] == step - 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    named = [f"{first} to {last}" if first < last else str(first) for first, last in spans[:_NAMED_GAPS]]
    return ", ".join(named) + (" and more" if len(spans) > _NAMED_GAPS else "")


def _tensorboard(closing: contextlib.ExitStack, folder: Path, start: int | None) -> Sink:
    """Returns what writes events; `start` is the first step, from which earlier events are hidden."""
    # tensorboardX's SummaryWriter writes in a thread, which a full disk ends without an error; the run then
    # blocks on its queue. Its EventsWriter leaves the file open if the last flush fails. So only its
    # RecordWriter is used. TensorBoard reads files in the order of their names.
    with writable(folder, f"{folder} must be a folder that can be written to"):
        folder.mkdir(exist_ok=True)
        number = len(list(folder.glob("*")))
        events = RecordWriter(
            f"{folder}/events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{number}"
        )
    flushed = time.monotonic()

    def close() -> None:
        with naming_errors(folder):
            events.close()

    def put(**event: Any) -> None:
        nonlocal flushed
        with naming_errors(folder):
            events.write(Event(wall_time=time.time(), **event).SerializeToString())
            if time.monotonic() - flushed > EVENTS_EVERY:
                events.flush()
                flushed = time.monotonic()

    def write(step: int, values: Values) -> None:
        # Numbers that are not finite cannot be drawn.
        finite = {name: value for name, value in _numbers(values).items() if math.isfinite(value)}
        if finite:
            scalars = [Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
            put(step=step, summary=Summary(value=scalars))

    closing.callback(close)
    put(file_version="brain.Event:2")
    # Makes TensorBoard hide events of an earlier process that are written again.
    if start is not None:
        put(step=start, session_log=SessionLog(status=SessionLog.START))
    return write


def _wandb(
    closing: contextlib.ExitStack,
    folder: Path,
    project: str,
    config: dict[str, Any],
    run_dir: epath.Path | None = None,
) -> Sink:
    """Returns what logs to the run whose id is in `run_dir`, by default the folder on this disk."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("--log.wandb needs wandb: pip install 'mora_jax[wandb]'") from error
    path = (run_dir or epath.Path(folder)) / _WANDB_ID
    if not path.exists():
        write_whole(path, uuid.uuid4().hex)
    run_id = read_text(path, 1000)
    run = wandb.init(
        project=project,
        name=path.parent.name,
        dir=str(folder),
        id=run_id,
        resume="allow",
        config=config,
        allow_val_change=True,  # a resumed run may have another mesh
    )
    closing.callback(run.finish)
    # Its own step can only grow, which would drop updates that are logged again after resuming.
    run.define_metric("*", step_metric="update")

    def write(step: int, values: Values) -> None:
        run.log({"update": step} | _numbers(values))

    return write


def _bar(closing: contextlib.ExitStack, total: int, start: int) -> Sink:
    bar = closing.enter_context(Bar("training", total, "steps", start=start))
    done, seen = start, {}
    seconds = collections.deque[float](maxlen=_RECENT)

    def show(step: int, values: Values) -> None:
        nonlocal done
        seen.update(values)
        if "loss" not in values:
            return
        if "tokens_per_second" in values:
            seconds.append(float(values["tokens"]) / (step + 1) / float(values["tokens_per_second"]))
        # The last half minute may hold an evaluation or a compilation, after which the time left would jump.
        left = (total - step - 1) * statistics.median(seconds) if seconds else None
        bar.advance(step + 1 - done, _facts(seen), left)
        done = step + 1

    return show


def _facts(seen: Values) -> str:
    forms = {
        "loss": "loss {:.3f}",
        "learning_rate": "lr {:.1e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "restart": "restarts {}",
    }
    return " · ".join(form.format(seen[name]) for name, form in forms.items() if name in seen)


def _numbers(values: Values) -> dict[str, float | int]:
    return {name: value for name, value in values.items() if not isinstance(value, str)}
