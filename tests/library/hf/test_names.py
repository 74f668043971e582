"""The table of names, from paths to tensors and back."""

import pytest
from hf_folders import CONFIG

from mora_jax.errors import InputError
from mora_jax.hf.names import NAMES, modules, parameter, parameter_shapes, places, tensors


def test_every_tensor_leads_back_to_its_parameter():
    for name in NAMES:
        found = tensors(name.path, 12)
        assert [parameter(tensor)[0] for tensor in found] == [name.path] * len(found)
        assert [parameter(tensor)[1] for tensor in found] == (list(range(12)) if len(found) > 1 else [None])


def test_a_model_has_the_entries_whose_parameters_it_has():
    shapes = parameter_shapes(CONFIG)
    expected = [tensor for n in NAMES if n.path in shapes for tensor in tensors(n.path, 3)]
    assert list(places(CONFIG)) == expected
    assert modules("layers/self_attn/o_proj/kernel", 2)[1] == "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize(
    "tensor", ["model.layers.01.mlp.up_proj.weight", "model.layers.mlp.up_proj.weight", "lm_head.weight2"]
)
def test_unknown_tensors_are_refused(tensor):
    with pytest.raises(InputError, match="no parameter is known"):
        parameter(tensor)


def test_unknown_paths_are_refused_with_the_nearest():
    with pytest.raises(InputError, match="did you mean layers/mlp/up_proj/kernel"):
        tensors("layers/mlp/upproj/kernel", 1)
