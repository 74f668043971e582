"""Tokenizers: turning documents into one array of tokens, training a SentencePiece model."""

import functools
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
import sentencepiece as spm
import tokenizers
from etils import epath

from mora_jax.errors import InputError
from mora_jax.hf.tokenizer_files import TokenizerFiles, read_tokenizer
from train.console.progress import progress
from train.data.rows.layout import MAX_PIECES, token_dtype
from train.data.text.entries import TEXT_KEY
from train.data.text.files import documents, shards
from train.storage.buckets import in_bucket
from train.storage.files import check_free, writable, write_whole
from train.storage.lock import lock_output

MIN_VOCAB_SIZE = 256 + 3 + 1  # every byte, the three special pieces, and one piece to learn
MAX_VOCAB_SIZE = 1_000_000
MAX_SENTENCE_BYTES = 16_384
_BEFORE = "\n"  # text that others follow: a token of its own
COUNT_EVERY = 1_000  # lines; redrawing the bar for each would take longer than the training


@dataclass(frozen=True)
class Tokenizer:
    """What encodes documents, and the facts that a data set stores about it. `Tokenizer.load` makes one.

    `bos_id` and `eos_id` are put around each document; None for none.
    """

    path: str
    sha256: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    encoder: spm.SentencePieceProcessor | tokenizers.Tokenizer = field(repr=False, compare=False)

    @classmethod
    def load(cls, path: epath.PathLike | TokenizerFiles, bos: bool = False, eos: bool = True) -> "Tokenizer":
        """Reads a tokenizer.

        Args:
          path: where it is (see `read_tokenizer`), or its files.
          bos: whether each document begins with the begin-of-text token.
          eos: whether it ends with the end-of-text token.

        Raises:
          InputError: the file is missing, is no tokenizer, or has no such token.
        """
        files = path if isinstance(path, TokenizerFiles) else read_tokenizer(path)
        encoder, ids = files.load(), files.special_ids()
        for flag, role, wanted in (("bos", "begin", bos), ("eos", "end", eos)):
            if wanted and f"{flag}_token_id" not in ids:
                raise InputError(
                    f"{files.place} has no {role}-of-text token to put around documents; add --no-{flag}"
                )
        if (size := _vocab_size(encoder)) > MAX_PIECES:
            raise InputError(
                f"{files.place} has token {size - 1:,}; at most {MAX_PIECES:,} tokens are supported"
            )
        around = ids["bos_token_id"] if bos else None, ids["eos_token_id"] if eos else None
        return cls(files.place, files.sha256, size, *around, encoder)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the tokens of all documents, with what is put around each: (N,), uint16 or uint32."""
        before, after = ([] if token is None else [token] for token in (self.bos_id, self.eos_id))
        pieces = [part for ids in _encode(self.encoder, texts) for part in (before, ids, after)]
        count = sum(map(len, pieces))
        return np.fromiter(chain.from_iterable(pieces), token_dtype(self.vocab_size), count)

    def encode_parts(self, texts: Sequence[str], begins: Sequence[bool]) -> list[list[int]]:
        """Returns the tokens of each text, which begins one or follows other text.

        SentencePiece puts a space before a text. There is none before a text that follows another.
        """
        if not self._adds_space:
            return list(_encode(self.encoder, texts))
        (before,) = _encode(self.encoder, [_BEFORE])
        whole = [text if first else _BEFORE + text for text, first in zip(texts, begins, strict=True)]
        found = list(_encode(self.encoder, whole))
        for index, first in enumerate(begins):
            if not first and found[index][: len(before)] == before:
                found[index] = found[index][len(before) :]
            elif not first:  # the two texts share a token
                (found[index],) = _encode(self.encoder, [texts[index]])
        return found

    @functools.cached_property
    def _adds_space(self) -> bool:
        """Whether a text has other tokens at the beginning than after a line end."""
        first, before, both = _encode(self.encoder, ["a", _BEFORE, f"{_BEFORE}a"])
        return both != [*before, *first]


def _vocab_size(encoder: spm.SentencePieceProcessor | tokenizers.Tokenizer) -> int:
    if isinstance(encoder, tokenizers.Tokenizer):
        return max(encoder.get_vocab().values(), default=-1) + 1  # ids may have gaps
    return encoder.vocab_size()


def _encode(
    encoder: spm.SentencePieceProcessor | tokenizers.Tokenizer, texts: Sequence[str]
) -> Iterator[list[int]]:
    if isinstance(encoder, tokenizers.Tokenizer):
        for found in encoder.encode_batch_fast(list(texts), add_special_tokens=False):
            yield found.ids
    else:
        for text in texts:  # faster than one call
            yield encoder.encode(text)


def train_tokenizer(
    source: str,
    out: str,
    vocab_size: int,
    max_documents: int = 1_000_000,
    max_characters: int = 50_000_000,
    overwrite: bool = False,
    key: str = TEXT_KEY,
) -> Tokenizer:
    """Trains a BPE model with byte fallback on the first documents of every file, and writes it.

    Args:
      source: a glob, a folder or a file of text.
      out: the `.model` file to write.
      vocab_size: number of pieces, including the 256 bytes and <unk>, <s>, </s>.
      max_documents: documents to train on at most, the same number from every file.
      max_characters: characters to train on at most, likewise.
      overwrite: whether a file in the place of `out` is replaced; otherwise it is refused.
      key: the key or column that holds the text.

    Returns:
      The trained tokenizer.

    Raises:
      InputError: bad text (see `files.records`), no text, a file in the place of `out`, which another program
        may be writing, or a vocabulary that cannot be made from it.
    """
    if in_bucket(out):
        raise InputError(f"--out {out} is in a bucket; write the tokenizer to a disk, then copy it there")
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(f"--vocab-size must be from {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}, not {vocab_size}")
    for name, value in (("--max-documents", max_documents), ("max_characters", max_characters)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    with lock_output(out, "--out"):
        check_free(out, "--out", overwrite, ".model")
        lines = _sample(source, key, max_documents, max_characters)
        if not lines:
            raise InputError(f"{source} holds no text to train a tokenizer on")
        with progress(f"training {vocab_size:,} pieces on", len(lines), "lines") as advance:
            model = _train(_counted(lines, advance), vocab_size)
        check_free(out, "--out", overwrite)  # other programs do not know the lock
        with writable(out, f"tokenizer {out} cannot be written"):
            write_whole(out, model)
        return Tokenizer.load(out)


def _sample(source: str, key: str, max_documents: int, max_characters: int) -> list[str]:
    """Returns the lines of the first documents of every file, up to an equal part of both limits."""
    files = shards(source)
    lines = []
    with progress("reading", len(files), "files") as advance:
        for file in files:
            left = -(-max_characters // len(files))
            for text in islice(documents(file, 0, key), -(-max_documents // len(files))):
                lines += filter(None, text.splitlines())
                left -= len(text)
                if left <= 0:
                    break
            advance(1)
    return lines


def _counted(lines: Iterable[str], advance: Callable[[float], None]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        yield line
        if number % COUNT_EVERY == 0:
            advance(COUNT_EVERY)


def _train(lines: Iterator[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.Train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",  # decoding returns the exact text
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=1,  # the model does not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        said = str(error).split("] ")[-1]
        raise InputError(f"--vocab-size {vocab_size} cannot be made from this text: {said}") from error
    return model.getvalue()
