"""Kills a small ReMoRA run again and again, and compares what becomes of it with a run that nobody disturbed.

    python tests/tools/soak.py --kills 100

Text is made up, prepared (and the preparation killed, too), and trained on once without a disturbance. Then
the same command is started and killed (SIGKILL) until there were so many kills: at random times, and on
purpose in a save, at a restart, in an evaluation, and while it stops for a SIGTERM. A run that finishes
before begins again from nothing. Every line that any of the killed programs wrote, and the arrays of every
finished run, must be those of the undisturbed one. The status is 1 if anything differs.
"""

import collections
import contextlib
import dataclasses
import gzip
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

os.environ["JAX_PLATFORMS"] = "cpu"  # here nothing is computed

import jax
import numpy as np
import tyro

from mora_jax import sharding
from train.console import exits
from train.data.tokenizer import train_tokenizer
from train.run.folder import open_checkpoints, read_config
from train.run.manifest import MANIFEST
from train.run.state import restore_state
from train.runtime.backend import CACHE

ROOT = Path(__file__).parents[2]
CONFIG = """
batch_size: 4
model:
  {vocab_size: 384, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2,
   num_key_value_heads: 2, max_position_embeddings: 32}
compute: {dtype: float32, layers: scan, remat: dots, loss_chunk: 64}
method: {name: mora, rank: 4, align: 8}
optimizer: {learning_rate: 1e-2}
schedule: {kind: jagged-cosine, warmup: 5}
restart: {every: 20, warmup: 2}
bad_steps: {window: 8}
eval: {every: 15, batch_size: 4, max_batches: 8}
checkpoint: {every: 7, keep: 3}
mesh: {data: 1}
"""
EVERY = {"restart": 20, "evaluation": 15}  # updates
KINDS = ("start", "update", "update", "save", "save", "restart", "evaluation", "SIGTERM")
MORA = (sys.executable, "-m", "train.cli")
AHEAD = 40  # updates, at most, between going on and lying in wait
LOSSES = ("loss", "validation_loss")
START_SECONDS = 10.0  # kills at a start come within so many seconds
TIMES = ("data_wait", "tokens_per_second")  # differ from run to run
# Seconds without a sign of what a kill waits for, after which it strikes all the same.
PATIENCE = 30.0


