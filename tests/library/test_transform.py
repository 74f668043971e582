"""The transform over parameter trees: stacked and single kernels, merge, restart, labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax import transform, trees
from mora_jax.errors import InputError
from mora_jax.methods import Bound, LoRA, MoRA, Share
from mora_jax.on import On, choice_from_json
from mora_jax.transform import Group, Methods

RULES = [
    ("layers/q/kernel", MoRA(4, Share(0), align=8)),
    ("layers/up/kernel", LoRA(3, alpha=6.0)),
    ("head/kernel", MoRA(4, Share(1))),
    ("norm/scale", "train"),
    (".*", "frozen"),
]


def random_tree(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return trees.unflatten(
        {n: 0.3 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    )


PARAMS = random_tree(
    0,
    {
        "layers/q/kernel": (3, 16, 16),
        "layers/up/kernel": (3, 16, 24),
        "head/kernel": (16, 20),
        "norm/scale": (16,),
        "embed/table": (20, 16),
    },
)


def randomised(adapters: dict, seed: int = 1) -> dict:
    """Adapters as after some training; zeros stay where m is padded."""
    flat = trees.flatten(adapters)
    keys = jax.random.split(jax.random.key(seed), len(flat))
    noisy = {n: a + 0.3 * jax.random.normal(k, a.shape) for k, (n, a) in zip(keys, flat.items(), strict=True)}
    r = MoRA(4).r_hat(16, 16)
    padded = noisy["layers/q/kernel/m_RR"]
    noisy["layers/q/kernel/m_RR"] = jnp.zeros_like(padded).at[:, :r, :r].set(padded[:, :r, :r])
    return trees.unflatten(noisy)


@pytest.fixture
def methods() -> Methods:
    return transform.assign(RULES, PARAMS, stacked="layers/.*")


@pytest.fixture
def adapters(methods) -> dict:
    return randomised(transform.attach(jax.random.key(2), PARAMS, methods))


def test_assign_names_a_kernel_that_is_none():
    with pytest.raises(InputError, match=r"mora adapts kernels.*'norm/scale' has shape \(16,\)"):
        transform.assign([("norm/scale", MoRA(4)), (".*", "frozen")], PARAMS)


@pytest.mark.parametrize("path", ["layers/norm/scale", "embed/embedding"])
def test_stacked_norms_and_embeddings_are_no_kernels(path):
    params = trees.unflatten({path: jnp.ones((3, 16))})
    with pytest.raises(InputError, match=f"adapts kernels.*'{path}'"):
        transform.assign([(".*", MoRA(4))], params)


def test_adapters_hold_arrays_and_nothing_else(adapters):
    assert sorted(trees.flatten(adapters)) == [
        "head/kernel/m_RR",
        "layers/q/kernel/m_RR",
        "layers/up/kernel/a_KR",
        "layers/up/kernel/b_RD",
    ]
    assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(adapters))


def test_stacked_layers_start_differently(methods):
    a_LKR = transform.attach(jax.random.key(2), PARAMS, methods)["layers"]["up"]["kernel"]["a_KR"]
    assert a_LKR.shape == (3, 16, 3)
    assert not np.allclose(a_LKR[0], a_LKR[1])


def test_kernels_of_one_shape_start_differently():
    params = {"q": {"kernel": jnp.ones((16, 16))}, "k": {"kernel": jnp.ones((16, 16))}}
    methods = transform.assign([(".*", LoRA(3))], params)
    adapters = transform.attach(jax.random.key(2), params, methods)
    assert not np.allclose(adapters["q"]["kernel"]["a_KR"], adapters["k"]["kernel"]["a_KR"])


def test_bind_puts_methods_beside_their_arrays(adapters, methods):
    bound = transform.bind(PARAMS, adapters, methods)["layers"]["q"]["kernel"]
    assert isinstance(bound, Bound)
    assert bound.method == RULES[0][1]
    kernel, array = jax.tree.leaves(bound)
    np.testing.assert_array_equal(kernel, PARAMS["layers"]["q"]["kernel"])
    np.testing.assert_array_equal(array, adapters["layers"]["q"]["kernel"]["m_RR"])


@pytest.mark.slow  # test_methods.py merges stacks of every method
def test_merge_of_a_stack_is_a_loop_over_its_layers(adapters, methods):
    merged = transform.merge(PARAMS, adapters, methods)
    for path, method in methods.adapted():
        w, arrays = trees.flatten(PARAMS)[path], adapters
        for part in path.split("/"):
            arrays = arrays[part]
        stacked = w.ndim == 3
        layers = range(w.shape[0]) if stacked else [...]
        for i in layers:
            expected = method.weight(jax.tree.map(lambda a, i=i: a[i], arrays), w[i])
            np.testing.assert_allclose(trees.flatten(merged)[path][i], expected, atol=1e-6)
            assert float(jnp.abs(expected - w[i]).max()) > 0.05
    np.testing.assert_array_equal(merged["norm"]["scale"], PARAMS["norm"]["scale"])


def test_a_merge_adds_in_float32_and_rounds_once(adapters, methods):
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    merged = transform.merge(rounded, adapters, methods)
    again = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    for path, leaf in trees.flatten(transform.merge(again, adapters, methods)).items():
        np.testing.assert_array_equal(trees.flatten(merged)[path], leaf.astype(jnp.bfloat16), err_msg=path)


def test_a_restart_changes_no_weight_and_switches_the_group_type(adapters, methods):
    params, fresh, after = transform.restart(jax.random.key(3), PARAMS, adapters, methods)
    before = transform.merge(PARAMS, adapters, methods)
    now = transform.merge(params, fresh, after)
    for path, leaf in trees.flatten(before).items():
        np.testing.assert_allclose(trees.flatten(now)[path], leaf, atol=1e-6)
    assert after["layers/q/kernel"] == On(MoRA(4, Share(1), align=8), stack=(0,))
    assert after["head/kernel"] == MoRA(4, Share(0))
    assert after["layers/up/kernel"] == methods["layers/up/kernel"]
    assert not np.asarray(fresh["head"]["kernel"]["m_RR"]).any()
    assert after.after_restart() == methods


def test_labels_cover_the_trainable_leaves_alone(adapters, methods):
    trainable, frozen = transform.partition(PARAMS, adapters, methods)
    labels = transform.labels(PARAMS, adapters, methods)
    assert jax.tree.structure(labels) == jax.tree.structure(trainable)
    assert trees.flatten(labels)["params/norm/scale"] == Group(adapter=False)
    assert trees.flatten(labels)["adapters/head/kernel/m_RR"] == Group(adapter=True)
    assert sorted(trees.flatten(frozen)) == [
        "params/embed/table",
        "params/head/kernel",
        "params/layers/q/kernel",
        "params/layers/up/kernel",
    ]
    whole = trees.combine(trainable, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure({"params": PARAMS, "adapters": adapters})


def test_methods_survive_json(methods):
    assert Methods.from_json(methods.to_json()) == methods


def test_a_choice_that_is_none_is_refused():
    with pytest.raises(InputError, match="'train', 'frozen' or a method, not 'trian'"):
        choice_from_json("trian")


def test_methods_cause_one_compilation_for_each_group_type(adapters, methods):
    compiled = 0

    def forward(methods, adapters, x):
        nonlocal compiled
        compiled += 1
        return x @ transform.merge(PARAMS, adapters, methods)["head"]["kernel"]

    forward = jax.jit(forward, static_argnums=0)
    for _ in range(10):
        forward(methods, adapters, jnp.ones((2, 16)))
        methods = methods.after_restart()
    assert compiled == 2
