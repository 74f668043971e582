"""The commands of `mora`: frozen dataclasses of flags. Their docstrings are the help."""

import dataclasses
import math
from typing import Annotated, Literal

import tyro

from mora_jax.errors import InputError, check_float32
from mora_jax.methods import MoRA
from mora_jax.models.generate import Sampling
from mora_jax.models.llama import LlamaConfig
from train.config.paths import spell_out
from train.config.run import RunConfig

Config = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
Folder = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
Out = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]


@dataclasses.dataclass(frozen=True)
class PrepareData:
    """Tokenizes text into a data set of token rows.

    Attributes:
      source: training text: a file, a glob or a folder of JSON lines (.jsonl, .json, also .gz or .zst) or
        .parquet (any etils.epath path), or tfds:NAME for a data set that TFDS has prepared (tfds:c4/en or
        tfds:/path/to/it); empty for a data set that mora evaluate can read and mora pretrain cannot.
      validation: validation text, in the same forms; a tfds: source has a validation split of its own.
      tokenizer: SentencePiece model (.model), tokenizer.json, or a folder or model of the Hub (org/name) with
        one of them.
      out: folder of the data set; one in gs:// or s3:// is prepared on this machine's disk, in MORA_CACHE or
        ~/.cache/mora_jax, and then uploaded.
      sequence_length: tokens per row.
      text_key: key of the text in a line of JSON, or its column in Parquet, or its feature in TFDS.
      bos: begin each document with the tokenizer's begin-of-text token.
      eos: end each document with the tokenizer's end-of-text token.
      skip_lines: bad lines or rows (not JSON, or without text) that are skipped; one more is an error.
      workers: processes; 0 for one per core.
      tfds_data_dir: folder of the data sets of TFDS; empty for its default.
    """

    tokenizer: str
    out: str
    source: str = ""
    validation: str = ""
    sequence_length: int = 512
    text_key: str = "text"
    bos: bool = False
    eos: bool = True
    skip_lines: int = 0
    workers: int = 0
    tfds_data_dir: str = ""

    def __post_init__(self) -> None:
        spell_out(self, "--", "tokenizer", "out", optional=("source", "validation", "tfds_data_dir"))


