"""The ways in which a disk, a copy or a careless hand may damage a checkpoint.

Each function damages a checkpoint of a folder at random, or its base, and returns the steps that are
damaged.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from mora_jax.errors import InputError
from train.run import manifest
from train.run.checkpoint import Checkpoints
from train.run.manifest import MANIFEST

STEPS = (1, 2)
Steps = set[int]


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def pick(rng: random.Random, folder: Path, empty: bool = True) -> Path:
    return rng.choice([path for path in files_of(folder) if empty or path.stat().st_size])


def place_of(rng: random.Random, directory: Path, step: int) -> Path:
    """Returns the folder of a checkpoint, or of its base."""
    return directory / rng.choice((str(step), f"base-{step}"))


def flip_bits(rng: random.Random, directory: Path, step: int) -> Steps:
    path = pick(rng, place_of(rng, directory, step), empty=False)
    content = bytearray(path.read_bytes())
    for place in rng.sample(range(len(content)), min(rng.choice((1, 1, 1, 2, 8)), len(content))):
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return {step}


def truncate(rng: random.Random, directory: Path, step: int) -> Steps:
    path = pick(rng, place_of(rng, directory, step), empty=False)
    os.truncate(path, rng.randrange(path.stat().st_size))
    return {step}


def extend(rng: random.Random, directory: Path, step: int) -> Steps:
    with pick(rng, place_of(rng, directory, step)).open("ab") as file:
        file.write(rng.choice((b"\0", b"\n", rng.randbytes(rng.randint(1, 5000)))))
    return {step}


def overwrite(rng: random.Random, directory: Path, step: int) -> Steps:
    """Overwrites a block with zeros or noise, as a lost write does."""
    path = pick(rng, place_of(rng, directory, step), empty=False)
    before = path.read_bytes()
    start = rng.randrange(len(before))
    length = rng.randint(1, min(4096, len(before) - start))
    block = bytes(length) if rng.random() < 0.5 else rng.randbytes(length)
    if before[start : start + length] == block:
        block = bytes(b ^ 255 for b in block)
    path.write_bytes(before[:start] + block + before[start + length :])
    return {step}


def delete(rng: random.Random, directory: Path, step: int) -> Steps:
    pick(rng, place_of(rng, directory, step)).unlink()
    return {step}


def delete_folder(rng: random.Random, directory: Path, step: int) -> Steps:
    folders = [path for path in place_of(rng, directory, step).rglob("*") if path.is_dir()]
    shutil.rmtree(rng.choice([f for f in folders if files_of(f)]))
    return {step}


def add(rng: random.Random, directory: Path, step: int) -> Steps:
    folder = pick(rng, place_of(rng, directory, step)).parent
    (folder / f"new{rng.randrange(100)}").write_bytes(rng.randbytes(rng.randrange(20)))
    return {step}


def add_copy(rng: random.Random, directory: Path, step: int) -> Steps:
    path = pick(rng, place_of(rng, directory, step))
    shutil.copy(path, path.with_name(f"{path.name}{rng.choice(('~', '.bak', ' (1)'))}"))
    return {step}


def rename(rng: random.Random, directory: Path, step: int) -> Steps:
    path = pick(rng, place_of(rng, directory, step))
    path.rename(path.with_name(f"{path.name}x"))
    return {step}


def swap(rng: random.Random, directory: Path, step: int) -> Steps:
    """Swaps two files of one checkpoint."""
    folder = place_of(rng, directory, step)
    return _swap(rng, folder, folder) and {step}


def swap_across(rng: random.Random, directory: Path, step: int) -> Steps:
    """Swaps a file of one checkpoint with one of the other, often of the same name."""
    name = rng.choice(("", "base-"))
    return _swap(rng, *(directory / f"{name}{s}" for s in STEPS)) and set(STEPS)


def _swap(rng: random.Random, folder: Path, other: Path) -> bool:
    while True:
        one = pick(rng, folder)
        namesake = other / one.relative_to(folder)
        two = namesake if namesake.exists() and rng.random() < 0.5 else pick(rng, other)
        contents = one.read_bytes(), two.read_bytes()
        if contents[0] != contents[1]:
            one.write_bytes(contents[1])
            two.write_bytes(contents[0])
            return True


def take_another(rng: random.Random, directory: Path, step: int) -> Steps:
    """Replaces a file by that of the same name in the other checkpoint."""
    name = rng.choice(("", "base-"))
    here, there = (directory / f"{name}{s}" for s in (step, 3 - step))
    shared = [p.relative_to(here) for p in files_of(here) if (there / p.relative_to(here)).exists()]
    different = [p for p in shared if (here / p).read_bytes() != (there / p).read_bytes()]
    name = rng.choice(different)
    shutil.copy(there / name, here / name)
    return {step}


def copy_whole(rng: random.Random, directory: Path, step: int) -> Steps:
    """Replaces the checkpoint by the other one."""
    name = rng.choice(("", "base-"))
    shutil.rmtree(directory / f"{name}{step}")
    shutil.copytree(directory / f"{name}{3 - step}", directory / f"{name}{step}")
    return {step}


def swap_whole(rng: random.Random, directory: Path, step: int) -> Steps:
    kind = rng.choice(("", "base-"))
    one, other, aside = (directory / name for name in (f"{kind}1", f"{kind}2", "aside"))
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return set(STEPS)


def link(rng: random.Random, directory: Path, step: int) -> Steps:
    """Replaces a file by a link to it: the target may change without notice."""
    path = pick(rng, place_of(rng, directory, step))
    elsewhere = directory.parent / f"elsewhere-{step}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    return {step}


def edit_manifest(rng: random.Random, directory: Path, step: int) -> Steps:
    """Changes a value, a name or an entry of the manifest, but not the manifest's hash of itself."""
    path = place_of(rng, directory, step) / MANIFEST
    content = json.loads(path.read_text())
    part = content[rng.choice([name for name in ("files", "arrays", "meta", "base") if content.get(name)])]
    name = rng.choice(sorted(part))
    change = rng.randrange(4)
    if change == 0:
        del part[name]
    elif change == 1:
        part[f"{name}x"] = part.pop(name)
    elif change == 2:
        part[name] = rng.choice((None, 0, "", [], {"bytes": 0, "sha256": ""}))
    else:
        content["step"] += 1
    path.write_text(json.dumps(content, sort_keys=True, indent=1) + "\n")
    return {step}


