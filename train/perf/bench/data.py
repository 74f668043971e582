"""`mora bench data`: how fast text is prepared and rows are read."""

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from rich.table import Table

from mora_jax.io import json_text
from train.config.sections import at_least
from train.console.terminal import console
from train.data.rows.build import prepare
from train.data.rows.info import DataInfo
from train.data.rows.read import train_batches
from train.data.text.files import documents, shards
from train.storage.files import write_result

READ_SECONDS = 5.0
VALIDATION_DOCUMENTS = 500
WARM_UP_BATCHES = 10  # more than are read ahead


@dataclass(frozen=True)
class DataSpeed:
    """Tokens a second, and the setting of the measurement."""

    prepared_tokens_per_second: float
    read_tokens_per_second: float
    prepared_tokens: int
    prepare_seconds: float
    sequence_length: int
    batch_size: int
    cores: int


def bench(
    source: str, tokenizer: str, sequence_length: int, batch_size: int, out: str = "", workers: int = 0
) -> DataSpeed:
    """Prepares `source` in a temporary folder, reads it, and prints both rates.

    The time of preparing includes the start of its processes.

    Args:
      source: text: a glob, a folder or a file.
      tokenizer: see `hf.read_tokenizer`.
      sequence_length: tokens of a row.
      batch_size: rows of a batch that is read.
      out: JSON file for the figures; empty for none.
      workers: processes that prepare; 0 for one a core.

    Raises:
      InputError: as `build.prepare` and `read.train_batches`, and for a batch of no row.
    """
    at_least("--batch-size", batch_size, 1)
    with tempfile.TemporaryDirectory(prefix="mora-bench-") as folder:
        validation = _validation_text(source, Path(folder))
        started = time.perf_counter()
        info = prepare(source, validation, tokenizer, sequence_length, f"{folder}/data", workers=workers)
        seconds = time.perf_counter() - started
        tokens = sum(info.tokens.values())
        speed = DataSpeed(
            prepared_tokens_per_second=tokens / seconds,
            read_tokens_per_second=read_speed(info, batch_size),
            prepared_tokens=tokens,
            prepare_seconds=seconds,
            sequence_length=sequence_length,
            batch_size=batch_size,
            cores=os.cpu_count() or 1,
        )
    _show(speed)
    if out:
        write_result(out, json_text(asdict(speed), indent=2) + "\n")
    return speed


def read_speed(info: DataInfo, batch_size: int, seconds: float = READ_SECONDS) -> float:
    """Returns the tokens a second of `train_batches` for a reader that does nothing else."""
    batches = train_batches(info, batch_size, seed=0, start_step=0)
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    started, rows = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        rows += len(next(batches).tokens_BT)
    return rows * info.sequence_length / (time.perf_counter() - started)


def _validation_text(source: str, folder: Path) -> str:
    """Writes the validation text that a data set must have: the first documents of the source."""
    texts = islice(documents(shards(source)[0], skip_lines=0), VALIDATION_DOCUMENTS)
    file = folder / "validation.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def _show(speed: DataSpeed) -> None:
    table = Table("", "M tokens/s", "", title="Data")
    prepared = f"{speed.prepared_tokens:,} tokens in {speed.prepare_seconds:.1f} s, {speed.cores} cores"
    table.add_row("prepared", f"{speed.prepared_tokens_per_second / 1e6:.2f}", prepared)
    read = f"batches of {speed.batch_size} rows of {speed.sequence_length} tokens"
    table.add_row("read", f"{speed.read_tokens_per_second / 1e6:.2f}", read)
    console().print(table)
