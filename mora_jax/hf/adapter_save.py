"""Adapters written as a Hugging Face folder, PEFT's or that of MoRA's authors, without torch."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mora_jax import trees
from mora_jax.errors import InputError
from mora_jax.hf.adapter_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_HASH,
    PREFIX,
    AdapterConfig,
    file_form,
    in_file,
    module_of,
    name_in_file,
)
from mora_jax.hf.folder import whole_folder
from mora_jax.hf.names import EMBEDDING, HEAD, Place, places
from mora_jax.hf.safetensors import PYTORCH, write_tensors
from mora_jax.hf.weights import finite, write_json
from mora_jax.methods.base import Arrays, Method
from mora_jax.methods.peft import PeftAdapter
from mora_jax.models.llama import LlamaConfig
from mora_jax.on import Axes, On
from mora_jax.transform import Methods, Params, Tree, adapters_of

# The ranks that vLLM serves.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Adapted(NamedTuple):
    """An adapted parameter.

    Attributes:
      tensors: the base's tensors that it makes, one a layer.
      on: its method.
      arrays: the adapter's arrays, of all layers.
      form: what the file holds of one layer, with shapes in the place of tensors.
      forms: returns what the file holds of a layer, from its arrays.
    """

    tensors: Mapping[str, Place]
    on: On
    arrays: Arrays
    form: PeftAdapter
    forms: Callable[[Arrays], PeftAdapter]

    def padded(self, rank: int, scale: float) -> "Adapted":
        """Returns it with one rank and one scale for all kernels."""

        def forms(arrays: Arrays) -> PeftAdapter:
            return self.forms(arrays).padded(rank, scale)

        form = jax.eval_shape(lambda form: form.padded(rank, scale), self.form)
        return self._replace(form=form, forms=forms)


def save_adapter(
    path: epath.PathLike,
    params: Params,
    adapters: Tree,
    methods: Methods,
    config: LlamaConfig,
    base: str,
    form: Literal["peft", "mora"] = "peft",
    pad_rank: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    base_hash: str = "",
) -> AdapterConfig:
    """Writes adapters as a folder that `peft.PeftModel.from_pretrained` reads.

    MoRA with sharing or truncation becomes LoRA of rank r_hat, without loss. Parameters that are trained
    themselves are written as a whole (`modules_to_save`). The folder appears when it is complete. The host
    holds one layer of one array at a time.

    Args:
      path: the folder to make.
      params: the model's parameters; only those that are trained are read.
      adapters: the adapters' arrays.
      methods: what they mean.
      config: the model.
      base: folder or Hub id of the model without adapters, which readers load first.
      form: "peft", or "mora" for the files of MoRA's authors.
      pad_rank: whether to pad all adapters with zeros to one rank that vLLM serves, for readers that ignore
        ranks and alphas of single modules.
      dtype: type of the stored tensors.
      base_hash: hash of the base, written into the file: with another base it is refused.

    Returns:
      What adapter_config.json says.

    Raises:
      InputError: if `path` exists and is not an empty folder, nothing is adapted, or a method has no place in
        such a file, as MoRA with rotation in one of PEFT.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from mora_jax import Llama, LlamaConfig, MoRA, State, save_adapter
      >>> config = LlamaConfig(32, 8, 16, 1, 2, 2)
      >>> params = Llama(config).init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
      >>> rules = [("lm_head/kernel", MoRA(1)), (".*", "frozen")]
      >>> state = State.init(jax.random.key(0), params, rules)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_adapter(f"{folder}/a", params, state.adapters, state.methods, config, base="org/base").r
      6
    """
    adapted = [*_adapted(params, adapters, methods, config, form == "mora")]
    if not adapted:
        raise InputError("nothing is adapted: export the whole model")
    if pad_rank:
        adapted = _padded(adapted, form)
    saved = _saved(methods, config, adapted)
    said = _config(adapted, saved, config)
    with whole_folder(path) as folder:
        metadata = PYTORCH | ({BASE_HASH: base_hash} if base_hash else {})
        _write_tensors(folder / ADAPTER_WEIGHTS, adapted, saved, params, jnp.dtype(dtype), metadata)
        write_json(
            folder / ADAPTER_CONFIG, said.to_json(base, tied=config.tie_word_embeddings and HEAD in saved)
        )
    return said


def _write_tensors(
    file: epath.Path,
    adapted: Sequence[Adapted],
    saved: Mapping[str, Place],
    params: Params,
    dtype: np.dtype,
    metadata: Mapping[str, str],
) -> None:
    specs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in _shapes(adapted, saved)}
    values = itertools.chain(_adapter_tensors(adapted), _saved_tensors(saved, params))
    pairs = zip(specs.items(), values, strict=True)
    write_tensors(file, specs, (finite(name, value, spec.dtype) for (name, spec), value in pairs), metadata)


def _adapted(
    params: Params, adapters: Tree, methods: Methods, config: LlamaConfig, authors: bool
) -> Iterator[Adapted]:
    """Yields every adapted parameter. Raises InputError for one that has no place in the file."""
    known = places(config)
    shapes = {path: leaf.shape for path, leaf in trees.flatten(params).items()}
    for path, on, arrays in adapters_of(params, adapters, methods):
        here = {name: place for name, place in known.items() if place.path == path}
        if (
            not all(place.transpose for place in here.values())
            or not here
            or not _is_natural(on, shapes[path])
        ):
            raise InputError(
                f"{path} is no linear layer of the model, adapted as such: it has no place in a file"
            )
        axes = on.axes(shapes[path])
        try:
            form = file_form(on.method, authors, axes.k, axes.d)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        yield Adapted(here, on, arrays, form, _forms(on.method, authors, axes))


def _forms(method: Method, authors: bool, axes: Axes) -> Callable[[Arrays], PeftAdapter]:
    return lambda arrays: in_file(method, authors, arrays, axes.k, axes.d)


def _is_natural(on: On, shape: Sequence[int]) -> bool:
    """Returns whether a method sees a kernel (..., in, out) as one, with layers as its stack."""
    axes = on.axes(shape)
    return (*axes.stack, *axes.inputs, *axes.outputs) == (*range(len(shape)),) and len(axes.inputs) == 1


def _padded(adapted: Sequence[Adapted], form: str) -> list[Adapted]:
    """Returns all adapters with one rank, one that vLLM serves, and one scale."""
    if form == "mora":
        raise InputError("ranks are padded in files of LoRA's form only, and the authors' have M's side")
    most = max(a.form.rank for a in adapted)
    if most > RANKS[-1]:
        raise InputError(
            f"vLLM serves ranks up to {RANKS[-1]}, not {most}: merge the adapter and export the whole model"
        )
    rank = next(rank for rank in RANKS if rank >= most)
    scales = {a.form.scale for a in adapted}
    return [a.padded(rank, scales.pop() if len(scales) == 1 else 1.0) for a in adapted]


def _saved(methods: Methods, config: LlamaConfig, adapted: Sequence[Adapted]) -> dict[str, Place]:
    """Returns the tensors of the modules that are trained themselves, and of a head tied to one of them."""
    known, trained = places(config), methods.trained()
    modules = {module_of(name) for name, place in known.items() if place.path in trained}
    if both := modules & {module_of(name) for a in adapted for name in a.tensors}:
        raise InputError(
            f"{min(both)} is adapted, and its bias is trained, which has no place in a file: merge them and "
            f"export the whole model"
        )
    saved = {name: place for name, place in known.items() if module_of(name) in modules}
    tied = config.tie_word_embeddings and EMBEDDING in saved
    return saved | ({HEAD: known[EMBEDDING]} if tied else {})


def _config(adapted: Sequence[Adapted], saved: Mapping[str, Place], config: LlamaConfig) -> AdapterConfig:
    """Returns what is said of the adapters; ranks and alphas that are not the largest rank's are patterns."""
    forms = [a.form for a in adapted]
    if len({form.dora for form in forms}) > 1:
        raise InputError("DoRA and other methods have no place in one file: merge and export the whole model")
    if len({form.mora_type for form in forms}) > 1:
        raise InputError(
            "the authors' files have one mora_type, and the operators differ from kernel to kernel"
        )
    rslora = all(form.rslora for form in forms)
    alphas = [form.alpha if form.rslora == rslora else form.scale * form.rank for form in forms]
    largest = max(range(len(forms)), key=lambda i: forms[i].rank)
    rank, alpha = forms[largest].rank, alphas[largest]
    modules = [*dict.fromkeys(module_of(name) for name in places(config))]
    ends = [_end(map(module_of, a.tensors), modules) for a in adapted]
    groups: dict[str, list[str]] = {}
    for name, place in saved.items():
        if name in places(config):
            groups.setdefault(place.path.rpartition("/")[0], []).append(module_of(name))
    return AdapterConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=tuple(ends),
        lora_dropout=adapted[largest].on.method.dropout,
        use_rslora=rslora,
        use_dora=forms[0].dora,
        rank_pattern={end: form.rank for end, form in zip(ends, forms, strict=True) if form.rank != rank},
        alpha_pattern={end: a for end, a in zip(ends, alphas, strict=True) if a != alpha},
        modules_to_save=tuple(_end(group, modules) for group in groups.values()),
        mora_type=forms[0].mora_type,
    )


