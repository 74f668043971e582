"""The table of names: which tensors of a Hugging Face folder make which parameter of `Llama`.

One table serves every architecture. A model has the entries whose parameters it has.
"""

import functools
import re
from typing import NamedTuple, TypeAlias

from mora_jax.errors import InputError, nearest, some
from mora_jax.models.llama import LlamaConfig, abstract_params
from mora_jax.trees import flatten

Shapes: TypeAlias = dict[str, tuple[int, ...]]

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Name(NamedTuple):
    """A parameter's two names.

    Attributes:
      path: in the tree of parameters.
      tensor: in the files; `{}` stands for the layer, the leading axis of our stacked array.
      transpose: whether the file holds (out, in) where we hold (in, out).
    """

    path: str
    tensor: str
    transpose: bool


def _layer(path: str, tensor: str, transpose: bool = False) -> Name:
    return Name(f"layers/{path}", f"model.layers.{{}}.{tensor}", transpose)


def _linear(module: str) -> tuple[Name, Name]:
    path = module.replace(".", "/")
    return (
        _layer(f"{path}/kernel", f"{module}.weight", True),
        _layer(f"{path}/bias", f"{module}.bias"),
    )


# In the order of the files.
NAMES = (
    Name("embed_tokens/embedding", EMBEDDING, False),
    _layer("input_layernorm/scale", "input_layernorm.weight"),
    *_linear("self_attn.q_proj"),
    *_linear("self_attn.k_proj"),
    *_linear("self_attn.v_proj"),
    *_linear("self_attn.o_proj"),
    _layer("self_attn/q_norm/scale", "self_attn.q_norm.weight"),
    _layer("self_attn/k_norm/scale", "self_attn.k_norm.weight"),
    _layer("post_attention_layernorm/scale", "post_attention_layernorm.weight"),
    *_linear("mlp.gate_proj"),
    *_linear("mlp.up_proj"),
    *_linear("mlp.down_proj"),
    _layer("post_feedforward_layernorm/scale", "post_feedforward_layernorm.weight"),
    Name("norm/scale", "model.norm.weight", False),
    Name("lm_head/kernel", HEAD, True),
)
_BY_PATH = {name.path: name for name in NAMES}


class Place(NamedTuple):
    """Where one tensor belongs.

    Attributes:
      path: of the parameter.
      index: of the layer within the stacked parameter; empty where nothing is stacked.
      transpose: whether the file holds it transposed.
      shape: in the file.
    """

    path: str
    index: tuple[int, ...]
    transpose: bool
    shape: tuple[int, ...]


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: LlamaConfig) -> Shapes:
    """Returns the shape of every parameter of a model, by path."""
    return {path: leaf.shape for path, leaf in flatten(abstract_params(config)).items()}


def places(config: LlamaConfig) -> dict[str, Place]:
    """Returns the place of every tensor of a model, by the tensor's name, in the order of the files."""
    shapes = parameter_shapes(config)
    found = {}
    for path, tensor, transpose in NAMES:
        if path not in shapes:
            continue
        stacked = "{}" in tensor
        shape = shapes[path][1:] if stacked else shapes[path]
        shape = shape[::-1] if transpose else shape
        for layer in range(config.num_hidden_layers) if stacked else [None]:
            index = () if layer is None else (layer,)
            found[tensor.format(layer)] = Place(path, index, transpose, shape)
    return found


def compare_shapes(found: Shapes, expected: Shapes, what: str) -> None:
    """Raises InputError, which begins with `what`, unless the names and the shapes are the expected ones."""
    wrong = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": wrong,
    }
    message = "; ".join(f"{fault}: {some(names)}" for fault, names in faults.items() if names)
    if message:
        raise InputError(f"{what}: {message}")


def tensors(path: str, layers: int) -> list[str]:
    """Returns the tensors of a parameter: one of each layer if it is stacked, else one.

    Args:
      path: of the parameter.
      layers: layers of the model.

    Raises:
      InputError: if no architecture has the parameter.

    Example:
      >>> tensors("layers/mlp/up_proj/kernel", 2)
      ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight']
    """
    if path not in _BY_PATH:
        raise InputError(f"no Hugging Face tensor is known for {path!r}{nearest(path, _BY_PATH)}")
    tensor = _BY_PATH[path].tensor
    return [tensor.format(layer) for layer in range(layers)] if "{}" in tensor else [tensor]


def modules(path: str, layers: int) -> list[str]:
    """Returns the modules that hold the tensors of a parameter, as `tensors` orders them.

    Raises:
      InputError: if no architecture has the parameter.

    Example:
      >>> modules("lm_head/kernel", 2)
      ['lm_head']
    """
    return [tensor.rpartition(".")[0] for tensor in tensors(path, layers)]


def parameter(tensor: str) -> tuple[str, int | None]:
    """Returns the path of the parameter that a tensor belongs to, and its layer; None if nothing is stacked.

    Raises:
      InputError: if no architecture has the tensor.

    Example:
      >>> parameter("model.layers.3.self_attn.q_proj.weight")
      ('layers/self_attn/q_proj/kernel', 3)
    """
    for name in NAMES:
        before, stacked, after = name.tensor.partition("{}")
        layer = r"(0|[1-9]\d*)" if stacked else ""
        if found := re.fullmatch(re.escape(before) + layer + re.escape(after), tensor):
            return name.path, int(found[1]) if stacked else None
    raise InputError(f"no parameter is known for the Hugging Face tensor {tensor!r}")
