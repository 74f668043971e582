"""Measures a training step of models that know nothing of adapters: a GPT in Linen and NNX, beside `Llama`.

    python tests/tools/own_models.py --json own_models.json
    python tests/tools/own_models.py --layers 2 --width 128 --mlp 512 --heads 4 --batch 2 --length 64 --rank 8

All rows compute the same loss over a frozen, tied embedding. "frozen" trains the scale of the first norm
only, so it runs the forward pass and the backward pass down to the inputs: the cost of the base. All adapters
train this scale too. "full" trains all but the embeddings. "merge" differentiates through `State.merged` in
place of `adapted`, and "adapt" is `mora_jax.nnx.adapt`. `Llama` has the same width, layers and heads, and an
MLP of as many numbers.

Each row is a jitted step with AdamW and a donated state. It must lower the loss in three steps, else it is
not timed. Rows take turns, so that drift meets all alike. Memory is the compiler's: arguments, outputs that
are no arguments, and temporary arrays. Lines are those that a user adds to a program of full fine-tuning or
changes in it. qwix (LoRA of another package) takes part if it can be imported.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

from mora_jax import Compute, DoRA, Llama, LlamaConfig, LoRA, MoRA, State, bind, trees, value_and_grad
from mora_jax.models.batch import Batch
from mora_jax.models.llama import STACKED
from mora_jax.models.loss import cross_entropy
from mora_jax.transform import Rules

COLUMNS = ("model", "row", "lines", "ms", "to frozen", "to full", "GiB", "trained", "compile s")
LOSS_CHUNK = 8192  # tokens
RATES = {"frozen": 0.1, "full": 1e-3}  # learning rates; adapters have another
ADAPTER_RATE = 3e-3
CHECKED = 3  # steps that must lower the loss
PARTS = ("query", "key", "value", "out", "up", "down")

Loss = Callable[[Any, jax.Array], jax.Array]
Gradient = Callable[[State, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the models, and how they compute; named as the flags."""

    layers: int
    width: int
    mlp: int
    heads: int
    vocabulary: int
    length: int
    dtype: str
    attention: str


class Family(NamedTuple):
    """A model.

    Attributes:
      name: for the table.
      init: returns new parameters.
      loss: the plain model's loss.
      kernels: regex of the kernels of the layers.
      first_norm: regex of the scale of the first norm.
      embeddings: regex of the embeddings, which no row trains.
      stacked: regex of the kernels that are stacked over layers.
    """

    name: str
    init: Callable[[], Any]
    loss: Loss
    kernels: str
    first_norm: str
    embeddings: str
    stacked: str = ""


class Row(NamedTuple):
    """A way to train a model.

    Attributes:
      name: for the table.
      family: the model, as this row computes it.
      rules: what is done with each parameter.
      gradient: returns the value and the gradient of a loss for a State's trained arrays.
      lines: what a user adds or changes.
    """

    name: str
    family: Family
    rules: Rules
    gradient: Callable[[Loss], Gradient]
    lines: tuple[str, ...]

    @property
    def label(self) -> str:
        """The model's name and the row's."""
        return f"{self.family.name}: {self.name}"


@dataclasses.dataclass
class Trial:
    """A compiled row, its donated state, and what was measured."""

    row: Row
    step: Any
    state: Any
    trained: int
    gib: float = math.nan
    compile_seconds: float = math.nan
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def ms(self) -> float:
        """Median time of a step."""
        return 1000 * statistics.median(self.seconds)


