"""The facts about a prepared data set, checked against its files."""

import contextlib
import hashlib
import io
import zipfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np

from mora_jax.errors import InputError
from mora_jax.hf.tokenizer_files import FOLDER, read_tokenizer
from mora_jax.io import read_bytes, read_json
from train.data.rows import layout
from train.data.rows.counts import Counts
from train.data.rows.description import check_description
from train.data.rows.settings import read_settings
from train.data.rows.staging import staged
from train.data.text.entries import TEXT_KEY

_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError)


@dataclass(frozen=True)
class DataInfo:
    """Facts about a prepared data set.

    `rows` and `tokens` (those in rows) are counts by split; a data set may lack the split "train". `bos_id`
    and `eos_id` were put around each document; None for none. For what follows, see `Settings`.
    """

    directory: str
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int | None
    sequence_length: int
    rows: dict[str, int]
    tokens: dict[str, int]
    bos_id: int | None = None
    text_key: str = TEXT_KEY
    form: str = "text"
    fields: str = ""
    loss: str = "completions"
    pack: bool = True
    overlong: str = "drop"
    template_sha256: str = ""
    validation_share: float = 0.0
    counts: Mapping[str, Counts] = field(default_factory=dict, compare=False)

    @property
    def joined(self) -> bool:
        """Whether rows are cut from joined documents: they have tokens alone, which all count."""
        return self.form == "text" and self.pack


def load_info(directory: str, splits: Collection[str] = layout.SPLITS) -> DataInfo:
    """Reads and checks the facts about a prepared data set; downloads one that is in a bucket.

    Args:
      directory: the data set.
      splits: those whose rows are needed, if there are any; others are neither checked nor downloaded.

    Raises:
      InputError: the data set is not finished, has a newer format, lacks row files or has some of another
        size than was written, or holds another tokenizer than it was prepared with.
    """
    folder = staged(directory, splits)
    if (folder / layout.SETTINGS).exists():
        read_settings(folder, directory)
        if not (folder / layout.DESCRIBED).exists():
            raise InputError(f"{directory} is not finished; run the same preparation again to resume it")
    try:
        facts = read_json(folder / "metadata.json")
        parts = facts.pop("splits")
        there = [split for split in layout.SPLITS if split in parts or split == "validation"]
        rows, tokens, file_bytes = (
            {split: layout.count(parts[split][what]) for split in there}
            for what in ("rows", "tokens", "file_bytes")
        )
        counts = {split: Counts(**parts[split]) for split in there}
        info = DataInfo(str(folder), **facts, rows=rows, tokens=tokens, counts=counts)
        _check_facts(info, file_bytes)
    except (InputError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{directory} is not a data set made by prepare-data; prepare one there") from error
    check_description(folder)
    _check_files(folder, {split: size for split, size in file_bytes.items() if split in splits})
    _check_tokenizer(info)
    return info


def check_trainable(info: DataInfo) -> None:
    """Raises InputError if a data set has validation text alone."""
    if "train" not in info.rows:
        raise InputError(
            f"{info.directory} has validation text alone, for mora evaluate; to train, prepare with --source"
        )


def unigram_perplexity(info: DataInfo) -> float:
    """Returns the perplexity of the validation rows under the frequencies in the training rows.

    Every frequency is one higher than counted, so that none is 0.

    Raises:
      InputError: the counts are damaged.
    """
    train_V, validation_V = (_unigram(info)[split] for split in layout.SPLITS)
    log_p_V = np.log(train_V + 1) - np.log(train_V.sum() + len(train_V))
    return float(np.exp(-(validation_V * log_p_V).sum() / validation_V.sum()))


def content_hash(info: DataInfo) -> str:
    """Returns a hash of how often each piece occurs in each split: other text has another one.

    Raises:
      InputError: the counts are damaged.
    """
    digest = hashlib.sha256()
    for counts_V in _unigram(info).values():
        digest.update(counts_V.tobytes())
    return digest.hexdigest()


def _check_facts(info: DataInfo, file_bytes: dict[str, int]) -> None:
    """Raises InputError for facts that no preparation writes, or that take more memory than the rows."""
    for counts in info.counts.values():
        for value in astuple(counts):
            layout.count(value)
    around = [value for value in (info.bos_id, info.eos_id) if value is not None]
    for value in (info.vocab_size, info.sequence_length, *around):
        layout.count(value)
    right = 2 <= info.sequence_length < 2**31 and info.vocab_size <= layout.MAX_PIECES
    right &= all(value < info.vocab_size for value in around)
    texts = (info.tokenizer_sha256, info.text_key, info.form, info.fields, info.loss, info.overlong)
    right &= all(isinstance(value, str) for value in (*texts, info.template_sha256))
    right &= isinstance(info.pack, bool) and isinstance(info.validation_share, int | float)
    right &= all(info.rows[split] <= file_bytes[split] for split in info.rows)  # a row takes some bytes
    if not right:
        raise InputError("no preparation writes such facts")


def _check_files(folder: Path, file_bytes: dict[str, int]) -> None:
    for split, expected in file_bytes.items():
        held = sum(file.stat().st_size for file in folder.glob(f"{layout.NAME}-{split}.array_record-*"))
        if held != expected:
            raise InputError(
                f"{folder}: the {split} rows take {held} bytes, not {expected}; "
                "copy or prepare the data set again"
            )


def _check_tokenizer(info: DataInfo) -> None:
    with contextlib.suppress(InputError):
        if read_tokenizer(Path(info.directory)).has_hash(info.tokenizer_sha256):
            return
    place = f"{info.directory}/{FOLDER}"
    raise InputError(f"{place} is not the tokenizer that the rows were made with; restore its files")


def _unigram(info: DataInfo) -> dict[str, np.ndarray]:
    """Returns how often each piece occurs in each split: (V,) each."""
    path = Path(info.directory) / layout.UNIGRAM
    largest = layout.piece_count_bytes(info.vocab_size)
    content = read_bytes(path, 2 * largest)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = {split: archive.getinfo(f"{split}.npy") for split in info.rows}
            if any(part.file_size > largest for part in parts.values()):
                raise ValueError("it holds more counts than there are pieces")
            return {
                split: layout.piece_counts(archive.read(part), info.vocab_size)
                for split, part in parts.items()
            }
    except (OSError, ValueError, LookupError, *_ZIP_ERRORS) as error:
        raise InputError(f"{path} is damaged ({error}); copy or prepare the data set again") from error