def _end(wanted: Iterable[str], modules: Sequence[str]) -> str:
    """Returns the shortest end of names that some modules have, one of each layer, and no others."""
    wanted = set(wanted)
    parts = min(wanted).split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
    return next(end for end in ends if {m for m in modules if m.endswith(end)} == wanted)


def _shapes(adapted: Sequence[Adapted], saved: Mapping[str, Place]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields names and shapes of the file's tensors, in the order of their values."""
    for a in adapted:
        for name in a.tensors:
            for n, tensor in a.form.tensors.items():
                yield PREFIX + name_in_file(module_of(name), n), tensor.shape
    for name, place in saved.items():
        yield PREFIX + name, place.shape


def _adapter_tensors(adapted: Sequence[Adapted]) -> Iterator[np.ndarray]:
    for a in adapted:
        for place in a.tensors.values():
            layer: Any = {name: np.asarray(array[place.index]) for name, array in a.arrays.items()}
            tensors = a.forms(layer).tensors
            yield from (np.asarray(tensors[n]) for n in a.form.tensors)


def _saved_tensors(saved: Mapping[str, Place], params: Params) -> Iterator[np.ndarray]:
    flat = trees.flatten(params)
    for place in saved.values():
        array = np.asarray(flat[place.path][place.index])
        yield array.T if place.transpose else array
