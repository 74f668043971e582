"""The picture of a sweep: time above, peak memory below, a column for each axis."""

from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mora_jax.errors import InputError
from train.jobs.plot import COLORS, style
from train.perf.bench.record import Record, Row, label

AXES = {
    "batch": "batch (sequences)",
    "sequence": "sequence (tokens)",
    "rank": "rank",
    "width": "hidden width",
}


def plot(record: Record, png_path: str) -> None:
    """Draws a sweep's record.

    Raises:
      InputError: if no axis has two points.
    """
    drawn = {axis: lines(record, axis) for axis in AXES}
    drawn = {axis: found for axis, found in drawn.items() if any(len(xs) > 1 for xs, _ in found.values())}
    if not drawn:
        raise InputError("there is nothing to draw yet: no axis has two points")
    figure = Figure(figsize=(3.6 * len(drawn) + 1, 6.5), dpi=150, layout="constrained")
    grid = figure.subplots(2, len(drawn), sharex="col", squeeze=False)
    names = sorted({name for found in drawn.values() for name in found}, key=_rank_of_colour)
    for (axis, found), upper, lower in zip(drawn.items(), *grid, strict=True):
        for name, (xs, rows) in found.items():
            color = COLORS[names.index(name) % len(COLORS)]
            _draw(upper, xs, [row["milliseconds"] for row in rows], name, color)
            _draw(lower, xs, [memory(row) for row in rows], name, color)
        _label(upper, lower, axis, sorted({x for xs, _ in found.values() for x in xs}))
    grid[0][0].set_ylabel("ms a step", fontsize=12)
    grid[1][0].set_ylabel("peak memory (GiB)", fontsize=12)
    handles = {h.get_label(): h for axes in grid[0] for h in axes.get_lines()}
    figure.legend(
        handles=list(handles.values()), loc="outside upper left", ncols=4, fontsize=11, frameon=False
    )
    Path(png_path).parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(png_path)


def lines(record: Record, axis: str) -> dict[str, tuple[list[int], list[Row]]]:
    """By method: the values of the axis and the rows there, all other sizes being the case's own."""
    s = record.setting
    own = {"batch": s["batch_size"], "sequence": s["sequence_length"], "width": s["model"]["hidden_size"]}
    own["rank"] = s["rank"]
    found: dict[str, tuple[list[int], list[Row]]] = {}
    for row in record.rows:
        what = row["what"]
        others = (name for name in own if name != axis)
        if (
            "error" in row
            or axis not in what
            or any(what.get(name, own[name]) != own[name] for name in others)
        ):
            continue
        xs, rows = found.setdefault(label({k: v for k, v in what.items() if k != "rank"}), ([], []))
        xs.append(what[axis])
        rows.append(row)
    return {name: _sorted(xs, rows) for name, (xs, rows) in found.items()}


def memory(figures: dict[str, Any]) -> float:
    """Peak memory in GiB as it was seen, else as the compiler planned it."""
    return figures["peak_gib"] or figures["planned_gib"]


def _rank_of_colour(name: str) -> tuple[bool, str]:
    """The first colour is for what matters most."""
    return not name.startswith("MoRA"), name


def _sorted(xs: list[int], rows: list[Row]) -> tuple[list[int], list[Row]]:
    order = sorted(range(len(xs)), key=xs.__getitem__)
    return [xs[i] for i in order], [rows[i] for i in order]


def _draw(axes: Axes, xs: list[int], ys: list[float], name: str, color: str) -> None:
    axes.plot(xs, ys, "o-", color=color, markersize=4, linewidth=1.8, label=name)


def _label(upper: Axes, lower: Axes, axis: str, values: list[int]) -> None:
    for axes in (upper, lower):
        style(axes)
        if axis == "rank":  # the others are drawn so that what grows in proportion is a straight line
            axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
    lower.set_xticks(values, [f"{value:,}" for value in values])
    lower.xaxis.set_minor_locator(ticker.NullLocator())
    lower.set_xlabel(AXES[axis], fontsize=12)
