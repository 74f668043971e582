"""Exports a run's adapters as a folder of PEFT or of MoRA's authors, and merges such folders into models."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from etils import epath

from mora_jax import hf, trees
from mora_jax.errors import InputError
from mora_jax.hf.adapter_config import AdapterConfig
from mora_jax.hf.adapter_save import RANKS
from mora_jax.hf.names import places
from mora_jax.hf.weights import fingerprint, read_weights
from mora_jax.transform import Methods
from train.config.run import RunConfig
from train.console.terminal import warn
from train.jobs.export import output_folder, save_model
from train.run.folder import CONFIG, absolute_path, is_within
from train.run.model import load_state, widest_mesh
from train.storage.files import naming_errors

Dtype: TypeAlias = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """How a run's adapters are exported.

    Attributes:
      dtype: type of the stored tensors.
      form: "peft", or "mora" for the files of MoRA's authors.
      pad_rank: whether all adapters are padded to one rank.
      with_base: folder for the model without its adapters; empty for none.
    """

    dtype: Dtype = "float32"
    form: Literal["peft", "mora"] = "peft"
    pad_rank: bool = False
    with_base: str = ""


def export_adapter(run_dir: str, out: str, how: AdapterOptions) -> AdapterConfig:
    """Writes the adapters of a run's newest good checkpoint, from one process.

    Readers load the base first. It is the model of `init_from`, or, with `with_base`, that folder. The latter
    holds the parameters that the run trained itself, so that the adapter needs no `modules_to_save`.

    Args:
      run_dir: the run.
      out: the folder to write.
      how: what is written.

    Returns:
      What adapter_config.json says.

    Raises:
      InputError: if another program writes a folder, the run has no complete checkpoint, its method has no
        place in such a file, or nobody else has its base: it was random, a run's, or changed by a restart.
    """
    if how.with_base and (is_within(out, how.with_base) or is_within(how.with_base, out)):
        raise InputError(
            f"--with-base {how.with_base} and OUT {out} must be two folders, neither in the other"
        )
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(output_folder(out, "OUT"))
        base_folder = (
            stack.enter_context(output_folder(how.with_base, "--with-base")) if how.with_base else None
        )
        mesh = widest_mesh(run_dir)
        config, state, methods = load_state(run_dir, mesh=mesh, with_base=base_folder is not None)
        if base_folder is None:
            _check_base(run_dir, config, int(state.step))
            base, base_hash = config.init_from, _hash_of(config.init_from, state.params, methods)
            if config.base_dtype != "float32":
                warn(
                    [f"the adapter was trained beside {base} in {config.base_dtype}: load that in this type"]
                )
        else:
            with naming_errors(how.with_base):
                save_model(base_folder, state.params, config.model, how.dtype, run_dir)
            base, base_hash = absolute_path(how.with_base), _hash_of(base_folder)
            methods = _without_trained(methods)
        with naming_errors(out):
            return hf.save_adapter(
                folder,
                state.params,
                state.adapters,
                methods,
                config.model,
                base,
                how.form,
                how.pad_rank,
                how.dtype,
                base_hash,
            )


def advice(said: AdapterConfig) -> list[str]:
    """Returns a sentence for each part of an adapter that vLLM does not serve."""
    found = []
    if said.modules_to_save:
        names = ", ".join(said.modules_to_save)
        found.append(
            f"vLLM takes no adapter with modules_to_save ({names}); --with-base DIR puts them into DIR"
        )
    if said.use_dora:
        found.append("vLLM takes no adapter of DoRA; mora export without --adapter merges it")
    if said.mora_type:
        found.append("only the authors' fork of PEFT, and mora, read files of --format mora")
    elif said.rank_pattern or said.alpha_pattern or said.r not in RANKS:
        way = "--pad-rank" if said.r <= RANKS[-1] else "mora export without --adapter"
        ranks = ", ".join(map(str, RANKS))
        found.append(f"vLLM serves one rank for all modules, of {ranks}, and ignores patterns: use {way}")
    return found


def size_of(folder: str) -> int:
    """Returns the bytes of the weights in a folder."""
    return sum(f.stat().length for f in epath.Path(folder).iterdir() if f.name.endswith(".safetensors"))


def merge_adapters(base: str, adapters: Sequence[tuple[str, float]], out: str, dtype: Any = None) -> int:
    """Merges adapters into a model, tensor by tensor, and writes it as a folder.

    Args:
      base: folder of the model, or its id on the Hub.
      adapters: folders of adapters, or their ids on the Hub, each with its weight.
      out: the folder to write.
      dtype: type of the written tensors; that of the base's by default.

    Returns:
      The number of tensors that were changed.

    Raises:
      InputError: as `mora_jax.hf.merge_adapters` does, for a run, and if another program writes `out`.
    """
    for path in (base, *(adapter for adapter, _ in adapters)):
        if (hf.local_folder(path) / CONFIG).exists():
            how = "mora export RUN OUT" + (" --adapter" if path != base else "")
            raise InputError(f"{path} is a run; export it first: {how}")
    with output_folder(out, "OUT") as folder, naming_errors(out):
        return hf.merge_adapters(base, adapters, folder, dtype)


def _check_base(run_dir: str, config: RunConfig, step: int) -> None:
    """Raises InputError if nobody else has the model that a run's adapters belong to."""
    if not config.init_from:
        why = "it started from random weights"
    elif (hf.local_folder(config.init_from) / CONFIG).exists():
        why = f"it started from the run {config.init_from}"
    elif config.restarts_before(step):
        why = "restarts have merged adapters into it"
    else:
        return
    raise InputError(
        f"nobody else has the base of {run_dir}: {why}; export the merged model, without --adapter, or write "
        f"the base beside it with --with-base DIR"
    )


def _hash_of(base: epath.PathLike, params: Any = None, methods: Methods = Methods(())) -> str:  # noqa: B008
    """Returns the hash of a base's weights, or warns that it is not known.

    Args:
      base: folder of the base, or its id on the Hub.
      params: what a checkpoint of a run that started from it holds.
      methods: what the run does with them.

    Raises:
      InputError: if parameters that the run does not train differ from the base.
    """
    folder = hf.local_folder(base)
    try:
        model = hf.read_config(folder)
        stored = read_weights(folder, model)
        digest = fingerprint(stored)
    except (InputError, OSError) as error:
        warn([f"the adapter does not say which weights it belongs to: {error}"])
        return ""
    flat = trees.flatten(params)
    for name, place in places(model).items():
        held = flat.get(place.path)
        # Checkpoints of older formats hold the base themselves. Others refer to files, which were compared.
        if isinstance(held, jax.Array) and place.path not in methods.trained():
            there, here = stored[name].array(), np.asarray(held[place.index])
            if not np.array_equal(there.astype(here.dtype), here.T if place.transpose else here):
                raise InputError(f"{name} in {base} is not what the run started from; restore that model")
    return digest


def _without_trained(methods: Methods) -> Methods:
    """Returns the methods with trained parameters frozen, for a base that holds their values."""
    return Methods(
        tuple((path, "frozen" if choice == "train" else choice) for path, choice in methods.choices)
    )
