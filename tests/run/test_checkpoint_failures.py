"""Saves that fail or are killed: the run learns of it, and the checkpoint before stays good."""

import concurrent.futures
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from states import a_state, abstract, bits, sharding

from train.run import checkpoint, manifest
from train.run.checkpoint import Checkpoints, SaveError

ROOT = Path(__file__).parents[2]


def test_a_failed_save_is_reported_and_leaves_the_previous_one(
    directory: Path, monkeypatch: pytest.MonkeyPatch
):
    def full_disk(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saved = Checkpoints(str(directory), keep=1)
    monkeypatch.setattr(manifest, "seal", full_disk)
    saved.save(3, a_state(3), {})
    with pytest.raises(SaveError, match="could not be saved: No space left") as caught:
        saved.wait()
    assert caught.value.filename == str(directory / "3")
    assert saved.steps() == [1, 2]
    monkeypatch.undo()
    saved.save(3, a_state(3), {})
    saved.close()
    assert saved.steps() == [3]


@pytest.mark.parametrize("why", ["the merged index is missing", "it lacks an array"])
def test_a_checkpoint_that_cannot_be_restored_is_not_sealed(
    directory: Path, monkeypatch: pytest.MonkeyPatch, why: str
):
    """Whatever the reason: orbax skipped its merge, or something removed a file meanwhile."""
    state = directory / "3" / "state"

    def before_sealing() -> None:
        (state / "manifest.ocdbt").unlink()
        if why == "it lacks an array":
            shutil.copytree(directory / "other" / "1" / "state", state, dirs_exist_ok=True)

    with Checkpoints(str(directory / "other")) as other:
        other.save(1, {"w": jnp.ones(3)}, {})
    saved = Checkpoints(str(directory), keep=1, before_sealing=before_sealing)
    saved.save(3, a_state(3), {})
    with pytest.raises(SaveError, match=r"could not be saved: .*/3 cannot be restored: .* is missing"):
        saved.close()
    assert saved.steps() == [1, 2]


def slow(real: Any, log: list[str], seconds: float = 0.3) -> Any:
    """A slow seal that records when it starts and ends."""

    def seal(folder: Any, content: Any) -> None:
        log.append(f"begin {content['step']}")
        time.sleep(seconds)
        real(folder, content)
        log.append(f"end {content['step']}")

    return seal


@pytest.mark.slow
def test_a_save_waits_for_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []
    monkeypatch.setattr(manifest, "seal", slow(manifest.seal, log))
    write = ocp.save_async
    monkeypatch.setattr(
        checkpoint.ocp,
        "save_async",
        lambda f, *a, **k: log.append(f"write {f.name}") or write(f, *a, **k),
    )
    with Checkpoints(str(tmp_path)) as saved:
        for step in (1, 2, 3):
            saved.save(step, {"w": jnp.arange(step)}, {})
            assert f"end {step}" not in log  # in the background
    assert log == [f"{what} {step}" for step in (1, 2, 3) for what in ("write", "begin", "end")]
    assert saved.steps() == [1, 2, 3]
    assert [saved.damage(step) for step in (1, 2, 3)] == [[], [], []]


def test_a_failed_save_stops_the_next_one_and_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    saved = Checkpoints(str(tmp_path))
    saved.save(1, {"w": jnp.arange(1)}, {})
    saved.wait()
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "seal", fail)
        saved.save(2, {"w": jnp.arange(2)}, {})
        with pytest.raises(SaveError, match="could not be saved: Input/output error"):
            saved.save(3, {"w": jnp.arange(3)}, {})
    assert saved.steps() == [1]
    assert not (tmp_path / "3").exists()
    saved.save(4, {"w": jnp.arange(4)}, {})
    saved.close()
    assert saved.steps() == [1, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4"]


def test_a_failure_is_detected_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    going_on = threading.Event()

    def fail(*_: Any) -> None:
        going_on.wait(60)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifest, "seal", fail)
    saved = Checkpoints(str(tmp_path))
    saved.save(1, {"w": jnp.arange(1)}, {})
    saved.poll()  # nothing is known yet
    going_on.set()
    concurrent.futures.wait([saved._pending])
    with pytest.raises(SaveError, match="Input/output error"):
        saved.poll()
    saved.close()


def test_a_failure_is_reported_at_the_latest_when_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifest, "seal", fail)
    with pytest.raises(SaveError, match="Input/output error"), Checkpoints(str(tmp_path)) as saved:
        saved.save(1, {"w": jnp.arange(1)}, {})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("a small file system can be mounted by root alone")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_last_good_one(small_disk: Path, caplog: pytest.LogCaptureFixture):
    large = {"w": jax.random.normal(jax.random.key(0), (5, 1024, 256))}  # 5 MB, which do not compress
    saved = Checkpoints(str(small_disk), keep=1)
    saved.save(1, large, {})
    saved.wait()
    saved.save(2, large, {})
    with pytest.raises(SaveError, match="could not be saved: No space left on device") as caught:
        saved.wait()
    assert caught.value.errno == errno.ENOSPC
    assert not [record for record in caplog.records if record.exc_info]
    saved.close()
    with Checkpoints(str(small_disk), keep=1) as again:
        assert again.latest_good() == (1, [])
        assert bits(again.restore(1, abstract(large, sharding()))) == bits(large)
        again.remove_unfinished()
        assert [path.name for path in small_disk.iterdir()] == ["1"]
        again.save(2, {"w": jnp.arange(2)}, {})
    assert again.steps() == [2]


DIES = """
import os, signal, jax, jax.numpy as jnp
from train.run import checkpoint, manifest
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
saved = checkpoint.Checkpoints({directory!r}, keep=1)
saved.save(1, {{"w": jnp.arange(5)}}, {{}})
saved.wait()
{before}
saved.save(2, {{"w": jax.random.normal(jax.random.key(0), (4096, 2048))}}, {{}})
{after}
"""


@pytest.mark.slow  # test_base.py stops saves in this process
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "while len(os.listdir({directory!r})) < 2: pass\ndie()"),
        ("manifest.seal = die", "saved.wait()"),
    ],
    ids=["while writing", "before the manifest"],
)
def test_a_save_that_was_killed_is_ignored_and_removed(tmp_path: Path, before: str, after: str):
    script = DIES.format(directory=str(tmp_path), before=before, after=after.format(directory=str(tmp_path)))
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    child = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, check=False)
    assert child.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] != ["1"]
    with Checkpoints(str(tmp_path), keep=1) as saved:
        assert saved.steps() == [1]
        assert saved.latest_good()[0] == 1
        target = {"w": jax.ShapeDtypeStruct((5,), jnp.int32, sharding=sharding())}
        np.testing.assert_array_equal(saved.restore(1, target)["w"], np.arange(5))
        saved.save(3, {"w": jnp.arange(6)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
