"""Every damage to a checkpoint is found."""

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import changes
import checkpoint_damages
import jax
import jax.numpy as jnp
import pytest
from etils import epath
from slow import slow
from states import a_state, abstract, files_of, flip_a_bit, sharding

from mora_jax.errors import InputError
from train.run import manifest
from train.run.checkpoint import Checkpoints
from train.run.manifest import MANIFEST

RANDOM_DAMAGES = 60  # tests/tools/damages.py does more


def assert_refused(directory: Path, name: str) -> None:
    """Step 2 is not loaded, the message names what is wrong, and step 1 is found in its place."""
    with Checkpoints(str(directory)) as saved:
        with pytest.raises(InputError) as caught:
            saved.restore(2, abstract(a_state()))
        assert name in str(caught.value)
        step, problems = saved.latest_good()
        assert step == 1
        assert any(name in problem for problem in problems)


@pytest.mark.parametrize("seed", [0, *(slow(n) for n in (1, 2))])
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


@pytest.mark.slow  # the other tests have most of its kinds
def test_every_random_damage_is_found(tmp_path: Path):
    checkpoint_damages.make_pristine(tmp_path / "pristine")
    kinds = set()
    for i in range(RANDOM_DAMAGES):
        kind, wrong = checkpoint_damages.undetected(
            random.Random(i), tmp_path / "pristine", tmp_path / "work"
        )
        assert not wrong, f"damage {i}, {kind}: {wrong}"
        kinds.add(kind)
    assert len(kinds) > 10


def test_files_of_another_step_are_found(directory: Path):
    (directory / "2" / MANIFEST).write_bytes((directory / "1" / MANIFEST).read_bytes())
    assert_refused(directory, "it holds what was saved as 1, not 2")
    shutil.rmtree(directory / "2")
    shutil.copytree(directory / "1", directory / "2")
    assert_refused(directory, "it holds what was saved as 1, not 2")


def test_a_file_that_does_not_belong_is_found(directory: Path):
    (directory / "2" / "state" / "extra").write_text("x")
    assert_refused(directory, "state/extra does not belong")


@pytest.mark.slow
def test_files_made_to_harm_are_an_input_error(directory: Path):
    """Sealed as they should be, but orbax's files are changed: no crash may follow, and no other shapes."""
    names = [p.relative_to(directory / "2") for p in files_of(directory / "2") if p.name != MANIFEST]
    refused = 0
    for i in range(24):
        rng, work = random.Random(i), directory.parent / f"made to harm {i}"
        shutil.copytree(directory / "2", work / "2")
        path = work / "2" / names[i % len(names)]
        try:
            content = changes.changed(rng, json.loads(path.read_text()), changes.as_json)
        except ValueError:
            content = changes.change_bytes(rng, path.read_bytes())
        path.write_bytes(content)
        folder = epath.Path(work / "2")
        found = manifest.read(folder, 2)
        manifest.seal(folder, {name: found[name] for name in ("step", "meta", "arrays")})
        wanted = abstract(a_state(), sharding())
        with Checkpoints(str(work)) as saved:
            damage = saved.damage(2)  # only of the index of arrays, since the seal is right
            try:
                restored = saved.restore(2, wanted)
            except InputError:
                refused += 1
            else:
                assert abstract(restored) == wanted
                assert damage == []
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
            "adapters/m is missing",
        ),
        (lambda a: a.replace(opt_state=()), "opt_state/0/count is .* must be absent"),
    ],
)
def test_another_state_is_refused(directory: Path, change: Any, message: str):
    with Checkpoints(str(directory)) as saved, pytest.raises(InputError, match=message):
        saved.restore(2, change(abstract(a_state())))
