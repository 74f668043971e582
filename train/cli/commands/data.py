"""`mora prepare-data` and `mora train-tokenizer`."""

import dataclasses

import tyro

from train.config.paths import spell_out


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


def prepare_data(command: PrepareData) -> None:
    """Runs `mora prepare-data`."""
    from train.data.rows.build import prepare

    info = prepare(
        command.source,
        command.validation,
        command.tokenizer,
        command.sequence_length,
        command.out,
        skip_lines=command.skip_lines,
        workers=command.workers,
        tfds_data_dir=command.tfds_data_dir,
        text_key=command.text_key,
        bos=command.bos,
        eos=command.eos,
    )
    counts = (f"{split} {info.rows[split]:,} rows, {info.tokens[split]:,} tokens" for split in info.rows)
    print(f"{command.out}: {'; '.join(counts)}")


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