@dataclasses.dataclass(frozen=True)
class TrainTokenizer:
    """Trains a SentencePiece BPE model with byte fallback.

    Attributes:
      source: text: a file, a glob or a folder, in the formats of mora prepare-data.
      out: model file to write, ending in .model.
      vocab_size: number of pieces.
      text_key: key of the text in a line of JSON, or its column in Parquet.
      max_documents: most documents to train on.
      overwrite: replace the model file if there is one; otherwise it is an error.
    """

    source: str
    out: str
    vocab_size: int = 32_000
    text_key: str = "text"
    max_documents: int = 1_000_000
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        spell_out(self, "--", "source", "out")


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Pretrains a model from a config file, or resumes its run. Flags override the file's values.

    Attributes:
      config: YAML file, such as configs/demo.yaml.
      resume: resume the run in --run-dir if there is one; with --no-resume such a folder is an error.
      dry_run: only show shapes, trainable and frozen parameters, tokens and steps.
    """

    config: Config
    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    resume: bool = True
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """Computes what a config needs of each TPU or GPU, by compiling its training step without any of them.

    Flags override the file's values. Exits with status 1 if the config does not fit.

    Attributes:
      config: YAML file, such as configs/1_3b_remora.yaml.
      topology: slice of TPUs to compile for, with the TPU compiler, such as v5e:16x16; empty for none.
      devices: number of GPUs to plan for instead, simulated by CPU devices; 0 for none.
      memory: memory of one such GPU, in GiB.
      every_program: also compile the restart and the evaluation.
      out: JSON file for all figures, in bytes; empty for none.
      overwrite: replace the file of --out if there is one; otherwise it is an error.
    """

    config: Config
    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    topology: str = ""
    devices: int = 0
    memory: float = 80.0
    every_program: tyro.conf.FlagCreatePairsOff[bool] = False
    out: str = ""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        spell_out(self, "--", optional=("out",))


@dataclasses.dataclass(frozen=True)
class PlanTable:
    """Prints the plans of several configs on several slices of TPUs as one Markdown table.

    Each config is sharded over all chips of a slice, with compute.remat full and splash attention.

    Attributes:
      configs: YAML files.
      topologies: slices of TPUs, such as v5e:2x4 v5e:16x16.
      sequences: most sequences of a microbatch on one chip.
      out: JSON file of plans; those that it holds are not compiled again.
      state_only: compile nothing; for plans that the file lacks, show the sizes of the state and the formula.
    """

    configs: tuple[str, ...]
    topologies: tuple[str, ...]
    sequences: int = 4
    out: str = "plans.json"
    state_only: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        spell_out(self, "--", "configs", "out")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Computes the validation perplexity of a run or of an exported model.

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


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continues prompts with a run or a Hugging Face model, or chats in the terminal.

    Without --prompt and --prompts, --chat answers what is typed, until Ctrl-C or the end of the input.

    Attributes:
      path: folder of a run, Hugging Face folder, or id of a model on the Hub (org/name, org/name@revision).
      prompt: text to continue; may be given several times.
      prompts: file of JSON lines with a `prompt` each, instead; empty for none.
      out: file of JSON lines to write: prompt, completion, tokens (new ones) and finish ("stop" at a stop
        string or an end-of-text token, "length" at the most tokens or the model's context); empty for
        standard output.
      overwrite: replace the file of --out if there is one; otherwise it is an error.
      chat: take each prompt as what a user says, in the tokenizer's chat template.
      max_new_tokens: most new tokens of each prompt.
      temperature: what logits are divided by before tokens are drawn; 0 takes the most probable token.
      top_p: tokens are drawn from the fewest whose probabilities sum to this, in (0, 1]; 1 for all.
      seed: seed of the random numbers. Each prompt has its own, which do not depend on other prompts.
      stop: text that ends a completion and is not part of it; may be given several times.
      batch_size: prompts that are computed at a time.
      merged: merge a run's adapters; with --no-merged they are computed beside the kernels.
      dtype: type of products.
    """

    path: Folder
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    prompts: str = ""
    out: str = ""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    chat: tyro.conf.FlagCreatePairsOff[bool] = False
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    batch_size: int = 8
    merged: bool = True
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        spell_out(self, "", "path")
        spell_out(self, "--", optional=("prompts", "out"))
        given = bool(self.prompt) + bool(self.prompts)
        if given > 1 or (not given and not self.chat):
            raise InputError("give --prompt TEXT, --prompts FILE, or --chat alone to chat in the terminal")
        if self.out and not given:
            raise InputError("--out is of --prompt and --prompts; a chat is written to the terminal")
        if self.batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, not {self.batch_size}")
        if "" in self.stop:
            raise InputError("--stop must not be empty")
        self.sampling()

    def sampling(self) -> Sampling:
        """Returns how tokens are chosen. Raises InputError for bad values."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.seed)


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


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draws the loss and the learning rate of one run, or of several in one picture.

    Attributes:
      runs: folders of runs, which may be training.
      out: PNG file to write; by default loss.png in the folder of a single run.
      overwrite: replace the file of --out if there is one; otherwise it is an error.
    """

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)"),
    ]
    out: str = ""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        spell_out(self, "", "runs")
        spell_out(self, "--", optional=("out",))
        if len(self.runs) != 1 and not self.out:
            raise InputError("give one run, or a PNG file for several: mora plot RUN RUN --out FILE.png")


def _weighted(adapter: str) -> tuple[str, float]:
    path, _, weight = adapter.rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        return adapter, 1.0
    if not path or not math.isfinite(value):
        raise InputError(f"{adapter}: give an adapter and a finite weight, such as A:0.5")
    check_float32(f"{path}: its weight", value)
    return path, value


@dataclasses.dataclass(frozen=True)
class ListCheckpoints:
    """Lists and verifies a run's checkpoints. Exits with status 4 if one is damaged.

    Attributes:
      run_dir: folder of the run, which may be training.
      no_verify: only list the checkpoints; verifying reads every file.
    """

    run_dir: Folder
    no_verify: tyro.conf.FlagCreatePairsOff[bool] = False

    def __post_init__(self) -> None:
        spell_out(self, "", "run_dir")


@dataclasses.dataclass(frozen=True)
class SurveyMethods:
    """Prints a table of methods for a model: trainable parameters, r_hat, attainable rank.

    Attributes:
      rank: rank of LoRA, whose parameter count MoRA matches.
      model: the model; its seven linears are adapted.
    """

    rank: int = 128
    model: Annotated[LlamaConfig, tyro.conf.FlagConversionOff] = dataclasses.field(
        default_factory=LlamaConfig
    )

    def __post_init__(self) -> None:
        MoRA(self.rank)  # raises InputError for a bad rank


@dataclasses.dataclass(frozen=True)
class Demo:
    """Tokenizes, prepares, pretrains and exports on text of this Python installation.

    Attributes:
      config: YAML file of the run.
      folder: folder for the data and the run; an earlier demo in it is replaced.
    """

    config: str = "configs/demo.yaml"
    folder: str = "runs/demo"

    def __post_init__(self) -> None:
        spell_out(self, "--", "config", "folder")
