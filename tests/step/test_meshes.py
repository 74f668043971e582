"""The same numbers on every mesh: losses, gradients and weights of one device against eight."""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from slow import quick, slow

from mora_jax import sharding, trees
from mora_jax.methods import DoRA, LoRA, MoRA, Rotate, Share, Spectral
from mora_jax.models.batch import Batch
from mora_jax.models.llama import Compute, LlamaConfig
from train.config.run import RunConfig
from train.config.sections import Data, Optimizer, Restart, Schedule
from train.run.state import abstract_state, assign_methods, fresh_state
from train.step.spec import spec_of
from train.step.step import orient_step, restart_step, train_step

STEPS, RESTART = 20, 10
# Updates whose gradients are looked at: the first, and one when LoRA's b is no longer zero after the restart.
LOOKED_AT = (0, RESTART + 2)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
# The width of the MLP and the vocabulary divide by 2 and not by 8, as those of the paper's 1.3B model do.
MODEL = LlamaConfig(
    vocab_size=60, hidden_size=64, intermediate_size=100, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=16, initializer_range=0.1,
)  # fmt: skip
SHARE, ROTATE, LORA, DORA = MoRA(4, Share(), 8), MoRA(4, Rotate(), 8), LoRA(8, 8.0), DoRA(8, 8.0)
RUNS = MoRA(4, Share(1), 8)  # groups of neighbours, which lie on both sides of where a mesh divides a width
REST = ("embed_tokens/embedding|(layers/)?.*norm/scale|lm_head/kernel", "train")


def rules(**choices: object) -> tuple:
    return (*((f"layers/.*/{name}_proj/kernel", choice) for name, choice in choices.items()), REST)


# Every method in projections of both kinds, side by side in one product with others, and what has no restart.
MIXTURES = {
    "share, rotate and LoRA": rules(q=SHARE, k=ROTATE, v=LORA, o=RUNS, gate=LORA, up=RUNS, down=ROTATE),
    "DoRA, full and share": rules(q=DORA, k="train", v=DORA, o=DORA, gate=RUNS, up="train", down="train"),
}
# And each alone, as most runs have it.
ALONE = {"full": "train", "LoRA": LORA, "share": SHARE, "rotate": ROTATE, "DoRA": DORA}
METHODS = MIXTURES | {name: rules(**{".*": choice}) for name, choice in ALONE.items()}
WITHOUT_RESTART = ("DoRA, full and share", "full", "DoRA")


def configured(name: str, steps: int, path: str) -> RunConfig:
    restarts = name not in WITHOUT_RESTART
    return RunConfig(
        steps=steps,
        batch_size=8,
        model=MODEL,
        compute=Compute(dtype="float32", layers="scan", remat="dots", loss_chunk=8, adapter_path=path),  # pyright: ignore
        data=Data("nowhere", 16),
        optimizer=Optimizer(learning_rate=3e-3),
        schedule=Schedule("jagged-cosine" if restarts else "cosine", warmup=2),
        restart=Restart(every=RESTART if restarts else 0, warmup=2),
        rules=METHODS[name],
    )


def drawn(state):
    """The same state with adapters that are not zero."""

    def draw(path, x):
        if path[-1].key in ("m_RR", "b_RD"):
            return x + 0.02 * np.random.default_rng(len(str(path))).standard_normal(x.shape, np.float32)
        return x

    def padded(path, x):  # the padding of M is zero, and stays so
        return np.where(np.arange(x.shape[-1]) < 22, x, 0) if path[-1].key == "m_RR" else x

    adapters = jax.tree_util.tree_map_with_path(draw, jax.tree.map(np.asarray, state.adapters))
    masked = jax.tree_util.tree_map_with_path(padded, adapters)
    masked = jax.tree_util.tree_map_with_path(
        lambda path, x: np.swapaxes(padded(path, np.swapaxes(x, -1, -2)), -1, -2), masked
    )
    return dataclasses.replace(state, adapters=placed(masked, state.adapters))


def placed(arrays: Any, like: Any) -> Any:
    """A copy of a tree of arrays, laid out as another one is."""
    return jax.tree.map(lambda x, old: jax.device_put(np.array(x), old.sharding), arrays, like)


