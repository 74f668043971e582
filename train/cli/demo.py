"""`mora demo`: the whole path from text to export, on prose that every Python installation has."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

from rich.table import Table

from mora_jax.errors import InputError
from mora_jax.io import json_text, read_text
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
from train.run.folder import SUMMARY
from train.storage import lock
from train.storage.files import remove_parts, writable, write_whole

# A folder that holds this file, with this text, was made by a demo, so the next demo may replace it.
MARK = "demo.txt"
MADE = "Made by `mora demo`, which replaces this folder when it runs again.\n"


def demo(config_path: str, folder: str, text_bytes: int = LIMIT_BYTES) -> None:
    """Gathers text, trains a tokenizer, prepares the rows, pretrains, exports and scores the export.

    Args:
      config_path: the run's config. Its `run_dir` and `data.directory` are replaced.
      folder: where everything is written. An earlier demo there is removed first.
      text_bytes: UTF-8 bytes of text to gather, at most.

    Raises:
      InputError: the config is wrong, the folder holds something else than a demo, or another program
        uses it.
      Preempted: the training was stopped by a signal.
    """
    config = flags.read_config(config_path)
    with lock.lock_output(folder, "--folder"):
        _demo(config, folder, text_bytes)


def _demo(config: RunConfig, folder: str, text_bytes: int) -> None:
    text, tokenizer, rows = (f"{folder}/{name}" for name in ("text", "tokenizer.model", "data"))
    config = dataclasses.replace(
        config, run_dir=folder, data=dataclasses.replace(config.data, directory=rows)
    )
    _clear(Path(folder))
    write_shards(text, limit_bytes=text_bytes)
    train, validation = f"{text}/c4-train.*.json.gz", f"{text}/c4-validation.*.json.gz"
    train_tokenizer(train, tokenizer, config.model.vocab_size)
    prepare(train, validation, tokenizer, config.data.sequence_length, rows)
    try:
        summary = pretrain(config)
    except Preempted as stopped:
        raise Preempted(
            f"{folder}: the demo was stopped; mora pretrain {folder}/config.yaml resumes its training, "
            "mora demo starts from scratch"
        ) from stopped
    export(folder, f"{folder}/export")
    score = score_path(f"{folder}/export", rows, config.eval, config.compute.dtype)
    summary["exported_perplexity"] = score.perplexity
    write_whole(Path(folder, SUMMARY), json_text(summary, indent=2) + "\n")
    _show(summary, folder, config)


def _clear(folder: Path) -> None:
    """Makes the folder, or empties that of an earlier demo, whose training must not be running."""
    if _is_demo(folder):
        with lock.lock_file(folder / lock.LOCK, "--folder", str(folder)):
            for path in sorted(folder.iterdir()):
                if path.name not in (MARK, lock.LOCK):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return
    if folder.is_dir():
        remove_parts(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something else than a demo; choose another --folder")
    with writable(folder, f"--folder {folder} cannot be created"):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / MARK, MADE)


def _is_demo(folder: Path) -> bool:
    with contextlib.suppress(InputError):
        return read_text(folder / MARK, len(MADE)) == MADE
    return False


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
