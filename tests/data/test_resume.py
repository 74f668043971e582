"""Preparation that is interrupted, damaged or run twice: it resumes, and the result is the same."""

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from made_text import SHARDS, T, contents, npy, prepared, random_texts, write_lines
from slow import quick, slow

from mora_jax.errors import InputError
from train.data.rows import build, layout, shard, workers
from train.data.rows.info import load_info
from train.storage import buckets, lock


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a data set that was prepared without interruption."""
    out = tmp_path_factory.mktemp("whole") / "d"
    prepared(text, out)
    return contents(out)


def interrupted_after(count: int):
    """Returns a `write_shard` that stops the program once `count` shards are written."""
    calls = itertools.count()

    def write_some(job: shard.Job, report) -> None:
        if next(calls) == count:
            raise KeyboardInterrupt
        shard.write_shard(job, report)

    return write_some


def test_a_second_start_writes_only_unfinished_shards(
    text: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "d"
    with monkeypatch.context() as patch:
        patch.setattr(workers, "write_shard", interrupted_after(2))
        with pytest.raises(KeyboardInterrupt):
            prepared(text, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("rows-*")}
    assert len(before) == 2
    done = []
    monkeypatch.setattr(workers, "write_shard", lambda job, _: (done.append(job), shard.write_shard(job, _)))
    prepared(text, out)
    assert len(done) == SHARDS + 1 - 2
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("rows-*")}.items()
    assert contents(out) == whole


def test_a_finished_data_set_is_not_written_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = prepared(text, tmp_path / "d")
    monkeypatch.setattr(workers, "write_shard", None)
    assert prepared(text, tmp_path / "d") == first


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("unfinished/train-00001.npy", npy("(10000000000000,)")),
        ("unfinished/train-00001.npy", b""),
        ("unfinished/train-00001.npy", None),
        ("unfinished/train-00001.json", b'{"rows": "x"}'),
        ("unfinished/train-00001.json", b'{"rows": 7, "file_bytes": -1}'),
        ("unfinished/train-00001.json", b'{"lines": 7}'),
        ("unfinished/train-00001.json", b"[1]"),
        (f"rows-train.array_record-00001-of-0000{SHARDS}", b"cut off"),
        (f"rows-train.array_record-00001-of-0000{SHARDS}", None),
    ],
)
def test_a_damaged_piece_is_written_again(
    text: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes | None,
):
    out, done = tmp_path / "d", []
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_metadata", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepared(text, out)
    (out / name).unlink()
    if content is not None:
        (out / name).write_bytes(content)
    monkeypatch.setattr(workers, "write_shard", lambda job, _: (done.append(job), shard.write_shard(job, _)))
    prepared(text, out)
    assert [job.record.name for job in done] == ["train-00001.json"]
    assert contents(out) == whole


@pytest.mark.parametrize("count", [1, slow(2)])
def test_a_bad_file_keeps_the_finished_shards(text: Path, tmp_path: Path, count: int):
    write_lines(tmp_path / "0.json.gz", random_texts(50, seed=0))
    write_lines(tmp_path / "1.json.gz", random_texts(50, seed=1))
    whole = (tmp_path / "1.json.gz").read_bytes()
    (tmp_path / "1.json.gz").write_bytes(whole[:-20])
    source = str(tmp_path / "*.json.gz")
    with pytest.raises(InputError, match=r"1\.json\.gz is a truncated gzip file"):
        prepared(text, tmp_path / "d", source=source, workers=count)
    assert not list((tmp_path / "d").glob("rows-train*00001-of*"))
    assert not list((tmp_path / "d" / "unfinished").glob("*rows-*"))
    (tmp_path / "1.json.gz").write_bytes(whole)
    for _ in range(2):
        prepared(text, tmp_path / "d", source=source)
    prepared(text, tmp_path / "whole", source=source)
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


@pytest.mark.slow  # the other tests stop a preparation at every step, in one process
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_kill_during_a_shard_leaves_no_partial_row_file(text: Path, tmp_path: Path):
    for index in range(3):
        write_lines(tmp_path / f"train.{index}.json.gz", random_texts(4_000 if index else 50, seed=index))
    out = tmp_path / "d"
    call = (
        "from train.data.rows.build import prepare\n"
        "if __name__ == '__main__':\n"
        f"    prepare({str(tmp_path / 'train.*')!r}, {str(text / 'validation.json.gz')!r}, "
        f"{str(text / 't.model')!r}, {T}, {str(out)!r}, workers=2)\n"
    )
    (tmp_path / "call.py").write_text(call)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, tmp_path / "call.py"], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not list(out.glob("unfinished/*.json")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(children) >= 3  # the workers and the manager of their messages
    while any(Path("/proc", child).exists() for child in children):
        assert time.monotonic() < deadline, "a worker outlives the program"
        time.sleep(0.05)
    assert not (out / "dataset_info.json").exists()
    arguments = {"source": str(tmp_path / "train.*"), "workers": 1}
    assert prepared(text, out, **arguments) == prepared(text, out, **arguments)
    prepared(text, tmp_path / "whole", **arguments)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_kill_while_the_description_is_written(
    text: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """TFDS writes it in place, so a kill or a full disk leaves half a file."""
    out, real = tmp_path / "d", type(epath.Path()).write_text

    def cut_off(self: Any, content: str, *args: Any, **kwargs: Any) -> int:
        if self.name != layout.DESCRIBED:
            return real(self, content, *args, **kwargs)
        real(self, content[: len(content) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path()), "write_text", cut_off)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                prepared(text, out)
    with pytest.raises(InputError, match="is not finished; run the same preparation again"):
        load_info(str(out))
    monkeypatch.setattr(workers, "write_shard", None)  # no shard is written again
    prepared(text, out)
    assert contents(out) == whole


@pytest.mark.parametrize("moves", quick([0, 3, 5], range(6)))  # 5: after all of them
def test_a_kill_while_the_last_files_are_moved(
    text: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
):
    out, real, left = tmp_path / "d", Path.replace, iter(range(moves))

    def replace(self: Path, target: Path) -> Path:
        if self.parent.name == "description" and next(left, None) is None:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        patch.setattr(shutil, "rmtree", stopping_at(out / layout.UNFINISHED))
        with pytest.raises(KeyboardInterrupt):
            prepared(text, out)
    monkeypatch.setattr(workers, "write_shard", None)
    prepared(text, out)
    assert contents(out) == whole


def stopped(*args: Any) -> None:
    raise KeyboardInterrupt


def stopping_at(folder: Path):
    """Returns a `shutil.rmtree` that stops the program before it removes that folder."""
    real = shutil.rmtree

    def rmtree(path: Path, **kwargs: Any) -> None:
        if path == folder:
            raise KeyboardInterrupt
        real(path, **kwargs)

    return rmtree


HOLD = """
import sys, time
from pathlib import Path
from train.storage import lock
with lock.lock_file(Path(sys.argv[1]), "--out", ""):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow  # tests/storage/test_lock.py locks both
@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_second_program_is_refused(text: Path, tmp_path: Path, bucket: str, place: str):
    out = str(tmp_path / "d") if place == "disk" else f"{bucket}/d"
    folder = buckets.stand_in("prepare", out) if place == "bucket" else Path(out)
    words = [sys.executable, "-W", "ignore", "-c", HOLD, folder / layout.UNFINISHED / lock.LOCK]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"{out} is in use by process {other.pid} .* another --out"):
            prepared(text, out)
        assert [entry.name for entry in folder.iterdir()] == [layout.UNFINISHED]
        other.kill()
    prepared(text, out)
    assert not (folder / layout.UNFINISHED).exists()


