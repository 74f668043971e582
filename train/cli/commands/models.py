"""`mora evaluate`, `mora export` and `mora merge`."""

import dataclasses
import math
from typing import Annotated, Literal

import tyro

from mora_jax.errors import InputError, check_float32
from mora_jax.hf.hub import is_hub_id
from mora_jax.io import path_of
from train.cli.commands.arguments import Folder, Out
from train.config.paths import spell_out
from train.config.sections import Evaluation
from train.console.terminal import print_summary


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Computes the validation perplexity of a run or of an exported model.

    A run's own figure, in its summary.json, is of eval.max_batches in compute.dtype.

    Attributes:
      path: folder of a run, Hugging Face folder, or id of a model on the Hub (org/name, org/name@revision).
      data: data set to evaluate on; empty for the run's own.
      batch_size: sequences per batch.
      max_batches: most batches to read; 0 for the whole split.
      dtype: type of products.
    """

    path: Folder
    data: str = ""
    batch_size: int = 64
    max_batches: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        spell_out(self, "", "path")
        spell_out(self, "--", optional=("data",))


def evaluate(command: Evaluate) -> None:
    """Runs `mora evaluate`."""
    from train.jobs.score import score_path

    how = Evaluation(batch_size=command.batch_size, max_batches=command.max_batches)
    score = score_path(command.path, command.data, how, command.dtype)
    print_summary({"validation_loss": score.loss, "validation_perplexity": score.perplexity}, command.path)


@dataclasses.dataclass(frozen=True)
class Export:
    """Exports a run's merged weights and tokenizer, or its adapters, as a Hugging Face folder.

    Attributes:
      run_dir: folder of the run.
      out: folder to write.
      dtype: type of the stored weights.
      adapter: write the adapters alone, as PEFT reads them: LoRA and DoRA as they are, MoRA with share or
        truncate as LoRA of rank r_hat, without loss.
      format: peft, or mora for the files of MoRA's authors; with --adapter.
      pad_rank: pad all adapters with zeros to one rank of 1, 8, 16, 32, 64, 128, 256, 320 or 512, which vLLM
        serves; with --adapter.
      with_base: folder to write the model without its adapters to, with what the run trained itself, as the
        base of the adapters; empty for none. Needed if nobody else has the base; with --adapter.
    """

    run_dir: Folder
    out: Out
    dtype: Literal["float32", "bfloat16"] = "float32"
    adapter: tyro.conf.FlagCreatePairsOff[bool] = False
    format: Literal["peft", "mora"] = "peft"
    pad_rank: tyro.conf.FlagCreatePairsOff[bool] = False
    with_base: str = ""

    def __post_init__(self) -> None:
        spell_out(self, "", "run_dir", "out")
        spell_out(self, "--", optional=("with_base",))

    def check(self) -> None:
        """Raises InputError for flags that do not fit each other."""
        if not self.adapter and (self.format, self.pad_rank, self.with_base) != ("peft", False, ""):
            raise InputError("--format, --pad-rank and --with-base are of adapters: give --adapter too")
        if self.format == "mora" and self.pad_rank:
            raise InputError(
                "--pad-rank pads LoRA's ranks, and --format mora has none; leave one of them out"
            )


def export(command: Export) -> None:
    """Runs `mora export`."""
    command.check()
    if command.adapter:
        export_adapter(command)
    else:
        export_merged(command)


def export_merged(command: Export) -> None:
    """Runs `mora export` without --adapter."""
    from train.jobs.export import export as write

    write(command.run_dir, command.out, command.dtype)
    print(f"written: {command.out}")


def export_adapter(command: Export) -> None:
    """Runs `mora export --adapter`."""
    from train.console.terminal import warn
    from train.jobs.adapter import AdapterOptions, advice, size_of
    from train.jobs.adapter import export_adapter as write

    how = AdapterOptions(command.dtype, command.format, command.pad_rank, command.with_base)
    said = write(command.run_dir, command.out, how)
    warn(advice(said))
    for folder in filter(None, (command.out, command.with_base)):
        print(f"written: {folder} ({size_of(folder) / 1e6:,.1f} MB)")


@dataclasses.dataclass(frozen=True)
class Merge:
    """Merges adapters of PEFT, or of MoRA's authors, into a model, and writes it as a Hugging Face folder.

    The model is read and written tensor by tensor, and computed in float32.

    Attributes:
      paths: folder of the model, or its id on the Hub (org/name, org/name@revision); folders or ids of
        adapters, each with :WEIGHT behind it unless that is 1, such as A:0.5 B:0.5; folder to write.
      dtype: type of the written tensors; base for those of the model.
    """

    paths: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="BASE ADAPTER[:WEIGHT] ... OUT", help_behavior_hint="(required)"),
    ]
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"

    def __post_init__(self) -> None:
        spell_out(self, "", "paths")

    def parts(self) -> tuple[str, list[tuple[str, float]], str]:
        """Returns the model, the adapters with their weights, and the folder to write."""
        if len(self.paths) < 3:
            raise InputError("give a model, an adapter and a folder to write: mora merge BASE ADAPTER OUT")
        base, *adapters, out = self.paths
        return base, [_weighted(adapter) for adapter in adapters], out


def merge(command: Merge) -> None:
    """Runs `mora merge`."""
    from train.jobs.adapter import merge_adapters

    dtype = None if command.dtype == "base" else command.dtype
    base, adapters, out = command.parts()
    count = merge_adapters(base, adapters, out, dtype)
    print(f"written: {out} ({count} tensors changed)")


def _weighted(adapter: str) -> tuple[str, float]:
    path, _, weight = adapter.rpartition(":")
    try:
        value = float(weight)
    except ValueError as error:
        if path and not path_of(adapter).exists() and (is_hub_id(path) or path_of(path).exists()):
            raise InputError(f"{adapter}: {weight!r} is no weight; give a number, such as A:0.5") from error
        return adapter, 1.0
    if not path or not math.isfinite(value):
        raise InputError(f"{adapter}: give an adapter and a finite weight, such as A:0.5")
    check_float32(f"{path}: its weight", value)
    return path, value
