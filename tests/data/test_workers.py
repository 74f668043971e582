"""Worker processes: reports arrive, the first error stops the others, a killed worker is reported."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from made_text import LongShard, contents, write_lines

from mora_jax.errors import InputError
from train.data.rows import workers
from train.data.rows.shard import Advance, Job, TextShard
from train.data.text.files import file_shards
from train.data.tokenizer import Tokenizer, train_tokenizer


class Deadly:
    """A shard that ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(a_file(folder / "a.json", "document a b c d"), str(folder / "t.model"), 290)


def a_file(path: Path, text: str, count: int = 50) -> str:
    return write_lines(path, [text] * count)


def a_job(tokenizer: Tokenizer, shard: TextShard, target: Path) -> Job:
    return Job(shard, tokenizer, 16, 0, target, target.with_suffix(".json"))


def test_two_workers_write_and_report_the_same_as_one(tokenizer: Tokenizer, tmp_path: Path):
    sources = [a_file(tmp_path / f"{i}.jsonl", f"document {i} a b c d") for i in range(3)]
    written = []
    for count in (1, 2):
        folder = tmp_path / f"{count} workers"
        folder.mkdir()
        jobs = [
            a_job(tokenizer, file_shards(path)[0], folder / f"{i}.rows") for i, path in enumerate(sources)
        ]
        reports: list[Advance] = []
        workers.run(jobs, count, reports.append)
        assert all(job.finished for job in jobs)
        assert sum(report.documents for report in reports) == 150
        assert sum(report.units for report in reports) == sum(Path(path).stat().st_size for path in sources)
        counts = [job.counts() for job in jobs]
        assert sum(report.tokens for report in reports) == sum(c.tokens + c.dropped_tokens for c in counts)
        written.append(contents(folder))
    assert written[0] == written[1]


@pytest.mark.slow
def test_the_first_error_stops_the_others(tokenizer: Tokenizer, tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text("not JSON\n")
    slow = a_job(tokenizer, LongShard(), tmp_path / "slow.rows")
    bad = a_job(tokenizer, file_shards(str(tmp_path / "bad.jsonl"))[0], tmp_path / "bad.rows")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        workers.run([slow, bad], 2, lambda advance: None)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_killed_worker_is_reported(tokenizer: Tokenizer, tmp_path: Path):
    jobs = [a_job(tokenizer, Deadly(), tmp_path / f"{i}.rows") for i in range(2)]  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a worker process was killed.*fewer --workers"):
        workers.run(jobs, 2, lambda advance: None)


class Noting:
    """A shard that notes the signals blocked in the process that unpickles it, and ends it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        blocked = "signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())"
        note = f"pathlib.Path({str(self._path)!r}).write_text(str({blocked}))"
        return exec, (f"import os, pathlib, signal; {note}; os._exit(9)",)


@pytest.mark.slow
def test_ctrl_c_is_the_parents_from_a_workers_first_moment(tokenizer: Tokenizer, tmp_path: Path):
    """A worker inherits that it is blocked. One that is interrupted while it loads prints a traceback."""
    shard: Any = Noting(tmp_path / "noted")
    jobs = [a_job(tokenizer, shard, tmp_path / f"{i}.rows") for i in range(2)]
    with pytest.raises(InputError, match="a worker process was killed"):
        workers.run(jobs, 2, lambda advance: None)
    assert (tmp_path / "noted").read_text() == "True"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_nothing_to_do():
    workers.run([], 4, lambda advance: None)


def test_ctrl_c_that_another_thread_receives_is_held_too():
    asked, done = threading.Event(), []
    other = threading.Thread(target=asked.wait)  # it was there before, and does not hold the signal back
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt), workers._interrupts_held():  # noqa: PT012
            signal.pthread_kill(other.ident or 0, signal.SIGINT)
            time.sleep(0.05)
            done.append("all that is held together")
        assert done
    finally:
        asked.set()
        other.join()
