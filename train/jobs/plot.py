"""Plots of runs, drawn from their metrics.jsonl."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mora_jax.errors import InputError
from train.run.metrics import read_metrics
from train.run.upload import newest_log
from train.storage.files import check_free, write_result

# Distinguishable by the colour-blind; the first is for what matters most.
COLORS = ("#0b5fa5", "#d1495b", "#2e8b57", "#8e5ea2", "#e08e0b", "#5c6670")
# The picture of a run in its folder.
PICTURE = "loss.png"
PALE, GREY = "#9fc3e0", "#8a8f98"
# More restarts than this are drawn, but not each labelled.
LABELLED = 16


@dataclasses.dataclass(frozen=True)
class Curves:
    """The curves of a run as pairs (steps, values), and (step, group type) of each restart."""

    loss: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    rate: tuple[np.ndarray, np.ndarray]
    restarts: tuple[tuple[int, str], ...]


def draw_runs(runs: Sequence[str], out: str = "", overwrite: bool = False) -> str:
    """Draws runs, which may be training: one by `plot_loss`, several by `plot_runs`.

    Args:
      runs: folders of runs.
      out: PNG file to write; empty for loss.png in the folder of a single run.
      overwrite: whether to replace the file of `out` if there is one.

    Returns:
      The path of the picture.

    Raises:
      InputError: if a run has no log that can be drawn, or the file exists.
    """
    logs = {run: newest_log(run) for run in runs}
    check_free(out, "--out", overwrite, ".png")
    if len(runs) > 1:
        plot_runs(logs, out)
        return out
    out = out or f"{runs[0]}/{PICTURE}"
    plot_loss(logs[runs[0]], out)
    return out


def plot_loss(metrics_path: str, png_path: str) -> None:
    """Draws a run: training and validation loss above, learning rate below, restarts marked in both.

    Raises:
      InputError: if the metrics cannot be read or hold neither a loss nor an evaluation.
    """
    curves = read_curves(metrics_path)
    figure, upper, lower = _figure()
    steps, values = curves.loss
    if steps.size:
        upper.plot(steps, values, color=PALE, linewidth=0.8)
        upper.plot(steps, smooth(values), color=COLORS[0], linewidth=1.8, label="training loss, smoothed")
    if curves.validation[0].size:
        upper.plot(*curves.validation, "o-", color=COLORS[1], markersize=4, label="validation loss")
    lower.plot(*curves.rate, color=COLORS[0], linewidth=1.6)
    _mark_restarts(upper, lower, curves.restarts)
    _save(figure, upper, png_path)


def plot_runs(runs: Mapping[str, str], png_path: str) -> None:
    """Draws several runs in one plot: loss above, learning rate below, a colour for each run.

    Validation losses are drawn if every run has them, else smoothed training losses.

    Args:
      runs: name -> path of its metrics.jsonl.
      png_path: the file to write.

    Raises:
      InputError: if the metrics of a run cannot be read or hold neither a loss nor an evaluation.
    """
    curves = {name: read_curves(path) for name, path in runs.items()}
    validated = all(c.validation[0].size for c in curves.values())
    figure, upper, lower = _figure()
    for i, (name, c) in enumerate(curves.items()):
        color, style = COLORS[i % len(COLORS)], ("-", "--", ":")[i // len(COLORS) % 3]
        if validated:
            upper.plot(*c.loss, color=color, linewidth=0.6, alpha=0.25)
            upper.plot(*c.validation, f"o{style}", color=color, markersize=4, label=name)
        else:
            upper.plot(c.loss[0], smooth(c.loss[1]), style, color=color, linewidth=1.8, label=name)
        lower.plot(*c.rate, style, color=color, linewidth=1.4)
    upper.set_ylabel("validation loss (nats a token)" if validated else "training loss (nats a token)")
    finite = [c.validation[1][np.isfinite(c.validation[1])] for c in curves.values()]
    highest = max(values.max(initial=0.0) for values in finite)
    lowest = upper.dataLim.y0
    if all(values.size > 1 for values in finite) and 0 < lowest < highest:
        # Runs differ where they end, far below where they begin.
        upper.set_ylim(0.99 * lowest, 1.02 * highest)
    _save(figure, upper, png_path)


def read_curves(path: str) -> Curves:
    """Returns the curves in a metrics.jsonl. Raises InputError if it has neither a loss nor an evaluation."""
    lines = read_metrics(path)
    restarts = tuple((line["step"], str(line.get("group_type", ""))) for line in lines if "restart" in line)
    loss, validation = _series(lines, "loss"), _series(lines, "validation_loss")
    if not loss[0].size and not validation[0].size:
        raise InputError(f"{path} holds no loss to draw")
    return Curves(loss, validation, _series(lines, "learning_rate"), restarts)


def _series(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array([line["step"] for line in lines if name in line], int)
    values = np.array([line[name] for line in lines if name in line], float)
    # A value that is not finite becomes a gap, and does not affect the limits.
    return steps, np.where(np.isfinite(values), values, np.nan)


def smooth(values: np.ndarray) -> np.ndarray:
    """Returns means over a centred window of about 1% of the run, shorter at both ends; gaps are ignored."""
    half = len(values) // 200
    known = np.isfinite(values)
    kernel = np.ones(2 * half + 1)
    total = np.convolve(np.where(known, values, 0.0), kernel)[half : half + len(values)]
    count = np.convolve(known.astype(float), kernel)[half : half + len(values)]
    return np.where(known, total / np.maximum(count, 1), np.nan)


def style(axes: Axes) -> None:
    """Sets the style of every plot: a pale grid behind the curves, no frame above and on the right."""
    axes.grid(color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)


def _figure() -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=(10, 6.5), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    for axes in (upper, lower):
        style(axes)
        axes.margins(x=0.015)
    upper.set_ylabel("loss (nats a token)")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    lower.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    lower.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    for label in (upper.yaxis.label, lower.yaxis.label, lower.xaxis.label):
        label.set_fontsize(12)
    return figure, upper, lower


def _mark_restarts(upper: Axes, lower: Axes, restarts: tuple[tuple[int, str], ...]) -> None:
    """Draws a dashed line through both panels at each restart, and the following group type above it."""
    for i, (step, group) in enumerate(restarts):
        for axes in (upper, lower):
            label = "restart" if i == 0 and axes is upper else None
            axes.axvline(step, color=GREY, linestyle="--", linewidth=1.0, zorder=1, label=label)
        if group and len(restarts) <= LABELLED:
            word = "group " if len(restarts) <= LABELLED // 2 else ""
            place = upper.get_xaxis_transform()
            upper.text(step, 1.01, word + group, transform=place, ha="center", fontsize=10, color=GREY)


def _save(figure: Figure, upper: Axes, png_path: str) -> None:
    low, high = upper.dataLim.y0, min(upper.dataLim.y1, upper.get_ylim()[1])
    if low > 0 and high > 2 * low:  # most of a run happens in the lower part of the range
        upper.set_yscale("log")
    upper.yaxis.set_major_locator(ticker.MaxNLocator(9))
    upper.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    upper.yaxis.set_minor_locator(ticker.NullLocator())
    figure.legend(loc="outside upper left", ncols=4, fontsize=11, frameon=False)
    write_png(figure, png_path)


def write_png(figure: Figure, path: str) -> None:
    """Writes a figure to a PNG file, and makes the file's folder."""
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    write_result(path, png.getvalue())
