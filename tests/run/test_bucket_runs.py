"""A run whose folder and data lie in a bucket: killed, gone on with on another machine, and used."""

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fake_store
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mora_jax import hf, sharding
from mora_jax.errors import InputError
from train.console import exits
from train.jobs import pretrain as loop
from train.jobs.evaluate import Evaluation
from train.jobs.export import export
from train.jobs.score import score_path
from train.run import manifest
from train.run.checkpoint import Checkpoints, SaveError
from train.run.folder import open_checkpoints
from train.run.inventory import inventory
from train.run.manifest import MANIFEST
from train.run.metrics import read_metrics
from train.run.state import restore_state
from train.storage import buckets

TIMES = ("data_wait", "tokens_per_second")
RUN = "runs/a"


def a_state(seed: int) -> dict[str, jax.Array]:
    return {"m": jax.random.normal(jax.random.key(seed), (4, 5)), "step": jnp.int32(seed)}


def abstract() -> dict[str, jax.ShapeDtypeStruct]:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), a_state(0))


def restored(saved: Checkpoints, step: int) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(saved.restore(step, abstract()))]


def bits(seed: int) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(a_state(seed))]


def test_checkpoints_are_kept_and_removed_as_on_a_disk(bucket: str):
    with Checkpoints(f"{bucket}/c", keep=2, keep_every=3) as saved:
        for step in range(1, 6):
            saved.save(step, a_state(step), {"step": step})
    assert saved.steps() == saved.folders() == [3, 4, 5]
    assert saved.latest_good() == (5, [])
    assert restored(saved, 4) == bits(4)
    assert saved.read_meta(3) == {"step": 3}
    assert not buckets.files(buckets.cache_folder())  # nothing is left behind


@pytest.mark.slow  # test_checkpoint_damage.py finds it on a disk
def test_damage_is_found_and_the_previous_checkpoint_is_used(bucket: str):
    with Checkpoints(f"{bucket}/c") as saved:
        saved.save(1, a_state(1), {})
        saved.save(2, a_state(2), {})
        saved.wait()
        names = sorted(name for name in buckets.objects(f"{bucket}/c/2") if name != MANIFEST)
        for number, name in enumerate(names):
            path = epath.Path(f"{bucket}/c/2/{name}")
            content = path.read_bytes()
            changes = [None, content + b"x", bytes([content[0] ^ 1]) + content[1:] if content else b"y"]
            change = changes[number % 3]
            path.unlink() if change is None else path.write_bytes(change)
            step, problems = saved.latest_good()
            assert step == 1
            assert f"c/2/{name} is" in problems[0]
            with pytest.raises(InputError, match="/2 cannot be restored"):
                saved.restore(2, abstract())
            path.write_bytes(content)
        assert saved.latest_good() == (2, [])
        assert restored(saved, 2) == bits(2)


def test_an_unreachable_store_is_not_damage(bucket: str, monkeypatch: pytest.MonkeyPatch):
    """Else a good checkpoint would be passed over, and removed later on."""
    with Checkpoints(f"{bucket}/c") as saved:
        saved.save(1, a_state(1), {})
        saved.wait()

        def out_of_reach(self, path, mode="rb", **kwargs):
            raise TimeoutError(110, "Connection timed out")

        monkeypatch.setattr(fake_store.FakeStore, "_open", out_of_reach)
        with pytest.raises(OSError, match="Connection timed out"):
            saved.latest_good()
        monkeypatch.setattr(fake_store.FakeStore, "find", out_of_reach)
        with pytest.raises(OSError, match="Connection timed out"):
            manifest.is_sealed(saved.folder(1))


def test_an_export_that_fails_leaves_nothing_on_this_machine(bucket: str, tmp_path, monkeypatch):
    def begin() -> None:
        with hf.whole_folder(f"{bucket}/model") as folder, hf.whole_folder(folder) as inner:
            (inner / "weights").write_text("half of them")
            raise OSError("full")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="full"):
        begin()
    assert set(tmp_path.iterdir()) == before
    assert not buckets.objects(f"{bucket}/model")


