"""Adapts unmodified models of other packages with MoRA, trains them through a restart, and merges.

    python tests/tools/third_party.py --models flax_linen tunix_llama3

The models have random weights. Each learns in a few steps which token follows which. Halfway ReMoRA merges
and starts anew. Full fine-tuning of the same model alternates with it, so that both meet the same load of the
machine. NNX models are functions of their state there. The model itself goes through `mora_jax.nnx.adapt`
too, gets random adapters, and is compared with its merged model ("adapt").

A model passes if the loss falls, the restart and the merges keep the outputs (float32, relative to the
largest), and the median step takes less time than that of full fine-tuning. The status is 1 if one fails.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

from mora_jax import MoRA, On, State, adapted, value_and_grad
from mora_jax.transform import Rules

COLUMNS = (
    "model",
    "kernels",
    "trained",
    "loss",
    "restart",
    "merge",
    "adapt",
    "MoRA ms",
    "full ms",
    "ratio",
    "result",
)


class Sizes(NamedTuple):
    """Sizes that all models share.

    Attributes:
      width: width of the residual stream.
      layers: transformer layers.
      vocabulary: tokens in the vocabulary.
      rank: MoRA's rank.
    """

    width: int
    layers: int
    vocabulary: int
    rank: int

    @property
    def mlp(self) -> int:
        """Width of the MLP."""
        return 4 * self.width

    @property
    def heads(self) -> int:
        """Heads of 64."""
        return self.width // 64


class Case(NamedTuple):
    """A model as it is adapted.

    Attributes:
      params: its parameters, any pytree.
      logits: the plain model, a function of the parameters and the tokens.
      rules: what is done with each parameter.
      module: an NNX model of these parameters and its call, for `mora_jax.nnx`.
    """

    params: Any
    logits: Callable[[Any, jax.Array], jax.Array]
    rules: Rules
    module: tuple[Any, Callable[[Any, jax.Array], jax.Array]] | None = None


# One function for each model: it makes the model and says in `rules` how it is adapted.


def flax_linen(sizes: Sizes) -> Case:
    """Returns a transformer of Linen's `MultiHeadDotProductAttention` and `Dense`."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            mask = nn.make_causal_mask(x[..., 0])
            x = x + nn.MultiHeadDotProductAttention(sizes.heads)(nn.LayerNorm()(x), mask=mask)
            return x + nn.Dense(sizes.width)(nn.gelu(nn.Dense(sizes.mlp)(nn.LayerNorm()(x))))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            x = nn.Embed(sizes.vocabulary, sizes.width)(tokens)
            for _ in range(sizes.layers):
                x = Block()(x)
            return nn.Dense(sizes.vocabulary, name="head")(nn.LayerNorm()(x))

    model = Model()
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    mora = MoRA(sizes.rank)
    rules = [
        (".*/(query|key|value)/kernel", On(mora, inputs=(0,))),
        (".*/out/kernel", On(mora, inputs=(0, 1))),
        ("Block_.*/Dense_./kernel", mora),
        (".*", "frozen"),
    ]

    def logits(params: Any, tokens: jax.Array) -> Any:
        return model.apply({"params": params}, tokens)

    return Case(params, logits, rules)