class Trained(NamedTuple):
    """What became of a run.

    Attributes:
      scalars: loss and norm of the gradients of every update.
      state: the last one.
      before: the states before the restart and before the updates that are looked at.
      gradients: of every trained leaf, in these updates.
      restarted: the state after the restart.
    """

    scalars: np.ndarray
    state: Any
    before: dict[Any, Any]
    gradients: dict[int, dict[str, np.ndarray]]
    restarted: Any


def trained(config: RunConfig, shape: tuple[int, int, int], one: Trained | None = None) -> Trained:
    """Trains on a mesh; every array stays where it was placed.

    It begins where `one` began, and goes its own way from there. But gradients, and what a restart makes, are
    those at the very states that `one` had.
    """
    mesh = sharding.make_mesh(*shape)
    logged, before, gradients, restarted = [], {}, {}, None
    with jax.set_mesh(mesh):
        methods = assign_methods(config)
        abstract = abstract_state(config, methods, mesh)
        state = drawn(fresh_state(config, methods, mesh)) if one is None else placed(one.before[0], abstract)
        places = jax.tree.map(lambda x: x.sharding, state)
        for step in range(config.steps):
            if config.restarts_at(step):
                before["restart"] = jax.tree.map(np.array, state) if one is None else one.before["restart"]
                restarted, _ = restart_step(spec_of(config), methods, placed(before["restart"], abstract))
                state, cleared = restart_step(spec_of(config), methods, state)
                methods = methods.after_restart()
                assert float(cleared) == 1.0
                assert jax.tree.map(lambda x: x.sharding, state) == places
            size = config.batch_size, config.data.sequence_length
            tokens_BT = np.random.default_rng(step % 2).integers(0, 60, size, np.int32)
            on_mesh = Batch(jax.device_put(tokens_BT, sharding.batch(mesh)))
            if step in LOOKED_AT:
                before[step] = jax.tree.map(np.array, state) if one is None else one.before[step]
                after, _ = train_step(spec_of(config), methods, placed(before[step], abstract), on_mesh)
                gradients[step] = gradients_of(config, before[step], after)
            state, scalars = train_step(spec_of(config), methods, state, on_mesh)
            assert jax.tree.map(lambda x: x.sharding, state) == places
            logged.append((float(scalars["loss"]), float(scalars["grad_norm"])))
    return Trained(np.array(logged), state, before, gradients, restarted)


def gradients_of(config: RunConfig, before: Any, after: Any) -> dict[str, np.ndarray]:
    """The gradient of every trained leaf, clipped, from what an update made of Adam's first moment."""
    b1 = config.optimizer.b1
    old, new = (
        {
            jax.tree_util.keystr(path): np.asarray(x)
            for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
        }
        for state in (before, after)
    )
    return {path: (new[path] - b1 * old[path]) / (1 - b1) for path in new if ".mu" in path}


_ON_ONE: dict = {}


def on_one(config: RunConfig) -> Trained:
    if config not in _ON_ONE:
        _ON_ONE[config] = trained(config, (1, 1, 1))
    return _ON_ONE[config]


CASES = [
    *(("share, rotate and LoRA", STEPS, "merged", shape) for shape in MESHES),
    *(("DoRA, full and share", STEPS, "merged", shape) for shape in ((1, 8, 1), (1, 1, 8))),
    *((name, STEPS, "merged", (2, 2, 2)) for name in ALONE),
    *(("share, rotate and LoRA", 2, "activation", shape) for shape in ((1, 8, 1), (1, 1, 8))),
    ("share, rotate and LoRA", 2, "compressed", (2, 2, 2)),
    ("share", 2, "merged", (2, 2, 2)),
]
QUICK = ("share", 2, "merged", (2, 2, 2))  # mixtures and restarts compile for longer
CASES = quick([QUICK], CASES)