@dataclasses.dataclass(frozen=True)
class Soak:
    """Kills a small ReMoRA run again and again, and compares it with an undisturbed one.

    Attributes:
      kills: how many.
      steps: updates of a run.
      seed: of the times and kinds of the kills.
      platform: where it is trained, cpu or cuda; on a GPU deterministically.
      folder: where everything is written; empty for a temporary folder that is removed.
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
    """What was counted; seconds are of wall time."""

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
    prepared_alike: bool = False
    undisturbed_seconds: float = 0.0
    disturbed_seconds: float = 0.0
    wasted_seconds: float = 0.0

    @property
    def alike(self) -> bool:
        """Whether nothing at all differs."""
        hashes = set(self.final_hashes) == {self.undisturbed_hash}
        return (
            hashes
            and self.prepared_alike
            and not (self.differing_losses + self.differing_lines + self.lines_lost_or_doubled)
        )


def main(options: Soak) -> int:
    """Runs it all and prints the figures; the exit status."""
    os.environ["JAX_PLATFORMS"] = options.platform  # of the programs: JAX is here already
    with contextlib.ExitStack() as stack:
        folder = Path(options.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        figures = soak(folder, options, random.Random(options.seed))
    plain = dataclasses.asdict(figures) | {"alike": figures.alike}
    for name, value in plain.items():
        print(f"{name.replace('_', ' '):24} {value}")
    if options.report:
        Path(options.report).write_text(json.dumps(plain, indent=2) + "\n")
    return 0 if figures.alike else 1


def soak(folder: Path, options: Soak, chance: random.Random) -> Figures:
    """Prepares, trains undisturbed, and kills."""
    figures = Figures()
    prepare(folder, figures, max(1, options.kills // 10), chance)
    data = f"data: {{directory: {folder / 'data'}, sequence_length: 32}}"
    gpu = options.platform != "cpu"
    (folder / "run.yaml").write_text(
        f"{data}\nsteps: {options.steps}\ndeterministic: {'true' if gpu else 'false'}\n{CONFIG}"
    )
    started = time.monotonic()
    say("training undisturbed")
    # Compiled by itself: on a CPU, programs taken from the cache must compute the same bits.
    finish(command(folder, "undisturbed", *([] if gpu else ["--compilation.cache", "off"])))
    figures.undisturbed_seconds = round(time.monotonic() - started, 1)
    expected = told(folder / "undisturbed")
    figures.undisturbed_hash = hash_of_arrays(folder / "undisturbed")
    disturb(folder, expected, figures, options.kills, chance)
    needed = len(figures.final_hashes) * figures.undisturbed_seconds
    figures.wasted_seconds = round(figures.disturbed_seconds - needed, 1)
    return figures


def disturb(
    folder: Path, expected: dict[str, dict], figures: Figures, kills: int, chance: random.Random
) -> None:
    """Starts the command until there were so many kills, and lets the last run come to its end."""
    run_dir, furthest = folder / "disturbed", 0
    while True:
        lend_programs(folder)
        strike = next_strike(run_dir, chance) if figures.kills < kills else None
        file_before, started = identity(run_dir), time.monotonic()
        status, err = attempt(command(folder, "disturbed"), strike)
        figures.disturbed_seconds = round(figures.disturbed_seconds + time.monotonic() - started, 1)
        figures.starts += 1
        if identity(run_dir) != file_before:  # else it was killed before it told of anything
            resumed = int((re.findall(r"resuming after (\d+) of", err) or [0])[0])
            figures.resumes += resumed > 0
            figures.replayed_steps += max(0, min(updates(run_dir), furthest) - resumed)
            compare(run_dir, resumed, expected, figures)
            furthest = max(furthest, updates(run_dir))
        if status == -signal.SIGKILL and strike:
            count_kill(run_dir, strike.kind, figures)
            say(f"kill {figures.kills} of {kills}: {strike.kind}, {updates(run_dir)} updates told of")
        elif status == 0:
            figures.final_hashes.append(hash_of_arrays(run_dir))
            figures.lines_lost_or_doubled += unmatched(run_dir, folder / "undisturbed")
            if figures.kills >= kills:
                return
            shutil.rmtree(run_dir)
            furthest = 0
        elif status == exits.PREEMPTED:  # sooner than the kill came
            figures.stopped_by_sigterm += 1
        else:
            raise SystemExit(f"the run ended with status {status}:\n{err}")


def lend_programs(folder: Path) -> None:
    """On a GPU a compiler makes another program each time: a new run begins with the undisturbed one's."""
    theirs, ours = folder / "undisturbed" / CACHE, folder / "disturbed" / CACHE
    if theirs.exists() and not ours.exists():
        shutil.copytree(theirs, ours)


