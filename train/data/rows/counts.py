"""What text became: counts of its documents, rows and tokens."""

from dataclasses import astuple, dataclass, replace


@dataclass(frozen=True)
class Counts:
    """What text became.

    Attributes:
      documents: texts or examples read.
      rows: rows written.
      tokens: those in rows, without padding.
      dropped_tokens: those of the last partial row, of examples that were dropped, and of ends cut off.
      skipped_lines: bad lines.
      file_bytes: size of the file of rows.
      loss_tokens: those in rows that the loss counts; 0 in data sets of earlier versions.
      dropped: examples in no row: longer than one, or without a token to predict that counts.
      cut: examples longer than a row of which it has the beginning.
      most_segments: most documents or examples of a row, padding counted as one; 0 if that is not known.
    """

    documents: int = 0
    rows: int = 0
    tokens: int = 0
    dropped_tokens: int = 0
    skipped_lines: int = 0
    file_bytes: int = 0
    loss_tokens: int = 0
    dropped: int = 0
    cut: int = 0
    most_segments: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        sums = Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))
        return replace(sums, most_segments=max(self.most_segments, other.most_segments))
