"""The table of names: which tensors of a Hugging Face folder make which parameter of `Llama`."""

import functools
from typing import NamedTuple, TypeAlias

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


# In the order of the files.
NAMES = (
    Name("embed_tokens/embedding", EMBEDDING, False),
    Name("layers/input_layernorm/scale", "model.layers.{}.input_layernorm.weight", False),
    Name("layers/self_attn/q_proj/kernel", "model.layers.{}.self_attn.q_proj.weight", True),
    Name("layers/self_attn/k_proj/kernel", "model.layers.{}.self_attn.k_proj.weight", True),
    Name("layers/self_attn/v_proj/kernel", "model.layers.{}.self_attn.v_proj.weight", True),
    Name("layers/self_attn/o_proj/kernel", "model.layers.{}.self_attn.o_proj.weight", True),
    Name("layers/post_attention_layernorm/scale", "model.layers.{}.post_attention_layernorm.weight", False),
    Name("layers/mlp/gate_proj/kernel", "model.layers.{}.mlp.gate_proj.weight", True),
    Name("layers/mlp/up_proj/kernel", "model.layers.{}.mlp.up_proj.weight", True),
    Name("layers/mlp/down_proj/kernel", "model.layers.{}.mlp.down_proj.weight", True),
    Name("norm/scale", "model.norm.weight", False),
    Name("lm_head/kernel", HEAD, True),
)


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
        if path not in shapes:  # a tied head
            continue
        stacked = "{}" in tensor
        shape = shapes[path][1:] if stacked else shapes[path]
        shape = shape[::-1] if transpose else shape
        for layer in range(config.num_hidden_layers) if stacked else [None]:
            index = () if layer is None else (layer,)
            found[tensor.format(layer)] = Place(path, index, transpose, shape)
    return found