@pytest.mark.parametrize(("name", "steps", "path", "shape"), CASES, ids=str)
def test_every_mesh_computes_what_one_device_computes(name, steps, path, shape):
    config = configured(name, steps, path)
    one = on_one(config)
    many = trained(config, shape, one)
    np.testing.assert_allclose(many.scalars, one.scalars, rtol=1e-5)
    assert steps < STEPS or one.scalars[-1, 0] < one.scalars[0, 0]
    assert list(one.gradients) == [step for step in LOOKED_AT if step < steps]
    assert len(one.gradients[0]) >= 11 + (name not in ("full", "DoRA, full and share"))
    assert_same_gradients(many, one)
    # Each on its own way: weights, and Adam's moments, what all gradients came to.
    assert_same(many.state, one.state, rtol=1e-4, atol=1e-5)
    if config.restart.every and steps == STEPS:
        # MoRA's update is merged to the same bits; products, which LoRA has, round with their tiles.
        assert_same(many.restarted, one.restarted, rtol=0, atol=0 if name in ("share", "rotate") else 1e-6)


def assert_same_gradients(many: Trained, one: Trained) -> None:
    """At the same states the gradient of every leaf is the same, beside its largest entry."""
    for step, gradients in one.gradients.items():
        for leaf, expected in gradients.items():
            largest = np.max(np.abs(expected))
            assert largest > 0, (step, leaf)
            found = many.gradients[step][leaf]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest, err_msg=f"{step} {leaf}")


@pytest.mark.parametrize(("rows", "length"), quick([(2, 16)], [(2, 16), (2, 15), (3, 16)]))
def test_few_sequences_are_divided_by_positions_or_not_at_all(rows, length):
    config = configured("share", 2, "merged")
    config = dataclasses.replace(config, batch_size=rows, data=Data("nowhere", length))
    one = on_one(config)
    many = trained(config, (1, 1, 4), one)
    np.testing.assert_allclose(many.scalars, one.scalars, rtol=1e-5)
    assert_same_gradients(many, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "shape"),
    [("share", RESTART, (2, 2, 2)), ("share", STEPS, (2, 2, 2)), ("full", RESTART, (2, 2, 2))],
    ids=str,
)
def test_muon_computes_on_a_mesh_what_it_computes_on_one_device(name, steps, shape):
    muon = Optimizer(learning_rate=3e-3, matrices="muon")
    config = dataclasses.replace(configured(name, steps, "merged"), optimizer=muon)
    one = on_one(config)
    many = trained(config, shape, one)
    np.testing.assert_allclose(many.scalars, one.scalars, rtol=1e-5)
    assert one.scalars[-1, 0] < one.scalars[0, 0]


