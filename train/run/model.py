"""The merged model of a run or of a Hugging Face folder."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array

from mora_jax import hf, sharding, trees
from mora_jax.errors import InputError, located, some
from mora_jax.hf.adapter_load import check_base
from mora_jax.hf.config import CONFIG as HF_CONFIG
from mora_jax.hf.names import places
from mora_jax.hf.tokenizer_files import JSON, MODEL
from mora_jax.models.llama import LAYOUTS, LlamaConfig, abstract_params
from mora_jax.on import On
from mora_jax.transform import Methods, adapters_of, effective
from train.config.run import RunConfig
from train.console.terminal import warn
from train.data.rows.info import DataInfo
from train.run.checkpoint import Checkpoints
from train.run.folder import CONFIG, open_checkpoints, read_config
from train.run.meta import check_data, read_meta
from train.run.state import assign_methods, restore_model, state_shapes
from train.step.spec import spec_of
from train.step.state import TrainState, held_types, layouts

# Reads of the newest checkpoint of a run that is training: it may remove the one being read.
READS = 5

T = TypeVar("T")


def load_model(
    path: str,
    info: DataInfo | None = None,
    mesh: Mesh | None = None,
    types: Mapping[str, DTypeLike] | None = None,
    step: int | None = None,
) -> tuple[Any, LlamaConfig]:
    """Returns the merged parameters of a run's checkpoint, or of a Hugging Face folder.

    Each process reads what its devices hold. A run's adapters are merged in float32.

    Args:
      path: the folder.
      info: the data set that the model is used with, whose tokenizer must be the model's.
      mesh: the devices that the parameters are sharded over; one device by default.
      types: types in which parameters are returned, by path; float32 for all others.
      step: updates of the run's checkpoint; None for its newest good one.

    Raises:
      InputError: if the folder holds no model, or one of another tokenizer than that of `info`.
    """
    mesh = mesh or sharding.make_mesh(1)
    if not (epath.Path(path) / CONFIG).exists():
        if info:
            _check_tokenizer(path, info)
        return hf.load_hf(path, mesh, types)
    return load_merged(path, info, mesh, types, step)[:2]


def load_merged(
    path: str,
    info: DataInfo | None,
    mesh: Mesh,
    types: Mapping[str, DTypeLike] | None = None,
    step: int | None = None,
) -> tuple[Any, LlamaConfig, int]:
    """Returns what `load_model` does of a run, and the updates of its checkpoint."""
    config, state, methods = load_state(path, info, mesh, step=step)
    updates = int(state.step)
    flat = trees.flatten(state.params)
    found = {p: (on, arrays) for p, on, arrays in adapters_of(state.params, state.adapters, methods)}
    places = trees.flatten(sharding.shardings(state.params, mesh, LAYOUTS))
    del state  # each kernel is freed once its merged one is there
    with jax.set_mesh(mesh):
        for name, array in flat.items():
            on, arrays = found.get(name, (None, {}))
            flat[name] = _merged(
                array, arrays, on, jnp.dtype((types or {}).get(name, "float32")), places[name]
            )
    return trees.unflatten(flat), config.model, updates


@functools.partial(jax.jit, static_argnames=("on", "dtype", "place"))
def _merged(w: Array, arrays: Any, on: On | None, dtype: np.dtype, place: NamedSharding) -> Array:
    """Returns a kernel with its adapter, computed in float32."""
    w = effective(on, arrays, w) if on else w
    return jax.lax.with_sharding_constraint(w.astype(dtype), place)


def load_state(
    path: str,
    info: DataInfo | None = None,
    mesh: Mesh | None = None,
    with_base: bool = True,
    step: int | None = None,
) -> tuple[RunConfig, TrainState, Methods]:
    """Returns the config of a run, and the model of a checkpoint as `restore_model` does.

    The checkpoint is that of `step` updates, and the newest good one by default.

    Raises:
      InputError: if the folder holds no run, one of another tokenizer than that of `info`, or no complete
        checkpoint of the step.
    """
    mesh = mesh or sharding.make_mesh(1)
    config = read_config(path)
    with open_checkpoints(config) as saved:

        def read(step: int) -> tuple[TrainState, Methods]:
            if info:
                check_data(saved, step, info)
            return restore_model(config, saved, step, mesh, with_base)

        if step is None:
            return config, *read_newest(saved, path, read)
        if step not in (there := saved.steps()):
            raise InputError(
                f"{path} holds no complete checkpoint {step}; it has {some([*map(str, there)], 12) or 'none'}"
            )
        return config, *read(step)


def load_initial(config: RunConfig, info: DataInfo, mesh: Mesh) -> Any:
    """Returns the parameters that `init_from` names, None if it is empty.

    Raises:
      InputError: if the folder holds no model, or one of another architecture or tokenizer.
    """
    if not config.init_from:
        return None
    types = held_types(spec_of(config), assign_methods(config))
    with located(config.init_from, "--init-from"):
        params, model = load_model(str(hf.local_folder(config.init_from)), info, mesh, types)
    dynamic = config.model.rope.type == "dynamic"  # its frequencies depend on max_position_embeddings
    may_differ = ("initializer_range", *(() if dynamic else ("max_position_embeddings",)))
    for field in dataclasses.fields(LlamaConfig):
        there, here = getattr(model, field.name), getattr(config.model, field.name)
        if field.name not in may_differ and there != here:
            raise InputError(
                f"--init-from {config.init_from} holds a model of {field.name} {there}, "
                f"not model.{field.name} {here}"
            )
    _warn_of_read_rows(config, info)
    return params


def load_initial_adapter(config: RunConfig, methods: Methods, params: Any) -> tuple[Any, Any]:
    """Returns parameters and adapters that a run which trains an adapter further starts from.

    Args:
      config: the run's config.
      methods: what is done with each parameter.
      params: the parameters of `init_from`.

    Returns:
      The parameters with those that the adapter's file holds as a whole, and the adapters; the parameters
      and None if the config names no adapter.

    Raises:
      InputError: if the file does not fit the model or the rules, or its base has other weights.
    """
    if not config.adapter:
        return params, None
    with located(config.adapter, "--adapter"):
        shapes = {name: place.shape for name, place in places(config.model).items()}
        found = hf.read_adapter(config.adapter, shapes)
        base = hf.local_folder(config.init_from)
        if not (base / CONFIG).exists():
            check_base(found, base, config.model)
        elif found.base_hash:
            raise InputError(f"it belongs to a folder of weights, and {base} is a run: mora export it first")
        if replaced := found.saved.keys() & found.kernels.keys():
            raise InputError(f"it holds {min(replaced)} both as a whole and adapted; merge it: mora merge")
        params, adapters = hf.load_arrays(found, params, methods, config.model)
    dropout = found.config.lora_dropout
    if dropout and not any(method.dropout for _, method in methods.adapted()):
        warn(
            [f"--adapter {config.adapter} was trained with lora_dropout {dropout}, and continues without it"]
        )
    return params, adapters


def widest_mesh(path: str, batch_size: int = 0) -> Mesh:
    """Returns the largest `fsdp` mesh that the model in a folder, and a batch of it, can be sharded over.

    Args:
      path: folder of a run, or Hugging Face folder.
      batch_size: sequences; 0 if none are computed.

    Raises:
      InputError: if the folder holds no model.
    """
    if (epath.Path(path) / CONFIG).exists():
        config = read_config(path)
        methods = assign_methods(config)
        shapes, rules = state_shapes(config, methods), layouts(methods)
    else:
        shapes, rules = abstract_params(hf.read_config(path)), LAYOUTS
    most = math.gcd(jax.device_count(), batch_size)
    for count in [n for n in range(most, 1, -1) if most % n == 0]:
        mesh = sharding.make_mesh(1, count)
        with contextlib.suppress(InputError):  # an array may have no axis that `count` divides
            sharding.shardings(shapes, mesh, rules)
            return mesh
    return sharding.make_mesh(1)


def read_newest(saved: Checkpoints, path: str, read: Callable[[int], T]) -> T:
    """Returns what `read` returns for the newest good checkpoint, and warns of damaged newer ones.

    The run may be training and remove the checkpoint that is being read. If a newer one has appeared by
    then, that one is read instead, up to `READS` times.

    Raises:
      InputError: if there is no good checkpoint.
    """
    reads = READS
    while True:
        reads, before = reads - 1, saved.steps()
        step, damaged = saved.latest_good()
        if damaged and reads and _newer(saved, before):
            continue
        warn(f"{what}; using an older checkpoint" for what in damaged)
        if step is None:
            raise InputError(f"{path} holds no complete checkpoint")
        try:
            return read(step)
        except (InputError, FileNotFoundError):
            if not reads or not _newer(saved, before):
                raise


def _warn_of_read_rows(config: RunConfig, info: DataInfo) -> None:
    """Warns if a warm start reads the rows that its source, a run of the same seed and data, has read."""
    if not (epath.Path(config.init_from) / CONFIG).exists():
        return
    source = read_config(config.init_from)
    with open_checkpoints(source) as saved:
        step = saved.steps()[-1]
        rows = read_meta(saved, step)["data"]["rows"]
    end = source.rows_before(step)
    same = (source.seed, rows) == (config.seed, info.rows["train"])
    if same and config.data.skip_rows < end:
        warn(
            [
                f"this run begins with rows that {config.init_from} has read: seed and data are the same; "
                f"--data.skip-rows {end} continues behind them, and another --seed shuffles anew"
            ]
        )


def _check_tokenizer(path: str, info: DataInfo) -> None:
    """Raises InputError if a Hugging Face folder holds another tokenizer than a data set was made with."""
    folder = epath.Path(path)
    if any((folder / name).exists() for name in (JSON, MODEL)):
        if not hf.read_tokenizer(folder).has_hash(info.tokenizer_sha256):
            raise InputError(
                f"{info.directory} was made with another tokenizer than that of {path}; prepare it with that"
            )
    elif (folder / HF_CONFIG).exists():
        warn([f"{path} has no tokenizer: whether {info.directory} was made with its tokenizer is not known"])


def _newer(saved: Checkpoints, before: list[int]) -> bool:
    """Whether a newer checkpoint has appeared. Several processes could disagree and then wait forever."""
    return jax.process_count() == 1 and saved.steps()[-1:] > before[-1:]
