"""A tiny run: its config, its text, and what a finished one leaves to the tests."""

import gzip
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

# The config of a run of 22 updates with a restart at every second one. The caller adds `data` and `run_dir`.
TINY = """
steps: 22
batch_size: 4
model:
  {vocab_size: 384, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2,
   num_key_value_heads: 2, max_position_embeddings: 32}
compute: {dtype: float32, layers: scan, remat: dots, loss_chunk: 64}
method: {name: mora, rank: 4, align: 8}
optimizer: {learning_rate: 1e-2}
schedule: {kind: jagged-cosine, warmup: 2}
restart: {every: 2, warmup: 1}
bad_steps: {window: 1}
eval: {every: 11, batch_size: 4, max_batches: 3}
checkpoint: {every: 3, keep: 0}
mesh: {data: 1}
"""


class TinyRun(NamedTuple):
    """A finished run with ten restarts.

    Attributes:
      config: its config. Nothing lies at `config.run_dir`: tests run there and reuse the compiled steps.
      folder: where the finished run lies.
      summary: what `pretrain` returned.
      compilations: how often each jitted step was compiled.
    """

    config: Any
    folder: Path
    summary: dict[str, Any]
    compilations: dict[str, int]


def tiny_documents(count: int, seed: int) -> list[str]:
    """Returns made-up documents of 10 to 60 words each, from a vocabulary of 200 words."""
    words = ["".join(random.Random(n).choices("abcdefghij", k=2 + n % 6)) for n in range(200)]
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(10, 60))) for _ in range(count)]


def write_tiny_text(folder: Path, train: int, validation: int) -> None:
    """Writes made-up text in C4's format: two training shards and one of validation, of so many documents."""
    folder.mkdir(exist_ok=True)
    shards = (("train.0", train), ("train.1", train), ("validation.0", validation))
    for seed, (name, documents) in enumerate(shards):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in tiny_documents(documents, seed))
        (folder / f"c4-{name}.json.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
