"""Which runs of a study train, wait or are stopped: a pure function of what their folders say."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Literal

from train.config.study import Halving, Study, StudyRun
from train.jobs.study.outcomes import Outcome

Outcomes = Mapping[str, Outcome]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What happens to a run.

    Attributes:
      kind: "train", "wait" for other runs of the row, "stopped" by halving, "ended", or "unused": a further
        seed at a rate that is not, or not yet, the best one.
      step: updates to train up to, or after which the run was stopped.
    """

    kind: Literal["train", "wait", "stopped", "ended", "unused"]
    step: int = 0


def verdicts(study: Study, found: Outcomes) -> dict[str, Verdict]:
    """Returns the verdict on every run by name.

    It depends on the outcomes alone, and not on the order in which runs were trained.
    """
    result: dict[str, Verdict] = {}
    for row in study.rows():
        first = [run for run in study.runs if run.row == row and not run.at_best]
        result |= _compared(study.halving, first, found)
        over = all(result[run.name].kind in ("ended", "stopped") for run in first)
        failed = any(found[run.name].state == "failed" for run in first)
        best = best_rate(first, found) if over and not failed else None
        for run in study.runs:
            if run.row == row and run.at_best:
                result[run.name] = _simple(run, found) if run.rate == best else Verdict("unused")
    return result


def best_rate(runs: list[StudyRun], found: Outcomes) -> float | None:
    """Returns the learning rate of the lowest mean loss over the seeds, None if no run has finished.

    A rate at which a run diverged counts only if there is no other. `runs` are those of one row; the seeds of
    `seeds_at_best` do not count, so that they cannot change which rate is best.
    """
    rates: dict[float, list[StudyRun]] = {}
    for run in runs:
        if not run.at_best:
            rates.setdefault(run.rate, []).append(run)
    ranked = []
    for rate, group in rates.items():
        losses = [loss for run in group if (loss := found[run.name].loss) is not None]
        diverged = any(found[run.name].state == "diverged" for run in group)
        if losses:
            ranked.append((diverged, statistics.fmean(losses), rate))
    return min(ranked)[2] if ranked else None


def _simple(run: StudyRun, found: Outcomes) -> Verdict:
    return Verdict("ended" if found[run.name].ended else "train", run.config.steps)


def _compared(halving: Halving | None, runs: list[StudyRun], found: Outcomes) -> dict[str, Verdict]:
    """Returns the verdicts on the runs of a row that may be stopped by halving."""
    if halving is None:
        return {run.name: _simple(run, found) for run in runs}
    result: dict[str, Verdict] = {}
    left = list(runs)
    for i in range(len(halving.at)):
        at = {run.name: halving.steps(run.config)[i] for run in left}
        losses = {run.name: _loss_after(found[run.name], at[run.name]) for run in left}
        if None in losses.values():
            for run in left:
                known = losses[run.name] is not None
                kind = "ended" if found[run.name].ended else "wait" if known else "train"
                result[run.name] = Verdict(kind, at[run.name])
            return result
        ranked = sorted(left, key=lambda run: losses[run.name] or 0.0)  # stable: the order of the file
        left = ranked[: math.ceil(halving.keep * len(ranked))]
        for run in ranked[len(left) :]:
            ended = found[run.name].ended
            result[run.name] = Verdict("ended" if ended else "stopped", at[run.name])
    return result | {run.name: _simple(run, found) for run in left}


def _loss_after(outcome: Outcome, step: int) -> float | None:
    """Returns the validation loss after so many updates, infinite for a run that ended before."""
    loss = outcome.evaluations.get(step)
    return math.inf if loss is None and outcome.ended else loss
