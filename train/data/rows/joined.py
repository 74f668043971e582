"""Documents joined and cut into rows: every row is full, and a document may go on in the next."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from train.data.rows.counts import Counts
from train.data.rows.layout import TOKENS, Rows, token_dtype
from train.data.text.entries import Record
from train.data.tokenizer import Tokenizer


class Joined:
    """Makes rows of the documents of one shard.

    Args:
      tokenizer: encodes them.
      sequence_length: tokens of a row.
    """

    def __init__(self, tokenizer: Tokenizer, sequence_length: int) -> None:
        self._tokenizer, self._length = tokenizer, sequence_length
        self._rest_N = np.empty(0, token_dtype(tokenizer.vocab_size))

    def add(self, block: Sequence[Record]) -> tuple[Rows, Counts]:
        """Returns the rows that the next documents complete, and what this added to the counts."""
        texts = [str(record.content) for record in block if record.content is not None]
        before = len(self._rest_N)
        tokens_N = np.concatenate([self._rest_N, self._tokenizer.encode_documents(texts)])
        end = len(tokens_N) // self._length * self._length
        rows_RT, self._rest_N = tokens_N[:end].reshape(-1, self._length), tokens_N[end:]
        return {TOKENS: rows_RT}, Counts(
            documents=len(texts),
            rows=len(rows_RT),
            tokens=end,
            dropped_tokens=len(self._rest_N) - before,
            skipped_lines=len(block) - len(texts),
            loss_tokens=end,
            most_segments=self._most(rows_RT),
        )

    def _most(self, rows_RT: Int[np.ndarray, "R T"]) -> int:
        """Returns the most documents that a row has parts of, 0 if nothing is put around them."""
        around = next((t for t in (self._tokenizer.eos_id, self._tokenizer.bos_id) if t is not None), None)
        if around is None or not len(rows_RT):
            return 0
        return 1 + int(np.count_nonzero(rows_RT == around, axis=1).max())

    def finish(self) -> tuple[Rows, Counts]:
        """Returns no row: the last partial one is dropped."""
        return {TOKENS: self._rest_N[:0].reshape(0, self._length)}, Counts()
