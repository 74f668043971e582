"""Rows of a prepared data set as text: what counts, where examples begin, how much is padding."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
import sentencepiece as spm
from jaxtyping import Bool, Int
from rich.text import Text

from mora_jax.errors import InputError, spelled_out
from mora_jax.hf.tokenizer_files import read_tokenizer
from mora_jax.models.batch import Batch
from train.data.rows.info import DataInfo
from train.data.rows.read import eval_batches

STYLE = "green"  # of what counts


def show_rows(info: DataInfo, split: str, rows: int, marks: tuple[str, str]) -> Iterator[Text]:
    """Yields the first rows of a split as text, each segment below a line that describes it.

    Joined documents are segments if there is a token between them; the first and the last may be parts.

    Args:
      info: the data set.
      split: "train" or "validation".
      rows: rows at most.
      marks: what stands before and after text that counts.

    Raises:
      InputError: there is no such split, or rows are damaged.
    """
    if rows < 1:
        raise InputError(f"--rows must be at least 1, not {rows}")
    encoder = read_tokenizer(info.directory).load()
    between = not info.joined or info.eos_id is not None or info.bos_id is not None
    batches = eval_batches(info, split, 1, rows, document_mask=between)
    for number, batch in enumerate(batches, start=1):
        yield _row(encoder, batch, f"{split} row {number} of {info.rows[split]:,}", marks)


def _row(encoder: Any, batch: Batch, name: str, marks: tuple[str, str]) -> Text:
    tokens_T, counts_T = np.asarray(batch.tokens_BT)[0], np.asarray(batch.weights_BT)[0] > 0
    segments_T = np.ones_like(tokens_T) if batch.segments_BT is None else np.asarray(batch.segments_BT)[0]
    last, padding = int(segments_T.max()), int((segments_T == 0).sum())
    found = Text(f"{name}: {len(tokens_T) - padding} tokens, {counts_T.sum()} count, {padding} padding\n")
    for segment in range(1, last + 1):
        here_T = segments_T == segment
        found.append(f"--- {segment} of {last}: {here_T.sum()} tokens\n", "dim")
        for text, counts in _pieces(encoder, tokens_T[here_T], counts_T[here_T]):
            before, after = marks if counts and not counts_T.all() else ("", "")
            found.append(f"{before}{text}{after}", STYLE if before or counts else "")
        found.append("\n")
    return found


def _pieces(
    encoder: Any, tokens_N: Int[np.ndarray, "N"], counts_N: Bool[np.ndarray, "N"]
) -> Iterator[tuple[str, bool]]:
    """Yields the text of runs of tokens that count, or that do not. Together they are the whole text."""
    tokens, end = [], 0
    for counts, run in groupby(zip(tokens_N.tolist(), counts_N.tolist(), strict=True), lambda pair: pair[1]):
        tokens += [token for token, _ in run]
        text = _decode(encoder, tokens)
        yield "\n".join(map(spelled_out, text[end:].split("\n"))), counts
        end = len(text)


def _decode(encoder: Any, tokens: list[int]) -> str:
    """Returns the text of tokens, with the names of special ones."""
    if not isinstance(encoder, spm.SentencePieceProcessor):
        return encoder.decode(tokens, skip_special_tokens=False)
    runs = groupby(tokens, lambda token: encoder.is_control(token) or encoder.is_unknown(token))
    return "".join(
        "".join(map(encoder.id_to_piece, run)) if special else encoder.decode(list(run))
        for special, run in runs
    )
