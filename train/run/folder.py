"""A run's folder: who may write to it, the state to go on from, and the merged model it holds."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import yaml
from etils import epath
from jax.sharding import Mesh

from mora_jax import hf, sharding, transform
from mora_jax.errors import InputError
from mora_jax.io import read_json
from mora_jax.methods import MoRA, Share
from mora_jax.models.llama import LlamaConfig, abstract_params
from mora_jax.transform import Methods
from train.config import flags
from train.config import run as run_config
from train.config.run import RunConfig
from train.console.terminal import warn
from train.data.rows.read import DataInfo, first_rows
from train.run.checkpoint import Checkpoints
from train.step.step import TrainState, init_params, init_state, random_state
from train.storage.files import make_folder, writable, write_whole

CONFIG = "config.yaml"
DIVERGED = "diverged.json"
CHECKPOINTS = "checkpoints"
# What a resumed run may have otherwise: none of it changes what is computed.
OPERATIONAL = ("run_dir", "eval", "checkpoint", "compilation", "log", "mesh", "distributed")
# How often a run that is trained meanwhile may overtake a reader of its newest checkpoint.
_LOOKS = 5

T = TypeVar("T")


def check_free(config: RunConfig, resume: bool) -> None:
    """Makes the run's folder, if it is not there; `claim` makes it a run.

    Raises:
      InputError: if the folder holds a run of another config, or any run and `resume` is off, or cannot be
        made.
    """
    folder = epath.Path(config.run_dir)
    if (folder / CONFIG).exists():
        if not resume:
            raise InputError(
                f"{folder} holds a run already; leave out --no-resume to go on, or choose another --run-dir"
            )
        _check_same(run_config.to_plain(read_config(config.run_dir)), config, f"{folder} holds a run")
    elif (folder / CHECKPOINTS).exists():
        raise InputError(
            f"{folder} holds checkpoints of no known run (its {CONFIG} is gone); choose another --run-dir"
        )
    with writable(folder, f"run_dir {folder} cannot be made"):
        make_folder(folder)


def claim(config: RunConfig) -> None:
    """Process 0 writes the config into the run's folder, which holds a run from then on."""
    if jax.process_index() > 0:
        return
    path = epath.Path(config.run_dir) / CONFIG
    text = yaml.safe_dump(run_config.to_plain(config), sort_keys=False)
    if not path.exists() or path.read_text() != text:
        write_whole(path, text)


def note_diverged(config: RunConfig, step: int) -> None:
    """Process 0 notes in the run's folder that it is told of a divergence after so many updates."""
    if jax.process_index() == 0:
        write_whole(epath.Path(config.run_dir) / DIVERGED, json.dumps({"step": step}) + "\n")


def told_diverged(config: RunConfig) -> Any:
    """The updates after which the run last told of a divergence; None where it never did."""
    try:
        found = read_json(epath.Path(config.run_dir) / DIVERGED)
    except InputError:
        return None
    return found.get("step") if isinstance(found, dict) else None


def read_config(run_dir: str) -> RunConfig:
    """The config of the run that lies in a folder, wherever it was written. Raises InputError for none."""
    path = epath.Path(run_dir) / CONFIG
    if not path.exists():
        raise InputError(f"{run_dir} holds no run: there is no {CONFIG} in it")
    return dataclasses.replace(flags.read_config(str(path)), run_dir=run_dir)


def checkpoints(config: RunConfig, before_sealing: Callable[[], None] = lambda: None) -> Checkpoints:
    """The run's checkpoints."""
    folder, rule = epath.Path(config.run_dir) / CHECKPOINTS, config.checkpoint
    return Checkpoints(str(folder), rule.keep or None, rule.keep_every, before_sealing)


def assign_methods(config: RunConfig) -> Methods:
    """What is done with each parameter before the first restart."""
    return transform.assign(config.parameter_rules(), abstract_params(config.model))


def methods_at(config: RunConfig, step: int) -> Methods:
    """What a checkpoint of `step` updates must hold; a restart comes after the saving, with the next step."""
    # Restarts go in a circle of at most a few methods: their number, which a file may say, is not walked.
    seen = [assign_methods(config)]
    while (following := seen[-1].after_restart()) not in seen:
        seen.append(following)
    lead, restarts = seen.index(following), config.restarts_before(step)
    return seen[restarts if restarts < lead else lead + (restarts - lead) % (len(seen) - lead)]


def group_type(methods: Methods) -> str:
    """The group types of MoRA's share, such as `0`; several are joined by commas, none is empty."""
    groups = {
        str(m.operator.group)
        for _, m in methods.adapted()
        if isinstance(m, MoRA) and isinstance(m.operator, Share)
    }
    return ", ".join(sorted(groups))