def flax_nnx(sizes: Sizes) -> Case:
    """Returns a transformer of `nnx.MultiHeadAttention` and `nnx.Linear`."""

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.norm1, self.norm2 = (
                nnx.LayerNorm(sizes.width, rngs=rngs),
                nnx.LayerNorm(sizes.width, rngs=rngs),
            )
            self.attention = nnx.MultiHeadAttention(sizes.heads, sizes.width, decode=False, rngs=rngs)
            self.up = nnx.Linear(sizes.width, sizes.mlp, rngs=rngs)
            self.down = nnx.Linear(sizes.mlp, sizes.width, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0]))
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.embed = nnx.Embed(sizes.vocabulary, sizes.width, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(sizes.layers)])
            self.norm = nnx.LayerNorm(sizes.width, rngs=rngs)
            self.head = nnx.Linear(sizes.width, sizes.vocabulary, rngs=rngs)

        def __call__(self, tokens: jax.Array) -> jax.Array:
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    mora = MoRA(sizes.rank)
    rules = [
        (".*/(query|key|value)/kernel", On(mora, inputs=(0,))),
        (".*/out/kernel", On(mora, inputs=(0, 1))),
        (".*/(up|down)/kernel", mora),
        (".*", "frozen"),
    ]
    return _nnx_case(Model(nnx.Rngs(0)), rules, lambda model, tokens: model(tokens))


def tunix_llama3(sizes: Sizes) -> Case:
    """Returns tunix's LLaMA 3, an NNX model of einsums and `nnx.Linear`."""
    from tunix.models.llama3 import model as llama3  # pyright: ignore[reportMissingImports]

    return _tunix(llama3.Llama3, llama3.ModelConfig, sizes)


def tunix_qwen2(sizes: Sizes) -> Case:
    """Returns tunix's Qwen 2, which adds biases to queries, keys and values."""
    from tunix.models.qwen2 import model as qwen2  # pyright: ignore[reportMissingImports]

    return _tunix(qwen2.Qwen2, qwen2.ModelConfig, sizes)


def tunix_qwen3(sizes: Sizes) -> Case:
    """Returns tunix's Qwen 3, which normalises queries and keys."""
    from tunix.models.qwen3 import model as qwen3  # pyright: ignore[reportMissingImports]

    return _tunix(qwen3.Qwen3, qwen3.ModelConfig, sizes)


def gemma_linen(sizes: Sizes) -> Case:
    """Returns Gemma 2 of Google's package gemma, a Linen model whose einsums join keys and values."""
    from gemma import modules, transformer  # pyright: ignore[reportMissingImports]

    kinds = (modules.AttentionType.LOCAL_SLIDING, modules.AttentionType.GLOBAL)
    config = transformer.TransformerConfig(
        num_layers=sizes.layers,
        num_embed=sizes.vocabulary,
        embed_dim=sizes.width,
        hidden_dim=sizes.mlp,
        num_heads=sizes.heads,
        num_kv_heads=sizes.heads // 2,
        head_dim=64,
        final_logit_softcap=30.0,
        attn_logits_soft_cap=50.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(kinds * sizes.layers)[: sizes.layers],
        sliding_window_size=64,
    )
    model = transformer.Transformer(config)

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens, *_positions_and_mask(tokens, None))[0]

    tokens = jnp.zeros((1, 4), jnp.int32)
    params = model.init(jax.random.key(0), tokens, *_positions_and_mask(tokens, None))["params"]
    mora = MoRA(sizes.rank)
    rules = [
        (".*/attn/q_einsum/w", On(mora, inputs=(1,))),
        (".*/attn/kv_einsum/w", On(mora, inputs=(2,), stack=(0,))),
        (".*/attn_vec_einsum/w", On(mora, inputs=(0, 1))),
        (".*/mlp/gating_einsum", On(mora, stack=(0,))),
        (".*/mlp/linear", mora),
        (".*", "frozen"),
    ]
    return Case(params, logits, rules)


