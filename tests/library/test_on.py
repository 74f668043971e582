"""`On`: kernels of any layout as matrices, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import quick

from mora_jax import LoRA, MoRA, On, assign, attach, describe, merge, singular_values
from mora_jax.errors import InputError
from mora_jax.report import count_trained
from mora_jax.transform import Methods

# How a kernel is laid out, and the einsum of an input with one kernel of it.
LAYOUTS = {
    "(in, out)": ((6, 10), On(MoRA(2)), "bi,io->bo"),
    "(out, in)": ((10, 6), On(MoRA(2), inputs=(1,)), "bi,oi->bo"),
    "query": ((6, 2, 5), On(MoRA(2), inputs=(0,)), "bi,inh->bnh"),
    "output": ((2, 5, 6), On(MoRA(2), inputs=(0, 1)), "bnh,nhi->bi"),
    "gemma": ((2, 6, 5), On(MoRA(2), inputs=(1,)), "bi,nih->bnh"),
    "other order": ((2, 5, 6), On(MoRA(2), inputs=(1, 0)), "bnh,nhi->bi"),
}


@pytest.mark.parametrize("name", quick(["(out, in)", "query", "other order"], LAYOUTS))
def test_matrices_multiply_flattened_inputs_as_the_kernel_does(name):
    shape, on, formula = LAYOUTS[name]
    axes = on.axes(shape)
    w = jax.random.normal(jax.random.key(0), shape)
    inputs = axes.sizes(sorted(axes.inputs))
    x = jax.random.normal(jax.random.key(1), (3, *inputs))
    order = [sorted(axes.inputs).index(axis) for axis in axes.inputs]
    flat = jnp.transpose(x, (0, *(1 + i for i in order))).reshape(3, -1)
    expected = jnp.einsum(formula, x, w).reshape(3, -1)
    np.testing.assert_allclose(flat @ axes.matrices(w), expected, atol=1e-5)
    np.testing.assert_array_equal(axes.kernel(axes.matrices(w)), w)


def test_a_stack_counts_kernels_wherever_its_axis_is():
    w = jax.random.normal(jax.random.key(0), (6, 3, 10))
    axes = On(LoRA(2), inputs=(0,), stack=(1,)).axes(w.shape)
    assert axes.describe() == "3 x (6, 10)"
    np.testing.assert_array_equal(axes.matrices(w)[2], w[:, 2])
    np.testing.assert_array_equal(axes.kernel(axes.matrices(w)), w)


def test_a_query_kernel_trains_what_its_matrix_has_and_not_a_stack_of_heads():
    on = On(LoRA(8), inputs=(0,))
    assert count_trained(on, (768, 12, 64)) == 8 * (768 + 768)
    params = {"query": jnp.ones((768, 12, 64))}
    adapters = attach(jax.random.key(0), params, assign([("query", on)], params))
    assert jax.tree.map(jnp.shape, adapters) == {"query": {"a_KR": (768, 8), "b_RD": (8, 768)}}


@pytest.mark.slow
def test_singular_values_are_those_of_the_matrix_as_the_method_sees_it():
    params = {"query": jnp.zeros((12, 3, 4))}
    methods = assign([("query", On(LoRA(2), inputs=(0,)))], params)
    noise = attach(jax.random.key(0), params, methods)
    noise["query"]["b_RD"] = jax.random.normal(jax.random.key(1), (2, 12))
    values = singular_values(params, merge(params, noise, methods), methods)["query"]
    assert values.shape == (12,)
    assert int(jnp.sum(values > 1e-4 * values[0])) == 2


@pytest.mark.parametrize(
    ("path", "shape", "choice", "message"),
    [
        (
            "q/kernel",
            (8, 2, 4),
            MoRA(2),
            r"'q/kernel' has shape \(8, 2, 4\): name its axes, as in On\(method",
        ),
        ("q/bias", (8,), MoRA(2), r"'q/bias' has shape \(8,\)"),
        ("norm/scale", (4, 8), LoRA(2), "'norm/scale' has shape"),
        ("embed/embedding", (9, 8), LoRA(2), "'embed/embedding' has shape"),
        ("conv/kernel", (4, 4, 1, 8), MoRA(2), "'conv/kernel' has shape"),
        ("w", (8, 8), MoRA, "a rule's choice is a Method, On.*, 'train' or 'frozen', not <class"),
        ("w", (8, 8), "mora", "'train' or 'frozen', not 'mora'"),
        ("w", (8, 8), "freeze", "'train' or 'frozen', not 'freeze'"),
        (
            "w",
            (8, 8),
            On(MoRA(2), inputs=(2,)),
            r"w: On\(mora.*names an axis that a kernel of shape \(8, 8\)",
        ),
        ("w", (8, 8), On(MoRA(2), inputs=(0,), stack=(0,)), "w: On.*twice"),
        ("w", (8, 8), On(MoRA(2), inputs=(0, 1)), "w: On.*leaves no axis for the outputs"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_path(path, shape, choice, message):
    head, _, name = path.rpartition("/")
    params = {head: {name: jnp.ones(shape)}} if head else {name: jnp.ones(shape)}
    with pytest.raises(InputError, match=message):
        assign([(path, choice)], params)


def test_an_operator_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"MoRA's operator is one of .*Share\(\).*, not 'share'"):
        MoRA(8, "share")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "arguments", [{"method": MoRA}, {"method": MoRA(2), "inputs": 0}, {"method": "mora"}]
)
def test_on_takes_a_method_and_tuples_of_axes(arguments):
    with pytest.raises(InputError, match="On"):
        On(**arguments)


def test_choices_with_axes_survive_json():
    params = {"q": jnp.ones((3, 8, 2, 4)), "w": jnp.ones((8, 8)), "b": jnp.ones(8)}
    rules = [("q", On(MoRA(2, align=8), inputs=(1,), stack=(0,))), ("w", LoRA(2)), ("b", "train")]
    methods = assign(rules, params)
    assert Methods.from_json(methods.to_json()) == methods
    assert dict(methods.after_restart().choices)["q"].stack == (0,)


def test_describe_says_how_every_parameter_is_seen():
    params = {"q": jnp.ones((3, 8, 2, 4)), "w": jnp.ones((8, 8)), "b": jnp.ones(8)}
    rules = [("q", On(MoRA(2), inputs=(1,), stack=(0,))), ("w", "frozen"), ("b", "train")]
    lines = [line.split() for line in describe(params, assign(rules, params)).splitlines()]
    assert lines[1] == ["b", "(8,)", "train", "8"]
    assert " ".join(lines[2]) == "q (3, 8, 2, 4) 3 x (8, 8) mora r 2, r_hat 5 75"
    assert " ".join(lines[3]) == "w (8, 8) frozen 0"
    assert " ".join(lines[4]) == "total 83 of 264"
