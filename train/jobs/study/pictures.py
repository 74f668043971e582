"""The pictures of a study: final perplexity over the learning rate, and loss over tokens."""

import math
from pathlib import Path

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from mora_jax.errors import InputError
from train.config.study import StudyRun, short
from train.jobs.plot import COLORS, Curves, read_curves, smooth, style, write_png
from train.jobs.study.table import Results
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
        points, spreads = [cell.mean for cell in done], [cell.spread or 0.0 for cell in done]
        axes.errorbar(
            [cell.rate for cell in done], points, spreads, None, f"o{dash}", color=color, label=row, capsize=4
        )
        diverged = [cell.rate for cell in cells if any("diverged" in word for word in cell.others)]
        place = axes.get_xaxis_transform()
        axes.plot(diverged, [0.98 - 0.03 * i] * len(diverged), "x", color=color, transform=place)
    axes.set_xscale("log")
    axes.set_xticks(results.rates, [short(rate) for rate in results.rates])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.margins(x=0.05)
    axes.set_xlabel("peak learning rate", fontsize=12)
    axes.set_ylabel("validation perplexity at the end", fontsize=12)
    _finish(figure, path)


def draw_losses(results: Results, path: Path) -> None:
    """Draws the loss over tokens: a colour for each row, strong at its best rate and pale at all others.

    Validation losses are drawn if every run has two, else smoothed training losses.
    """
    curves = {run.name: found for run in results.shown() if (found := _curves(run))}
    if not curves:
        return
    validated = all(np.isfinite(found.validation[1]).sum() > 1 for found in curves.values())
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


def _limit(axes, losses: list[np.ndarray]) -> None:
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


def _figure():
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    style(axes)
    return figure, axes


def _finish(figure: Figure, path: Path) -> None:
    axes = figure.axes[0]
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        figure.legend(loc="outside upper left", ncols=4, fontsize=11, frameon=False)
    low, high = axes.dataLim.intervaly
    if math.isfinite(high) and high > 10 * low > 0:  # one bad run would press the others together
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    write_png(figure, str(path))