def attempt(words: list[str], strike: "Strike | None") -> tuple[int, str]:
    """Starts the command, and strikes; its status and what it said on stderr."""
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
      kind: what is waited for, once the program has gone on.
      run_dir: where that is seen.
      ahead: updates that are let go by before.
      late: how long after the moment it comes, from 0 to 1.
      file_before: `identity` before the program was started.
    """

    kind: str
    run_dir: Path
    ahead: int
    late: float
    file_before: int

    def wait(self, process: subprocess.Popen) -> None:
        """Returns when it is time."""
        if self.kind == "start":
            return pause(process, START_SECONDS * self.late)
        wait_until(process, lambda: identity(self.run_dir) != self.file_before and updates(self.run_dir) > 0)
        goal = updates(self.run_dir) + self.ahead
        wait_until(process, lambda: updates(self.run_dir) >= goal)
        if self.kind == "save":
            wait_until(process, lambda: unfinished(self.run_dir))
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
    """A kind of kill and its moment, drawn at random."""
    return Strike(chance.choice(KINDS), run_dir, chance.randrange(AHEAD), chance.random(), identity(run_dir))


def pause(process: subprocess.Popen, seconds: float) -> None:
    """Waits, but not for a program that has ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def wait_until(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    """Waits for what happens for a moment only; gives up where the program has ended, or in the end."""
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until and not happened():
        time.sleep(0.001)


# What lies in a run's folder


def identity(run_dir: Path) -> int:
    """Tells a metrics.jsonl from that of the program before, which each one writes anew; 0 for none."""
    path = run_dir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def updates(run_dir: Path) -> int:
    """How many updates were told of: what is called in a hurry reads the end of the file alone."""
    with contextlib.suppress(OSError), (run_dir / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        return max([json.loads(line)["step"] + 1 for line in file.read().split(b"\n")[1:-1]], default=0)
    return 0


def unfinished(run_dir: Path) -> bool:
    """Whether a save is under way, or was cut off."""
    with contextlib.suppress(OSError):
        for folder in (run_dir / "checkpoints").iterdir():
            if not folder.name.isdigit() or not (folder / MANIFEST).exists():
                return True
    return False


def count_kill(run_dir: Path, kind: str, figures: Figures) -> None:
    """Counts a kill and what it cut off."""
    figures.kills += 1
    figures.kills_by_kind[kind] += 1
    figures.saves_found_unfinished += unfinished(run_dir)
    path = run_dir / "metrics.jsonl"
    figures.lines_found_cut += path.exists() and not path.read_bytes().endswith(b"\n")


def told(run_dir: Path) -> dict[str, dict]:
    """All whole lines of a run by what they tell of, without what differs from run to run."""
    return {subject(line): line for line in whole_lines(run_dir)}


def whole_lines(run_dir: Path) -> list[dict]:
    """All whole lines of a run, in their order."""
    return [without_times(line) for line in (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]]


def unmatched(run_dir: Path, other: Path) -> int:
    """How many lines of two finished runs tell of what the other's do not, or tell of it more often."""
    ours, theirs = (collections.Counter(map(subject, whole_lines(folder))) for folder in (run_dir, other))
    return ((ours - theirs) + (theirs - ours)).total()


def without_times(line: str) -> dict:
    """A line, but for what differs from run to run."""
    return {name: value for name, value in json.loads(line).items() if name not in TIMES}


def subject(line: dict) -> str:
    """What a line tells of."""
    kinds = [kind for kind in ("loss", "restart", "validation_loss") if kind in line]
    return f"{line['step']} {kinds[0]}"


def compare(run_dir: Path, resumed: int, expected: dict[str, dict], figures: Figures) -> None:
    """Compares what a program told of, from where it went on, with what the undisturbed one told."""
    for name, line in told(run_dir).items():
        if line["step"] >= resumed:
            figures.lines_compared += 1
            other = expected.get(name, {})
            figures.differing_lines += line != other
            figures.differing_losses += any(line.get(loss) != other.get(loss) for loss in LOSSES)


def hash_of_arrays(run_dir: Path) -> str:
    """Of all arrays of a finished run's last checkpoint: parameters, adapters, optimizer and guard."""
    config = read_config(str(run_dir))
    with open_checkpoints(config) as saved:
        state, _ = restore_state(config, saved, config.steps, sharding.make_mesh(1))
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# Text and commands


def prepare(folder: Path, figures: Figures, kills: int, chance: random.Random) -> None:
    """Makes text and prepares it, undisturbed and with kills; the training then uses the latter."""
    say("preparing")
    words = ["".join(random.Random(n).choices("abcdefghij", k=2 + n % 6)) for n in range(200)]
    for name, documents in (("train.0", 1500), ("train.1", 1500), ("validation.0", 100)):
        texts = (" ".join(chance.choices(words, k=chance.randint(10, 60))) for _ in range(documents))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"c4-{name}.json.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
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
    figures.prepared_alike = contents(folder / "undisturbed_data") == contents(folder / "data")
    (folder / "run.yaml").write_text(f"data: {{directory: {folder / 'data'}, sequence_length: 32}}\n{CONFIG}")


def contents(folder: Path) -> dict[str, str]:
    """Every file and its hash."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def preparation(folder: Path, out: str) -> list[str]:
    """The command that prepares the text, one that continues what was cut off."""
    source, validation = str(folder / "c4-train.*"), str(folder / "c4-validation.*")
    words = ["--source", source, "--validation", validation, "--tokenizer", str(folder / "t.model")]
    return [*MORA, "prepare-data", *words, "--out", str(folder / out), "--sequence-length", "32"]


def command(folder: Path, name: str, *more: str) -> list[str]:
    """The command that trains, the same for every start."""
    return [*MORA, "pretrain", str(folder / "run.yaml"), "--run-dir", str(folder / name), *more]


def finish(words: list[str]) -> None:
    """Runs a command that nothing disturbs."""
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with status {done.returncode}:\n{done.stderr}")


def environment() -> dict[str, str]:
    """That of the programs, which run from this source."""
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TF_CPP_MIN_LOG_LEVEL": "3"}


def say(sentence: str) -> None:
    """What is going on, on stderr."""
    print(f"soak: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Soak, description=__doc__)))
