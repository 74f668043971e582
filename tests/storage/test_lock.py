"""One run at a time in a folder, whatever became of the one before."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from etils import epath

from mora_jax.errors import InputError
from train.storage import lock

HOLD = """
import sys, time
from train.storage import lock
with lock.lock_run(sys.argv[1]):
    print("held", flush=True)
    if len(sys.argv) > 2:  # a child that outlives this program
        import os
        if os.fork() == 0:
            time.sleep(float(sys.argv[2]))
            os._exit(0)
    time.sleep(60)
"""


def holder(folder, *more: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLD, str(folder), *more], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def enter(folder) -> None:
    with lock.lock_run(str(folder)):
        pass


@pytest.mark.parametrize("child", [(), ("20",)], ids=["alone", "with a child that outlives it"])
def test_a_folder_is_locked_until_the_program_is_killed(tmp_path, child):
    with holder(tmp_path, *child) as process:
        with pytest.raises(InputError, match=rf"is in use by process {process.pid} on "):
            enter(tmp_path)
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
    with lock.lock_run(str(tmp_path)):
        assert f"process {os.getpid()}" in (tmp_path / lock.LOCK).read_text()
    enter(tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / lock.LOCK).mkdir()
    with pytest.raises(InputError, match="cannot be written to: Is a directory"):
        enter(tmp_path)


def test_a_full_disk_is_not_bad_input(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock, "open_own", full)
    with pytest.raises(OSError, match="No space left") as error:
        enter(tmp_path)
    assert error.value.filename == str(tmp_path / lock.LOCK)


def test_a_run_in_a_bucket_is_locked_on_this_machine(bucket, capfd):
    run = f"{bucket}/runs/a"
    with lock.lock_run(run):
        assert f"process {os.getpid()} on " in (epath.Path(run) / lock.LOCK).read_text()
        assert (lock.local_folder(run) / lock.LOCK).exists()
    assert not (epath.Path(run) / lock.LOCK).exists()
    with holder(lock.local_folder(run)) as process:
        with pytest.raises(InputError, match=rf"{run} is in use by process {process.pid} on "):
            enter(run)
        process.kill()
    enter(run)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("host", ["another-host", socket.gethostname()])
def test_a_note_in_the_bucket_names_another_machine(bucket, capfd, host):
    run = f"{bucket}/run"
    (epath.Path(run) / lock.LOCK).write_text(f"process 7 on {host}")
    enter(run)
    printed = capfd.readouterr().err
    assert ("process 7 on another-host did not release" in printed) == (host == "another-host")
    assert "warning" in printed or host == socket.gethostname()


def test_the_text_of_a_note_is_escaped(bucket, capfd):
    (epath.Path(f"{bucket}/run") / lock.LOCK).write_text("process 7 on \x1b[31m\nmora: fine")
    enter(f"{bucket}/run")
    (line,) = capfd.readouterr().err.splitlines()
    assert r"process 7 on \x1b[31m\nmora: fine" in line


def test_the_note_of_a_program_that_started_meanwhile_stays(bucket):
    note = epath.Path(f"{bucket}/run") / lock.LOCK
    with lock.lock_run(f"{bucket}/run"):
        note.write_text("process 7 on another-host")
    assert note.read_text() == "process 7 on another-host"


def test_a_missing_bucket(bucket):
    with pytest.raises(InputError, match="s3://none/run cannot be written to: there is no bucket none"):
        enter("s3://none/run")