def fresh_state(config: RunConfig, methods: Methods, mesh: Mesh) -> TrainState:
    """The state before the first update: random, or warm-started from `init_from`."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, methods, mesh))
    if not config.init_from:
        return jax.jit(lambda: init_state(config, methods, init_params(config)), out_shardings=places)()
    params, model = load_model(config.init_from, mesh=mesh)
    _check_architecture(model, config)
    return jax.jit(lambda p: init_state(config, methods, p), out_shardings=places)(params)


def meta(
    config: RunConfig, methods: Methods, info: DataInfo, step: int, evaluation: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What is saved beside the arrays of `step` updates: all that gives them meaning.

    `evaluation` is what was found of this very state, where it was evaluated.
    """
    text = {"tokenizer_sha256": info.tokenizer_sha256, "rows": info.rows["train"]}
    implied = _implied(config, step, info.rows["train"])
    return implied | {
        "config": run_config.to_plain(config),
        "methods": methods.to_json(),
        "data": implied["data"] | text,
        "evaluation": evaluation,
    }


def saved_meta(saved: Checkpoints, step: int) -> dict[str, Any]:
    """What `meta` wrote for a checkpoint. Raises InputError unless it is of that form, whoever wrote it."""
    found = saved.read_meta(step)
    try:
        Methods.from_json(found["methods"])
        data, score, restarts = found["data"], found["evaluation"], found["restarts"]
        right = isinstance(found["config"], dict)
        right &= type(restarts) is int and 0 <= restarts <= step
        right &= type(data["rows"]) is int and 0 < data["rows"] < 2**62
        right &= isinstance(data["tokenizer_sha256"], str)
        right &= score is None or {n: type(v) for n, v in score.items()} == {
            "loss": float,
            "predictions": int,
        }
    except (InputError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{saved.folder(step)} was not saved by a run of this version: {error!r}") from error
    if not right:
        raise InputError(f"{saved.folder(step)} was not saved by a run of this version")
    return found


def restore(config: RunConfig, saved: Checkpoints, step: int, mesh: Mesh) -> tuple[TrainState, Methods]:
    """The state and methods of one checkpoint.

    Raises:
      InputError: if it was saved by a run of another config, its methods, restarts, data position or random
        state are not those that the config gives for its step, or it is damaged.
    """
    methods, found = methods_at(config, step), saved_meta(saved, step)
    # The data may have been moved, and config.yaml told so by hand; `check_text` compares what it holds.
    _check_same(found["config"], config, f"{saved.folder(step)} was saved by a run", "data.directory")
    if Methods.from_json(found["methods"]) != methods:
        raise InputError(
            f"{config.run_dir}: the methods saved at step {step} are not those the config gives for it"
        )
    _check_implied(config, step, found)
    state = saved.restore(step, abstract_state(config, methods, mesh))
    if int(state.step) != step:
        raise InputError(f"{config.run_dir}: checkpoint {step} holds the state of {int(state.step)} updates")
    return state, methods


def check_text(saved: Checkpoints, step: int, info: DataInfo, resume: bool = False) -> None:
    """Raises InputError unless a data set has a checkpoint's tokenizer, and to resume also its rows."""
    seen = saved_meta(saved, step)["data"]
    if seen["tokenizer_sha256"] != info.tokenizer_sha256:
        raise InputError(f"{info.directory} was made with another tokenizer than the run's data set")
    if resume and seen["rows"] != info.rows["train"]:
        raise InputError(
            f"{info.directory} has {info.rows['train']} training rows, not the run's {seen['rows']}"
        )


def abstract_state(config: RunConfig, methods: Methods, mesh: Mesh) -> Any:
    """Shapes, types and shardings of the state, without computing it."""
    shapes = _state_shapes(config, methods)
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        shapes,
        sharding.shardings(shapes, mesh),
    )


def _state_shapes(config: RunConfig, methods: Methods) -> Any:
    return jax.eval_shape(lambda: init_state(config, methods, init_params(config)))


