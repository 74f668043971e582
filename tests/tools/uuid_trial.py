"""The paper's memory task on GPUs side by side: every method at several rates, Table 1 and Fig. 2 and 3.

    python tests/tools/uuid_trial.py MODEL WORK --out OUT --gpus 4 --seconds 540
    python tests/tools/uuid_trial.py MODEL WORK --out OUT --runs mora_r8=3e-4,1e-3 -- --microbatches 4
    CUDA_VISIBLE_DEVICES=2 python tests/tools/uuid_trial.py MODEL WORK --out OUT --gpus 1

MODEL is a Hugging Face folder. WORK holds the pairs, the data set and a folder for each run and its log. The
same command resumes: finished runs and scores are kept, stopped runs go on. OUT gets few small files, written
again after every run: uuid.json, table.md, fig2.png, fig3.png. Words behind -- are flags of `mora finetune`.
A run that fails is named, and the others go on. JAX runs in the children alone.
"""

import argparse
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Those of the paper, highest first, and one more of full fine-tuning. The order is that of the runs.
RATES = {
    "lora_r8": ("3e-4", "2e-4", "1e-4"),
    "mora_r8": ("1e-4", "7e-5", "5e-5"),
    "lora_r256": ("3e-4", "2e-4", "1e-4"),
    "mora_r256": ("1e-4", "7e-5", "5e-5"),
    "full": ("1e-4", "3e-5"),
}
# Character accuracy of LLaMA-2 7B in percent, after 300, 500, 700 and 900 updates: Table 1 of the paper.
PAPER = {
    "full": (42.5, 100, 100, 100),
    "lora_r8": (9.9, 10.0, 10.7, 54.2),
    "mora_r8": (10.1, 15.7, 87.4, 100),
    "lora_r256": (9.9, 70.6, 100, 100),
    "mora_r256": (41.6, 100, 100, 100),
}
FIGURES = {
    "fig2.png": ("full", "lora_r8", "lora_r256"),
    "fig3.png": ("lora_r8", "mora_r8", "lora_r256", "mora_r256"),
}
# How a small model is computed on one GPU. The configs of the paper are for 7B.
HOW = [
    "--base-dtype",
    "float32",
    "--mesh.fsdp",
    "1",
    "--mesh.data",
    "1",
    "--compute.layers",
    "scan",
    "--compute.remat",
    "dots",
]
HOW += ["--microbatches", "2"]
SHOWN = 15.0  # seconds between two lines of progress
SAVING = 60.0  # seconds that a stopped run has for its checkpoint


@dataclasses.dataclass(frozen=True)
class Run:
    """One method at one rate."""

    method: str
    rate: str

    @property
    def name(self) -> str:
        return f"{self.method}_{self.rate}"


@dataclasses.dataclass(frozen=True)
class Trial:
    """What the command line says. `ends` is on the clock of `time.monotonic`."""

    model: Path
    work: Path
    out: Path
    steps: int
    scored: tuple[int, ...]
    pairs: int
    ends: float
    batch_size: int
    sequence_length: int
    flags: tuple[str, ...]

    def folder(self, run: Run) -> Path:
        return self.work / "runs" / run.name

    def left(self) -> float:
        return self.ends - time.monotonic()


