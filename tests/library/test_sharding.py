"""The mesh, where arrays lie on it, and data parallelism: four devices compute what one does."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from slow import slow

from mora_jax import sharding, trees
from mora_jax.errors import InputError
from mora_jax.methods import METHODS, DoRA, MoRA
from mora_jax.models.batch import Batch
from mora_jax.models.llama import LAYOUTS, RESIDUAL_PARTS, Llama
from mora_jax.transform import Methods
from train.config import flags
from train.config.sections import Mesh
from train.jobs import pretrain as loop
from train.run.metrics import read_metrics
from train.run.model import load_model
from train.run.state import abstract_state, assign_methods, fresh_state
from train.step.spec import spec_of
from train.step.state import init_params, init_state
from train.step.step import eval_step

RULES = (
    *LAYOUTS,
    *((name, leaf.layout) for method in (MoRA(), DoRA()) for name, leaf in method.leaves().items()),
)
BATCHED = sharding.Layout((P(sharding.BATCH, None, None),))


@pytest.fixture(scope="module")
def four(tiny_run, tmp_path_factory):
    """The tiny run on four devices."""
    config = dataclasses.replace(
        tiny_run.config,
        run_dir=str(tmp_path_factory.mktemp("four") / "run"),
        mesh=dataclasses.replace(tiny_run.config.mesh, data=4),
    )
    loop.pretrain(config)
    return config


def numbers(folder: str, name: str) -> list[float]:
    return [line[name] for line in read_metrics(f"{folder}/metrics.jsonl") if name in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "validation_loss"])
def test_four_devices_equal_one(tiny_run, four, name):
    ours, theirs = numbers(four.run_dir, name), numbers(str(tiny_run.folder), name)
    assert len(ours) == len(theirs) > 1
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.slow
def test_four_devices_train_the_same_weights(tiny_run, four):
    ours, theirs = (trees.flatten(load_model(str(f))[0]) for f in (four.run_dir, tiny_run.folder))
    for path, leaf in ours.items():
        np.testing.assert_allclose(leaf, theirs[path], atol=1e-5, err_msg=path)


def test_a_batch_is_divided_and_the_state_is_whole_on_each():
    mesh = sharding.make_mesh(4)
    x_BT = jnp.arange(32.0).reshape(8, 4)
    parts = jax.device_put(x_BT, sharding.batch(mesh)).addressable_shards
    assert [part.data.shape for part in parts] == [(2, 4)] * 4
    np.testing.assert_array_equal(np.concatenate([part.data for part in parts]), x_BT)
    copies = jax.device_put(x_BT, sharding.replicated(mesh)).addressable_shards
    assert [copy.data.shape for copy in copies] == [(8, 4)] * 4


def test_each_device_computes_its_own_part(tiny_yaml):
    """What is compiled for each of four devices holds the products of a quarter of the batch."""
    config = flags.read_config(str(tiny_yaml))
    model = Llama(config.model, config.compute)
    flops = {}
    for devices in (1, 4):
        mesh = sharding.make_mesh(devices)
        state = abstract_state(config, assign_methods(config), mesh)
        tokens = jax.ShapeDtypeStruct((64, 32), jnp.int32, sharding=sharding.batch(mesh))
        weights = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding.batch(mesh))
        compiled = eval_step.lower(model, Methods(()), state.params, {}, Batch(tokens, weights)).compile()
        flops[devices] = compiled.cost_analysis()["flops"]
    assert 0.2 * flops[1] < flops[4] < 0.4 * flops[1]


def test_the_sizes_of_a_mesh():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh(1, -1, 2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert sharding.make_mesh(2, 1, 1).devices.size == 2
    for sizes, message in [
        ((64, 1, 1), r"mesh\.data 64 needs 64 devices; 8 \(cpu\) are here"),
        ((4, 2, 2), r"mesh\.data 4, mesh\.fsdp 2, mesh\.tensor 2 needs 16 devices"),
        ((-1, 3, 1), r"mesh\.data -1: 8 devices do not divide by the other axes' 3"),
    ]:
        with pytest.raises(InputError, match=message):
            sharding.make_mesh(*sizes)


def test_one_size_alone_may_be_what_is_left():
    with pytest.raises(InputError, match=r"only one of mesh\.data, mesh\.fsdp, mesh\.tensor may be -1"):
        Mesh(-1, -1)
    with pytest.raises(InputError, match=r"mesh\.tensor must be at least 1"):
        Mesh(tensor=0)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What of a device the layout of a mesh looks at."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "made up"


# Neighbours in number lie in different slices.
CHIPS = [Chip(i, i // 2, i % 2, (i // 2 % 2, i // 4, 0)) for i in range(8)]


@pytest.mark.parametrize(
    ("sizes", "one_slice"),
    [((2, 4, 1), [(0, slice(None), 0)]), ((2, 2, 2), [(0,)]), ((1, 8, 1), [(0, slice(4), 0)])],
    ids=str,
)
def test_slices_are_bridged_by_data_and_else_by_fsdp(sizes, one_slice):
    devices = sharding.make_mesh(*sizes, devices=CHIPS).devices
    for part in one_slice:
        assert {chip.slice_index for chip in devices[part].flat} == {0}
    assert {chip.id for chip in devices.flat} == set(range(8))


def test_slices_are_used_evenly():
    with pytest.raises(InputError, match="3 devices does not divide into 2 slices"):
        sharding.make_mesh(1, 3, 1, devices=[dataclasses.replace(c, process_index=0) for c in CHIPS])


SIZES = {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize(
    ("name", "shape", "sizes", "expected"),
    [
        ("params/layers/self_attn/q_proj/kernel", (24, 2048, 2048), (1, 8, 1), P(None, "fsdp")),
        ("params/layers/self_attn/q_proj/kernel", (24, 2048, 2048), (1, 2, 4), P(None, "fsdp", "tensor")),
        ("params/layers/mlp/up_proj/kernel", (24, 2048, 5461), (1, 2, 4), P(None, ("fsdp", "tensor"))),
        ("params/layers/mlp/down_proj/kernel", (24, 5461, 2048), (1, 8, 1), P(None, None, "fsdp")),
        ("layers/mlp/down_proj/kernel", (5461, 2048), (4, 2, 1), P(None, "fsdp")),
        ("layers/self_attn/o_proj/kernel", (2048, 2048), (1, 2, 4), P("tensor", "fsdp")),
        ("params/embed_tokens/embedding", (32100, 2048), (1, 4, 2), P("tensor", "fsdp")),
        ("params/embed_tokens/embedding", (32100, 2048), (1, 1, 8), P(None, "tensor")),
        ("params/lm_head/kernel", (2048, 32100), (1, 8, 1), P("fsdp")),
        ("params/norm/scale", (2048,), (1, 8, 1), P()),
        ("params/layers/input_layernorm/scale", (24, 2048), (1, 8, 1), P()),
        ("adapters/layers/mlp/up_proj/kernel/m_RR", (24, 1024, 1024), (2, 2, 2), P(None, "fsdp", "tensor")),
        ("adapters/layers/mlp/up_proj/kernel/a_KR", (24, 2048, 12), (1, 8, 1), P(None, "fsdp")),
        ("adapters/layers/mlp/up_proj/kernel/b_RD", (24, 16, 5461), (1, 8, 1), P(None, "fsdp")),
        ("adapters/layers/mlp/up_proj/kernel/magnitude_D", (24, 5461), (1, 8, 1), P()),
        ("opt_state/inner_states/adapter/inner_state/0/mu/adapters/layers/mlp/up_proj/kernel/m_RR",
         (24, 1024, 1024), (1, 8, 1), P(None, "fsdp")),
        ("opt_state/inner_states/adapter/inner_state/0/count", (), (1, 8, 1), P()),
    ],
    ids=str,
)  # fmt: skip
def test_where_arrays_lie(name, shape, sizes, expected):
    sizes = dict(zip(sharding.AXES, sizes, strict=True))
    assert sharding.spec_at(name, shape, sizes, RULES) == expected


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "q_proj/kernel/m_RR",
            (24, 443, 443),
            r"mesh\.fsdp 8: no axis of .*m_RR \(24, 443, 443\).*align 128",
        ),
        ("up_proj/kernel/b_RD", (24, 4, 5461), r"mesh\.fsdp 8: no axis of .*b_RD \(24, 4, 5461\)"),
        ("params/layers/mlp/new_proj/kernel", (8, 8), "no sharding rule covers 'params"),
    ],
    ids=["m", "b", "unknown"],
)
def test_what_cannot_be_divided(name, shape, message):
    with pytest.raises(InputError, match=message):
        sharding.spec_at(name, shape, SIZES, RULES)


@pytest.mark.parametrize("method", [cls() for cls in METHODS.values()], ids=lambda method: method.name)
def test_the_rules_cover_the_arrays_of_every_method(method):
    for name, array in method.init(jax.random.key(0), jnp.ones((256, 256))).items():
        sharding.spec(method.leaves()[name].layout, array.shape, SIZES, name)


@pytest.mark.slow
def test_a_state_is_made_in_parts_and_held_in_parts(tiny_yaml):
    """Of what is divided no device ever holds more than a few layers' worth at once."""
    config = flags.read_config(str(tiny_yaml))
    model = dataclasses.replace(
        config.model, hidden_size=128, intermediate_size=256, vocab_size=1024, num_hidden_layers=8
    )
    config = dataclasses.replace(config, model=model)
    mesh = sharding.make_mesh(1, 8, 1)
    methods = assign_methods(config)
    shapes = abstract_state(config, methods, mesh)
    state = fresh_state(config, methods, mesh)
    size, held = (sum(leaf.nbytes for leaf in leaves) for leaves in (
        jax.tree.leaves(state), [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(state)]
    ))  # fmt: skip
    assert held < 1.1 * size / 8
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, shapes)
    make = jax.jit(
        lambda: init_state(spec_of(config), methods, init_params(spec_of(config))),
        out_shardings=jax.tree.map(lambda x: x.sharding, shapes),
    )
    assert make.lower().compile().memory_analysis().temp_size_in_bytes < size / 4
    whole = fresh_state(config, methods, sharding.make_mesh(1))
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_global_batch_of_local_rows_is_the_batch():
    mesh = sharding.make_mesh(2, 2, 2)
    rows_BT = np.arange(32, dtype=np.int32).reshape(8, 4)
    held = sharding.local_rows(mesh, 8)
    np.testing.assert_array_equal(held, np.arange(8))
    on_mesh = sharding.to_global(mesh, 8, rows_BT[held])
    np.testing.assert_array_equal(on_mesh, rows_BT)
    assert on_mesh.sharding == sharding.batch(mesh)


