"""Writes figures as tables: on the terminal, and in Markdown between marks in a page."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from mora_jax.errors import InputError, reason
from train.console.terminal import console
from train.perf.bench import scaling_table
from train.perf.bench.ratios import Ratio, matmul_share, ratios
from train.perf.bench.record import Record, Row, label, load
from train.storage.files import write_whole

COLUMNS = (
    "method",
    "step ms",
    "p10-p90",
    "steps/s",
    "tokens/s",
    "matmul share",
    "base alone",
    "peak GiB",
    "compile s",
)
# Everything between the two marks is rewritten from the file that the first names.
MARKED = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def show(record: Record) -> None:
    """Prints the figures and the comparisons."""
    columns, rows = _table(record)
    table = Table(*columns[:1], title=_title(record))
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    screen = console(width=max(console().width, 130))
    screen.print(table)
    compared = Table("comparison", "value", "aim", "")
    for ratio in compare(record):
        compared.add_row(ratio.name, ratio.figure(), ratio.goal(), _verdict(ratio))
    if compared.row_count:
        screen.print(compared)


def refresh(page: str) -> int:
    """Rewrites every marked table of a Markdown page from its file, whose name is relative to the page.

    Returns:
      The number of tables.

    Raises:
      InputError: if the page or a file cannot be read, or the page has no marks.
    """
    path = Path(page)
    try:
        old = path.read_text()
    except OSError as error:
        raise InputError(f"{page}: cannot read this page: {reason(error)}") from error
    new, count = MARKED.subn(lambda m: f"{m[1]}{markdown(load(str(path.parent / m[2])))}{m[3]}", old)
    if not count:
        raise InputError(f"{page} holds no <!-- figures: FILE --> ... <!-- end -->")
    write_whole(path, new)
    return count


def markdown(record: Record) -> str:
    """Returns a record's tables as Markdown: the setting, the figures and the comparisons."""
    lines = [_title(record) + ".", "", *_rows(*_table(record))]
    compared = compare(record)
    if compared:
        cells = ((r.name, r.figure(), r.goal(), _verdict(r)) for r in compared)
        lines += ["", *_rows(("comparison", "value", "aim", ""), cells)]
    return "\n".join([*lines, ""])


def compare(record: Record) -> list[Ratio]:
    """Returns all comparisons between rows of a record."""
    return list(scaling_table.ratios(record)) if scaling_table.has_meshes(record) else ratios(record)


def _table(record: Record) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the columns and the rows of the table that suits a record."""
    if scaling_table.has_meshes(record):
        return scaling_table.COLUMNS, [scaling_table.cells(record, row) for row in record.rows]
    return COLUMNS, [_cells(record, row) for row in record.rows]


def _cells(record: Record, row: Row) -> tuple[str, ...]:
    if "error" in row:
        return (label(row["what"]), f"failed: {row['error']}", *("",) * (len(COLUMNS) - 2))
    shares = ("", "")
    if "needed_tflop" in row:
        counts = ("needed_tflop", "needed_tflop_base")
        shares = tuple(f"{matmul_share(record, row, count):.3f}" for count in counts)
    return (
        label(row["what"]),
        f"{row['milliseconds']:.2f}",
        f"{row['p10']:.2f}-{row['p90']:.2f}",
        f"{1e3 / row['milliseconds']:.3g}",
        f"{row['tokens_per_second']:,.0f}",
        *shares,
        _memory(row),
        f"{row['compile_seconds']:.1f}" if row["compile_seconds"] is not None else "",
    )


def _memory(row: Row) -> str:
    """Returns the measured peak, or what the compiler planned in brackets."""
    if row["peak_gib"]:
        return f"{row['peak_gib']:.2f}"
    return f"({row['planned_gib']:.3f})" if row.get("planned_gib") else ""


def _title(record: Record) -> str:
    setting = record.setting
    rates = sorted({f"{run['matmul_tflops']:.3g}" for run in record.runs})
    side = record.runs[-1]["matmul_side"] if record.runs else 0
    batch = f"batch {setting['batch_size']} x {setting['sequence_length']}"
    if any("mesh" in row["what"] for row in record.rows):
        batch += " on one device"
    return (
        f"{record.case}: {batch}, {setting['compute']['dtype']}, on {record.device} "
        f"({side}-cube matmul: {' and '.join(rates)} TFLOP/s; {', '.join(_versions(record))})"
    )


def _versions(record: Record) -> Iterator[str]:
    found: dict[str, Any] = {}
    for source in (*record.runs, *record.rows):
        found |= source.get("versions", {})
    return (f"{name} {version}" for name, version in found.items())


def _verdict(ratio: Ratio) -> str:
    return {None: "", True: "met", False: "missed"}[ratio.met]


def _rows(head: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