@pytest.mark.parametrize("where", ["", "tokenizer"])
def test_what_a_kill_left_of_a_small_file_is_removed(
    text: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    out = tmp_path / "d"
    with monkeypatch.context() as patch:
        patch.setattr(workers, "write_shard", interrupted_after(0))
        with pytest.raises(KeyboardInterrupt):
            prepared(text, out)
    (out / where / "tokenizer.model.0123456789abcdef.part").touch()
    prepared(text, out)
    assert contents(out) == whole


@pytest.mark.parametrize(
    ("said", "number"),
    [
        (
            "open() failed: No space left on device; opening /x; Failed to create the file header",
            errno.ENOSPC,
        ),
        ("write() failed: Input/output error; at byte 7", errno.EIO),
        ("something new", errno.EIO),
    ],
)
def test_what_the_writer_of_rows_says_of_the_disk(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, number: int
):
    """It knows no OSError."""

    def fail(*_: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(shard, "ArrayRecordWriter", fail)
    with pytest.raises(OSError, match=rf"{os.strerror(number)}: '.*/unfinished/train-00000\.rows-") as caught:
        prepared(text, tmp_path / "d")
    assert caught.value.errno == number


def test_a_kill_while_the_unfinished_folder_is_removed(
    text: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The next start removes the rest of it, whatever was removed first."""
    left = tmp_path / "left"
    with monkeypatch.context() as patch:
        patch.setattr(build, "_remove_unfinished", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepared(text, left)
    assert len(list((left / "unfinished").iterdir())) > 4
    for count in itertools.count():
        out = Path(shutil.copytree(left, tmp_path / str(count)))
        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, dies_at(count, getattr(os, name)))
            with contextlib.suppress(Killed):
                prepared(text, out)
        finished = not (out / "unfinished").exists()
        prepared(text, out)
        assert contents(out) == whole
        assert not (out / "unfinished").exists()
        if finished:
            return


class Killed(BaseException):
    pass


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def dies_at(count: int, real: Any) -> Any:
    """Returns a function that kills in place of its call number `count`."""
    calls = itertools.count()

    def call(*args: Any, **kwargs: Any) -> None:
        if next(calls) == count:
            raise Killed
        real(*args, **kwargs)

    return call


def test_a_folder_called_unfinished_of_somebody_else_stays(text: Path, tmp_path: Path):
    mine = tmp_path / "d" / layout.UNFINISHED / "thesis.tex"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(InputError, match="is not empty and not a prepared data set"):
        prepared(text, tmp_path / "d")
    assert mine.read_text() == "years of work"
    shutil.move(mine.parent, tmp_path / "aside")
    prepared(text, tmp_path / "d")
    shutil.move(tmp_path / "aside", mine.parent)
    prepared(text, tmp_path / "d")  # it is complete
    assert mine.read_text() == "years of work"


@pytest.mark.parametrize("name", ["settings.json.part", "lock", "train-00000.json.part"])
def test_no_link_leads_outside(text: Path, tmp_path: Path, name: str):
    outside = tmp_path / "outside"
    outside.write_text("years of work")
    aside = tmp_path / "d" / layout.UNFINISHED
    aside.mkdir(parents=True)
    (aside / "lock").touch()
    (aside / name).unlink(missing_ok=True)
    (aside / name).symlink_to(outside)
    with contextlib.suppress(InputError):
        prepared(text, tmp_path / "d")
    assert outside.read_text() == "years of work"


def test_a_link_in_the_place_of_the_unfinished_folder_is_refused(text: Path, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / layout.UNFINISHED).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"unfinished is a link, .* put a folder there"):
        prepared(text, tmp_path / "d")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_another_program_finishes_it_meanwhile(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = lock.lock_file

    def late(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(lock, "lock_file", real)
            prepared(text, tmp_path / "d")
        return real(*args)

    monkeypatch.setattr(lock, "lock_file", late)
    done = []
    monkeypatch.setattr(workers, "write_shard", lambda job, _: (done.append(job), shard.write_shard(job, _)))
    prepared(text, tmp_path / "d")
    assert len(done) == SHARDS + 1
    assert not (tmp_path / "d" / layout.UNFINISHED).exists()


def test_a_finished_data_set_needs_no_lock(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It may lie on a read-only disk."""
    first = prepared(text, tmp_path / "d")
    monkeypatch.setattr(lock, "lock_file", None)
    assert prepared(text, tmp_path / "d") == first


def test_a_disk_without_locks_causes_a_warning(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
):
    def none(*args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", none)
    prepared(text, tmp_path / "d")
    assert f"warning: {tmp_path / 'd'} cannot be locked: No locks available" in capfd.readouterr().err


def test_a_disk_full_at_the_end(text: Path, disk, monkeypatch: pytest.MonkeyPatch):
    out, real = disk.path / "d", build.write_metadata
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_metadata", lambda *args: (disk.fill(), real(*args)))
        with pytest.raises(OSError, match=r"No space left .*unfinished/description"):
            prepared(text, out)
    disk.free()
    monkeypatch.setattr(workers, "write_shard", None)
    prepared(text, out)


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, Any]:
    """Three files of text that can be changed without changing their sizes."""
    for index in range(3):
        write_lines(tmp_path / f"plain.{index}.json", random_texts(60, seed=index))
    return {"source": str(tmp_path / "plain.*.json")}


def change(path: Path) -> None:
    """Changes a file's text to other text of equal size."""
    before = path.read_bytes()
    path.write_bytes(before.replace(b"a", b"e"))
    assert path.read_bytes() != before
    assert path.stat().st_size == len(before)


def test_other_text_of_equal_names_and_sizes_is_refused(text: Path, plain: dict, tmp_path: Path):
    first = prepared(text, tmp_path / "d", **plain)
    before = contents(tmp_path / "d")
    change(tmp_path / "plain.1.json")
    with pytest.raises(InputError, match=r"another train text: plain\.1\.json has other content now; choose"):
        prepared(text, tmp_path / "d", **plain)
    assert contents(tmp_path / "d") == before
    (tmp_path / "d" / layout.TEXT).unlink()  # as earlier versions left it
    assert prepared(text, tmp_path / "d", **plain) == first
    with (tmp_path / "plain.1.json").open("a") as file:
        file.write("\n")
    with pytest.raises(InputError, match=r"another train \(size \d+ of plain\.1\.json, now size \d+ "):
        prepared(text, tmp_path / "d", **plain)


@pytest.mark.parametrize("done", [1, 2, 4], ids=["before", "after", "all"])
def test_shards_of_old_and_new_text_are_never_mixed(
    text: Path, plain: dict, tmp_path: Path, monkeypatch, done: int
):
    """The text changes after a kill, before or after its shard is finished."""
    with monkeypatch.context() as patch:
        patch.setattr(workers, "write_shard", interrupted_after(done))
        patch.setattr(build, "write_metadata", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepared(text, tmp_path / "d", **plain)
    change(tmp_path / "plain.1.json")
    prepared(text, tmp_path / "d", **plain)
    prepared(text, tmp_path / "new", **plain)
    assert contents(tmp_path / "d") == contents(tmp_path / "new")


def test_a_kill_while_a_shard_is_replaced_leaves_no_record_of_it(
    text: Path, plain: dict, tmp_path: Path, monkeypatch
):
    """Its rows are new and its record would be that of the old text, which may come back."""
    old = (tmp_path / "plain.1.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_metadata", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepared(text, tmp_path / "d", **plain)
    change(tmp_path / "plain.1.json")
    with monkeypatch.context() as patch:
        patch.setattr(shard, "write_whole", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepared(text, tmp_path / "d", **plain)
    (tmp_path / "plain.1.json").write_bytes(old)
    prepared(text, tmp_path / "d", **plain)
    prepared(text, tmp_path / "whole", **plain)
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


def test_an_upload_of_other_text_is_not_continued(
    text: Path, plain: dict, tmp_path: Path, bucket: str, monkeypatch
):
    """This machine's copy is lost meanwhile, and the second upload is killed as well."""
    real = buckets.upload

    def first_files(folder: Path, out: str, names: Any, advance: Any) -> None:
        if layout.DESCRIBED in names:
            raise KeyboardInterrupt
        real(folder, out, names, advance)

    with monkeypatch.context() as patch:
        patch.setattr(buckets, "upload", first_files)
        with pytest.raises(KeyboardInterrupt):
            prepared(text, f"{bucket}/d", **plain)
    shutil.rmtree(buckets.stand_in("prepare", f"{bucket}/d"))
    change(tmp_path / "plain.1.json")
    with monkeypatch.context() as patch:
        patch.setattr(buckets, "upload", lambda *args: (real(*args), stopped()))
        with pytest.raises(KeyboardInterrupt):
            prepared(text, f"{bucket}/d", **plain)
    prepared(text, f"{bucket}/d", **plain)
    prepared(text, tmp_path / "new", **plain)
    for name, content in contents(tmp_path / "new").items():
        assert epath.Path(f"{bucket}/d/{name}").read_bytes() == content