def test_a_save_that_was_not_uploaded_is_not_a_checkpoint(bucket: str, monkeypatch: pytest.MonkeyPatch):
    """The manifest is sent last: whatever breaks off, the checkpoint is whole or unfinished."""
    saved = Checkpoints(f"{bucket}/c")
    saved.save(1, a_state(1), {})
    saved.wait()
    real, sent = fake_store.FakeStore.put_file, []

    def breaks_off(self, local, remote, **kwargs):
        if remote.endswith(MANIFEST):
            assert set(sent) == set(buckets.objects(f"{bucket}/c/2")) != set()
            raise ConnectionResetError(104, "Connection reset by peer")
        real(self, local, remote, **kwargs)
        sent.append(remote.partition("/c/2/")[2])

    with monkeypatch.context() as patch:
        patch.setattr(fake_store.FakeStore, "put_file", breaks_off)
        saved.save(2, a_state(2), {})
        with pytest.raises(SaveError, match="Connection reset by peer"):
            saved.wait()
    assert (saved.folders(), saved.steps(), saved.latest_good()[0]) == ([1, 2], [1], 1)
    saved.remove_unfinished()
    assert saved.folders() == [1]
    assert not buckets.files(buckets.cache_folder())
    saved.close()


def test_lines_are_uploaded_before_a_checkpoint_is_sealed(bucket: str):
    sealed = []

    def upload() -> None:
        sealed.append([MANIFEST in buckets.objects(f"{bucket}/c/{step}") for step in (1, 2)])

    with Checkpoints(f"{bucket}/c", before_sealing=upload) as saved:
        saved.save(1, a_state(1), {})
        saved.save(2, a_state(2), {})
    assert sealed == [[False, False], [True, False]]


def test_several_processes_cannot_save_to_s3(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=r"several processes cannot write checkpoints to s3://; use gs://"):
        Checkpoints(f"{bucket}/c")
    Checkpoints("gs://bucket/c")


@pytest.fixture
def config(bucket: str, tiny_run, tiny_data: Path):
    """The tiny run, with its folder and its data in a bucket."""
    for name in buckets.files(tiny_data):
        (epath.Path(f"{bucket}/data/tiny") / name).write_bytes((tiny_data / name).read_bytes())
    data = dataclasses.replace(tiny_run.config.data, directory=f"{bucket}/data/tiny")
    # On a disk: what others have compiled is taken.
    programs = dataclasses.replace(
        tiny_run.config.compilation, cache=str(Path(tiny_run.config.run_dir).parent / "jax_cache")
    )
    return dataclasses.replace(tiny_run.config, run_dir=f"{bucket}/{RUN}", data=data, compilation=programs)


def logged(run_dir: str) -> list[dict]:
    found = read_metrics(f"{run_dir}/metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def final_arrays(config) -> list[np.ndarray]:
    with open_checkpoints(config) as saved:
        state, _ = restore_state(config, saved, config.steps, sharding.make_mesh(1))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_undisturbed(config, tiny_run) -> None:
    on_a_disk = dataclasses.replace(config, run_dir=str(tiny_run.folder))
    assert logged(config.run_dir) == logged(str(tiny_run.folder))
    for ours, theirs in zip(final_arrays(config), final_arrays(on_a_disk), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(buckets.CACHE, str(tmp_path / f"cache {time.monotonic_ns()}"))


@pytest.mark.slow
def test_a_killed_run_resumes_on_another_machine(
    config, tiny_run, tiny_yaml: Path, tmp_path: Path, monkeypatch
):
    words = ["pretrain", str(tiny_yaml), "--run-dir", config.run_dir]
    words += ["--data.directory", config.data.directory, "--compilation.cache", config.compilation.cache]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    program = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(root / "tests/support/fake_store.py"), *words],
        env=environment,
        stderr=subprocess.PIPE,
    )
    until = time.monotonic() + 120
    with open_checkpoints(config) as saved:
        while len(saved.folders()) < 3 and program.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
    program.send_signal(signal.SIGKILL)
    _, said = program.communicate()
    assert program.returncode == -signal.SIGKILL, said[-2000:]
    with open_checkpoints(config) as saved:
        newest = saved.steps()[-1]
        assert newest < config.steps
    losses = {line["step"] for line in logged(config.run_dir) if "loss" in line}
    assert set(range(newest)) <= losses  # none that a checkpoint counts is lost
    another_machine(monkeypatch, tmp_path)
    summary = loop.pretrain(config)
    assert summary["validation_loss"] == tiny_run.summary["validation_loss"]
    assert_undisturbed(config, tiny_run)


