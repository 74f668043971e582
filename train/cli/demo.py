"""`make demo`: the whole path on prose that every Python installation carries; nothing is downloaded."""

import dataclasses
import json
import shutil
from pathlib import Path

from rich.table import Table

from mora_jax.errors import InputError
from train.config import flags
from train.config.run import RunConfig
from train.console.exits import Preempted
from train.console.terminal import console
from train.data.rows.build import prepare
from train.data.text.prose import LIMIT_BYTES, write_shards
from train.data.tokenizer import train_tokenizer
from train.jobs.export import export
from train.jobs.pretrain import pretrain
from train.jobs.score import score_path
from train.storage import lock

# What a demo leaves in its folder, among others: the mark by which a folder is known to be a demo's.
MARK = "demo.txt"


def demo(config_path: str, folder: str, text_bytes: int = LIMIT_BYTES) -> None:
    """Gathers text, trains a tokenizer, prepares the rows, pretrains, exports and scores the export.

    Args:
      config_path: the run's config; its folders are replaced by those below `folder`.
      folder: everything is written here; what a demo left here before is removed first.
      text_bytes: text to gather, at most.

    Raises:
      InputError: for a config that does not fit, or a folder that is not a demo's.
    """
    text, tokenizer, rows = (f"{folder}/{name}" for name in ("text", "tokenizer.model", "data"))
    config = flags.read_config(config_path)
    config = dataclasses.replace(
        config, run_dir=folder, data=dataclasses.replace(config.data, directory=rows)
    )
    _start_afresh(Path(folder))
    write_shards(text, limit_bytes=text_bytes)
    train, validation = f"{text}/c4-train.*.json.gz", f"{text}/c4-validation.*.json.gz"
    train_tokenizer(train, tokenizer, config.model.vocab_size)
    prepare(train, validation, tokenizer, config.data.sequence_length, rows)
    try:
        summary = pretrain(config)
    except Preempted as stopped:
        raise Preempted(
            f"{folder}: the demo was stopped; mora pretrain {folder}/config.yaml goes on with its training, "
            "mora demo begins anew"
        ) from stopped
    export(folder, f"{folder}/export")
    score = score_path(f"{folder}/export", rows, config.eval, config.compute.dtype)
    summary["exported_perplexity"] = score.perplexity
    Path(folder, "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _show(summary, folder, config)


def _start_afresh(folder: Path) -> None:
    if (folder / MARK).exists():
        with lock.held(folder / lock.LOCK, "folder", str(folder)):  # not that of a demo under way
            shutil.rmtree(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something else than a demo; choose another --folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text("Made by `mora demo`, which replaces this folder when it runs again.\n")
    except OSError as error:
        raise InputError(f"--folder {folder} cannot be made: {error.strerror}") from error


def _show(summary: dict, folder: str, config: RunConfig) -> None:
    table = Table("", "", title="demo", show_header=False)
    table.add_row("validation perplexity", f"{summary['validation_perplexity']:.2f}")
    table.add_row("  of the exported model, reloaded", f"{summary['exported_perplexity']:.2f}")
    table.add_row("  of the unigram distribution", f"{summary['unigram_perplexity']:.1f}")
    table.add_row("restarts, group types in turn", f"{summary['restarts']}")
    table.add_row("tokens trained on", f"{summary['tokens']:,}")
    table.add_row("tokens/s", f"{summary['tokens_per_second']:,.0f}")
    for name in ("metrics.jsonl", "summary.json", "loss.png", "export/"):
        table.add_row(name, f"{folder}/{name}")
    console().print(table)