def load_model(path: str, info: DataInfo | None = None, mesh: Mesh | None = None) -> tuple[Any, LlamaConfig]:
    """The merged float32 parameters of a run's newest good checkpoint, or of a Hugging Face folder.

    Each process reads what its devices hold.

    Args:
      path: the folder.
      info: the data set that the model is to be used with, whose tokenizer must be the run's.
      mesh: the devices that the parameters are divided over; one device by default.

    Raises:
      InputError: if there is neither, or the run saw another tokenizer than that of `info`.
    """
    mesh = mesh or sharding.make_mesh(1)
    if (epath.Path(path) / CONFIG).exists():
        config = read_config(path)
        with checkpoints(config) as saved:

            def read(step: int) -> tuple[TrainState, Methods]:
                if info:
                    check_text(saved, step, info)
                return restore(config, saved, step, mesh)

            state, methods = of_newest(saved, path, read)
        places = sharding.shardings(state.params, mesh)
        merge = jax.jit(
            lambda params, adapters: transform.merge(params, adapters, methods), out_shardings=places
        )
        with jax.set_mesh(mesh):
            return merge(state.params, state.adapters), config.model
    return hf.load_hf(path, mesh)


def widest_mesh(path: str, batch_size: int = 0) -> Mesh:
    """As many devices as the model in a folder, and a batch if one is given, can be divided over: `fsdp`.

    Args:
      path: folder of a run, or Hugging Face folder.
      batch_size: sequences; 0 where none are computed.

    Raises:
      InputError: if there is no model.
    """
    if (epath.Path(path) / CONFIG).exists():
        config = read_config(path)
        shapes = _state_shapes(config, assign_methods(config))
    else:
        shapes = abstract_params(hf.read_config(path))
    together = math.gcd(jax.device_count(), batch_size)
    for count in [n for n in range(together, 1, -1) if together % n == 0]:
        mesh = sharding.make_mesh(1, count)
        with contextlib.suppress(InputError):  # an array may have no axis that so many divide
            sharding.shardings(shapes, mesh)
            return mesh
    return sharding.make_mesh(1)


def of_newest(saved: Checkpoints, path: str, read: Callable[[int], T]) -> T:
    """What `read` makes of the step of the newest good checkpoint; what is wrong with newer ones is told.

    The run may be trained meanwhile, which removes checkpoints, perhaps the one that is being read: where a
    newer one has come, it is looked again.

    Raises:
      InputError: if there is no good checkpoint.
    """
    looks = _LOOKS
    while True:
        looks, before = looks - 1, saved.steps()
        step, damaged = saved.latest_good()
        if damaged and looks and _gone_on(saved, before):
            continue
        warn(f"{what}; going back to an older checkpoint" for what in damaged)
        if step is None:
            raise InputError(f"{path} holds no complete checkpoint")
        try:
            return read(step)
        except (InputError, FileNotFoundError):
            if not looks or not _gone_on(saved, before):
                raise


def _gone_on(saved: Checkpoints, before: list[int]) -> bool:
    """Whether a newer checkpoint has come since. Several processes could see it otherwise, and never meet."""
    return jax.process_count() == 1 and saved.steps()[-1:] > before[-1:]


def _implied(config: RunConfig, step: int, rows: int) -> dict[str, Any]:
    """What the number of updates done alone says of a run, as JSON holds it."""
    return {
        "restarts": config.restarts_before(step),
        "data": {
            "step": step,
            "seed": config.seed,
            "next_rows": first_rows(rows, config.batch_size, config.seed, step),
        },
        "random": random_state(config, step),
    }


def _check_implied(config: RunConfig, step: int, found: dict[str, Any]) -> None:
    implied = dict(flags.flatten(_implied(config, step, found["data"]["rows"])))
    saved = dict(flags.flatten(found))
    for name, value in implied.items():
        if name not in saved or saved[name] != value:
            raise InputError(
                f"{config.run_dir}: checkpoint {step} was saved with {name} {saved.get(name)}, and going on "
                f"from there would take {value}; go on with the versions of jax and grain that it began with"
            )


def _check_architecture(found: LlamaConfig, config: RunConfig) -> None:
    for field in dataclasses.fields(LlamaConfig):
        there, here = getattr(found, field.name), getattr(config.model, field.name)
        if field.name not in ("max_position_embeddings", "initializer_range") and there != here:
            raise InputError(
                f"init_from {config.init_from} holds a model of {field.name} {there}, "
                f"not model.{field.name} {here}"
            )


def _check_same(before: dict[str, Any], config: RunConfig, whose: str, *apart: str) -> None:
    """Compares a plain config with a run's, but for what may change; what is not told had its default."""
    known = dict(flags.flatten(run_config.to_plain(RunConfig())))
    old, new = known | dict(flags.flatten(before)), dict(flags.flatten(run_config.to_plain(config)))
    for name in new | old:
        may_change = name in apart or name.split(".")[0] in OPERATIONAL
        if not may_change and old.get(name) != new.get(name):
            raise InputError(
                f"{whose} with {name} {old.get(name)!r}, not {new.get(name)!r}; choose another --run-dir"
            )