def _tunix(make: Any, config_of: Any, sizes: Sizes) -> Case:
    config = config_of(
        num_layers=sizes.layers,
        vocab_size=sizes.vocabulary,
        embed_dim=sizes.width,
        hidden_dim=sizes.mlp,
        num_heads=sizes.heads,
        head_dim=64,
        num_kv_heads=sizes.heads // 2,
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    mora = MoRA(sizes.rank)
    rules = [
        (".*/attn/[qkv]_proj/w", On(mora, inputs=(0,))),
        (".*/attn/o_proj/w", On(mora, inputs=(0, 1))),
        (".*/mlp/(gate|up|down)_proj/kernel", mora),
        (".*", "frozen"),
    ]
    return _nnx_case(
        make(config, rngs=nnx.Rngs(0)),
        rules,
        lambda m, tokens: m(tokens, *_positions_and_mask(tokens, None))[0],
    )


def _nnx_case(model: Any, rules: Rules, call: Callable[[Any, jax.Array], jax.Array]) -> Case:
    """Returns an NNX model as a function of the state of its parameters."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return call(nnx.merge(graph, params, rest), tokens)

    return Case(params, logits, rules, (model, call))


def _positions_and_mask(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any, jax.Array]:
    """Returns positions, the cache and the causal mask, as tunix's and Gemma's models take them."""
    n, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (n, length))
    return positions, cache, jnp.tril(jnp.ones((n, length, length), bool))


MODELS: dict[str, tuple[Callable[[Sizes], Case], str]] = {
    "flax_linen": (flax_linen, "flax"),
    "flax_nnx": (flax_nnx, "flax"),
    "tunix_llama3": (tunix_llama3, "google-tunix"),
    "tunix_qwen2": (tunix_qwen2, "google-tunix"),
    "tunix_qwen3": (tunix_qwen3, "google-tunix"),
    "gemma_linen": (gemma_linen, "gemma==2.0.8"),
}


def main() -> int:
    """Tries the models and prints a table. Returns the exit status."""
    options = parser().parse_args()
    sizes = Sizes(options.width, options.layers, options.vocabulary, options.rank)
    tokens = rows_of_tokens(options.batch, options.length, sizes.vocabulary)
    rows: list[tuple[str, ...]] = [COLUMNS]
    for name in options.models:
        make, package = MODELS[name]
        try:
            case = make(sizes)
        except ModuleNotFoundError as error:
            rows.append(
                (name, *[""] * (len(COLUMNS) - 2), f"not installed: pip install {package} ({error.name})")
            )
        else:
            rows.append((name, *tried(name, case, tokens, options)))
        print(f"{name}: {rows[-1][-1]}", flush=True)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(*["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows], sep="\n")
    return int(any(row[-1].startswith("FAIL") for row in rows))


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="models to try")
    numbers = {
        "width": (512, "width of the residual stream, a multiple of 128"),
        "layers": (3, "transformer layers"),
        "vocabulary": (512, "tokens in the vocabulary"),
        "rank": (32, "MoRA's rank"),
        "batch": (8, "sequences of a step"),
        "length": (64, "tokens of a sequence"),
        "steps": (20, "training steps; the restart comes after half of them"),
    }
    for name, (default, words) in numbers.items():
        made.add_argument(f"--{name}", type=int, default=default, help=f"{words} (default: {default})")
    made.add_argument("--learning-rate", type=float, default=2e-3, help="of Adam (default: 2e-3)")
    made.add_argument(
        "--tolerance", type=float, default=1e-5, help="largest relative difference of outputs (default: 1e-5)"
    )
    return made


def rows_of_tokens(n: int, length: int, vocabulary: int) -> jax.Array:
    """Returns sequences in which one fixed token follows each token."""
    next_token = jax.random.permutation(jax.random.key(1), vocabulary)
    first = jax.random.randint(jax.random.key(2), (n,), 0, vocabulary)
    return jax.lax.scan(lambda token, _: (next_token[token], token), first, length=length)[1].T


def tried(name: str, case: Case, tokens: jax.Array, options: argparse.Namespace) -> tuple[str, ...]:
    """Adapts, trains, restarts and merges a model. Returns its row of the table, without the name."""
    params = randomised(case.params)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = case.logits(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    tx = optax.adamw(options.learning_rate)
    state = State.init(jax.random.key(3), params, case.rules)
    optimizer = state.optimizer(tx)
    outputs = jax.jit(adapted(case.logits))

    @jax.jit
    def step(state: State, opt_state: Any) -> tuple[State, Any, jax.Array]:
        updates: Any
        value, gradients = value_and_grad(loss)(state, tokens)
        updates, opt_state = optimizer.update(gradients, opt_state, state.trainable)
        return state.updated(updates), opt_state, value

    @jax.jit
    def full_step(params: Any, opt_state: Any) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    ours, full = (state, optimizer.init(state.trainable)), (params, tx.init(params))
    losses: list[float] = []
    spent: dict[str, list[float]] = {"MoRA": [], "full": []}
    kept = math.nan
    for number in range(options.steps):
        if number == options.steps // 2:
            before = outputs(ours[0], tokens)
            ours = ours[0].restart(jax.random.key(number), ours[1], optimizer)
            kept = difference(outputs(ours[0], tokens), before)
        *ours, value = timed(step, ours, spent["MoRA"])
        *full, _ = timed(full_step, full, spent["full"])
        losses.append(float(value))
        if number % 5 == 0 or number == options.steps - 1:
            print(f"{name}: step {number}, loss {losses[-1]:.4f}", flush=True)
    state = ours[0]
    merged = difference(jax.jit(case.logits)(state.merged(), tokens), outputs(state, tokens))
    module = module_difference(case, tokens)
    # The first step and the one after the restart compile.
    compiles = (0, options.steps // 2)
    seconds = {
        who: statistics.median(s for number, s in enumerate(all_) if number not in compiles)
        for who, all_ in spent.items()
    }
    ratio = seconds["MoRA"] / seconds["full"]
    checks = {
        "the loss does not fall": losses[-1] < 0.9 * losses[0],
        "the restart changes outputs": kept <= options.tolerance,
        "the merge changes outputs": merged <= options.tolerance,
        "the merge of the NNX module changes outputs": module is None or module <= options.tolerance,
        "slower than full fine-tuning": ratio < 1,
    }
    failed = [words for words, holds in checks.items() if not holds]
    return (
        str(len(list(state.methods.kernels()))),
        f"{size_of(state.trainable) / size_of(params):.1%}",
        f"{losses[0]:.2f} to {losses[-1]:.2f}",
        f"{kept:.0e}",
        f"{merged:.0e}",
        "-" if module is None else f"{module:.0e}",
        *(f"{1000 * seconds[who]:.0f}" for who in ("MoRA", "full")),
        f"{ratio:.2f}",
        f"FAIL: {', '.join(failed)}" if failed else "PASS",
    )


def randomised(params: Any) -> Any:
    """Returns random weights in place of arrays with two or more axes, some of which packages set to zero."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    return structure.unflatten(
        0.05 * jax.random.normal(key, leaf.shape) if leaf.ndim > 1 else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    )


def module_difference(case: Case, tokens: jax.Array) -> float | None:
    """Returns how an NNX model with random adapters differs from its merged model; None for other models."""
    try:
        from mora_jax import nnx as mora_nnx  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        return None
    if case.module is None:
        return None
    model, call = case.module
    nnx.update(model, randomised(nnx.state(model, nnx.Param)))
    model = mora_nnx.adapt(model, case.rules, nnx.Rngs(5))
    nnx.update(model, randomised(nnx.state(model, mora_nnx.AdapterParam)))
    return difference(nnx.jit(call)(mora_nnx.merged(model), tokens), nnx.jit(call)(model, tokens))


def timed(step: Callable[..., Any], args: Any, seconds: list[float]) -> Any:
    """Runs a step and adds its time to a list."""
    before = time.perf_counter()
    result = jax.block_until_ready(step(*args))
    seconds.append(time.perf_counter() - before)
    return result


def difference(a: jax.Array, b: jax.Array) -> float:
    """Returns the largest difference, relative to the largest value."""
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))


def size_of(tree: Any) -> int:
    """Returns the numbers that a tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    sys.exit(main())
