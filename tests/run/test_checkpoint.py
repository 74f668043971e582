import concurrent.futures
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import damages
import fuzz
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from mora_jax.errors import InputError
from train.run import checkpoint, manifest
from train.run.checkpoint import Checkpoints, SaveError
from train.run.manifest import MANIFEST

ROOT = Path(__file__).parents[2]
RANDOM_DAMAGES = 60  # tests/tools/damages.py does as many as it is told to


@struct.dataclass
class State:
    step: jax.Array
    params: Any
    adapters: Any
    opt_state: Any


def sharding(*spec: str | None) -> NamedSharding:
    return NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec(*spec))


def a_state(seed: int = 0) -> State:
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    params = {
        "layers": {"q_proj": {"kernel": jax.random.normal(next(keys), (2, 8, 12))}},
        "norm": {"scale": jax.random.normal(next(keys), (12,)).astype(jnp.bfloat16)},
        "ids": jax.random.randint(next(keys), (5,), -(2**31), 2**31 - 1),
    }
    chain = optax.chain(optax.scale_by_adam(), optax.identity())
    opt_state = chain.init({"norm": params["norm"]})
    opt_state = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape).astype(a.dtype), opt_state)
    state = State(jnp.int32(seed), params, {}, opt_state)
    state = jax.device_put(state, sharding())
    state.params["layers"]["q_proj"]["kernel"] = jax.device_put(
        params["layers"]["q_proj"]["kernel"], sharding(None, "data")
    )
    return state