def stop_by_signal(config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs until a signal comes, as the ninth batch is asked for."""
    real, asked = loop.next_batch, []

    def interrupted(batches):
        asked.append(0)
        if len(asked) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # for the thread that hears it, before an update that is saved anyway
        return real(batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "next_batch", interrupted)
        with pytest.raises(exits.Preempted):
            loop.pretrain(config)


@pytest.mark.slow  # tests/jobs/test_stop.py resumes one on a disk
def test_a_stopped_run_resumes_on_another_machine(config, tiny_run, tmp_path: Path, monkeypatch):
    stop_by_signal(config, monkeypatch)
    another_machine(monkeypatch, tmp_path)
    loop.pretrain(config)
    assert_undisturbed(config, tiny_run)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_evaluated_exported_and_warm_started_from(
    config, tiny_run, bucket: str, tmp_path: Path, monkeypatch
):
    stop_by_signal(config, monkeypatch)
    another_machine(monkeypatch, tmp_path)
    assert loop.pretrain(config) == loop.pretrain(config)  # the second finds it finished
    assert_undisturbed(config, tiny_run)
    on_a_disk = dataclasses.replace(config, run_dir=str(tiny_run.folder))
    found = {name.partition("/")[0] for name in buckets.objects(config.run_dir)}
    files = {"config.yaml", "loss.png", "metrics.jsonl", "summary.json", "tokenizer"}
    assert found == files | {"checkpoints", "tensorboard"}
    another_machine(monkeypatch, tmp_path)
    entries = inventory(config.run_dir)
    assert [(e.step, e.state) for e in entries] == [(e.step, e.state) for e in inventory(on_a_disk.run_dir)]
    assert all(e.saved and abs(e.saved.timestamp() - time.time()) < 600 for e in entries)
    how = Evaluation(batch_size=4)
    assert score_path(config.run_dir, "", how, "float32") == score_path(on_a_disk.run_dir, "", how, "float32")
    export(on_a_disk.run_dir, str(tmp_path / "export"))
    export(config.run_dir, f"{bucket}/export/a")
    assert set(buckets.objects(f"{bucket}/export/a")) == set(buckets.files(tmp_path / "export"))
    for name in buckets.files(tmp_path / "export"):
        assert (epath.Path(f"{bucket}/export/a") / name).read_bytes() == (
            tmp_path / "export" / name
        ).read_bytes()
    with pytest.raises(InputError, match="export/a exists already"):
        export(config.run_dir, f"{bucket}/export/a")
    score = score_path(f"{bucket}/export/a", config.data.directory, how, "float32")
    assert score == score_path(config.run_dir, "", how, "float32")
    warm = dataclasses.replace(config, run_dir=f"{bucket}/runs/warm", init_from=f"{bucket}/export/a", steps=2)
    loop.pretrain(warm)
    assert logged(warm.run_dir)[0]["loss"] < logged(config.run_dir)[0]["loss"] - 0.3


def test_a_run_that_cannot_resume_is_refused_as_on_a_disk(config, tiny_run):
    for name in buckets.files(tiny_run.folder):
        if not name.startswith("checkpoints/"):
            (epath.Path(config.run_dir) / name).write_bytes((tiny_run.folder / name).read_bytes())
    config = dataclasses.replace(config, data=tiny_run.config.data)
    with pytest.raises(InputError, match="has logged 22 updates, saved every 3, but has no checkpoint"):
        loop.pretrain(config)
    with pytest.raises(InputError, match="already holds a run"):
        loop.pretrain(config, resume=False)
    with pytest.raises(InputError, match="s3://none/run cannot be written to: there is no bucket none"):
        loop.pretrain(dataclasses.replace(config, run_dir="s3://none/run"))