RULES_LINE = "rules = [('.*/kernel', MoRA(128)), ('.*', 'frozen')]"
STATE_LINES = (
    RULES_LINE,
    "state = State.init(key, params, rules)",
    "optimizer = state.optimizer(optax.adamw(1e-3))",
    "value, gradients = value_and_grad(loss)(state, batch)",
    "state = state.updated(updates)",
)
ADAPT_LINES = (
    RULES_LINE,
    "model = mora_nnx.adapt(model, rules, rngs)",
    "optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=AdapterParam)",
    "value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model, batch)",
)
BIND_LINE = "loss(bind(state.params, state.adapters, state.methods), batch)"
QWIX_LINES = {
    "GPT, Linen": (
        "provider = qwix.LoraProvider(module_path='.*layer.*', rank=128, alpha=128)",
        "model = qwix.apply_lora_to_model(model, provider)",
        "with_lora = traverse_util.flatten_dict(model.init(key, batch)['params'])",
        "params = traverse_util.unflatten_dict(with_lora | traverse_util.flatten_dict(params))",
        "labels = path_aware_map(lambda path, _: 'lora' if 'lora' in path[-1] else 'frozen', params)",
        "optimizer = optax.partition({'lora': optax.adamw(1e-3), 'frozen': optax.set_to_zero()}, labels)",
    ),
    "GPT, NNX": (
        "provider = qwix.LoraProvider(module_path='.*layers.*', rank=128, alpha=128)",
        "model = qwix.apply_lora_to_model(model, provider, batch, rngs=nnx.Rngs(0))",
        "optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.LoRAParam)",
        "value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch)",
    ),
}


# The models.


class LinenLayer(nn.Module):
    """A layer of the GPT in Linen."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Adds attention and MLP to the residual stream."""
        s = self.sizes
        norm, dense = (functools.partial(cls, dtype=s.dtype) for cls in (nn.LayerNorm, nn.Dense))
        h = norm(name="attention_norm")(x)
        q, k, v = (split_heads(dense(s.width, name=name)(h), s) for name in ("query", "key", "value"))
        x = x + dense(s.width, name="out")(attend(q, k, v, s))
        h = norm(name="mlp_norm")(x)
        return x + dense(s.width, name="down")(nn.gelu(dense(s.mlp, name="up")(h)))


