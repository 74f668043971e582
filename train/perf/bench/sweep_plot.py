"""Draws a sweep: step time above, peak memory below, one column for each axis."""

from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mora_jax.errors import InputError
from train.jobs.plot import COLORS, style, write_png
from train.perf.bench.record import Record, Row, label

AXES = {
    "batch": "batch (sequences)",
    "sequence": "sequence (tokens)",
    "rank": "rank",
    "width": "hidden width",
}


def plot(record: Record, png_path: str) -> None:
    """Draws the record of a sweep.

    Raises:
      InputError: if no axis has two points.
    """
    drawn = {axis: lines(record, axis) for axis in AXES}
    drawn = {axis: found for axis, found in drawn.items() if any(len(xs) > 1 for xs, _ in found.values())}
    if not drawn:
        raise InputError("nothing to draw yet: no axis has two points")
    figure = Figure(figsize=(3.6 * len(drawn) + 1, 6.5), dpi=150, layout="constrained")
    grid = figure.subplots(2, len(drawn), sharex="col", squeeze=False)
    names = list(dict.fromkeys(name for found in drawn.values() for name in found))
    for (axis, found), upper, lower in zip(drawn.items(), *grid, strict=True):
        for name, (xs, rows) in found.items():
            color = COLORS[names.index(name) % len(COLORS)]
            for axes, ys in ((upper, [row["milliseconds"] for row in rows]), (lower, map(memory, rows))):
                axes.plot(xs, list(ys), "o-", color=color, markersize=4, linewidth=1.8, label=name)
        _label(upper, lower, axis, sorted({x for xs, _ in found.values() for x in xs}))
    grid[0][0].set_ylabel("ms a step", fontsize=12)
    grid[1][0].set_ylabel("peak memory (GiB)", fontsize=12)
    handles = {h.get_label(): h for axes in grid[0] for h in axes.get_lines()}
    figure.legend(
        handles=list(handles.values()), loc="outside upper left", ncols=4, fontsize=11, frameon=False
    )
    write_png(figure, png_path)


def lines(record: Record, axis: str) -> dict[str, tuple[list[int], list[Row]]]:
    """Returns by method the values of an axis and their rows, where all other sizes are the case's own."""
    s = record.setting
    own = {"batch": s["batch_size"], "sequence": s["sequence_length"], "width": s["model"]["hidden_size"]}
    own["rank"] = s["rank"]
    found: dict[str, list[Row]] = {}
    for row in record.rows:
        what = row["what"]
        others_differ = any(what.get(name, own[name]) != own[name] for name in own if name != axis)
        if "error" in row or axis not in what or others_differ:
            continue
        found.setdefault(label({k: v for k, v in what.items() if k != "rank"}), []).append(row)
    points = {name: sorted(rows, key=lambda row: row["what"][axis]) for name, rows in found.items()}
    return {name: ([row["what"][axis] for row in rows], rows) for name, rows in points.items()}


def memory(figures: dict[str, Any]) -> float:
    """Returns peak memory in GiB as the allocator measured it, or else as the compiler planned it."""
    return figures["peak_gib"] or figures["planned_gib"]


def _label(upper: Axes, lower: Axes, axis: str, values: list[int]) -> None:
    """Labels the two plots of an axis, with ticks at its values."""
    for axes in (upper, lower):
        style(axes)
        if axis == "rank":  # other axes are linear: proportional growth is a straight line
            axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
    lower.set_xticks(values, [f"{value:,}" for value in values])
    lower.xaxis.set_minor_locator(ticker.NullLocator())
    lower.set_xlabel(AXES[axis], fontsize=12)