def abstract(state: Any, place: NamedSharding | None = None) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place or a.sharding), state)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes()) or bytearray(1)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good checkpoints of steps 1 and 2, to be copied."""
    directory = tmp_path_factory.mktemp("pristine") / "checkpoints"
    with Checkpoints(str(directory)) as saved:
        saved.save(1, a_state(1), {"step": 1})
        saved.save(2, a_state(2), {"step": 2})
    return directory


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "checkpoints")


def assert_refused(directory: Path, name: str) -> None:
    """Step 2 is not loaded, the message names what is wrong, and step 1 is found in its place."""
    with Checkpoints(str(directory)) as saved:
        with pytest.raises(InputError) as caught:
            saved.restore(2, abstract(a_state()))
        assert name in str(caught.value)
        step, problems = saved.latest_good()
        assert step == 1
        assert any(name in problem for problem in problems)


def test_restores_exact_bits_into_other_shardings(directory: Path):
    state = a_state(2)
    with Checkpoints(str(directory)) as saved:
        for place in (None, sharding()):
            restored = saved.restore(2, abstract(state, place))
            assert bits(restored) == bits(state)
            assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert all(leaf.sharding == sharding() for leaf in jax.tree.leaves(restored))
        crosswise = sharding(None, None, "data")
        target = abstract(state).replace(
            params={
                **abstract(state.params),
                "layers": {
                    "q_proj": {"kernel": jax.ShapeDtypeStruct((2, 8, 12), jnp.float32, sharding=crosswise)}
                },
            }
        )
        restored = saved.restore(2, target)
        assert restored.params["layers"]["q_proj"]["kernel"].sharding == crosswise
        assert bits(restored) == bits(state)


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path: Path):
    step = jax.jit(lambda s: jax.tree.map(lambda a: a * 3 + 1, s), donate_argnums=0)
    state = jax.random.normal(jax.random.key(0), (1024, 1024))
    before = bits(state)
    with Checkpoints(str(tmp_path)) as saved:
        saved.save(1, {"w": state}, {})
        state = step(step(state))
        saved.wait()
        assert bits(saved.restore(1, abstract({"w": state}))) == before


def test_meta_comes_back_and_must_be_json(directory: Path):
    meta = {"methods": [["a", {"rank": 8}]], "restarts": 3, "rate": 1e-3, "name": "ü", "none": None}
    with Checkpoints(str(directory)) as saved:
        saved.save(3, a_state(3), meta)
        meta["restarts"] = 4
        saved.wait()
        assert saved.read_meta(3) == meta | {"restarts": 3}
        with pytest.raises(ValueError, match="JSON"):
            saved.save(4, a_state(3), {"loss": float("nan")})
        with pytest.raises(InputError, match="/7 does not exist"):
            saved.read_meta(7)


def test_saving_again_at_once_skips_nothing(tmp_path: Path):
    with Checkpoints(str(tmp_path)) as saved:
        for step in range(4):
            saved.save(step, a_state(step), {"step": step})
    assert saved.steps() == [0, 1, 2, 3]
    assert [saved.read_meta(step)["step"] for step in saved.steps()] == [0, 1, 2, 3]
    assert bits(saved.restore(2, abstract(a_state(2)))) == bits(a_state(2))


def test_keeps_the_newest(tmp_path: Path):
    with Checkpoints(str(tmp_path), keep=2) as saved:
        for step in (1, 5, 9, 10):
            saved.save(step, a_state(step), {})
    assert saved.steps() == [9, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "9"]
    with pytest.raises(InputError, match="at least 1"):
        Checkpoints(str(tmp_path), keep=0)


def test_keeps_every_so_many_for_good(tmp_path: Path):
    with Checkpoints(str(tmp_path), keep=2, keep_every=10) as saved:
        for step in (5, 10, 15, 20, 25, 30, 35):
            saved.save(step, {"w": jnp.arange(step)}, {})
    assert saved.steps() == [10, 20, 30, 35]
    assert [saved.damage(step) for step in saved.steps()] == [[]] * 4


def test_what_was_found_damaged_goes_when_the_run_has_passed_it(directory: Path):
    """It counts for none of those to keep, for it is of no use."""
    with Checkpoints(str(directory), keep=2, keep_every=2) as saved:
        flip_a_bit(directory / "2" / "state" / "_METADATA", random.Random(0))
        assert saved.latest_good()[0] == 1
        saved.save(1, a_state(1), {})
        saved.wait()
        assert saved.steps() == [1, 2]
        saved.save(3, a_state(3), {})
    assert saved.steps() == [1, 3]


def test_a_newer_damaged_one_does_not_push_out_the_one_just_saved(tmp_path: Path):
    with Checkpoints(str(tmp_path), keep=1) as saved:
        saved.save(5, a_state(5), {})
        saved.wait()
        flip_a_bit(tmp_path / "5" / MANIFEST, random.Random(0))
        saved.save(4, a_state(4), {})
        saved.wait()
        assert saved.latest_good()[0] == 4
        saved.save(5, a_state(6), {})  # what was damaged is replaced
    assert saved.latest_good() == (5, [])
    assert bits(saved.restore(5, abstract(a_state()))) == bits(a_state(6))


def test_nothing_is_made_where_nothing_is_saved(tmp_path: Path):
    with Checkpoints(str(tmp_path / "none")) as saved:
        assert saved.steps() == []
        assert saved.latest_good() == (None, [])
    assert not (tmp_path / "none").exists()


def test_reading_leaves_the_save_of_another_process_alone(directory: Path):
    (directory / "3.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(str(directory)) as saved:
        assert saved.latest_good() == (2, [])
    assert (directory / "3.orbax-checkpoint-tmp").exists()


@pytest.mark.parametrize("seed", range(3))
def test_every_flipped_bit_is_found(directory: Path, seed: int):
    for path in files_of(directory / "2"):
        content = path.read_bytes()
        flip_a_bit(path, random.Random(f"{seed} {path.name}"))
        assert_refused(directory, str(path))
        path.write_bytes(content)


def test_every_truncation_and_deletion_is_found(directory: Path):
    for path in files_of(directory / "2"):
        content = path.read_bytes()
        if content:
            path.write_bytes(content[: len(content) // 2])
            assert_refused(directory, str(path))
        path.unlink()
        assert_refused(directory, f"{path} is missing")
        path.write_bytes(content)
    with Checkpoints(str(directory)) as saved:
        assert saved.latest_good() == (2, [])


def test_swapped_files_are_found(directory: Path):
    files = files_of(directory / "2")
    swapped = 0
    for one, other in itertools.pairwise(files):
        contents = one.read_bytes(), other.read_bytes()
        if contents[0] == contents[1]:
            continue
        swapped += 1
        one.write_bytes(contents[1])
        other.write_bytes(contents[0])
        assert_refused(directory, MANIFEST if other.name == MANIFEST else str(one))
        one.write_bytes(contents[0])
        other.write_bytes(contents[1])
    assert swapped > 3


def test_no_random_damage_goes_unnoticed(tmp_path: Path):
    damages.make_pristine(tmp_path / "pristine")
    kinds = set()
    for i in range(RANDOM_DAMAGES):
        kind, wrong = damages.undetected(random.Random(i), tmp_path / "pristine", tmp_path / "work")
        assert not wrong, f"damage {i}, {kind}: {wrong}"
        kinds.add(kind)
    assert len(kinds) > 10


def test_files_of_another_step_are_found(directory: Path):
    (directory / "2" / MANIFEST).write_bytes((directory / "1" / MANIFEST).read_bytes())
    assert_refused(directory, "it holds the checkpoint of step 1")
    shutil.rmtree(directory / "2")
    shutil.copytree(directory / "1", directory / "2")
    assert_refused(directory, "it holds the checkpoint of step 1")


def test_a_file_that_does_not_belong_is_found(directory: Path):
    (directory / "2" / "state" / "extra").write_text("x")
    assert_refused(directory, "state/extra does not belong")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's other reads
def test_files_made_to_harm_are_an_input_error(directory: Path):
    """Sealed as they should be, but orbax's files are changed: no crash may follow, and no other shapes."""
    names = [p.relative_to(directory / "2") for p in files_of(directory / "2") if p.name != MANIFEST]
    refused = 0
    for i in range(24):
        rng, work = random.Random(i), directory.parent / f"made to harm {i}"
        shutil.copytree(directory / "2", work / "2")
        path = work / "2" / names[i % len(names)]
        try:
            content = fuzz.changed(rng, json.loads(path.read_text()), fuzz.as_json)
        except ValueError:
            content = fuzz.change_bytes(rng, path.read_bytes())
        path.write_bytes(content)
        folder = epath.Path(work / "2")
        found = manifest.read(folder, 2)
        manifest.seal(folder, {name: found[name] for name in ("step", "meta", "arrays")})
        wanted = abstract(a_state(), sharding())
        with Checkpoints(str(work)) as saved:
            assert saved.damage(2) == []
            try:
                restored = saved.restore(2, wanted)
            except InputError:
                refused += 1
            else:
                assert abstract(restored) == wanted
    assert refused > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.replace(step=jax.ShapeDtypeStruct((1,), jnp.int32)),
            r"step is int32\[\] and must be int32\[1\]",
        ),
        (
            lambda a: a.replace(step=jax.ShapeDtypeStruct((), jnp.float32)),
            r"step is int32\[\] and must be float32",
        ),
        (
            lambda a: a.replace(adapters={"m": jax.ShapeDtypeStruct((), jnp.float32)}),
            "adapters/m is not there",
        ),
        (lambda a: a.replace(opt_state=()), "opt_state/0/count is .* must be absent"),
    ],
)
def test_another_state_is_refused(directory: Path, change: Any, message: str):
    with Checkpoints(str(directory)) as saved, pytest.raises(InputError, match=message):
        saved.restore(2, change(abstract(a_state())))


def test_a_failed_save_is_told_and_leaves_the_one_before(directory: Path, monkeypatch: pytest.MonkeyPatch):
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


def slow(real: Any, log: list[str], seconds: float = 0.3) -> Any:
    """A seal that takes its time and tells when it begins and ends."""

    def seal(folder: Any, content: Any) -> None:
        log.append(f"begin {content['step']}")
        time.sleep(seconds)
        real(folder, content)
        log.append(f"end {content['step']}")

    return seal


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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


def test_a_failed_save_stops_the_next_one_and_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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


def test_a_failure_is_seen_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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


def test_a_failure_is_told_at_the_latest_when_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
