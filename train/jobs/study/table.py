"""The result of a study: rows of figures, as Markdown and as JSON."""

import dataclasses
import functools
import math
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from mora_jax import trees
from mora_jax.models.llama import abstract_params
from mora_jax.report import count_trained
from train.config.run import RunConfig
from train.config.study import Study, StudyRun, short
from train.jobs.study.outcomes import Outcome
from train.jobs.study.queue import command
from train.jobs.study.verdicts import Verdict, best_rate
from train.run.state import assign_methods


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row of the table at one learning rate.

    Attributes:
      row: the row.
      rate: the learning rate.
      perplexities: final validation perplexities of the runs that have finished.
      others: states of all other runs, such as "diverged" or "step 120".
      best: whether the rate is the best one of the row so far.
    """

    row: str
    rate: float
    perplexities: tuple[float, ...]
    others: tuple[str, ...]
    best: bool

    @property
    def mean(self) -> float:
        """The mean over the seeds; infinite if no run has finished."""
        return statistics.fmean(self.perplexities) if self.perplexities else math.inf

    @property
    def spread(self) -> float | None:
        """The standard deviation over the seeds (n - 1); None for fewer than two."""
        return statistics.stdev(self.perplexities) if len(self.perplexities) > 1 else None


@dataclasses.dataclass(frozen=True)
class Results:
    """All that the table, the JSON and the pictures show.

    Attributes:
      study: the study.
      found: outcome of every run by name.
      verdicts: what happens to each run next, by name.
    """

    study: Study
    found: Mapping[str, Outcome]
    verdicts: Mapping[str, Verdict]

    def shown(self) -> list[StudyRun]:
        """Returns the runs of the table: not those of further seeds at other rates than the best."""
        unused = [name for name, verdict in self.verdicts.items() if verdict.kind == "unused"]
        return [
            run for run in self.study.runs if run.name not in unused or self.found[run.name].loss is not None
        ]

    @functools.cached_property
    def cells(self) -> dict[tuple[str, float], Cell]:
        """The cells of the table by row and rate."""
        groups: dict[tuple[str, float], list[StudyRun]] = {}
        for run in self.shown():
            groups.setdefault((run.row, run.rate), []).append(run)
        best = {row: best_rate([r for r in self.study.runs if r.row == row], self.found) for row in self.rows}
        return {
            (row, rate): Cell(
                row,
                rate,
                tuple(p for run in runs if (p := self.found[run.name].perplexity) is not None),
                tuple(self.word(run) for run in runs if self.found[run.name].perplexity is None),
                rate == best[row],
            )
            for (row, rate), runs in groups.items()
        }

    @property
    def rows(self) -> list[str]:
        """The rows in the order of the file."""
        return self.study.rows()

    @property
    def rates(self) -> list[float]:
        """All learning rates, increasing."""
        return sorted({rate for _, rate in self.cells})

    def at_best(self) -> list[Cell]:
        """Returns the cell of each row at its best rate, lowest perplexity first."""
        return sorted((cell for cell in self.cells.values() if cell.best), key=lambda cell: cell.mean)

    def word(self, run: StudyRun) -> str:
        """Returns the state of a run that has not finished, in few words."""
        outcome, verdict = self.found[run.name], self.verdicts[run.name]
        if outcome.ended:
            return outcome.state
        if verdict.kind == "stopped":
            return f"stopped at {verdict.step:,}"
        return f"at {outcome.step:,}" if outcome.step else "waiting"


def markdown(results: Results) -> str:
    """Returns the result as a page of Markdown."""
    lines = [f"# {results.study.run_dir}", "", _caption(results), ""]
    lines += _table(["", *map(short, results.rates)], _by_rate(results))
    if best := results.at_best():
        heads = ["each at its best rate", "rate", "perplexity", "seeds", "trained", "tokens/s", "time"]
        lines += ["", *_table(heads, (_best_row(results, cell) for cell in best))]
    if shared := list(_orders(results)):
        lines += ["", *_table(["all at one rate", "lowest perplexity first"], shared)]
    rest = [run for run in results.shown() if results.found[run.name].perplexity is None]
    if rest:
        lines += ["", *_table(["not finished", "state", "step", ""], (_rest_row(results, r) for r in rest))]
    return "\n".join([*lines, ""])


def to_json(results: Results) -> dict[str, Any]:
    """Returns the result as plain data."""
    return {
        "study": results.study.file,
        "rows": [
            {
                "row": cell.row,
                "rate": cell.rate,
                "perplexity": cell.mean if cell.perplexities else None,
                "spread": cell.spread,
                "seeds": len(cell.perplexities),
                "best": cell.best,
                "others": list(cell.others),
            }
            for cell in results.cells.values()
        ],
        "runs": [_run_json(results, run) for run in results.shown()],
    }


@functools.lru_cache(maxsize=256)
def trained_parameters(config: RunConfig) -> int:
    """Returns how many parameters a run trains."""
    methods = assign_methods(config)
    flat = trees.flatten(abstract_params(config.model))
    return sum(count_trained(methods[path], leaf.shape) for path, leaf in flat.items())


def _caption(results: Results) -> str:
    tokens = {run.config.steps * run.config.tokens_per_step() for run in results.study.runs}
    length = " or ".join(f"{n:,}" for n in sorted(tokens))
    devices = sorted({outcome.device for outcome in results.found.values()} - {""})
    where = f" Trained on {' and '.join(devices)}." if devices else ""
    return (
        f"Validation perplexity after {length} tokens by peak learning rate: mean ± standard deviation over "
        f"seeds, with their number if there are several. The best rate of each row is bold.{where}"
    )


def _by_rate(results: Results) -> Iterator[list[str]]:
    for row in results.rows:
        yield [row, *(_cell_text(results.cells.get((row, rate))) for rate in results.rates)]


def _cell_text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    others = [f"{_times(cell, word)}{word}" for word in dict.fromkeys(cell.others)]
    if not cell.perplexities:
        return ", ".join(others)
    figure = _figure(cell)
    count = f" ({len(cell.perplexities)})" if cell.spread is not None else ""
    return ", ".join([f"**{figure}**{count}" if cell.best else figure + count, *others])


def _times(cell: Cell, word: str) -> str:
    several = len(cell.others) + len(cell.perplexities) > 1
    return f"{cell.others.count(word)} " if several else ""


def _figure(cell: Cell) -> str:
    return _readable(cell.mean) + ("" if cell.spread is None else f" ± {cell.spread:.2f}")


def _readable(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.3g}"


def _best_row(results: Results, cell: Cell) -> list[str]:
    runs = [r for r in results.shown() if (r.row, r.rate) == (cell.row, cell.rate)]
    speeds = [s for run in runs if (s := results.found[run.name].tokens_per_second)]
    config, speed = runs[0].config, statistics.median(speeds) if speeds else 0.0
    seconds = config.steps * config.tokens_per_step() / speed if speed else 0.0
    return [
        cell.row,
        short(cell.rate),
        _figure(cell),
        str(len(cell.perplexities)),
        f"{trained_parameters(config):,}",
        f"{speed:,.0f}",
        str(timedelta(seconds=round(seconds))),
    ]


def _orders(results: Results) -> Iterator[list[str]]:
    """Yields the order of the rows at each rate at which several have finished.

    Further seeds, which a row has at its best rate alone, do not count.
    """
    for rate in results.rates:
        found: dict[str, list[float]] = defaultdict(list)
        for run in results.shown():
            perplexity = results.found[run.name].perplexity
            if run.rate == rate and not run.at_best and perplexity is not None:
                found[run.row].append(perplexity)
        if len(found) > 1:
            ranked = sorted((statistics.fmean(each), row) for row, each in found.items())
            yield [short(rate), " < ".join(f"{row} {_readable(mean)}" for mean, row in ranked)]


def _rest_row(results: Results, run: StudyRun) -> list[str]:
    outcome = results.found[run.name]
    return [run.name, results.word(run), f"{outcome.step:,}/{run.config.steps:,}", outcome.note]


def _run_json(results: Results, run: StudyRun) -> dict[str, Any]:
    outcome, verdict = results.found[run.name], results.verdicts[run.name]
    return {
        "name": run.name,
        "row": run.row,
        "rate": run.rate,
        "seed": run.seed,
        "state": "stopped" if verdict.kind == "stopped" else outcome.state,
        "step": outcome.step,
        "steps": run.config.steps,
        "tokens": outcome.step * run.config.tokens_per_step(),
        "validation_loss": outcome.loss,
        "perplexity": outcome.perplexity,
        "tokens_per_second": outcome.tokens_per_second,
        "trained_parameters": trained_parameters(run.config),
        "device": outcome.device,
        "note": outcome.note,
        "command": f"mora {shlex.join(command(run))}",
    }


def _table(heads: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    yield from (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
