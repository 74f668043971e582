"""Kills a small ReMoRA run many times, and compares the result with an undisturbed run.

    python tests/tools/soak.py --kills 100

Prepares made-up text (and kills the preparation too) and trains on it once without disturbance. Then the same
command is started and killed (SIGKILL) again and again: at random times, and on purpose in a save, at a
restart, in an evaluation, and while it stops for a SIGTERM. A run that finishes starts again from scratch.
Every line that a killed program wrote and the arrays of every finished run must equal those of the
undisturbed run. Else the exit status is 1.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

os.environ["JAX_PLATFORMS"] = "cpu"  # of this program, which computes nothing

import tyro

from train.console import exits
from train.data.tokenizer import train_tokenizer
from train.runtime.backend import CACHE

sys.path.append(str(Path(__file__).parents[1] / "support"))
from run_folders import (
    hash_of_arrays,
    identity,
    is_saving,
    logged,
    missing_or_repeated,
    updates,
)
from tiny import TINY, write_tiny_text

ROOT = Path(__file__).parents[2]
EVERY = {"restart": 20, "evaluation": 15}  # updates
SETTINGS = (
    *("--schedule.warmup", "5", "--restart.every", "20", "--restart.warmup", "2", "--bad-steps.window", "8"),
    *("--eval.every", "15", "--eval.max-batches", "8", "--checkpoint.every", "7", "--checkpoint.keep", "3"),
)
KINDS = ("start", "update", "update", "save", "save", "restart", "evaluation", "SIGTERM")
MORA = (sys.executable, "-m", "train.cli")
AHEAD = 40  # at most so many updates pass before a kill is prepared
LOSSES = ("loss", "validation_loss")
START_SECONDS = 10.0  # a kill of kind "start" comes within this time
PATIENCE = 30.0  # seconds after which a kill no longer waits for its moment


@dataclasses.dataclass(frozen=True)
class Soak:
    """Kills a small ReMoRA run many times, and compares the result with an undisturbed run.

    Attributes:
      kills: number of kills.
      steps: updates of a run.
      seed: seed of the times and kinds of the kills.
      platform: where the runs train, cpu or cuda. Runs on a GPU are deterministic.
      folder: where all files are written; empty for a temporary folder.
      report: JSON file for the figures; empty for none.
    """

    kills: int = 100
    steps: int = 240
    seed: int = 0
    platform: Literal["cpu", "cuda"] = "cpu"
    folder: str = ""
    report: str = ""


@dataclasses.dataclass
class Figures:
    """The counts. Seconds are wall time."""

    kills: int = 0
    kills_by_kind: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    preparation_kills: int = 0
    starts: int = 0
    resumes: int = 0
    stopped_by_sigterm: int = 0
    saves_found_unfinished: int = 0
    lines_found_cut: int = 0
    replayed_steps: int = 0
    lines_compared: int = 0
    differing_losses: int = 0
    differing_lines: int = 0
    lines_lost_or_doubled: int = 0
    undisturbed_hash: str = ""
    final_hashes: list[str] = dataclasses.field(default_factory=list)
    prepared_equal: bool = False
    undisturbed_seconds: float = 0.0
    disturbed_seconds: float = 0.0
    wasted_seconds: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        hashes = set(self.final_hashes) == {self.undisturbed_hash}
        return (
            hashes
            and self.prepared_equal
            and not (self.differing_losses + self.differing_lines + self.lines_lost_or_doubled)
        )


def main(options: Soak) -> int:
    """Runs the soak and prints the figures. Returns the exit status."""
    os.environ["JAX_PLATFORMS"] = options.platform  # of the programs that are started
    with contextlib.ExitStack() as stack:
        folder = Path(options.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        figures = soak(folder, options, random.Random(options.seed))
    plain = dataclasses.asdict(figures) | {"equal": figures.equal}
    for name, value in plain.items():
        print(f"{name.replace('_', ' '):24} {value}")
    if options.report:
        Path(options.report).write_text(json.dumps(plain, indent=2) + "\n")
    return 0 if figures.equal else 1


def soak(folder: Path, options: Soak, chance: random.Random) -> Figures:
    """Prepares the data, trains without disturbance, and then with kills. Returns the figures."""
    figures = Figures()
    prepare(folder, figures, max(1, options.kills // 10), chance)
    data = f"data: {{directory: {folder / 'data'}, sequence_length: 32}}"
    gpu = options.platform != "cpu"
    (folder / "run.yaml").write_text(
        f"{data}\ndeterministic: {'true' if gpu else 'false'}\n{TINY}".replace(
            "steps: 22", f"steps: {options.steps}"
        )
    )
    started = time.monotonic()
    say("training undisturbed")
    # Without the cache: on a CPU, programs from the cache must compute the same bits as fresh ones.
    finish(command(folder, "undisturbed", *([] if gpu else ["--compilation.cache", "off"])))
    figures.undisturbed_seconds = round(time.monotonic() - started, 1)
    expected = logged(folder / "undisturbed")
    figures.undisturbed_hash = hash_of_arrays(folder / "undisturbed")
    disturb(folder, expected, figures, options.kills, chance)
    needed = len(figures.final_hashes) * figures.undisturbed_seconds
    figures.wasted_seconds = round(figures.disturbed_seconds - needed, 1)
    return figures


def disturb(
    folder: Path, expected: dict[str, dict], figures: Figures, kills: int, chance: random.Random
) -> None:
    """Starts the command until it was killed `kills` times, and lets the last run finish."""
    run_dir, furthest = folder / "disturbed", 0
    while True:
        copy_programs(folder)
        strike = next_strike(run_dir, chance) if figures.kills < kills else None
        file_before, started = identity(run_dir), time.monotonic()
        status, err = attempt(command(folder, "disturbed"), strike)
        figures.disturbed_seconds = round(figures.disturbed_seconds + time.monotonic() - started, 1)
        figures.starts += 1
        if identity(run_dir) != file_before:  # else it was killed before it logged anything
            resumed = int((re.findall(r"resuming after (\d+) of", err) or [0])[0])
            figures.resumes += resumed > 0
            figures.replayed_steps += max(0, min(updates(run_dir), furthest) - resumed)
            compare(run_dir, resumed, expected, figures)
            furthest = max(furthest, updates(run_dir))
        if status == -signal.SIGKILL and strike:
            count_kill(run_dir, strike.kind, figures)
            say(f"kill {figures.kills} of {kills}: {strike.kind}, {updates(run_dir)} updates logged")
        elif status == 0:
            figures.final_hashes.append(hash_of_arrays(run_dir))
            figures.lines_lost_or_doubled += missing_or_repeated(run_dir, folder / "undisturbed")
            if figures.kills >= kills:
                return
            shutil.rmtree(run_dir)
            furthest = 0
        # Before the kill came. A run that has finished no longer handles signals; the next start finds it.
        elif status in (exits.PREEMPTED, -signal.SIGTERM):
            figures.stopped_by_sigterm += 1
        else:
            raise SystemExit(f"the run ended with status {status}:\n{err}")


def copy_programs(folder: Path) -> None:
    """Copies the programs of the undisturbed run: on a GPU each compilation gives another program."""
    theirs, ours = folder / "undisturbed" / CACHE, folder / "disturbed" / CACHE
    if theirs.exists() and not ours.exists():
        shutil.copytree(theirs, ours)


def attempt(words: list[str], strike: "Strike | None") -> tuple[int, str]:
    """Starts the command and kills it as `strike` says. Returns its status and its stderr."""
    with tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=err, env=environment())
        if strike:
            strike.wait(process)
            process.kill()
        status = process.wait()
        err.seek(0)
        return status, err.read()


@dataclasses.dataclass(frozen=True)
class Strike:
    """How a program is killed.

    Attributes:
      kind: the event to wait for once the program has resumed.
      run_dir: where the event is seen.
      ahead: updates that pass before.
      late: how long after the event the kill comes, from 0 to 1.
      file_before: `identity` before the program was started.
    """

    kind: str
    run_dir: Path
    ahead: int
    late: float
    file_before: int

    def wait(self, process: subprocess.Popen) -> None:
        """Returns when the program is to be killed."""
        if self.kind == "start":
            return pause(process, START_SECONDS * self.late)
        wait_until(process, lambda: identity(self.run_dir) != self.file_before and updates(self.run_dir) > 0)
        goal = updates(self.run_dir) + self.ahead
        wait_until(process, lambda: updates(self.run_dir) >= goal)
        if self.kind == "save":
            wait_until(process, lambda: is_saving(self.run_dir))
            return pause(process, 0.03 * self.late)
        if self.kind in EVERY:
            wait_until(process, lambda: updates(self.run_dir) % EVERY[self.kind] == 0)
            return pause(process, 0.03 * self.late)
        pause(process, self.late)
        if self.kind == "SIGTERM":
            process.send_signal(signal.SIGTERM)
            pause(process, 0.2 * self.late)
        return None


def next_strike(run_dir: Path, chance: random.Random) -> Strike:
    """Draws a kind of kill and its moment."""
    return Strike(chance.choice(KINDS), run_dir, chance.randrange(AHEAD), chance.random(), identity(run_dir))


def pause(process: subprocess.Popen, seconds: float) -> None:
    """Waits, or returns when the program ends."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def wait_until(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    """Waits for a short event, until the program ends, or for PATIENCE seconds."""
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until and not happened():
        time.sleep(0.001)


# Counts


def count_kill(run_dir: Path, kind: str, figures: Figures) -> None:
    """Counts a kill and what it interrupted."""
    figures.kills += 1
    figures.kills_by_kind[kind] += 1
    figures.saves_found_unfinished += is_saving(run_dir)
    path = run_dir / "metrics.jsonl"
    figures.lines_found_cut += path.exists() and not path.read_bytes().endswith(b"\n")


def compare(run_dir: Path, resumed: int, expected: dict[str, dict], figures: Figures) -> None:
    """Compares the lines that a program logged after it resumed with those of the undisturbed run."""
    for name, line in logged(run_dir).items():
        if line["step"] >= resumed:
            figures.lines_compared += 1
            other = expected.get(name, {})
            figures.differing_lines += line != other
            figures.differing_losses += any(line.get(loss) != other.get(loss) for loss in LOSSES)


# Text and commands


def prepare(folder: Path, figures: Figures, kills: int, chance: random.Random) -> None:
    """Writes made-up text and prepares it, once undisturbed and once with kills. Training uses the latter."""
    say("preparing")
    write_tiny_text(folder, train=1500, validation=100)
    train_tokenizer(str(folder / "c4-train.*"), str(folder / "t.model"), 384)
    started = time.monotonic()
    finish(preparation(folder, "undisturbed_data"))
    seconds = time.monotonic() - started
    while figures.preparation_kills < kills:
        process = subprocess.Popen(preparation(folder, "data"), env=environment(), stderr=subprocess.DEVNULL)
        pause(process, seconds * chance.uniform(0.3, 1))
        process.kill()
        figures.preparation_kills += process.wait() != 0
        if process.returncode == 0:
            shutil.rmtree(folder / "data")
    finish(preparation(folder, "data"))
    figures.prepared_equal = contents(folder / "undisturbed_data") == contents(folder / "data")


def contents(folder: Path) -> dict[str, str]:
    """Returns the hash of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def preparation(folder: Path, out: str) -> list[str]:
    """Returns the command that prepares the text, and resumes a preparation that was killed."""
    source, validation = str(folder / "c4-train.*"), str(folder / "c4-validation.*")
    words = ["--source", source, "--validation", validation, "--tokenizer", str(folder / "t.model")]
    return [*MORA, "prepare-data", *words, "--out", str(folder / out), "--sequence-length", "32"]


def command(folder: Path, name: str, *more: str) -> list[str]:
    """Returns the command that trains, the same for every start."""
    return [*MORA, "pretrain", str(folder / "run.yaml"), "--run-dir", str(folder / name), *SETTINGS, *more]


def finish(words: list[str]) -> None:
    """Runs a command to its end."""
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with status {done.returncode}:\n{done.stderr}")


def environment() -> dict[str, str]:
    """Returns the environment of the programs, which run from this source."""
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TF_CPP_MIN_LOG_LEVEL": "3"}


def say(sentence: str) -> None:
    """Reports progress on stderr."""
    print(f"soak: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Soak, description=__doc__)))