def mora(words: list[str], log: Path, gpu: str | None = None, limit: float | None = None) -> int | None:
    """Runs a command, whose output is added to `log`. Returns its exit status, None if it was stopped."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {"PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": str(log.parents[1] / "cache")}
    if gpu is None:
        env["JAX_PLATFORMS"] = "cpu"
    else:
        env |= {"CUDA_VISIBLE_DEVICES": gpu, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "train.cli", *words], cwd=ROOT, env=env, stdout=file, stderr=file
        )
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            child.terminate()  # `mora finetune` saves a checkpoint
            try:
                child.wait(SAVING)
            except subprocess.TimeoutExpired:
                child.kill()
            return None


def prepare(trial: Trial) -> None:
    """Makes the pairs and the data set."""
    pairs, others, log = trial.work / "pairs.jsonl", trial.work / "others.jsonl", trial.work / "logs/data.log"
    words = ["task", "uuid-pairs", "--overwrite"]
    done = mora([*words, str(pairs), "--count", str(trial.pairs)], log)
    done = done or mora([*words, str(others), "--count", "200", "--seed", "1"], log)
    words = f"prepare-data --form prompt --source {pairs} --validation {others} --tokenizer {trial.model}"
    words = [*words.split(), "--sequence-length", str(trial.sequence_length)]
    done = done or mora([*words, "--out", str(trial.work / "data")], log)
    if done:
        sys.exit(f"the data set could not be prepared: {last_line(log)}")


def carry_out(trial: Trial, run: Run, gpu: str) -> str:
    """Trains and scores a run. Returns what became of it."""
    folder, log = trial.folder(run), trial.work / "logs" / f"{run.name}.log"
    if not (folder / "summary.json").exists():
        if trial.left() < 0:
            return "not begun: no time left"
        words = ["finetune", f"configs/paper/uuid_{run.method}.yaml", "--init-from", str(trial.model)]
        words += ["--run-dir", str(folder), "--data.directory", str(trial.work / "data")]
        words += ["--data.sequence-length", str(trial.sequence_length)]
        words += ["--optimizer.learning-rate", run.rate, "--batch-size", str(trial.batch_size)]
        epochs = trial.steps * trial.batch_size / trial.pairs
        words += ["--epochs", str(epochs), *HOW, *trial.flags]
        done = mora(words, log, gpu, trial.left())
        if done is None:
            return f"stopped after {at(folder)}"
        if done:
            return f"FAILED in training after {at(folder)}: {last_line(log)}"
    if set(trial.scored) <= scores(folder).keys():
        return "done"
    if trial.left() < 0:
        return "trained, not scored: no time left"
    steps = [str(step) for step in trial.scored]
    words = ["task", "uuid-score", str(folder), "--pairs", str(trial.work / "pairs.jsonl"), "--steps", *steps]
    done = mora(words, log, gpu, trial.left() + SAVING)
    return f"FAILED in scoring: {last_line(log)}" if done or done is None else "done"


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "no output"


def logged(folder: Path) -> list[dict]:
    """Returns the whole lines of a run's metrics."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def at(folder: Path) -> str:
    """Returns where a run is, for a line of progress."""
    lines = [line for line in logged(folder) if "loss" in line]
    if not lines:
        return "no update"
    last = lines[-1]
    speed = f"{last.get('tokens_per_second', 0):,.0f} tokens/s"
    return f"{last['step'] + 1} updates (loss {last['loss']:.3f}, {speed})"


def scores(folder: Path) -> dict[int, float]:
    """Returns the character accuracy of each scored checkpoint, from 0 to 1."""
    path = folder / "uuid_accuracy.json"
    found = json.loads(path.read_text())["scores"] if path.exists() else []
    return {score["step"]: score["character_accuracy"] for score in found}


def best(trial: Trial, runs: list[Run]) -> dict[str, Run]:
    """Returns the run of each method with the highest mean of its scores, of those that have all."""
    found: dict[str, Run] = {}
    means = {
        run: sum(s.values()) for run in runs if set(trial.scored) <= (s := scores(trial.folder(run))).keys()
    }
    for run, mean in means.items():
        if run.method not in found or mean > means[found[run.method]]:
            found[run.method] = run
    return found


def report(trial: Trial, runs: list[Run], said: dict[str, str]) -> str:
    """Writes what is known so far into `out`, and returns the table."""
    trial.out.mkdir(parents=True, exist_ok=True)
    winners = best(trial, runs)
    head = [f"{step:,}" for step in trial.scored]
    rows = [
        f"| character accuracy, % | rate | {' | '.join(head)} | paper | last loss |",
        "|---" * (4 + len(head)) + "|",
    ]
    content = {}
    for run in sorted(runs, key=lambda run: (list(PAPER).index(run.method), float(run.rate))):
        folder = trial.folder(run)
        found, lines = scores(folder), [line for line in logged(folder) if "loss" in line]
        losses = [[line["step"], line["loss"]] for line in lines]
        content[run.name] = {"scores": found, "losses": losses[::10], "state": said.get(run.name, "waiting")}
        mark = " (best)" if winners.get(run.method) == run else ""
        cells = [f"{100 * found[step]:.1f}" if step in found else "" for step in trial.scored]
        paper = " / ".join(f"{value:g}" for value in PAPER[run.method]) if mark else ""
        loss = f"{losses[-1][1]:.3f}" if losses else ""
        rows.append(f"| {run.method} | {run.rate}{mark} | {' | '.join(cells)} | {paper} | {loss} |")
    (trial.out / "uuid.json").write_text(json.dumps(content))
    (trial.out / "table.md").write_text("\n".join(rows) + "\n")
    for name, methods in FIGURES.items():
        folders = [str(trial.folder(winners[method])) for method in methods if method in winners]
        if folders:
            words = ["task", "uuid-plot", *folders, "--out", str(trial.out / name), "--overwrite"]
            mora(words, trial.work / "logs/plot.log")
    return "\n".join(rows)


