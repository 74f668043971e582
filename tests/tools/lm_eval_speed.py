"""Runs lm-evaluation-harness with our backend and with its own `hf` on one folder: scores and time of both.

The tasks are made up unless named: multiple choice, rolling log-likelihood, generation. Each backend is run
twice, so that the second time has no compilation in it. The script needs the extras `eval` and `parity`.

    python tests/tools/lm_eval_speed.py FOLDER                                    # float32: compares scores
    python tests/tools/lm_eval_speed.py FOLDER --their-dtype float64              # nearer the truth
    python tests/tools/lm_eval_speed.py FOLDER --dtype bfloat16 --device cuda --batch-size 64 --documents 500
    python tests/tools/lm_eval_speed.py FOLDER --tasks fpb --include-path configs/tasks --limit 100
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from harness_tasks import TASKS, write_tasks

TEXT = """the a of to and in that is was he for it with as his on be at by had not are but from or have an
they which one you were her all she there would their we him been has when who will more no if out so said
what up its about into than them can only other new some could time these two may then do first any my"""


class Peers(NamedTuple):
    """What two backends answered to the requests of one method.

    Attributes:
      ours: our answers.
      theirs: those of `hf`.
      seconds: of ours and of theirs, each the faster of two times.
      first: of ours and of theirs, the first time.
    """

    ours: list[Any]
    theirs: list[Any]
    seconds: tuple[float, float]
    first: tuple[float, float]


def requests_of(tasks: list[str], include_path: str, limit: int | None) -> dict[str, list[Any]]:
    """Returns the requests of some tasks, by method."""
    from train.jobs.harness import Asked, load_tasks

    found = defaultdict(list)
    for task in load_tasks(Asked(tuple(tasks), include_path))["tasks"].values():
        task.build_all_requests(limit=limit)
        for request in task.instances:
            found[request.request_type].append(request)
    return found


def compared(ours: Any, theirs: Any, requests: dict[str, list[Any]], times: int = 2) -> dict[str, Peers]:
    """Returns what both backends answer, and how long they take, by method."""
    found = {}
    for method, asked in requests.items():
        runs = [[_timed(getattr(model, method), asked) for _ in range(times)] for model in (ours, theirs)]
        seconds, first = (tuple(f(s for s, _ in each) for each in runs) for f in (min, next))
        found[method] = Peers(*(each[0][1] for each in runs), seconds, first)
    return found


def difference(method: str, peers: Peers) -> tuple[float, float]:
    """Returns the largest difference of log-likelihoods, and the share of other answers that are equal."""
    if method == "generate_until":
        return 0.0, float(np.mean([a == b for a, b in zip(peers.ours, peers.theirs, strict=True)]))
    if method == "loglikelihood_rolling":
        return float(np.abs(np.subtract(peers.ours, peers.theirs)).max()), 1.0
    (ours, greedy), (theirs, their_greedy) = (zip(*answers, strict=True) for answers in peers[:2])
    return float(np.abs(np.subtract(ours, theirs)).max()), float(np.mean(np.equal(greedy, their_greedy)))


def both(folder: str, dtype: str, device: str, batch_size: int, their_dtype: str = "") -> tuple[Any, Any]:
    """Returns our backend and the harness's own, on one model; theirs in our type unless it is named."""
    from lm_eval.models.huggingface import HFLM

    from train.jobs.generate import load_generator
    from train.jobs.harness_model import HarnessModel

    theirs = HFLM(pretrained=folder, dtype=their_dtype or dtype, device=device, batch_size=batch_size)
    return HarnessModel(load_generator(folder, True, dtype, batch_size), batch_size), theirs


def _timed(function: Any, requests: list[Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    answers = function(requests, disable_tqdm=True)
    return time.perf_counter() - start, answers


def main() -> None:
    """Parses the arguments, runs both and prints a line for each method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="Hugging Face folder")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--their-dtype", default="", help="of hf, such as float64; --dtype by default")
    parser.add_argument("--device", default="cpu", help="of torch; JAX takes its own default")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--documents", type=int, default=40, help="of each made-up task")
    parser.add_argument("--words", type=int, default=60, help="of a made-up question, at most")
    parser.add_argument("--tasks", default="", help="names with commas between them, instead of made-up ones")
    parser.add_argument("--include-path", default="")
    parser.add_argument("--limit", type=int, default=None, help="documents of each task")
    parser.add_argument("--times", type=int, default=2, help="runs of each backend")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        names = given.tasks.split(",") if given.tasks else [*TASKS]
        if not given.tasks:
            write_tasks(Path(scratch), given.documents, given.words, TEXT.split())
        requests = requests_of(names, given.include_path or scratch, given.limit)
    ours, theirs = both(given.folder, given.dtype, given.device, given.batch_size, given.their_dtype)
    for method, peers in compared(ours, theirs, requests, given.times).items():
        worst, same = difference(method, peers)
        line = {
            "method": method,
            "requests": len(requests[method]),
            "largest difference of log-likelihoods": worst,
            "share of equal answers": same,
            "seconds of ours": round(peers.seconds[0], 2),
            "seconds of hf": round(peers.seconds[1], 2),
            "first time of ours": round(peers.first[0], 2),
            "first time of hf": round(peers.first[1], 2),
            "times as fast": round(peers.seconds[1] / peers.seconds[0], 2),
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