def oriented(config: RunConfig, shape: tuple[int, int, int], start: Any = None) -> tuple[Any, Any]:
    """The first state of a run on a mesh, with m not zero, before and after its adapters are fitted."""
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        methods = assign_methods(config)
        if start is None:
            state = drawn(fresh_state(config, methods, mesh))
        else:
            state = placed(start, abstract_state(config, methods, mesh))
        before, places = jax.tree.map(np.array, state), jax.tree.map(lambda x: x.sharding, state)
        tokens_BT = np.random.default_rng(0).integers(0, 60, (8, 16), np.int32)
        on_mesh = Batch(jax.device_put(tokens_BT, sharding.batch(mesh)))
        state = orient_step(spec_of(config), methods, state, on_mesh)
    assert jax.tree.map(lambda x: x.sharding, state) == places
    return before, state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bases", "shape"),
    [
        ("sampled", (2, 2, 2)),
        ("sampled", (8, 1, 1)),
        ("sampled", (1, 1, 8)),
        ("leading", (1, 8, 1)),
        ("leading", (2, 2, 2)),
    ],
    ids=str,
)
def test_bases_on_a_mesh_are_those_of_one_device_and_each_device_holds_the_same(bases, shape):
    config = dataclasses.replace(
        configured("share", STEPS, "merged"), rules=rules(**{".*": Spectral(4, 8, bases)})
    )
    start, one = oriented(config, (1, 1, 1))
    _, many = oriented(config, shape, start)
    old, one, many = (trees.flatten(state.adapters) for state in (start, one, many))
    assert len(many) == 7 * 3
    for path, array in many.items():
        parts: dict[str, np.ndarray] = {}
        for shard in array.addressable_shards:
            part = np.asarray(shard.data)
            np.testing.assert_array_equal(part, parts.setdefault(str(shard.index), part), err_msg=path)
        if path.endswith("m_RR"):
            assert np.abs(array).max() > 0.01
            np.testing.assert_array_equal(array, old[path], err_msg=path)
            continue
        axes = "lkr,lks->lrs" if path.endswith("u_KR") else "lrd,lsd->lrs"
        places_LRR = np.abs(np.einsum(axes, np.asarray(one[path]), np.asarray(array)))
        # The same vectors but for signs: another draw has a 0 on the diagonal. Rounding of the Gram matrix
        # turned vectors by up to 8e-4 over three seeds, towards those of the nearest singular values.
        same_LRR = np.broadcast_to(np.eye(places_LRR.shape[-1]), places_LRR.shape)
        np.testing.assert_allclose(places_LRR, same_LRR, atol=5e-3, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_kernels_that_share_a_product_have_gradients_of_their_own_on_a_mesh(shape):
    """As in bfloat16, which rounds: gradients in another order would be wrong altogether."""
    config = configured("share", 2, "merged")
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, dtype="bfloat16"))
    one = on_one(config)
    many = trained(config, shape, one)
    np.testing.assert_allclose(many.scalars, one.scalars, rtol=1e-2)
    for leaf, expected in one.gradients[0].items():
        error = np.linalg.norm(many.gradients[0][leaf] - expected) / np.linalg.norm(expected)
        assert error < 5e-2, leaf


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [("share", (2, 2, 2)), ("share", (8, 1, 1)), ("full", (1, 8, 1)), ("full", (2, 2, 2))],
    ids=str,
)
def test_gradients_summed_in_bfloat16_are_rounded_and_those_of_one_device_are_not(name, shape):
    config = configured(name, 2, "merged")
    compute = dataclasses.replace(config.compute, gradient_sums="bfloat16")
    config, rounded = dataclasses.replace(config, compute=compute), config
    one, many = on_one(rounded), trained(config, shape, on_one(rounded))
    if shape == (2, 2, 2):
        alone = trained(config, (1, 1, 1), one)
        assert all((alone.gradients[0][leaf] == g).all() for leaf, g in one.gradients[0].items())
    for leaf, expected in one.gradients[0].items():
        error = np.linalg.norm(many.gradients[0][leaf] - expected) / np.linalg.norm(expected)
        # Up to eight parts and their sums are each rounded to 8 bits. Norms have float32, but all gradients
        # are clipped by their common norm.
        assert (error < 1e-4) if "norm" in leaf else (1e-3 < error < 1e-2), (leaf, error)


