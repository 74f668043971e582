"""The same numbers on every mesh: losses, gradients and weights of one device against eight."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from mora_jax import sharding, trees
from mora_jax.llama import Compute, LlamaConfig
from mora_jax.methods import DoRA, LoRA, MoRA, Rotate, Share
from train import runs
from train.config import RunConfig
from train.sections import Data, Optimizer, Restart, Schedule
from train.step import restart_step, train_step

STEPS = 20
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


def configured(mixture: str, steps: int, path: str) -> RunConfig:
    restarts = "DoRA" not in mixture
    return RunConfig(
        steps=steps,
        batch_size=8,
        model=MODEL,
        compute=Compute(dtype="float32", layers="scan", loss_chunk=8, adapter_path=path),  # pyright: ignore
        data=Data("nowhere", 16),
        optimizer=Optimizer(learning_rate=3e-3),
        schedule=Schedule("jagged-cosine" if restarts else "cosine", warmup=2),
        restart=Restart(every=10 if restarts else 0, warmup=2),
        rules=MIXTURES[mixture],
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
    placed = jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), masked, state.adapters)
    return dataclasses.replace(state, adapters=placed)


def trained(config: RunConfig, shape: tuple[int, int, int]):
    """Losses, gradient norms and the last state; every array stays where it was placed."""
    mesh = sharding.make_mesh(*shape)
    told = []
    with jax.set_mesh(mesh):
        methods = runs.assign_methods(config)
        state = drawn(runs.fresh_state(config, methods, mesh))
        places = jax.tree.map(lambda x: x.sharding, state)
        for step in range(config.steps):
            if config.restarts_at(step):
                state, cleared = restart_step(config, methods, state)
                methods = methods.after_restart()
                assert float(cleared) == 1.0
                assert jax.tree.map(lambda x: x.sharding, state) == places
            tokens_BT = np.random.default_rng(step).integers(0, 60, (8, 16), np.int32)
            on_mesh = jax.device_put(tokens_BT, sharding.batch(mesh))
            state, scalars = train_step(config, methods, state, on_mesh)
            assert jax.tree.map(lambda x: x.sharding, state) == places
            told.append((float(scalars["loss"]), float(scalars["grad_norm"])))
    return np.array(told), state


_ON_ONE: dict = {}


def on_one(config: RunConfig):
    if config not in _ON_ONE:
        _ON_ONE[config] = trained(config, (1, 1, 1))
    return _ON_ONE[config]


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize(
    ("mixture", "steps", "path"),
    [
        ("share, rotate and LoRA", STEPS, "merged"),
        ("share, rotate and LoRA", 2, "activation"),
        ("share, rotate and LoRA", 2, "compressed"),
        ("DoRA, full and share", STEPS, "merged"),
    ],
)
def test_every_mesh_computes_what_one_device_computes(shape, mixture, steps, path):
    config = configured(mixture, steps, path)
    (one, state_of_one), (many, state) = on_one(config), trained(config, shape)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    assert steps < STEPS or one[-1, 0] < one[0, 0]
    # Weights, and Adam's moments: what all gradients came to.
    ours, theirs = (jax.tree_util.tree_leaves_with_path(s) for s in (state, state_of_one))
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def collectives(compiled: str) -> list[tuple[str, str]]:
    """(kind, type of the result) of every collective in a compiled program."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return [(kind, shape) for shape, kind in re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", compiled)]


def elements(shape: str) -> int:
    """Of the largest array in an HLO type such as `(f32[2,3]{1,0}, f32[])`."""
    dims = re.findall(r"\[([\d,]*)\]", shape)
    return max(int(np.prod([int(d) for d in one.split(",") if d])) for one in dims)


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 2, 4), (2, 2, 2)], ids=str)
def test_kernels_are_gathered_and_never_moved_about(shape):
    """Nothing as large as a part of a kernel is exchanged, and nothing of all layers at once is gathered."""
    config = configured("share, rotate and LoRA", STEPS, "merged")
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        methods = runs.assign_methods(config)
        state = runs.abstract_state(config, methods, mesh)
        tokens = jax.ShapeDtypeStruct((8, 16), np.int32, sharding=sharding.batch(mesh))
        compiled = train_step.lower(config, methods, state, tokens).compile()
    found = collectives(compiled.as_text())
    assert {"all-gather", "all-reduce"} <= {kind for kind, _ in found}
    exchanged = [shape for kind, shape in found if kind in ("all-to-all", "collective-permute")]
    assert all(elements(shape) < 64 * 64 // 8 for shape in exchanged)
    stacks = [leaf.shape for _, leaf in trees.flatten(state.params).items() if leaf.ndim == 3]
    assert stacks
    for shape_of_stack in stacks:
        whole = f"[{','.join(map(str, shape_of_stack))}]"
        assert not [f for f in found if whole in f[1]]
