"""The base that checkpoints share: saved once, verified with each of them, and removed after the last."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from slow import quick
from states import abstract, bits, files_of
from tiny_runs import Interrupted, arrays, stop_after, without_times

from mora_jax import sharding, trees
from mora_jax.errors import InputError
from mora_jax.methods import LoRA
from train.config.sections import Checkpoint, Evaluation, Params, Restart, Schedule
from train.data.rows.info import load_info
from train.jobs import pretrain as loop
from train.jobs.score import score_path
from train.run import array_folders, base, manifest
from train.run.checkpoint import Checkpoints, SaveError
from train.run.folder import open_checkpoints
from train.run.inventory import inventory
from train.run.manifest import MANIFEST
from train.run.meta import build_meta
from train.run.model import load_initial, load_model
from train.run.state import (
    abstract_state,
    assign_methods,
    fresh_state,
    methods_at,
    named_base,
    restore_model,
    restore_state,
)


def a_part(seed: int) -> dict[str, Any]:
    return {"m": jax.random.normal(jax.random.key(seed), (4, 5)), "step": jnp.int32(seed)}


def a_base(seed: int) -> dict[str, Any]:
    return {"params": {"kernel": jax.random.normal(jax.random.key(seed), (300, 200), jnp.bfloat16)}}


def restored(saved: Checkpoints, step: int) -> list[bytes]:
    return bits((saved.restore(step, abstract(a_part(0))), saved.restore_base(step, abstract(a_base(0)))))


def save(saved: Checkpoints, step: int, restarts: int) -> None:
    saved.save(step, a_part(step), {}, a_base(restarts), restarts)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_base_is_saved_once_for_all_checkpoints_that_share_it(tmp_path: Path):
    with Checkpoints(str(tmp_path)) as saved:
        for step, restarts in ((1, 0), (2, 0), (3, 1)):
            save(saved, step, restarts)
        saved.wait()
        assert names(tmp_path) == ["1", "2", "3", "base-0", "base-1"]
        for step, restarts in ((1, 0), (2, 0), (3, 1)):
            assert restored(saved, step) == bits((a_part(step), a_base(restarts)))
    assert all(sum(f.stat().st_size for f in files_of(tmp_path / n)) < 50_000 for n in "123")
    with Checkpoints(str(tmp_path)) as saved:
        before = (tmp_path / "base-0" / MANIFEST).read_text()
        restored(saved, 2)
        save(saved, 4, 0)
        saved.wait()
        assert (tmp_path / "base-0" / MANIFEST).read_text() == before
        assert restored(saved, 4) == bits((a_part(4), a_base(0)))


def test_a_base_is_removed_with_the_last_checkpoint_that_needs_it(tmp_path: Path):
    """But for the one before, to which a damaged base leads back."""
    seen = []
    with Checkpoints(str(tmp_path), keep=2, keep_every=6) as saved:
        for step, restarts in ((1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 2), (7, 3), (8, 3), (9, 3)):
            save(saved, step, restarts)
            saved.wait()
            seen.append(" ".join(names(tmp_path)))
    assert seen[3:6] == ["2 3 4 base-0 base-1", "2 4 5 base-0 base-1", "5 6 base-1 base-2"]
    assert seen[-1] == "6 8 9 base-2 base-3"
    with Checkpoints(str(tmp_path), keep=1) as saved:
        save(saved, 10, 4)
    assert names(tmp_path) == ["10", "base-4"]


def test_the_base_before_is_used_if_the_newest_is_damaged(tmp_path: Path):
    with Checkpoints(str(tmp_path), keep=2) as saved:
        for step, restarts in ((1, 0), (2, 1), (3, 1)):
            save(saved, step, restarts)
    flip_a_bit(max(files_of(tmp_path / "base-1"), key=lambda path: path.stat().st_size))
    with Checkpoints(str(tmp_path), keep=2) as saved:
        step, problems = saved.latest_good()
        assert step == 1
        assert len(problems) == 1  # which both share
        assert all("base-1/" in line and "is damaged" in line for line in problems)
        with pytest.raises(InputError, match=r"/base-1 cannot be restored: .* is damaged"):
            saved.restore_base(3, abstract(a_base(0)))
        assert restored(saved, 1) == bits((a_part(1), a_base(0)))
        for step in (2, 3):  # trained again
            save(saved, step, 1)
        saved.wait()
        assert saved.latest_good() == (3, [])
        assert restored(saved, 3) == bits((a_part(3), a_base(1)))


def test_a_base_is_exactly_that_of_the_checkpoint(tmp_path: Path):
    """Sealed under the same name, and another one: of a run that was trained again, or of a copy by hand."""
    for folder, seed in (("here", 0), ("there", 7)):
        with Checkpoints(str(tmp_path / folder)) as saved:
            saved.save(1, a_part(1), {}, a_base(seed), 0)
    shutil.rmtree(tmp_path / "here/base-0")
    shutil.copytree(tmp_path / "there/base-0", tmp_path / "here/base-0")
    with Checkpoints(str(tmp_path / "here")) as saved:
        (line,) = saved.damage(1)
        assert line.endswith(f"base-0 is not the base that {tmp_path}/here/1 was saved with")
        assert saved.latest_good() == (None, [line])
        with pytest.raises(InputError, match="base-0 is not the base that"):
            saved.restore_base(1, abstract(a_base(0)))


@pytest.mark.parametrize("gone", ["1", "base-0"])
def test_a_checkpoint_that_a_run_removes_while_it_is_verified(tmp_path: Path, monkeypatch, gone: str):
    """Its files were good. It has no manifest, or its base has none, by the time that this is read."""
    with Checkpoints(str(tmp_path)) as saved:
        save(saved, 1, 0)
        saved.wait()
        real = array_folders.ArrayFolders.damage

        def damage(self: Any, name: str, *args: Any) -> list[str]:
            found = real(self, name, *args)
            if name == gone:
                shutil.rmtree(tmp_path / gone)
            return found

        monkeypatch.setattr(array_folders.ArrayFolders, "damage", damage)
        (line,) = saved.damage(1)
        assert line == f"{tmp_path / gone} does not exist"


@pytest.mark.parametrize(
    "at", quick(["after"], ["before the base is sealed", "after", "the checkpoint is sealed"])
)
def test_a_kill_at_any_seal_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str):
    with Checkpoints(str(tmp_path), keep=2) as saved:
        save(saved, 1, 0)
    real, sealing = manifest.seal, []

    def seal(folder: Any, content: Any) -> str:
        sealing.append(folder.name)
        if (at, folder.name) == ("before the base is sealed", "base-1"):
            raise Interrupted
        if (at, folder.name) == ("after", "2"):
            raise Interrupted
        return real(folder, content)

    monkeypatch.setattr(array_folders.manifest, "seal", seal)
    saved = Checkpoints(str(tmp_path), keep=2)
    restored(saved, 1)
    save(saved, 2, 1)
    if at == "the checkpoint is sealed":
        saved.close()
    else:
        with pytest.raises(SaveError):
            saved.close()
    assert sealing == ["base-1", *(["2"] if at != "before the base is sealed" else [])]
    monkeypatch.undo()
    with Checkpoints(str(tmp_path), keep=2) as saved:
        last = 2 if at == "the checkpoint is sealed" else 1
        assert saved.latest_good()[0] == last
        assert restored(saved, last) == bits((a_part(last), a_base(last - 1)))
        saved.remove_unfinished()
        if last == 1:
            save(saved, 2, 1)
        save(saved, 3, 1)
        saved.wait()
        assert names(tmp_path) == ["1", "2", "3", "base-0", "base-1"]
        assert restored(saved, 3) == bits((a_part(3), a_base(1)))


@pytest.mark.parametrize(
    "plain",
    [
        *({}, [], {"files": {"a": 1}}, {"files": []}, {"files": {}, "x": 1}, {"restarts": 1, "sha256": 2}),
        *({"restarts": wrong, "sha256": ""} for wrong in (-1, True, "0/../../x")),
    ],
)
def test_a_reference_that_no_run_has_written_is_damage(tmp_path: Path, plain: Any):
    with Checkpoints(str(tmp_path)) as saved:
        save(saved, 1, 0)
        saved.wait()
        path = saved.folder(1) / MANIFEST
        path.write_text(manifest.render(manifest.read(saved.folder(1), 1) | {"base": plain}))
        assert saved.latest_good() == (None, [f"{path} is damaged: its content is not what was saved"])


# Runs


def test_checkpoints_of_a_run_hold_what_is_trained(tiny_run):
    """Its base changes at each restart, and its last checkpoints have ten behind them."""
    config = tiny_run.config
    state = abstract_state(config, methods_at(config, 22), sharding.make_mesh(1))
    with open_checkpoints(dataclasses.replace(config, run_dir=str(tiny_run.folder))) as saved:
        there = manifest.read(saved.folder(22), 22)["arrays"]
        kept = saved.base_of(22)
        assert isinstance(kept, base.Kept)
        shared = manifest.read(saved.base_folder(kept), 10)["arrays"]
        assert {str(saved.base_of(step)) for step in saved.steps()} == {
            f"base-{config.restarts_before(step)}" for step in saved.steps()
        }
    assert len(there) + len(shared) == len(jax.tree.leaves(state))
    assert all(name.startswith("params/layers/") and name.endswith("_proj/kernel") for name in shared)


@pytest.fixture
def tuned(tiny_run, hf_model, tmp_path: Path):
    """The config of a warm start from a Hugging Face folder, with a bfloat16 base and no restarts."""
    shutil.copytree(hf_model, tmp_path / "model")
    return dataclasses.replace(
        tiny_run.config,
        steps=6,
        init_from=str(tmp_path / "model"),
        base_dtype="bfloat16",
        method=LoRA(4),
        params=Params(train=".*norm/scale"),
        restart=Restart(),
        schedule=Schedule(warmup=1),
        checkpoint=Checkpoint(every=2, keep=2),
        eval=Evaluation(every=0, batch_size=4, max_batches=1),
        run_dir=str(tmp_path / "run"),
    )


@pytest.mark.slow
def test_a_base_that_init_from_names_is_read_from_there(tuned, tmp_path):
    mesh, methods = sharding.make_mesh(1), assign_methods(tuned)
    info = load_info(tuned.data.directory)
    state = fresh_state(tuned, methods, mesh, load_initial(tuned, info, mesh))
    named = named_base(tuned, methods)
    assert named
    with open_checkpoints(tuned) as saved:
        rest, shared = base.split(state, methods)
        saved.refer_to(named)
        saved.save(0, rest, build_meta(tuned, methods, info, 0), shared, 0)
        saved.wait()
        assert names(tmp_path / "run/checkpoints") == ["0"]
        again, _ = restore_state(tuned, saved, 0, sharding.make_mesh(1, 2))
        assert bits(again) == bits(state)
        assert jax.tree.structure(again) == jax.tree.structure(state)
        light, _ = restore_model(tuned, saved, 0, mesh, with_base=False)
        assert (light.opt_state, light.spikes) == (None, None)
        assert bits((light.adapters, base.split(light, methods)[0].params)) == bits(
            (state.adapters, rest.params)
        )
        kernels = trees.flatten(base.split(light, methods)[1])
        assert {type(kernel) for kernel in kernels.values()} == {jax.ShapeDtypeStruct}
        flip_a_bit(tmp_path / "model/model.safetensors")
        with pytest.raises(
            InputError, match=r"model\.safetensors in .*/model is not what the run started from"
        ):
            restore_state(tuned, saved, 0, mesh)
        with pytest.raises(InputError, match="is not what the run started from"):
            restore_model(tuned, saved, 0, mesh, with_base=False)


@pytest.mark.parametrize("kind", quick(["run"], ["full", "run"]))
def test_what_is_whole_or_may_change_is_not_named(tuned, tiny_run, kind):
    change = (
        {"init_from": str(tiny_run.folder)} if kind == "run" else {"method": "full", "base_dtype": "float32"}
    )
    config = dataclasses.replace(tuned, **change)
    assert named_base(config, assign_methods(config)) is None


@pytest.mark.slow
def test_a_warm_start_names_its_base_and_finds_it_again(tuned, tmp_path, monkeypatch, capsys):
    folder = Path(tuned.run_dir)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            loop.pretrain(tuned)
    assert names(folder / "checkpoints") == ["0", "2"]
    assert [(e.base, e.state) for e in inventory(str(folder))] == [("init_from", "good")] * 2
    weights = tmp_path / "model/model.safetensors"
    good = weights.read_bytes()
    flip_a_bit(weights)
    words = "needs the model it started from: model.safetensors in .*/model is not what the run started from"
    with pytest.raises(InputError, match=f"{words}; restore it, or, if it was moved, correct init_from in"):
        loop.pretrain(tuned)
    assert [e.state for e in inventory(str(folder))] == ["damaged"] * 2
    weights.write_bytes(good)
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"holds neither model\.safetensors nor|does not exist"):
        loop.pretrain(tuned)
    config_file = folder / "config.yaml"
    config_file.write_text(config_file.read_text().replace(tuned.init_from, str(tmp_path / "moved")))
    moved = dataclasses.replace(tuned, init_from=str(tmp_path / "moved"))
    loop.pretrain(moved)
    whole = dataclasses.replace(moved, run_dir=str(tmp_path / "whole"))
    summary = loop.pretrain(whole)
    score = score_path(whole.run_dir, "", whole.eval, "float32")
    assert score.loss == pytest.approx(summary["validation_loss"], rel=1e-6)
    merged, _ = load_model(whole.run_dir)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(merged))
    for ours, theirs in zip(arrays(moved, folder, 6), arrays(whole, tmp_path / "whole", 6), strict=True):
        assert (ours.dtype, ours.tobytes()) == (theirs.dtype, theirs.tobytes())
    assert without_times(folder) == without_times(tmp_path / "whole")
    assert not any(name.startswith("base") for name in names(folder / "checkpoints"))