def assert_same(ours: Any, theirs: Any, rtol: float, atol: float) -> None:
    ours, theirs = (jax.tree_util.tree_leaves_with_path(tree) for tree in (ours, theirs))
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def collectives(compiled: str) -> list[tuple[str, str]]:
    """(kind, type of the result) of every collective in a compiled program."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return [(kind, shape) for shape, kind in re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", compiled)]


def elements(shape: str) -> int:
    """Of the largest array in an HLO type such as `(f32[2,3]{1,0}, f32[])`."""
    dims = re.findall(r"\[([\d,]*)\]", shape)
    return max(int(np.prod([int(d) for d in one.split(",") if d])) for one in dims)


def sent(config: RunConfig, shape: tuple[int, int, int]) -> tuple[Any, list[tuple[str, str]]]:
    """The state of a run on a mesh, without values, and the collectives of its step."""
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        methods = assign_methods(config)
        state = abstract_state(config, methods, mesh)
        tokens = jax.ShapeDtypeStruct((8, 16), np.int32, sharding=sharding.batch(mesh))
        compiled = train_step.lower(spec_of(config), methods, state, Batch(tokens)).compile()
    return state, collectives(compiled.as_text())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 2, 4), (2, 2, 2)], ids=str)
def test_kernels_are_gathered_and_never_moved_about(shape):
    """Nothing as large as a part of a kernel is exchanged, and nothing of all layers at once is gathered."""
    config = configured("share, rotate and LoRA", STEPS, "merged")
    state, found = sent(config, shape)
    assert {"all-gather", "all-reduce"} <= {kind for kind, _ in found}
    exchanged = [shape for kind, shape in found if kind in ("all-to-all", "collective-permute")]
    assert all(elements(shape) < 64 * 64 // 8 for shape in exchanged)
    stacks = [leaf.shape for _, leaf in trees.flatten(state.params).items() if leaf.ndim == 3]
    assert stacks
    for shape_of_stack in stacks:
        whole = f"[{','.join(map(str, shape_of_stack))}]"
        assert not [f for f in found if whole in f[1]]


@pytest.mark.slow
def test_gradients_of_kernels_are_summed_in_shards_over_tensor():
    """Also those of o and down, whose inputs are divided."""
    _, found = sent(configured("full", STEPS, "merged"), (2, 2, 2))
    assert not [f for f in found if f[0] == "all-gather" and re.search(r"\[1,(64|100),64\]", f[1])]
    summed = " ".join(shape for kind, shape in found if kind == "all-reduce")
    assert "[50,64]" in summed
    assert "[100,64]" not in summed


@pytest.mark.slow
def test_a_tied_embedding_is_not_moved_about():
    config = configured("share", STEPS, "merged")
    model = dataclasses.replace(config.model, tie_word_embeddings=True)
    rest = (REST[0].removesuffix("|lm_head/kernel"), "train")
    _, found = sent(dataclasses.replace(config, model=model, rules=(*config.rules[:-1], rest)), (2, 4, 1))
    assert {kind for kind, _ in found} == {"all-gather", "all-reduce"}


def sent_in_bfloat16(shape: tuple[int, int, int], layers: str, remat: str) -> list[tuple[str, str]]:
    """Collectives of a step of two layers, as runs are: kernels that need no cast do not share a product."""
    config = configured("share", STEPS, "merged")
    compute: Any = {"dtype": "bfloat16", "layers": layers, "remat": remat}
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, **compute))
    return sent(config, shape)[1]


def gathered(found: list[tuple[str, str]], size: str) -> int:
    """How many arrays of a size, such as "24,24", are all-gathered."""
    return sum(f"[{size}]" in result for kind, result in found if kind == "all-gather")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 4, 1), (1, 1, 8)], ids=str)
def test_kernels_of_unrolled_layers_are_sent_once_and_those_of_one_product_in_one_piece(shape):
    found = sent_in_bfloat16(shape, "unrolled", "none")
    # M of q, k, v and o, and of gate, up and down: of each of two layers.
    assert [gathered(found, "24,24"), gathered(found, "32,32")] == [2 * 4, 2 * 3]
    # q, k and v of 64 columns; gate and up of 100, in tiles of 128.
    together = [gathered(found, f"64,{3 * 64}"), gathered(found, f"64,{2 * 128}")]
    assert together == ([2, 2] if shape[2] == 1 else [0, 0])
    # Kernels with a width of 100 are not gathered for `tensor`: devices exchange parts of rows and columns.
    exchanged = sum(kind == "all-to-all" for kind, _ in found)
    assert exchanged == (0 if shape[2] == 1 else 2 * 3)


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["scan", "unrolled"])
def test_recomputed_layers_all_gather_each_kernel_twice(layers):
    found = sent_in_bfloat16((1, 8, 1), layers, "full")
    twice = 2 * (1 if layers == "scan" else 2)  # of one layer in a loop, or of two
    assert [gathered(found, f"64,{3 * 64}"), gathered(found, f"64,{2 * 128}")] == [twice, twice]
    assert gathered(found, "24,24") == 4 * twice


@pytest.mark.parametrize("shape", [slow((1, 8, 1)), (2, 2, 2)], ids=str)
def test_a_restart_gathers_one_layer_at_a_time(shape):
    config = configured("share", STEPS, "merged")
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        methods = assign_methods(config)
        state = abstract_state(config, methods, mesh)
        compiled = restart_step.lower(spec_of(config), methods, state).compile()
    gathered = [elements(shape) for kind, shape in collectives(compiled.as_text()) if kind == "all-gather"]
    assert max(gathered) == 32 * 32  # the MLP's M, of one of the two layers
    held = compiled.memory_analysis()
    assert held.alias_size_in_bytes >= 0.99 * held.argument_size_in_bytes