def edit_and_seal(rng: random.Random, directory: Path, step: int) -> Steps:
    """Changes the manifest's entries of files, and corrects its hash of itself."""
    path = place_of(rng, directory, step) / MANIFEST
    content = json.loads(path.read_text())
    del content["sha256"]
    files = content["files"]
    one, two = rng.sample([n for n in sorted(files) if files[n]["bytes"]], 2)
    change = rng.randrange(4)
    if change == 0:
        files[one] = files[two]
    elif change == 1:
        files[one] = files[one] | {"bytes": files[one]["bytes"] + rng.choice((-1, 1, 2**62))}
    elif change == 2:
        del files[one]
    else:
        files[f"../{3 - step}/{one}"] = files[one]
    path.write_text(manifest.render(content))
    return {step}


DAMAGES: tuple[Callable[[random.Random, Path, int], Steps], ...] = (
    *(flip_bits, flip_bits, flip_bits, truncate, truncate, overwrite, extend, delete, delete_folder, add),
    *(add_copy, rename, swap, swap, swap_across, take_another, copy_whole, swap_whole, link),
    *(edit_manifest, edit_and_seal),
)


def make_pristine(directory: Path) -> None:
    """Saves two good checkpoints, each with a base, with equal shapes and different values."""
    with Checkpoints(str(directory)) as saved:
        for step in STEPS:
            meta = {"methods": {"a": "train"}, "restarts": step}
            saved.save(step, state(step), meta, shared(step), step)


def shared(seed: int) -> dict:
    return {"base": {"kernel": jax.random.normal(jax.random.key(seed), (40, 30)).astype(jnp.bfloat16)}}


def state(seed: int) -> dict:
    keys = jax.random.split(jax.random.key(seed), 3)
    w = {"kernel": jax.random.normal(keys[0], (4, 32, 24)), "scale": jax.random.normal(keys[1], (24,))}
    return {"step": jnp.int32(seed), "params": w, "moments": [jax.random.uniform(keys[2], (32, 24))]}


def undetected(rng: random.Random, pristine: Path, work: Path) -> tuple[str, str]:
    """Damages a fresh copy in `work`. Returns the kind of damage, and what went wrong or an empty string."""
    shutil.rmtree(work, ignore_errors=True)
    directory = Path(shutil.copytree(pristine, work / "checkpoints"))
    kind = rng.choice(DAMAGES)
    damaged = kind(rng, directory, rng.choice(STEPS))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted, base = (
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)
        for tree in (state(0), shared(0))
    )
    with Checkpoints(str(directory)) as saved:
        for step in sorted(damaged):
            if not saved.damage(step):
                return kind.__name__, f"the damage of step {step} was not found"
            try:
                saved.restore(step, wanted)
                saved.restore_base(step, base)
            except InputError:
                continue
            return kind.__name__, f"step {step} was loaded"
        good = max(set(STEPS) - damaged, default=None)
        found, problems = saved.latest_good()
    if found != good or (max(STEPS) in damaged and not problems):
        return kind.__name__, f"the newest good step is {good}, and {found} was returned"
    return kind.__name__, ""
