"""The state of a run: a fresh one, its shapes and shardings, and the one that a checkpoint holds."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh

from mora_jax import hf, sharding, transform, trees
from mora_jax.errors import InputError
from mora_jax.models.llama import STACKED, abstract_params
from mora_jax.transform import Methods
from train.config import old
from train.config.run import RunConfig
from train.run import base
from train.run.arrays import check_layout, layout
from train.run.base import Named
from train.run.checkpoint import Checkpoints
from train.run.folder import CONFIG, check_same_config
from train.run.meta import check_derived, read_meta
from train.step.spec import StepSpec, spec_of
from train.step.state import TrainState, held, init_params, init_state, layouts, state_over
from train.storage.format import KEY


def assign_methods(config: RunConfig) -> Methods:
    """Returns what is done with each parameter before the first restart."""
    return transform.assign(config.parameter_rules(), abstract_params(config.model), STACKED)


def methods_at(config: RunConfig, step: int) -> Methods:
    """Returns the methods that a checkpoint of `step` updates must hold.

    A restart at that step comes after the save.
    """
    return assign_methods(config).after_restart(config.restarts_before(step))


def state_shapes(config: RunConfig, methods: Methods) -> Any:
    """Returns shapes and types of the state, without computing it."""
    traced = _traced_state(spec_of(config), methods)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), traced)


@functools.lru_cache(maxsize=64)
def _traced_state(spec: StepSpec, methods: Methods) -> Any:
    return jax.eval_shape(lambda: init_state(spec, methods, init_params(spec)))


def abstract_state(config: RunConfig, methods: Methods, mesh: Mesh) -> Any:
    """Returns shapes, types and shardings of the state, without computing it."""
    shapes = state_shapes(config, methods)
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        shapes,
        sharding.shardings(shapes, mesh, layouts(methods)),
    )


def fresh_state(
    config: RunConfig, methods: Methods, mesh: Mesh, params: Any = None, adapters: Any = None
) -> TrainState:
    """Returns the state before the first update.

    Args:
      config: the run's config.
      methods: what is done with each parameter.
      mesh: the devices.
      params: parameters of a warm start, which the state takes over; random ones by default.
      adapters: adapters that are trained further, the same on all processes; fresh ones by default. Only with
        a warm start.
    """
    spec = spec_of(config)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, methods, mesh))
    if params is None:
        return jax.jit(lambda: init_state(spec, methods, init_params(spec)), out_shardings=places)()
    state = state_over(spec, methods, jax.device_put(held(spec, methods, params), places.params), places)
    if adapters is None:
        return state
    place = jax.jit(lambda arrays: arrays, out_shardings=places.adapters)
    return dataclasses.replace(state, adapters=place(adapters))


def named_base(config: RunConfig, methods: Methods) -> Named | None:
    """Returns the reference to the model that a run starts from, if its base can be read from there again.

    Returns:
      None for random weights, for a run, which may be trained further, and if every parameter is trained.

    Raises:
      InputError: if the folder holds no weights.
    """
    folder = config.init_from
    all_trained = len(methods.trained()) == len(methods.choices)
    if not folder or all_trained or (hf.local_folder(folder) / CONFIG).exists():
        return None
    return base.name_model(folder)


def check_saved(config: RunConfig, saved: Checkpoints, step: int) -> tuple[dict[str, Any], Methods]:
    """Returns what was saved beside the arrays of a run's checkpoint, and its methods. Reads no array.

    Raises:
      InputError: if a run of another config saved it, or if its methods, restarts, data position, random
        state or arrays are not those that the config gives for its step.
    """
    methods, found = methods_at(config, step), read_meta(saved, step)
    # The data may have moved, with config.yaml edited by hand. `check_data` compares what the data set holds.
    # So may have the model of init_from, whose files are compared.
    may_move = ("data.directory", "init_from")
    check_same_config(found["config"], config, f"{saved.folder(step)} was saved by a run", *may_move)
    if Methods.from_json(found["methods"]) != methods:
        raise InputError(
            f"{config.run_dir}: the methods saved at step {step} are not those that the config gives for it"
        )
    check_derived(config, step, found)
    shapes, shared = state_shapes(config, methods), None
    if saved.base_of(step):
        shapes, shared = base.split(shapes, methods)
    saved.check_layout(step, _as_saved(shapes, found[KEY]), shared)
    return found, methods


def restore_state(config: RunConfig, saved: Checkpoints, step: int, mesh: Mesh) -> tuple[TrainState, Methods]:
    """Returns the state and methods of one checkpoint.

    Raises:
      InputError: if a run of another config saved it; if its methods, restarts, data position or random
        state are not those that the config gives for its step; if it is damaged; or if its base is that of
        `init_from`, and the model there is another one by now.
    """
    return _restored(config, saved, step, mesh)


def restore_model(
    config: RunConfig, saved: Checkpoints, step: int, mesh: Mesh, with_base: bool = True
) -> tuple[TrainState, Methods]:
    """Returns the model of one checkpoint: `restore_state` with None for what only training needs.

    The optimizer state is verified, and not read into memory.

    Args:
      config: the run's config.
      saved: the run's checkpoints.
      step: the checkpoint.
      mesh: the devices.
      with_base: whether parameters that are not trained are read, too. Otherwise shapes take their place
        where checkpoints share them, and the files of the model that `init_from` names are compared alone.

    Raises:
      InputError: as `restore_state`.
    """
    return _restored(config, saved, step, mesh, ("opt_state", "spikes"), with_base)


def _restored(
    config: RunConfig,
    saved: Checkpoints,
    step: int,
    mesh: Mesh,
    without: tuple[str, ...] = (),
    with_base: bool = True,
) -> tuple[TrainState, Methods]:
    """Returns the state and methods of one checkpoint, without the fields named."""
    found, methods = check_saved(config, saved, step)
    abstract = dataclasses.replace(abstract_state(config, methods, mesh), **dict.fromkeys(without))
    named = saved.base_of(step)
    if named is None:
        state = _load(saved, step, abstract, found[KEY])
    else:
        rest, shared = base.split(abstract, methods)
        state = _load(saved, step, rest, found[KEY])
        if isinstance(named, Named):
            shared = _read_named(config, named, shared, mesh, with_base)
            saved.refer_to(named)
        elif with_base:
            shared = saved.restore_base(step, shared)
        state = base.join(state, shared)
    if int(state.step) != step:
        raise InputError(f"{config.run_dir}: checkpoint {step} holds the state of {int(state.step)} updates")
    return state, methods


def _read_named(config: RunConfig, named: Named, abstract: Any, mesh: Mesh, with_arrays: bool) -> Any:
    """Returns the base that `init_from` names, or its shapes alone.

    Raises:
      InputError: if it is not what the run started from.
    """
    remedy = f"restore it, or, if it was moved, correct init_from in {config.run_dir}/{CONFIG}"
    try:
        if found := base.difference(named, config.init_from):
            raise InputError(found)
        if not with_arrays:
            return abstract
        flat = trees.flatten(abstract["params"])
        types = {path: leaf.dtype for path, leaf in flat.items()}
        params = trees.flatten(hf.load_hf(hf.local_folder(config.init_from), mesh, types)[0])
        arrays = {"params": trees.unflatten({path: params[path] for path in flat})}
        check_layout(config.init_from, layout(arrays), layout(abstract))
    except InputError as error:
        raise InputError(f"{config.run_dir} needs the model it started from: {error}; {remedy}") from error
    return jax.device_put(arrays, jax.tree.map(lambda leaf: leaf.sharding, abstract))


def _load(saved: Checkpoints, step: int, abstract: TrainState, number: int) -> TrainState:
    """Returns the fields of a state that `abstract` has, and None for others."""
    wanted = _as_saved(abstract, number)
    arrays = saved.restore(step, wanted, partial=len(wanted) < len(dataclasses.fields(abstract)))
    names = {field.name: _saved_name(field.name, number) for field in dataclasses.fields(abstract)}
    return TrainState(**{name: arrays.get(saved_name) for name, saved_name in names.items()})


def _as_saved(state: TrainState, number: int) -> dict[str, Any]:
    """Returns the fields that a state has, by the names that they have in checkpoints of a format."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {_saved_name(name, number): value for name, value in fields.items() if value is not None}


def _saved_name(field: str, number: int) -> str:
    """Returns the name of a field in a checkpoint: in format 1 some have other names."""
    return field if number > 1 else old.STATE_FIELDS.get(field, field)
