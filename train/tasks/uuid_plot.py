"""The paper's Fig. 2 and 3: how soon runs memorise the UUID pairs."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import ticker
from matplotlib.figure import Figure

from train.jobs.plot import COLORS, read_curves, smooth, style, write_png
from train.run.upload import newest_log
from train.storage.files import check_free
from train.tasks.uuids import read_scores


def draw(runs: Sequence[str], out: str, overwrite: bool = False) -> None:
    """Draws the character accuracy of runs over updates, and their training loss below.

    Args:
      runs: their folders, which `score_run` has scored.
      out: PNG file to write.
      overwrite: whether to replace the file if there is one.

    Raises:
      InputError: if a run has no scores or no log, or the file exists.
    """
    check_free(out, "--out", overwrite, ".png")
    figure = Figure(figsize=(10, 6.5), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.6, 1))
    for i, run in enumerate(runs):
        scores, (steps, losses) = read_scores(run), read_curves(newest_log(run)).loss
        color, line = COLORS[i % len(COLORS)], ("-", "--", ":")[i // len(COLORS) % 3]
        percent = [100 * score.character_accuracy for score in scores]
        at = [score.step for score in scores]
        upper.plot(at, percent, f"o{line}", color=color, markersize=4, label=Path(run).name)
        lower.plot(steps, smooth(losses), line, color=color, linewidth=1.4)
    for axes in (upper, lower):
        style(axes)
    upper.set_ylabel("character accuracy (%)", fontsize=12)
    upper.set_ylim(0, 103)
    lower.set_ylabel("training loss (nats a token)", fontsize=12)
    lower.set_xlabel("step", fontsize=12)
    lower.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    figure.legend(loc="outside upper left", ncols=4, fontsize=11, frameon=False)
    write_png(figure, out)