def go(trial: Trial, runs: list[Run], gpus: list[str]) -> dict[str, str]:
    """Carries out all runs, each on the next GPU that is free. Returns what became of each."""
    free: queue.Queue[str] = queue.Queue()
    for gpu in gpus:
        free.put(gpu)
    said, writing = {}, threading.Lock()

    def one(run: Run) -> None:
        gpu, began = free.get(), time.monotonic()
        said[run.name] = f"running on GPU {gpu}"
        try:
            said[run.name] = carry_out(trial, run, gpu)
        except Exception as error:  # the others go on
            said[run.name] = f"FAILED: {error}"
        free.put(gpu)
        print(f"{run.name}: {said[run.name]} ({time.monotonic() - began:.0f} s)", flush=True)
        with writing:
            report(trial, runs, said)

    with ThreadPoolExecutor(len(gpus)) as pool:
        waiting = [pool.submit(one, run) for run in runs]
        while not all(each.done() for each in waiting):
            time.sleep(SHOWN)
            busy = [run for run in runs if said.get(run.name, "").startswith("running")]
            shown = "; ".join(f"{run.name} {at(trial.folder(run))}" for run in busy)
            print(f"[{trial.left():.0f} s left] {shown}", flush=True)
    for each in waiting:
        each.result()
    return said


def first_gpus(count: int) -> list[str]:
    """Returns the first GPUs that CUDA_VISIBLE_DEVICES leaves visible, at most so many; [""] for none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if visible is None else list(filter(None, visible.split(",")))
    return names[:count] or [""]


def in_order(rates: dict[str, tuple[str, ...]]) -> list[Run]:
    """Returns the runs: the first rate of every method, then the second, and so on."""
    most = max(map(len, rates.values()))
    return [Run(method, rate[i]) for i in range(most) for method, rate in rates.items() if i < len(rate)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=4, help="the first of those visible; 0 for the CPU")
    parser.add_argument("--runs", nargs="+", default=[], metavar="METHOD=RATE,RATE", help="instead of all")
    parser.add_argument("--steps", type=int, default=900, help="updates of each run")
    parser.add_argument("--scored", type=int, nargs="+", default=[300, 500, 700, 900])
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=1000, help="pairs of an update")
    parser.add_argument("--sequence-length", type=int, default=80, help="tokens of a row: one pair, not two")
    parser.add_argument(
        "--seconds", type=float, default=540, help="then runs are stopped, and can be resumed"
    )
    words = [*sys.argv[1:], "--"]
    args, flags = parser.parse_args(words[: words.index("--")]), words[words.index("--") + 1 : -1]
    rates = {m: tuple(r.split(",")) for m, _, r in (text.partition("=") for text in args.runs)} or RATES
    if unknown := rates.keys() - RATES.keys():
        parser.error(f"there is no method {min(unknown)}; there are {', '.join(RATES)}")
    scored = tuple(step for step in args.scored if step <= args.steps)
    model, work, out = (path.absolute() for path in (args.model, args.work, args.out))
    trial = Trial(
        model,
        work,
        out,
        args.steps,
        scored,
        args.pairs,
        time.monotonic() + args.seconds,
        args.batch_size,
        args.sequence_length,
        tuple(flags),
    )
    prepare(trial)
    runs = in_order(rates)
    print(f"{len(runs)} runs of {args.steps} updates: {', '.join(run.name for run in runs)}", flush=True)
    said = go(trial, runs, first_gpus(args.gpus))
    print(report(trial, runs, said))


if __name__ == "__main__":
    main()
