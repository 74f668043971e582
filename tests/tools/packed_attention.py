"""Times attention within segments beside plain causal attention, on a GPU, and compares it with float32.

    python tests/tools/packed_attention.py [--out FILE.json]

Forward and backward, bfloat16, 32,768 tokens in rows of 512, 2,048 and 8,192, about eight segments a row.
Then the 250M model's whole step with MoRA r 128, with and without segments. The shapes of heads are those of
the 250M model, of SmolLM2-135M, and of the 1.3B model.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax.models import cudnn
from mora_jax.models.attention import Visible, attention
from mora_jax.models.batch import Batch
from mora_jax.sharding import make_mesh
from train.config import flags
from train.perf.bench.program import lower_step, placed
from train.runtime import backend
from train.step.spec import spec_of
from train.step.step import train_step

TOKENS = 32_768
SHAPES = {
    "250M": (16, 16, 48),
    "SmolLM2-135M": (9, 3, 64),
    "1.3B": (32, 32, 64),
}  # query heads, key heads, width
LENGTHS = (512, 2048, 8192)


def segments(rows: int, length: int) -> tuple[np.ndarray, int]:
    """Returns the segments of rows, of random lengths around an eighth of a row, and the most of a row."""
    rng, mean = np.random.default_rng(0), max(length // 8, 64)
    found = np.zeros((rows, length), np.int32)
    for row_T in found:
        ends = np.cumsum(rng.integers(mean // 2, mean * 3 // 2, 2 * length // mean + 2))
        row_T[:] = 1 + np.searchsorted(ends, np.arange(length), side="right")
    return found, int(found.max())


def milliseconds(function: Callable[..., Any], *arrays: Any, calls: int = 20) -> float:
    """Returns the time of a call: the least of three means."""
    jax.block_until_ready(function(*arrays))
    found = []
    for _ in range(3):
        began = time.perf_counter()
        last = [function(*arrays) for _ in range(calls)][-1]
        jax.block_until_ready(last)
        found.append((time.perf_counter() - began) / calls * 1e3)
    return min(found)


def both_ways(visible_of: Callable[[Any], Visible], kernel: Any) -> Callable[..., Any]:
    """Returns a compiled function of q, k, v, w and segments: attention, and its gradients against w."""

    @jax.jit
    def run(q: Any, k: Any, v: Any, w: Any, ids: Any) -> Any:
        y, pull = jax.vjp(lambda q, k, v: attention(q, k, v, visible_of(ids), kernel), q, k, v)
        return y, *pull(w)

    return run


def compare(shape: tuple[int, int, int], length: int) -> dict[str, Any]:
    """Returns times, and for short rows the largest differences from float32 XLA."""
    heads, kv_heads, width = shape
    rows = TOKENS // length
    ids, most = segments(rows, length)
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    arrays = [
        jax.random.normal(key, (rows, length, n, width), jnp.bfloat16)
        for key, n in zip(keys, counts, strict=True)
    ]
    bound = length // cudnn.TOKENS_OF_SEGMENT if length >= cudnn.SHORTEST else most
    ways = {
        "plain": both_ways(lambda ids: Visible(), "cudnn"),
        "mask": both_ways(lambda ids: Visible(segments_BT=ids), "cudnn"),
        "chosen": both_ways(lambda ids: Visible(segments_BT=ids, most_segments=bound), "cudnn"),
    }
    found: dict[str, Any] = {"most": most, "packed": cudnn.pays(length, bound)}
    found |= {name: round(milliseconds(way, *arrays, ids), 3) for name, way in ways.items()}
    if length == LENGTHS[1]:
        few = [a[:2].astype(jnp.float32) for a in arrays]
        with jax.default_matmul_precision("highest"):
            exact = both_ways(lambda ids: Visible(segments_BT=ids), "xla")(*few, ids[:2])
        ways = {"xla": both_ways(lambda ids: Visible(segments_BT=ids), "xla")} | ways
        for name in ("xla", "mask", "chosen"):
            got = ways[name](*(a[:2] for a in arrays), ids[:2])
            pairs = zip(got, exact, strict=True)
            found[f"error, {name}"] = [round(float(jnp.abs(a - b).max()), 4) for a, b in pairs]
    return found


def step_times(config_file: str) -> dict[str, Any]:
    """Returns the medians of whole steps, plain and with segments, in milliseconds."""
    words = ["--compute.attention", "cudnn", "--batch-size", "64"]
    config = flags.read_config(config_file, words)
    length = config.data.sequence_length
    spec, rules = spec_of(config), config.parameter_rules()
    shape = (config.batch_size, length)
    lowered = lower_step(spec, rules, shape, make_mesh(1))
    ids, most = segments(config.batch_size, length)
    found: dict[str, Any] = {"rows": config.batch_size, "length": length, "most": most}
    for name in ("plain", "segments"):
        timed = placed(lowered, None, 0.0)
        if name == "segments":
            timed.batches = [
                Batch(b.tokens_BT, segments_BT=jnp.asarray(ids), most_segments=most) for b in timed.batches
            ]
        timed.compiled = train_step.lower(spec, timed.methods, timed.state, timed.batches[0]).compile()
        timed.run(5)
        found[name] = round(statistics.median(timed.run(40)) * 1e3, 2)
    return found


def main() -> None:
    """Prints every figure, and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--config", default="configs/250m_mora.yaml")
    options = parser.parse_args()
    backend.set_flags(deterministic=False)  # as in a run
    figures: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    cases = {f"{name}, {t}": functools.partial(compare, s, t) for name, s in SHAPES.items() for t in LENGTHS}
    for name, measure in (cases | {"step, 250M": functools.partial(step_times, options.config)}).items():
        figures[name] = measure()
        print(name, json.dumps(figures[name]), flush=True)
        if options.out:
            options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