@pytest.mark.parametrize("count", [slow(3), slow(8), 11])
def test_devices_share_out_the_entries_of_a_stack(count):
    """Each device computes as many, of which the last may be zeros."""
    computed = []

    def decomposed(a, b):
        jax.debug.callback(lambda _: computed.append(1), a[0, 0])
        return {"sum": jnp.linalg.eigh(a + a.T)[0] + b["vector"]}

    a_LKK = jax.random.normal(jax.random.key(0), (count, 4, 4))
    b = {"vector": jax.random.normal(jax.random.key(1), (count, 4))}
    expected = sharding.one_by_one(decomposed, a_LKK, b)
    jax.effects_barrier()
    assert len(computed) == count
    computed.clear()
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        in_parts = jax.device_put(a_LKK, jax.NamedSharding(mesh, P(None, "fsdp", "tensor")))
        found = jax.jit(lambda *stacks: sharding.one_by_one(decomposed, *stacks))(in_parts, b)
    jax.effects_barrier()
    np.testing.assert_allclose(found["sum"], expected["sum"], atol=1e-5)
    assert len(computed) == 8 * -(-count // 8)


@pytest.mark.parametrize("shape", [slow((1, 8, 1)), (2, 2, 2), slow((1, 2, 4))], ids=str)
def test_devices_share_matrices_that_they_hold_in_parts(shape):
    """Each has whole matrices, a share of each kind.

    `c` can only be divided by its rows, `d` is not divided, and `e`, as large as `b`, is of another type.
    """
    rules = [("[ac].*", sharding.COLUMNS), ("[be]", sharding.ROWS), ("d", sharding.REPLICATED)]
    shapes = {
        "a0": (3, 16, 24),
        "a1": (16, 24),
        "b": (5, 24, 16),
        "c": (2, 16, 13),
        "d": (16, 24),
        "e": (24, 16),
    }
    rng = np.random.default_rng(0)
    matrices = {
        name: jnp.asarray(rng.normal(size=size), "bfloat16" if name == "e" else "float32")
        for name, size in shapes.items()
    }
    computed = []

    def running(stack):
        computed.append(stack.shape)
        return jnp.cumsum(jnp.cumsum(stack, -1), -2)

    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        places = {
            name: jax.NamedSharding(mesh, sharding.spec_at(name, m.shape, mesh.shape, rules))
            for name, m in matrices.items()
        }
        shared = jax.jit(lambda matrices: sharding.by_matrix(running, matrices, rules))
        found = shared(jax.device_put(matrices, places))
    for name, matrix in matrices.items():
        np.testing.assert_allclose(*(np.float32(m) for m in (found[name], running(matrix))), 1e-6, 1e-5)
        assert (found[name].dtype, found[name].sharding) == (matrix.dtype, places[name])
    held = 8 // shape[0]
    whole = [(-(-count // held), k, d) for count, k, d in ((4, 16, 24), (5, 24, 16), (2, 16, 13))]
    assert computed[:5] == [*whole, (16, 24), (1, 24, 16)]


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((8, 6, 16), P(("data", "tensor"), None, None)),
        ((2, 6, 16), P("data", "tensor", None)),
        ((2, 5, 16), P("data", None, None)),
    ],
    ids=["sequences", "positions", "neither"],
)
def test_activations_are_in_parts_between_products(shape, parts):
    """So are their gradients; products have them complete."""
    rng = np.random.default_rng(0)
    x_BTD, w_DF, w_FD = (
        jnp.asarray(rng.normal(size=size), jnp.float32) for size in (shape, (16, 24), (24, 16))
    )

    @jax.jit
    def through(x_BTD, w_DF, w_FD):
        def products(x_BTD):
            y_BTF = jnp.tanh(sharding.joined(x_BTD, RESIDUAL_PARTS) @ w_DF)
            return sharding.parted(y_BTF @ w_FD, RESIDUAL_PARTS)

        y_BTD, pulled = jax.vjp(products, x_BTD)
        return y_BTD, pulled(jnp.cos(y_BTD))[0]

    expected = through(x_BTD, w_DF, w_FD)
    mesh = sharding.make_mesh(data=2, fsdp=1, tensor=2)
    with jax.set_mesh(mesh):
        columns, rows = (jax.NamedSharding(mesh, P(*spec)) for spec in ((None, "tensor"), ("tensor", None)))
        found = through(x_BTD, jax.device_put(w_DF, columns), jax.device_put(w_FD, rows))
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)
        assert ours.sharding.is_equivalent_to(jax.NamedSharding(mesh, parts), 3)


def test_the_library_asks_for_no_mesh_and_for_none_of_ours():
    x_BTD = jnp.ones((2, 3, 4))
    other = jax.make_mesh((8,), ("x",))
    for ambient in (contextlib.nullcontext(), jax.set_mesh(other)):
        with ambient:
            assert jax.jit(lambda x: sharding.constrain(x, BATCHED))(x_BTD).shape == (2, 3, 4)
            assert sharding.joined(x_BTD, BATCHED) is sharding.parted(x_BTD, BATCHED) is x_BTD
            twice = sharding.by_matrix(lambda x: 2 * x, {"x": x_BTD}, [("x", sharding.ROWS)])
            np.testing.assert_array_equal(twice["x"], 2 * x_BTD)
            assert not sharding.in_use()


@pytest.mark.parametrize("rows", [8, 3])
def test_each_device_applies_a_function_to_its_part_of_a_width(rows: int):
    """The width of 7 is padded to what 2 devices share out; 3 rows are not divided."""
    x = jax.random.normal(jax.random.key(0), (rows, 5, 7))
    w = jax.random.normal(jax.random.key(1), (7, 4))
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        parts = jax.jit(lambda x: sharding.by_width(lambda complete: complete @ w, x, 2, 7))(x)
    assert parts.shape == (2, rows, 5, 4)
    np.testing.assert_allclose(parts[0], x[..., :4] @ w[:4], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(parts[1], x[..., 4:] @ w[4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 5, 3, 4), (3, 5, 3, 4), (8, 3, 4), (3, 4)], ids=str)
def test_a_stack_whose_width_is_divided(shape: tuple[int, ...]):
    """It is cut apart, and laid flat and back, with gradients; flat, each device has its parts of all."""
    y = jax.random.normal(jax.random.key(0), shape)

    def loss(y: jax.Array) -> jax.Array:
        parts = sharding.unstacked(y)
        return sum((jnp.sum(jnp.sin(part) * (i + 1)) for i, part in enumerate(parts)), jnp.zeros(()))

    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        parts, gradient = jax.jit(sharding.unstacked)(y), jax.jit(jax.grad(loss))(y)
        flat = jax.jit(sharding.flat)(y)
        back = jax.jit(lambda y: sharding.unflat(sharding.flat(y), 3))(y)
    np.testing.assert_array_equal(jnp.stack(parts, -2), y)
    np.testing.assert_array_equal(back, y)
    np.testing.assert_array_equal(flat[..., :6], y[..., :2].reshape(*shape[:-2], 6))
    np.testing.assert_allclose(gradient, np.cos(y) * np.arange(1, 4)[:, None], rtol=1e-5, atol=1e-6)
