"""Adapters of a model of one's own as a file, and what is refused when it is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mora_jax import InputError, LoRA, MoRA, On, State, load, save, trees

PARAMS = {
    "query": jax.random.normal(jax.random.key(0), (8, 2, 4)),
    "layers": [jnp.ones((8, 8)), jnp.ones((8, 8), jnp.bfloat16)],
    "scale": jnp.ones(()),
}
RULES = [
    ("query", On(MoRA(2), inputs=(0,))),
    ("layers/0", LoRA(2, train_factors="b")),
    ("scale", "train"),
    (".*", "frozen"),
]


@pytest.fixture
def state() -> State:
    state = State.init(jax.random.key(1), PARAMS, RULES)
    moved = jax.tree.map(lambda a: a + jax.random.normal(jax.random.key(a.size), a.shape), state.trainable)
    return state.with_trainable(moved)


@pytest.fixture
def file(tmp_path, state):
    save(tmp_path / "adapters.safetensors", state)
    return tmp_path / "adapters.safetensors"


def test_what_is_saved_is_loaded(file, state):
    again = load(file, PARAMS)
    assert again.methods == state.methods
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for got, expected in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def test_the_file_holds_no_frozen_parameter_and_is_one_that_others_read(file):
    assert sorted(load_file(file)) == [
        "adapters/layers/0/a_KR",
        "adapters/layers/0/b_RD",
        "adapters/query/m_RR",
        "params/scale",
    ]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_file_that_cannot_be_written_leaves_the_old_one(file, state, monkeypatch):
    content = file.read_bytes()
    monkeypatch.setattr("mora_jax.adapter_file.write_tensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(file, state)
    assert file.read_bytes() == content
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def changed(path: str, leaf):
    return trees.replaced(PARAMS, {path: leaf})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (changed("query", PARAMS["query"] + 1), "beside other values of query; after a restart"),
        (changed("query", jnp.ones((8, 4, 4))), "beside other values of query"),
        ({**PARAMS, "extra": jnp.ones(2)}, "beside other parameters: they differ in extra"),
        (changed("scale", jnp.ones(2)), "beside other parameters: they differ in params/scale"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(file, params, message):
    with pytest.raises(InputError, match=message):
        load(file, params)


def test_files_that_are_none_of_ours_are_refused(tmp_path, file):
    from safetensors.numpy import save_file

    other = tmp_path / "other.safetensors"
    save_file({"w": np.ones(2, np.float32)}, other)
    with pytest.raises(InputError, match=r"other\.safetensors holds no adapters that mora_jax\.save"):
        load(other, PARAMS)
    with pytest.raises(InputError, match="missing"):
        load(tmp_path / "nothing.safetensors", PARAMS)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match="damaged"):
        load(file, PARAMS)
