"""Checkpoints: what is saved is restored bit for bit, and which ones are kept."""

import random
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from states import a_state, abstract, bits, flip_a_bit, sharding

from mora_jax.errors import InputError
from train.run.checkpoint import Checkpoints
from train.run.manifest import MANIFEST


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


@pytest.mark.parametrize("name", ["br[1]", "a*b?", "[!x]", "a/../b", "100% #1 {x} $HOME"])
def test_the_name_of_a_folder_is_no_pattern(tmp_path: Path, name: str):
    state = a_state(1)
    with Checkpoints(str(tmp_path / name / "run" / "checkpoints")) as saved:
        saved.save(1, state, {})
        saved.wait()
        assert saved.latest_good() == (1, [])
        assert bits(saved.restore(1, abstract(state))) == bits(state)


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path: Path):
    step = jax.jit(lambda s: jax.tree.map(lambda a: a * 3 + 1, s), donate_argnums=0)
    state = jax.random.normal(jax.random.key(0), (1024, 1024))
    before = bits(state)
    with Checkpoints(str(tmp_path)) as saved:
        saved.save(1, {"w": state}, {})
        state = step(step(state))
        saved.wait()
        assert bits(saved.restore(1, abstract({"w": state}))) == before


def test_meta_is_restored_and_must_be_json(directory: Path):
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


@pytest.mark.slow  # test_base.py keeps them with their bases
def test_keeps_multiples_of_keep_every_for_good(tmp_path: Path):
    with Checkpoints(str(tmp_path), keep=2, keep_every=10) as saved:
        for step in (5, 10, 15, 20, 25, 30, 35):
            saved.save(step, {"w": jnp.arange(step)}, {})
    assert saved.steps() == [10, 20, 30, 35]
    assert [saved.damage(step) for step in saved.steps()] == [[]] * 4


def test_a_damaged_checkpoint_is_removed_once_the_run_has_passed_it(directory: Path):
    """It counts for none of those to keep, for it is of no use."""
    with Checkpoints(str(directory), keep=2, keep_every=2) as saved:
        flip_a_bit(directory / "2" / "state" / "_METADATA", random.Random(0))
        assert saved.latest_good()[0] == 1
        saved.save(1, a_state(1), {})
        saved.wait()
        assert saved.steps() == [1, 2]
        saved.save(3, a_state(3), {})
    assert saved.steps() == [1, 3]


def test_a_newer_damaged_checkpoint_does_not_replace_the_one_just_saved(tmp_path: Path):
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


def test_no_folder_is_made_before_a_save(tmp_path: Path):
    with Checkpoints(str(tmp_path / "none")) as saved:
        assert saved.steps() == []
        assert saved.latest_good() == (None, [])
    assert not (tmp_path / "none").exists()


def test_reading_leaves_the_save_of_another_process_alone(directory: Path):
    (directory / "3.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(str(directory)) as saved:
        assert saved.latest_good() == (2, [])
    assert (directory / "3.orbax-checkpoint-tmp").exists()


def test_a_part_is_restored_and_all_is_verified(tmp_path: Path):
    with Checkpoints(str(tmp_path)) as saved:
        saved.save(1, a_state(1), {})
        saved.wait()
        part = {"params": abstract(a_state(1)).params}
        assert bits(saved.restore(1, part, partial=True)) == bits({"params": a_state(1).params})
        with pytest.raises(InputError, match="and must be absent"):
            saved.restore(1, part)
        with pytest.raises(InputError, match="is missing and must be"):
            saved.restore(1, part | {"more": jax.ShapeDtypeStruct((3,), jnp.float32)}, partial=True)
        flip_a_bit(
            next(file for file in sorted((tmp_path / "1").rglob("*")) if file.is_file()), random.Random(0)
        )
        with pytest.raises(InputError, match="cannot be restored"):
            saved.restore(1, part, partial=True)
