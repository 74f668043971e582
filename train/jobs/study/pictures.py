"""The pictures of a study: final perplexity over the learning rate, and loss over tokens."""

import itertools
import math
from pathlib import Path

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mora_jax.errors import InputError
from train.config.study import StudyRun, short
from train.jobs.plot import COLORS, Curves, read_curves, smooth, style, write_png
from train.jobs.study.table import Cell, Results
from train.run.metrics import LINES

_DASHES = ("-", "--", ":")


def draw_rates(results: Results, path: Path) -> None:
    """Draws the final perplexity of each row over the learning rate, with the spread over seeds.

    A cross at the top marks a rate at which a run diverged.
    """
    figure, axes = _figure()
    for i, row in enumerate(results.rows):
        cells = [results.cells[row, rate] for rate in results.rates if (row, rate) in results.cells]
        done = [cell for cell in cells if cell.perplexities]
        color, dash = _look(i)
        if not done and not any(map(_diverged, cells)):
            continue
        points = [cell.mean for cell in done]
        axes.plot([cell.rate for cell in done], points, f"o{dash}", color=color, label=row)
        several = [cell for cell in done if cell.spread is not None]
        bars = {"fmt": "none", "ecolor": color, "capsize": 4}
        means, spreads = [cell.mean for cell in several], [cell.spread or 0.0 for cell in several]
        axes.errorbar([cell.rate for cell in several], means, spreads, **bars)
        diverged = [cell.rate for cell in cells if _diverged(cell)]
        place = axes.get_xaxis_transform()
        axes.plot(diverged, [0.98 - 0.03 * i] * len(diverged), "x", color=color, transform=place)
    rates = [cell.rate for cell in results.cells.values() if cell.perplexities or _diverged(cell)]
    _label_rates(axes, sorted(set(rates)))
    axes.margins(x=0.05)
    axes.set_xlabel("peak learning rate", fontsize=12)
    axes.set_ylabel("validation perplexity at the end", fontsize=12)
    low, high = axes.dataLim.intervaly
    if math.isfinite(high) and high > 10 * low > 0:  # one bad run would press the others together
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    _finish(figure, path)


def draw_losses(results: Results, path: Path) -> None:
    """Draws the loss over tokens: a colour for each row, strong at its best rate and pale at all others.

    Validation losses are drawn if every finished run has two, else smoothed training losses.
    """
    curves = {run.name: found for run in results.shown() if (found := _curves(run))}
    if not curves:
        return
    done = [found for name, found in curves.items() if results.found[name].state == "finished"]
    validated = bool(done) and all(found.validation[0].size > 1 for found in done)
    figure, axes = _figure()
    for i, row in enumerate(results.rows):
        color, dash = _look(i)
        label: str | None = row
        runs = [run for run in results.shown() if run.row == row and run.name in curves]
        for run in sorted(runs, key=lambda run: not results.cells[row, run.rate].best):
            best = results.cells[row, run.rate].best
            found = curves[run.name]
            steps, losses = found.validation if validated else (found.loss[0], smooth(found.loss[1]))
            tokens = (steps + 1) * run.config.tokens_per_step()
            width, alpha = (1.8, 1.0) if best else (0.9, 0.4)
            axes.plot(tokens, losses, dash, color=color, linewidth=width, alpha=alpha, label=label)
            label = None
    _limit(axes, [found.validation[1] if validated else found.loss[1] for found in curves.values()])
    axes.set_xlabel("tokens", fontsize=12)
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    kind = "validation loss" if validated else "training loss, smoothed"
    axes.set_ylabel(f"{kind} (nats a token)", fontsize=12)
    _finish(figure, path)


def _diverged(cell: Cell) -> bool:
    return "diverged" in cell.others


def _label_rates(axes: Axes, rates: list[float]) -> None:
    """Labels a logarithmic axis at the rates, aslant if they come close to each other."""
    axes.set_xscale("log")
    if not rates:
        return
    span = math.log(rates[-1] / rates[0])
    close = any(math.log(b / a) < 0.07 * span for a, b in itertools.pairwise(rates))
    axes.set_xticks(rates, [short(rate) for rate in rates], rotation=45 if close else 0)
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def _limit(axes: Axes, losses: list[np.ndarray]) -> None:
    """Shows the losses that matter: those of the start, far above, would press the rest together."""
    known = np.concatenate([values[np.isfinite(values)] for values in losses])
    if known.size:
        low, high = known.min(), np.percentile(known, 98)
        axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)


def _curves(run: StudyRun) -> Curves | None:
    try:
        return read_curves(f"{run.config.run_dir}/{LINES}")
    except InputError:
        return None


def _look(i: int) -> tuple[str, str]:
    return COLORS[i % len(COLORS)], _DASHES[i // len(COLORS) % len(_DASHES)]


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    style(axes)
    return figure, axes


def _finish(figure: Figure, path: Path) -> None:
    axes = figure.axes[0]
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        figure.legend(loc="outside upper left", ncols=4, fontsize=11, frameon=False)
    write_png(figure, str(path))
