"""Whole examples in rows: several, first-fit, or one, with padding behind them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from train.data.rows.counts import Counts
from train.data.rows.examples import Example, encode
from train.data.rows.layout import MAX_SEGMENTS, Rows, row_dtypes
from train.data.rows.options import RowOptions
from train.data.text.entries import Record, bad_entry
from train.data.tokenizer import Tokenizer

# Rows that may still get examples. With more of them, less padding is left.
OPEN_ROWS = 64


class Packed:
    """Makes rows of the examples of one shard. They depend on the shard alone.

    An example goes to the first open row with room. If there is none, a row is opened; the fullest is
    closed for it when there are too many.

    Args:
      tokenizer: encodes them.
      sequence_length: tokens of a row.
      options: how examples become rows.
      skip_lines: bad examples that are skipped.
    """

    def __init__(
        self, tokenizer: Tokenizer, sequence_length: int, options: RowOptions, skip_lines: int
    ) -> None:
        self._tokenizer, self._length, self._options = tokenizer, sequence_length, options
        self._skip_lines, self._skipped = skip_lines, 0
        self._open: list[list[Example]] = []
        self._free: list[int] = []  # tokens of each open row

    def add(self, block: Sequence[Record]) -> tuple[Rows, Counts]:
        """Returns the rows that the next examples complete, and what this added to the counts.

        Raises:
          InputError: one bad example too many.
        """
        read = [record for record in block if record.content is not None]
        rows, counts = [], Counts(skipped_lines=len(block) - len(read))
        for record, example in zip(read, encode(self._tokenizer, self._options, read), strict=True):
            if isinstance(example, str):
                counts += Counts(skipped_lines=int(not record.again))
                self._skipped += not record.again
                if self._skipped > self._skip_lines:
                    raise bad_entry(record.place, example, self._skip_lines)
                continue
            kept, more = self._fit(example)
            counts += more
            if kept:
                rows += self._place(kept)
        return self._stack(rows), replace(counts, rows=len(rows), most_segments=self._most(rows))

    def finish(self) -> tuple[Rows, Counts]:
        """Returns the rows that are still open."""
        rows, self._open, self._free = self._open, [], []
        return self._stack(rows), Counts(rows=len(rows), most_segments=self._most(rows))

    def _fit(self, example: Example) -> tuple[Example | None, Counts]:
        """Returns what of an example goes into a row, and the counts of it."""
        size, cut = len(example.tokens_N), False
        if size > self._length and self._options.overlong == "cut":
            example, cut = Example(*(each_N[: self._length] for each_N in example)), True
        kept = len(example.tokens_N)
        if kept > self._length or not example.weights_N[1:].any():  # the first token is never predicted
            return None, Counts(documents=1, dropped_tokens=size, dropped=1)
        loss = int(np.count_nonzero(example.weights_N))
        return example, Counts(
            documents=1, tokens=kept, dropped_tokens=size - kept, loss_tokens=loss, cut=int(cut)
        )

    def _place(self, example: Example) -> list[list[Example]]:
        """Puts an example into a row. Returns the rows that are closed by it."""
        size = len(example.tokens_N)
        if not self._options.pack:
            return [[example]]
        at = next((at for at, free in enumerate(self._free) if free >= size), len(self._free))
        if at == len(self._free):
            self._open.append([])
            self._free.append(self._length)
        self._open[at].append(example)
        self._free[at] -= size
        if self._free[at] == 0 or len(self._open[at]) == MAX_SEGMENTS:
            return [self._close(at)]
        return [self._close(int(np.argmin(self._free)))] if len(self._open) > OPEN_ROWS else []

    def _close(self, at: int) -> list[Example]:
        del self._free[at]
        return self._open.pop(at)

    def _most(self, rows: Sequence[Sequence[Example]]) -> int:
        """Returns the most segments of a row, with its padding as one."""
        filled = (sum(len(example.tokens_N) for example in row) for row in rows)
        return max((len(row) + (n < self._length) for row, n in zip(rows, filled, strict=True)), default=0)

    def _stack(self, rows: Sequence[Sequence[Example]]) -> Rows:
        """Returns rows of examples as arrays (R, T) with padding of zeros."""
        dtypes = row_dtypes(self._tokenizer.vocab_size, joined=False)
        arrays_RT = [np.zeros((len(rows), self._length), dtype) for dtype in dtypes.values()]
        for row, examples in enumerate(rows):
            start = 0
            for segment, (tokens_N, weights_N) in enumerate(examples, start=1):
                end = start + len(tokens_N)
                for array_RT, values in zip(arrays_RT, (tokens_N, weights_N, segment), strict=True):
                    array_RT[row, start:end] = values
                start = end
        return dict(zip(dtypes, arrays_RT, strict=True))
