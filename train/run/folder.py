"""The folder of a run: which run it holds, and whether this program may write to it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import yaml
from etils import epath

from mora_jax import hf
from mora_jax.errors import InputError
from mora_jax.hf.tokenizer_files import FOLDER as TOKENIZER
from mora_jax.io import read_json
from train.config import flags
from train.config import run as run_config
from train.config.old import renewed
from train.config.run import RunConfig
from train.run.checkpoint import Checkpoints
from train.run.metrics import EVENTS
from train.runtime.backend import CACHE
from train.storage.buckets import in_bucket
from train.storage.files import make_folder, refuse_links, remove_parts, writable, write_whole
from train.storage.format import FORMAT, KEY

CONFIG = "config.yaml"
DIVERGED = "diverged.json"
SUMMARY = "summary.json"
PICTURE = "loss.png"
CHECKPOINTS = "checkpoints"
# What a run fills beside its files.
FOLDERS = (CHECKPOINTS, EVENTS, CACHE, TOKENIZER)
# Sections that a resumed run may change: none of them affects what is trained.
OPERATIONAL = ("run_dir", "eval", "checkpoint", "compilation", "log", "mesh", "distributed")


def check_free(config: RunConfig, resume: bool) -> None:
    """Makes the run's folder if it does not exist. Only `claim` turns it into a run.

    Raises:
      InputError: if the folder holds a run of another config, holds any run and `resume` is off, is that of
        the data set, has a link in the place of a folder that the run fills or a folder in that of a file,
        or cannot be made.
    """
    folder = epath.Path(config.run_dir)
    if is_within(config.run_dir, config.data.directory):
        raise InputError(
            f"--run-dir {folder} is in the data set's folder, {config.data.directory}; "
            "choose another --run-dir"
        )
    if (folder / CONFIG).exists():
        if not resume:
            raise InputError(
                f"{folder} already holds a run; remove --no-resume to resume it, or choose another --run-dir"
            )
        check_same_config(run_config.to_plain(read_config(config.run_dir)), config, f"{folder} holds a run")
    elif (folder / CHECKPOINTS).is_dir():
        raise InputError(
            f"{folder} holds checkpoints of an unknown run (its {CONFIG} is missing); "
            "choose another --run-dir"
        )
    for name in (SUMMARY, PICTURE, DIVERGED, CONFIG):  # most of them are written at the end
        if (folder / name).is_dir():
            raise InputError(f"{folder / name} is a folder, and a run writes a file of this name; remove it")
    with writable(folder, f"--run-dir {folder} cannot be made"):
        make_folder(folder)
    if not in_bucket(folder):
        refuse_links(Path(folder), FOLDERS)


def claim(config: RunConfig) -> None:
    """Writes the config into the run's folder, which holds a run from then on. Only process 0 writes."""
    if jax.process_index() > 0:
        return
    path = epath.Path(config.run_dir) / CONFIG
    for place in (path.parent, path.parent / TOKENIZER):
        remove_parts(place)
    text = yaml.safe_dump({KEY: FORMAT} | run_config.to_plain(config), sort_keys=False)
    if not path.exists() or path.read_text() != text:
        write_whole(path, text)


def absolute(config: RunConfig) -> RunConfig:
    """Returns a config whose data set and first weights are found from any working folder."""
    data = dataclasses.replace(config.data, directory=absolute_path(config.data.directory))
    models = {
        name: absolute_path(path) if path and not hf.is_hub_id(path) else path
        for name, path in (("init_from", config.init_from), ("adapter", config.adapter))
    }
    return dataclasses.replace(config, data=data, **models)


def read_config(run_dir: str) -> RunConfig:
    """Returns the config of the run in a folder, which may have been moved.

    Raises:
      InputError: if the folder holds no run, or one of a newer format.
    """
    path = epath.Path(run_dir) / CONFIG
    if not path.exists():
        raise InputError(f"{run_dir} holds no run: it has no {CONFIG}")
    return dataclasses.replace(flags.read_config(str(path)), run_dir=run_dir)


def open_checkpoints(config: RunConfig, before_sealing: Callable[[], None] = lambda: None) -> Checkpoints:
    """Returns the run's checkpoints, a context manager."""
    folder, rule = epath.Path(config.run_dir) / CHECKPOINTS, config.checkpoint
    return Checkpoints(str(folder), rule.keep or None, rule.keep_every, before_sealing)


def note_diverged(config: RunConfig, step: int) -> None:
    """Records in the run's folder that a divergence after `step` updates was reported (process 0 only)."""
    if jax.process_index() == 0:
        write_whole(epath.Path(config.run_dir) / DIVERGED, json.dumps({"step": step}) + "\n")


def diverged_at(config: RunConfig) -> Any:
    """Returns the step of the last divergence that the run reported, None if there is none."""
    try:
        found = read_json(epath.Path(config.run_dir) / DIVERGED)
    except InputError:
        return None
    return found.get("step") if isinstance(found, dict) else None


def _remedy(name: str, run_dir: str) -> str:
    """Returns what to do if a run has another value for a key of its config."""
    if name == "data.directory":
        return f"if the data set moved, change it in {run_dir}/{CONFIG}; else choose another --run-dir"
    if name == "init_from":
        return f"if the model was moved, correct it in {run_dir}/{CONFIG}; else choose another --run-dir"
    if name == "steps":
        return (
            "the learning rate depends on it, so a run cannot be made longer; to train its weights further, "
            f"start a run from them: --init-from {run_dir} --run-dir NEW"
        )
    return "choose another --run-dir"


def absolute_path(path: str) -> str:
    """Returns a path that is found from any working folder."""
    return path if in_bucket(path) else str(Path(path).absolute())


def is_within(inner: str, outer: str) -> bool:
    """Whether a folder is another one, or below it, through whatever links."""
    here, there = (p if in_bucket(p) else p.resolve() for p in map(epath.Path, (inner, outer)))
    return there in (here, *here.parents)


def check_same_config(saved: dict[str, Any], config: RunConfig, whose: str, *ignored: str) -> None:
    """Raises InputError if a saved plain config trains something else than `config` does.

    Args:
      saved: the plain config; keys that it lacks have their defaults.
      config: the config of this program.
      whose: the beginning of the message, such as "FOLDER holds a run".
      ignored: keys that may differ besides `OPERATIONAL`.
    """
    both = (absolute(flags.config_from_plain(saved)), absolute(config))
    old, new = (renewed(dict(flags.flatten(run_config.to_plain(c)))) for c in both)
    for name in new | old:
        may_change = name in ignored or name.split(".")[0] in OPERATIONAL
        if not may_change and old.get(name) != new.get(name):
            difference = f"{whose} with {name} {old.get(name)!r}, not {new.get(name)!r}"
            raise InputError(f"{difference}; {_remedy(name, config.run_dir)}")