class LinenGPT(nn.Module):
    """Returns the final hidden states of a GPT in Linen."""

    sizes: Sizes

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Applies the layers to the sum of the embeddings of tokens and positions."""
        s, init = self.sizes, nn.initializers.normal(0.02)
        x = nn.Embed(s.vocabulary, s.width, dtype=s.dtype, embedding_init=init, name="embed")(tokens)
        x = x + nn.Embed(s.length, s.width, dtype=s.dtype, embedding_init=init, name="positions")(
            jnp.arange(tokens.shape[1])
        )
        for i in range(s.layers):
            x = LinenLayer(s, name=f"layer_{i}")(x)
        return nn.LayerNorm(dtype=s.dtype, name="norm")(x)


class NNXLayer(nnx.Module):
    """A layer of the GPT in NNX."""

    def __init__(self, s: Sizes, rngs: nnx.Rngs) -> None:
        self.sizes = s
        norm, dense = (
            functools.partial(cls, dtype=s.dtype, rngs=rngs) for cls in (nnx.LayerNorm, nnx.Linear)
        )
        self.attention_norm, self.mlp_norm = norm(s.width), norm(s.width)
        self.query, self.key, self.value, self.out = (dense(s.width, s.width) for _ in range(4))
        self.up, self.down = dense(s.width, s.mlp), dense(s.mlp, s.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Adds attention and MLP to the residual stream."""
        h = self.attention_norm(x)
        q, k, v = (split_heads(dense(h), self.sizes) for dense in (self.query, self.key, self.value))
        x = x + self.out(attend(q, k, v, self.sizes))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class NNXGPT(nnx.Module):
    """Returns the final hidden states of a GPT in NNX."""

    def __init__(self, s: Sizes, rngs: nnx.Rngs) -> None:
        embed = functools.partial(
            nnx.Embed, dtype=s.dtype, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
        )
        self.embed, self.positions = embed(s.vocabulary, s.width), embed(s.length, s.width)
        self.layers = nnx.List([NNXLayer(s, rngs) for _ in range(s.layers)])
        self.norm = nnx.LayerNorm(s.width, dtype=s.dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Applies the layers to the sum of the embeddings of tokens and positions."""
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def split_heads(x: jax.Array, s: Sizes) -> jax.Array:
    """Returns projections by heads."""
    return x.reshape(*x.shape[:-1], s.heads, -1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, s: Sizes) -> jax.Array:
    """Returns causal attention, heads joined."""
    q, k, v = (x.astype(s.dtype) for x in (q, k, v))  # qwix's factors in float32 widen them
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=s.attention)  # pyright: ignore
    return y.reshape(*y.shape[:-2], -1)


def hidden_loss(x: jax.Array, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the mean next-token loss (nats) of hidden states, with the embedding as head."""
    n, length = tokens.shape
    weights = jnp.broadcast_to(jnp.arange(length) < length - 1, (n, length)).astype(jnp.float32)
    targets = jnp.roll(tokens, -1, axis=1)
    x, chunk = x.reshape(-1, x.shape[-1]), math.gcd(tokens.size, LOSS_CHUNK)
    total: Any = cross_entropy(x, table.T, targets.reshape(-1), weights.reshape(-1), chunk)
    return total / weights.sum()


def drawn(init: Callable[[], Any]) -> Any:
    """Returns parameters like those of an initialisation, whose program XLA may take minutes to compile.

    Scales are ones and biases zeros; other arrays are normal with a standard deviation of 0.02.
    """
    shapes = jax.eval_shape(init)
    leaves = {}
    for i, (path, leaf) in enumerate(trees.flatten(shapes).items()):
        fixed = {"scale": jnp.ones, "bias": jnp.zeros, "b_RD": jnp.zeros, "m_RR": jnp.zeros}
        make = next((f for name, f in fixed.items() if path.endswith(name)), None)
        key = jax.random.fold_in(jax.random.key(0), i)
        array = make(leaf.shape) if make else 0.02 * jax.random.normal(key, leaf.shape)
        leaves[path] = array.astype(leaf.dtype)
    return trees.replaced(shapes, leaves)


def linen_gpt(s: Sizes, model: nn.Module | None = None, base: Family | None = None) -> Family:
    """Returns the GPT in Linen.

    Args:
      s: its sizes.
      model: another model of the same parameters, some of which may be new.
      base: what these parameters are taken from.
    """
    module, tokens = model or LinenGPT(s), jnp.zeros((1, 4), jnp.int32)

    def init() -> Any:
        params = drawn(lambda: module.init(jax.random.key(0), tokens)["params"])
        return trees.replaced(params, trees.flatten(base.init())) if base else params

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        x: Any = module.apply({"params": params}, tokens)
        return hidden_loss(x, params["embed"]["embedding"], tokens)

    kernels = rf"layer_\d+/({'|'.join(PARTS)})/kernel"
    return Family("GPT, Linen", init, loss, kernels, "layer_0/attention_norm/scale", "(embed|positions)/.*")


def nnx_gpt(s: Sizes, change: Callable[[nnx.Module], Any] = lambda model: model) -> Family:
    """Returns the GPT in NNX, as a function of the state of its parameters.

    Args:
      s: its sizes.
      change: returns another model in its place.
    """
    abstract = nnx.eval_shape(lambda: change(NNXGPT(s, nnx.Rngs(0))))
    graph, _, rest = nnx.split(abstract, nnx.Param, ...)
    if jax.tree.leaves(rest):
        raise ValueError("the model has arrays that are no parameters")

    def init() -> Any:
        return drawn(lambda: nnx.state(change(NNXGPT(s, nnx.Rngs(0))), nnx.Param))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        x = nnx.merge(graph, params, rest)(tokens)
        return hidden_loss(x, params["embed"]["embedding"][...], tokens)

    kernels = rf"layers/\d+/({'|'.join(PARTS)})/kernel"
    return Family("GPT, NNX", init, loss, kernels, "layers/0/attention_norm/scale", "(embed|positions)/.*")


def llama(s: Sizes) -> Family:
    """Returns the project's model, whose SwiGLU has as many numbers as the GPT's MLP."""
    config = LlamaConfig(
        vocab_size=s.vocabulary,
        hidden_size=s.width,
        intermediate_size=2 * s.mlp // 3,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        tie_word_embeddings=True,
    )
    compute: Any = {"dtype": s.dtype, "attention": s.attention, "loss_chunk": LOSS_CHUNK}
    model, tokens = Llama(config, Compute(**compute)), jnp.zeros((1, 4), jnp.int32)
    looped = Llama(config, Compute(layers="scan", dtype=compute["dtype"]))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        total, n = model.apply({"params": params}, Batch(tokens), method=Llama.loss)
        return total / n

    return Family(
        "Llama",
        lambda: drawn(lambda: looped.init(jax.random.key(0), tokens)["params"]),
        loss,
        "layers/.*_proj/kernel",
        "layers/input_layernorm/scale",
        "embed_tokens/.*",
        STACKED,
    )


# The rows.


def rows_of(s: Sizes, rank: int) -> Iterator[Row | Exception]:
    """Returns all rows, or why some cannot be made."""
    for family in (linen_gpt(s), nnx_gpt(s), llama(s)):
        bound = family.name == "Llama"
        gradient = bound_gradient if bound else value_and_grad
        lines = (*STATE_LINES, *((BIND_LINE,) if bound else ()))
        yield Row("frozen", family, rules_of(family), gradient, ())
        yield Row("full", family, [(family.embeddings, "frozen"), (".*", "train")], gradient, ())
        for name, method in {"MoRA": MoRA(rank), "LoRA": LoRA(rank), "DoRA": DoRA(rank)}.items():
            if name != "DoRA" or not bound:
                rules = [(family.kernels, method), *rules_of(family)]
                yield Row(f"{name} r {rank}", family, rules, gradient, lines)
        if not bound:
            rules = [(family.kernels, MoRA(rank)), *rules_of(family)]
            yield Row(f"MoRA r {rank}, merge", family, rules, merged_gradient, lines)
            yield from qwix_rows(s, family, rank)
        if family.name == "GPT, NNX":
            yield from adapt_rows(s, family, rank)


def rules_of(family: Family) -> list[Any]:
    """Returns the rules that train the first norm only."""
    return [(family.first_norm, "train"), (".*", "frozen")]


def adapt_rows(s: Sizes, family: Family, rank: int) -> Iterator[Row | Exception]:
    """Returns the rows of `mora_jax.nnx.adapt`, whose adapters are arrays of the model."""
    for name, method in {"MoRA": MoRA(rank), "LoRA": LoRA(rank)}.items():
        try:
            changed = adapt_family(s, [(family.kernels, method), (".*", "frozen")])
        except Exception as error:  # of any kind: the other rows go on
            yield RuntimeError(f"{family.name}: {name} r {rank}, adapt: {said(error)}")
        else:
            rules = [(".*/kernel_[^/]*", "train"), *rules_of(family)]
            yield Row(f"{name} r {rank}, adapt", changed, rules, value_and_grad, ADAPT_LINES)


def adapt_family(s: Sizes, rules: Rules) -> Family:
    """Returns an NNX model with adapters."""
    from mora_jax import nnx as mora_nnx

    return nnx_gpt(s, lambda model: mora_nnx.adapt(model, rules, nnx.Rngs(1)))


def qwix_rows(s: Sizes, family: Family, rank: int) -> Iterator[Row | Exception]:
    """Returns the rows of qwix's LoRA: factors in the kernels' type, its default, and the products'."""
    lines, rules = QWIX_LINES[family.name], [(".*_lora_[ab]", "train"), *rules_of(family)]
    for dtype in ("float32", s.dtype) if s.dtype != "float32" else ("float32",):
        name = f"qwix LoRA r {rank}, {dtype}"
        try:
            yield Row(name, qwix_family(s, family, rank, dtype), rules, value_and_grad, lines)
        except Exception as error:  # of any kind: the other rows go on
            yield RuntimeError(f"{family.name}: {name}: {said(error)}")


def qwix_family(s: Sizes, family: Family, rank: int, dtype: str) -> Family:
    """Returns a model with qwix's LoRA, whose factors have a type."""
    import qwix  # pyright: ignore[reportMissingImports]

    def in_dtype(init: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda key, shape, _: init(key, shape, jnp.dtype(dtype))

    provider = qwix.LoraProvider(
        module_path=".*layer.*",
        rank=rank,
        alpha=float(rank),
        lora_a_initializer=in_dtype(jax.nn.initializers.he_uniform()),
        lora_b_initializer=in_dtype(jax.nn.initializers.zeros),
    )
    if family.name != "GPT, NNX":
        return linen_gpt(s, qwix.apply_lora_to_model(LinenGPT(s), provider), family)
    tokens = jnp.zeros((1, 4), jnp.int32)
    return nnx_gpt(s, lambda model: qwix.apply_lora_to_model(model, provider, tokens, rngs=nnx.Rngs(1)))


def bound_gradient(loss: Loss) -> Gradient:
    """Returns `value_and_grad` of a model that calls `dense`."""

    def call(state: State, tokens: jax.Array) -> tuple[jax.Array, Any]:
        def of_trainable(trainable: Any) -> jax.Array:
            now = state.with_trainable(trainable)
            return loss(bind(now.params, now.adapters, now.methods), tokens)

        return jax.value_and_grad(of_trainable)(state.trainable)

    return call


def merged_gradient(loss: Loss) -> Gradient:
    """Returns the naive `value_and_grad`, which differentiates through merging."""

    def call(state: State, tokens: jax.Array) -> tuple[jax.Array, Any]:
        def of_trainable(trainable: Any) -> jax.Array:
            return loss(state.with_trainable(trainable).merged(), tokens)

        return jax.value_and_grad(of_trainable)(state.trainable)

    return call


# The measurement.


def traced(row: Row, tokens: jax.Array) -> Trial:
    """Returns a row with its initial state, not compiled yet."""
    family = row.family
    state = State.init(jax.random.key(1), family.init(), row.rules, family.stacked)
    optimizer = state.optimizer(optax.adamw(RATES.get(row.name, ADAPTER_RATE)))
    gradient = row.gradient(family.loss)

    def step(carry: tuple[State, Any], tokens: jax.Array) -> tuple[tuple[State, Any], jax.Array]:
        state, opt_state = carry
        updates: Any
        value, gradients = gradient(state, tokens)
        updates, opt_state = optimizer.update(gradients, opt_state, state.trainable)
        return (state.updated(updates), opt_state), value

    trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    carry = (state, optimizer.init(state.trainable))
    return Trial(row, jax.jit(step, donate_argnums=0).lower(carry, tokens), carry, trained)


def compile_step(trial: Trial) -> Trial:
    """Compiles a row. Like the next functions it returns the row."""
    before = time.perf_counter()
    trial.step = trial.step.compile()
    trial.compile_seconds = time.perf_counter() - before
    trial.gib = peak(trial.step)
    print(f"{trial.row.label}: compiled in {trial.compile_seconds:.1f} s", flush=True)
    return trial


def check(trial: Trial, tokens: jax.Array) -> Trial:
    """Raises ValueError if a row's loss is not finite or does not fall."""
    losses = []
    for _ in range(CHECKED + 1):
        trial.state, loss = trial.step(trial.state, tokens)
        losses.append(float(loss))
    if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        raise ValueError(f"the loss does not fall: {', '.join(f'{loss:.5f}' for loss in losses)}")
    return trial


def peak(program: Any) -> float:
    """Returns the memory that a compiled program needs, in GiB."""
    m = program.memory_analysis()
    used = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return used / 2**30


def each(
    function: Callable[[Any], Any], given: Iterable[Any], failures: list[str], threads: int = 1
) -> list[Any]:
    """Applies a function, and returns its results. What fails is left out, and said in `failures`."""

    def tried(item: Any) -> list[Any]:
        try:
            if isinstance(item, Exception):
                raise item
            return [function(item)]
        except Exception as error:  # of any kind: the other rows go on
            row = item.row if isinstance(item, Trial) else item
            failures.append(f"{row.label}: {said(error)}" if isinstance(row, Row) else str(error))
            print(failures[-1], flush=True)
            return []

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        results = pool.map(tried, given) if threads > 1 else map(tried, given)
        return [result for found in results for result in found]


def measured(trials: list[Trial], tokens: jax.Array, options: Any, failures: list[str]) -> list[Trial]:
    """Compiles and checks rows, and times them in turns, in the opposite order every other round."""
    trials = each(compile_step, trials, failures, options.threads)
    trials = each(lambda trial: check(trial, tokens), trials, failures)
    for _ in range(options.rounds):
        trials = each(lambda trial: time_steps(trial, tokens, options.steps), trials[::-1], failures)
    print(f"timed {options.rounds} rounds of {options.steps} steps", flush=True)
    return trials if options.rounds % 2 == 0 else trials[::-1]


def time_steps(trial: Trial, tokens: jax.Array, steps: int) -> Trial:
    """Adds the mean time of a step."""
    before = time.perf_counter()
    for _ in range(steps):
        trial.state, _ = trial.step(trial.state, tokens)
    jax.block_until_ready(trial.state)
    trial.seconds.append((time.perf_counter() - before) / steps)
    return trial


def report(trials: list[Trial]) -> list[dict[str, Any]]:
    """Returns what was measured, for JSON."""
    times = {(trial.row.family.name, trial.row.name): trial.ms for trial in trials}
    found = []
    for trial in trials:
        row, name = trial.row, trial.row.family.name
        found.append(
            {
                "model": name,
                "row": row.name,
                "lines": len(row.lines),
                "ms": trial.ms,
                **{
                    f"to {to}": trial.ms / times[name, to] if (name, to) in times else None
                    for to in ("frozen", "full")
                },
                "GiB": trial.gib,
                "trained": trial.trained,
                "compile s": trial.compile_seconds,
                "code": row.lines,
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Returns what was measured as a Markdown table."""
    digits = {
        "ms": ".2f",
        "to frozen": ".3f",
        "to full": ".3f",
        "GiB": ".2f",
        "trained": ",",
        "compile s": ".1f",
    }

    def cell(row: dict[str, Any], name: str) -> str:
        return "" if row[name] is None else format(row[name], digits.get(name, ""))

    rows = [COLUMNS, *[tuple(cell(row, name) for name in COLUMNS) for row in found]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def label_of(row: Row | Exception) -> str:
    """Returns a row's name, or what is said in its place."""
    return row.label if isinstance(row, Row) else str(row)


def said(error: BaseException) -> str:
    """Returns an error in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    on_gpu = jax.default_backend() == "gpu"
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {
        "layers": (12, "transformer layers"),
        "width": (768, "width of the residual stream"),
        "mlp": (3072, "width of the GPT's MLP; that of Llama is two thirds"),
        "heads": (12, "heads of attention"),
        "vocabulary": (32_000, "tokens in the vocabulary"),
        "batch": (32, "sequences of a step"),
        "length": (1024, "tokens of a sequence"),
        "rank": (128, "rank of the adapters"),
        "rounds": (12, "turns of each row"),
        "steps": (3, "steps of a turn, timed together"),
        "threads": (1, "rows compiled at a time; several may disturb XLA's choice of kernels"),
    }
    for name, (default, words) in numbers.items():
        made.add_argument(f"--{name}", type=int, default=default, help=f"{words} (default: {default})")
    kinds = {
        "dtype": (("bfloat16", "float32"), "bfloat16" if on_gpu else "float32", "type of products"),
        "attention": (("cudnn", "xla"), "cudnn" if on_gpu else "xla", "implementation of attention"),
    }
    for name, (choices, default, words) in kinds.items():
        made.add_argument(
            f"--{name}", choices=choices, default=default, help=f"{words} (default here: {default})"
        )
    made.add_argument("--only", default=".*", help="regex of the rows, as in 'GPT, Linen: MoRA.*'")
    made.add_argument("--json", type=Path, help="file for what was measured")
    return made


def main() -> int:
    """Prints the table. Returns the exit status, 1 if a row failed."""
    options = parser().parse_args()
    fields = {field.name for field in dataclasses.fields(Sizes)}
    sizes = Sizes(**{name: value for name, value in vars(options).items() if name in fields})
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {sizes}, {options.batch} sequences", flush=True)
    tokens = rows_of_tokens(options.batch, sizes.length, sizes.vocabulary)
    failures: list[str] = []
    rows = (row for row in rows_of(sizes, options.rank) if re.fullmatch(options.only, label_of(row)))
    trials = each(lambda row: traced(row, tokens), rows, failures)
    print(f"traced {len(trials)} rows", flush=True)
    trials = measured(trials, tokens, options, failures)
    found = report(trials)
    print(table(found))
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        data = {
            "device": device,
            "jax": jax.__version__,
            "options": settings,
            "rows": found,
            "failed": failures,
        }
        options.json.write_text(json.dumps(data, indent=1))
    return int(bool(failures))


def rows_of_tokens(n: int, length: int, vocabulary: int) -> jax.Array:
    """Returns sequences in which one fixed token follows each token."""
    next_token = jax.random.permutation(jax.random.key(1), vocabulary)
    first = jax.random.randint(jax.random.key(2), (n,), 0, vocabulary)
    return jax.lax.scan(lambda token, _: (next_token[token], token), first, length=length)[1].T


if __name__ == "__main__":
    sys.exit(main())
