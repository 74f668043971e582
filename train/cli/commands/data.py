"""`mora prepare-data`, `mora show-data` and `mora train-tokenizer`."""

import dataclasses
from typing import TYPE_CHECKING, Literal

import tyro

from mora_jax.errors import InputError
from train.cli.commands.arguments import Folder
from train.config.paths import spell_out
from train.console.terminal import console
from train.data.rows.options import Loss, Overlong, RowOptions
from train.data.text.forms import Form, FormName

if TYPE_CHECKING:
    from train.data.rows.info import DataInfo


@dataclasses.dataclass(frozen=True)
class PrepareData:
    """Tokenizes text, prompts or conversations into a data set of token rows.

    Attributes:
      source: training text: a file, a glob or a folder of JSON lines (.jsonl, .json, also .gz or .zst) or
        .parquet (any etils.epath path), tfds:NAME for a data set that TFDS has prepared (tfds:c4/en or
        tfds:/path/to/it), or org/name or hf://datasets/org/name/FILES for one of the Hub; empty for a data
        set that mora evaluate can read and mora pretrain cannot.
      mixture: one of several sources of training text, in the place of --source, as SOURCE=TIMES: how often
        each of its examples is in the rows, such as 2, or 0.25 for a quarter of them; may be given several
        times.
      validation: validation text, in the same forms; a tfds: source has a validation split of its own.
      validation_share: fraction of the training text that is the validation text instead, below 1; 0 for
        none. The hash of an example decides, so equal ones are on one side.
      tokenizer: SentencePiece model (.model), tokenizer.json, or a folder or model of the Hub (org/name) with
        one of them.
      out: folder of the data set; one in gs:// or s3:// is prepared on this machine's disk, in MORA_CACHE or
        ~/.cache/mora_jax, and then uploaded.
      sequence_length: tokens per row.
      form: what a line of JSON or a row of Parquet holds: text; a prompt and its completion; messages of a
        conversation; a query and its response, as MetaMathQA.
      fields: the keys or columns of the form's fields where they have other names, such as
        prompt=instruction,completion=output.
      text_key: key of the text in a line of JSON, or its column in Parquet, or its feature in TFDS.
      template: file with the Jinja template that writes messages as text, or a prompt as what a user says and
        its completion as the answer; empty for the tokenizer's own, by which prompts are not written.
      loss: what the loss counts: completions (what the assistant says) alone, or all of each example. Text
        counts as a whole.
      pack: several examples a row, documents of text joined; --no-pack: one a row, padded.
      overlong: drop examples longer than a row, or cut their end off. Joined text is never too long.
      bos: begin each document or prompt with the tokenizer's begin-of-text token.
      eos: end each document or completion with the tokenizer's end-of-text token. A template writes its own.
      skip_lines: bad lines or rows (not JSON, or not of the form) that are skipped; one more is an error.
      workers: processes; 0 for one per core.
      tfds_data_dir: folder of the data sets of TFDS; empty for its default.
    """

    tokenizer: str
    out: str
    source: str = ""
    mixture: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    validation: str = ""
    validation_share: float = 0.0
    sequence_length: int = 512
    form: FormName = "text"
    fields: str = ""
    text_key: str = "text"
    template: str = ""
    loss: Loss = "completions"
    pack: bool = True
    overlong: Overlong = "drop"
    bos: bool = False
    eos: bool = True
    skip_lines: int = 0
    workers: int = 0
    tfds_data_dir: str = ""

    def __post_init__(self) -> None:
        optional = ("source", "mixture", "validation", "tfds_data_dir", "template")
        spell_out(self, "--", "tokenizer", "out", optional=optional)
        _check_key(self.text_key)


def prepare_data(command: PrepareData) -> None:
    """Runs `mora prepare-data`."""
    from train.data.rows.build import prepare

    form = Form.of(command.form, command.fields, command.text_key)
    info = prepare(
        command.source,
        command.validation,
        command.tokenizer,
        command.sequence_length,
        command.out,
        skip_lines=command.skip_lines,
        workers=command.workers,
        tfds_data_dir=command.tfds_data_dir,
        bos=command.bos,
        eos=command.eos,
        options=RowOptions(form, command.loss, command.pack, command.overlong),
        template=command.template,
        validation_share=command.validation_share,
        mixture=command.mixture,
    )
    print(f"{command.out}: {'; '.join(_said(info, split) for split in info.rows)}")


def _check_key(text_key: str) -> None:
    if not text_key:
        raise InputError("--text-key is empty; give the key of the text, such as text")


def _said(info: "DataInfo", split: str) -> str:
    """Returns what a split holds, in words."""
    counts = info.counts[split]
    said = f"{split} {counts.rows:,} rows, {counts.tokens:,} tokens"
    if info.joined:
        return said
    padding = 1 - counts.tokens / (counts.rows * info.sequence_length)
    said += f" ({counts.loss_tokens:,} count; {padding:.1%} padding)"
    if counts.dropped:
        said += f", {counts.dropped:,} of {counts.documents:,} examples dropped (too long, or nothing counts)"
    return f"{said}, {counts.cut:,} cut" if counts.cut else said


@dataclasses.dataclass(frozen=True)
class ShowData:
    """Prints rows of a prepared data set as text: each document or example, and what of it the loss counts.

    What counts is green. Without colours, it stands in [[ and ]], unless all of the row counts.

    Attributes:
      path: folder of the data set.
      rows: rows to print, from the first.
      split: train or validation.
    """

    path: Folder
    rows: int = 3
    split: Literal["train", "validation"] = "train"

    def __post_init__(self) -> None:
        spell_out(self, "", "path")


def show_data(command: ShowData) -> None:
    """Runs `mora show-data`."""
    from train.data.rows.info import load_info
    from train.data.show import show_rows

    out = console(highlight=False)
    marks = ("[[", "]]") if out.color_system is None else ("", "")
    for text in show_rows(load_info(command.path, (command.split,)), command.split, command.rows, marks):
        out.print(text, soft_wrap=True)


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
        _check_key(self.text_key)


def train_tokenizer(command: TrainTokenizer) -> None:
    """Runs `mora train-tokenizer`."""
    from train.data.tokenizer import train_tokenizer as train

    made = train(
        command.source,
        command.out,
        command.vocab_size,
        command.max_documents,
        overwrite=command.overwrite,
        key=command.text_key,
    )
    print(f"{made.path}: {made.vocab_size:,} pieces")
