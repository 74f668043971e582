"""The state of a run: a fresh one, its shapes and shardings, and the one that a checkpoint holds."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from mora_jax import sharding, transform
from mora_jax.errors import InputError
from mora_jax.models.llama import STACKED, abstract_params
from mora_jax.transform import Methods
from train.config import old
from train.config.run import RunConfig
from train.run.checkpoint import Checkpoints
from train.run.folder import check_same_config
from train.run.meta import check_derived, read_meta
from train.step.spec import spec_of
from train.step.state import TrainState, held, init_params, init_state, layouts, state_over
from train.storage.format import KEY


def assign_methods(config: RunConfig) -> Methods:
    """Returns what is done with each parameter before the first restart."""
    return transform.assign(config.parameter_rules(), abstract_params(config.model), STACKED)


def methods_at(config: RunConfig, step: int) -> Methods:
    """Returns the methods that a checkpoint of `step` updates must hold.

    A restart at that step comes after the save.
    """
    # Restarts cycle through a few methods. Their number may come from a file, so it is not looped over.
    seen = [assign_methods(config)]
    while (following := seen[-1].after_restart()) not in seen:
        seen.append(following)
    lead, restarts = seen.index(following), config.restarts_before(step)
    return seen[restarts if restarts < lead else lead + (restarts - lead) % (len(seen) - lead)]


def state_shapes(config: RunConfig, methods: Methods) -> Any:
    """Returns shapes and types of the state, without computing it."""
    spec = spec_of(config)
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


def check_saved(config: RunConfig, saved: Checkpoints, step: int) -> tuple[dict[str, Any], Methods]:
    """Returns what was saved beside the arrays of a run's checkpoint, and its methods. Reads no array.

    Raises:
      InputError: if a run of another config saved it, or if its methods, restarts, data position, random
        state or arrays are not those that the config gives for its step.
    """
    methods, found = methods_at(config, step), read_meta(saved, step)
    # The data may have moved, with config.yaml edited by hand. `check_data` compares what the data set holds.
    check_same_config(found["config"], config, f"{saved.folder(step)} was saved by a run", "data.directory")
    if Methods.from_json(found["methods"]) != methods:
        raise InputError(
            f"{config.run_dir}: the methods saved at step {step} are not those that the config gives for it"
        )
    check_derived(config, step, found)
    saved.check_layout(step, _as_saved(state_shapes(config, methods), found[KEY]))
    return found, methods


def restore_state(config: RunConfig, saved: Checkpoints, step: int, mesh: Mesh) -> tuple[TrainState, Methods]:
    """Returns the state and methods of one checkpoint.

    Raises:
      InputError: if a run of another config saved it; if its methods, restarts, data position or random
        state are not those that the config gives for its step; or if it is damaged.
    """
    found, methods = check_saved(config, saved, step)
    state = _load(saved, step, abstract_state(config, methods, mesh), found[KEY])
    if int(state.step) != step:
        raise InputError(f"{config.run_dir}: checkpoint {step} holds the state of {int(state.step)} updates")
    return state, methods


def _load(saved: Checkpoints, step: int, abstract: TrainState, number: int) -> TrainState:
    """Returns the state in a checkpoint of a format."""
    arrays = saved.restore(step, _as_saved(abstract, number))
    if number > 1:
        return arrays
    fields = [field.name for field in dataclasses.fields(abstract)]
    return TrainState(**{name: arrays[old.STATE_FIELDS.get(name, name)] for name in fields})


def _as_saved(state: TrainState, number: int) -> Any:
    """Returns a state as a checkpoint of a format holds it: in format 1 some fields have other names."""
    if number > 1:
        return state
    fields = [field.name for field in dataclasses.fields(state)]
    return {old.STATE_FIELDS.get(name, name): getattr(state, name) for name in fields}
