"""Kills commands at chosen file operations, or makes these fail, and compares what they make.

    python tests/tools/file_faults.py --kills 100 --failures 60

A small library (file_faults.c, compiled with `cc`) counts the operations that change files, in each command
and its children. A command first runs undisturbed. Then each trial starts it in a new folder, disturbs one
operation, and runs the same command again. A kill is SIGKILL, after half of a write. A failure is EIO, or a
disk that is full from there on (ENOSPC). Afterwards every file, all arrays and every logged line must equal
those of the undisturbed command. A failure must end with status 74 and one line, or do no harm. Else the exit
status is 1.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import tyro

from train.console import exits
from train.run.folder import read_config
from train.storage.files import sha256

sys.path.append(str(Path(__file__).parents[1] / "support"))
from run_folders import hash_of_arrays, whole_lines
from tiny import TINY, write_tiny_text

ROOT = Path(__file__).parents[2]
MORA = (sys.executable, "-m", "train.cli")
# A demo with little text.
DEMO = """
import functools, train.cli.demo
from train.cli.main import main
train.cli.demo.demo = functools.partial(train.cli.demo.demo, text_bytes=150_000)
main()
"""
ACTIONS = ("KILL", "EIO", "ENOSPC")
LINE, LINES = 192, 20_000  # as in file_faults.c
STARTS = 3  # of the same command after a fault, at most
# Of all trials, each command's part.
SHARES = {"pretrain": 6, "prepare-data": 5, "prepare-data, 2 workers": 2, "train-tokenizer": 2, "export": 4}
SHARES |= {"demo": 3}
# What differs from run to run, or is compared by its arrays.
SKIPPED = ("checkpoints", "tensorboard", "jax_cache")
TIMED = "tokens_per_second"


@dataclasses.dataclass(frozen=True)
class FileFaults:
    """Kills commands at chosen file operations, or makes these fail, and compares the results.

    Attributes:
      kills: number of kills, over all commands.
      failures: number of operations that fail, likewise: half of them with EIO, half with ENOSPC.
      seed: seed of the chosen operations.
      only: the one command to disturb; empty for all.
      report: JSON file for all trials; empty for none.
    """

    kills: int = 100
    failures: int = 60
    seed: int = 0
    only: str = ""
    report: str = ""


@dataclasses.dataclass
class Trial:
    """One disturbed command. `wrong` says what differs from what is documented; empty if nothing does."""

    command: str
    action: str
    number: int
    operation: str = ""
    status: int = 0
    starts: int = 0
    wrong: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done to one operation. `number` counts from 1; 0 disturbs none."""

    number: int = 0
    action: str = "none"


UNDISTURBED = Plan()


class Faults:
    """The compiled library."""

    def __init__(self, folder: Path) -> None:
        """Compiles it into a folder. Raises SystemExit where there is no compiler."""
        source, self._library = Path(__file__).with_suffix(".c"), folder / "file_faults.so"
        self._record = folder / "record"
        if not shutil.which("cc"):
            raise SystemExit("file_faults: needs a C compiler, `cc`, and this machine has none")
        words = ["cc", "-shared", "-fPIC", "-O2", "-o", str(self._library), str(source), "-ldl", "-lpthread"]
        subprocess.run(words, check=True)

    def run(
        self,
        words: Sequence[str],
        root: Path,
        plan: Plan = UNDISTURBED,
        env: Mapping[str, str] = MappingProxyType({}),
        seconds: float | None = None,
    ) -> tuple[int, str, list[str]]:
        """Runs a program, at most so many seconds.

        Returns:
          Its status, its stderr, and its operations on files below `root`.
        """
        self._record.write_bytes(b"")
        os.truncate(self._record, 8 + LINE * LINES)
        faults = {
            "LD_PRELOAD": str(self._library),
            "FILE_FAULTS": f"{plan.number} {plan.action} {root}",
            "FILE_FAULTS_RECORD": str(self._record),
        }
        env = environment() | faults | dict(env)
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=seconds)
        content = self._record.read_bytes()
        (count,) = struct.unpack_from("Q", content)
        lines = (content[8 + LINE * i :][:LINE].partition(b"\0")[0] for i in range(min(count, LINES)))
        return done.returncode, done.stderr, [line.decode().partition(" ")[2] for line in lines]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of `mora` to disturb.

    Attributes:
      words: the command, which writes below `place` alone.
      place: its folder, empty before each trial but for what `copied` says.
      copied: a folder that is copied into the place first; None for none.
      refused: what a start after a kill may say instead, if all was done before the kill.
    """

    words: tuple[str, ...]
    place: Path
    copied: Path | None = None
    refused: str = ""

    def clear(self) -> None:
        """Makes the place as it is before each trial."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        if self.copied:
            shutil.copytree(self.copied, self.place / self.copied.name)


def main(options: FileFaults) -> int:
    """Runs all trials and prints a table. Returns the exit status."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        faults = Faults(folder)
        shares = {name: share for name, share in SHARES.items() if options.only in ("", name)}
        made = commands(folder, shares.keys())
        trials = []
        for name, share in shares.items():
            part = share / sum(shares.values())
            counts = [round(part * n) for n in (options.kills, options.failures / 2, options.failures / 2)]
            trials += disturb(name, made[name], faults, dict(zip(ACTIONS, counts, strict=True)), options.seed)
    if options.report:
        plain = json.dumps([dataclasses.asdict(trial) for trial in trials], indent=1)
        Path(options.report).write_text(plain + "\n")
    print_table(trials)
    return 1 if any(trial.wrong for trial in trials) else 0


def commands(folder: Path, names: Collection[str]) -> dict[str, Command]:
    """Prepares what the named commands read. Returns all by name."""
    given = folder / "given"
    write_tiny_text(given, train=150, validation=60)
    place, model = folder / "work", str(given / "t.model")
    text = (f"{given}/c4-train.*", f"{given}/c4-validation.*")
    config = (
        f"data: {{directory: {given / 'data'}, sequence_length: 32}}\n{TINY.replace('steps: 22', 'steps: 8')}"
    )
    (given / "run.yaml").write_text(config)
    (given / "demo.yaml").write_text(config.replace("vocab_size: 384", "vocab_size: 512"))
    tokenizer = (*MORA, "train-tokenizer", "--source", text[0], "--vocab-size", "384", "--out")
    words = ("--source", text[0], "--validation", text[1], "--tokenizer", model, "--sequence-length", "32")
    prepare = (*MORA, "prepare-data", *words, "--out")
    train = (*MORA, "pretrain", str(given / "run.yaml"), "--run-dir")
    demo = (sys.executable, "-c", DEMO, "demo", "--config", str(given / "demo.yaml"), "--folder")
    if set(names) - {"train-tokenizer", "demo"}:
        say("making what the commands read")
        for made in ([*tokenizer, model], [*prepare, f"{given}/data"], [*train, f"{given}/run"]):
            finish(made)
    exists = "exists already"
    return {
        "pretrain": Command((*train, str(place / "run")), place, given / "jax_cache"),
        "prepare-data": Command((*prepare, str(place / "data"), "--workers", "1"), place),
        "prepare-data, 2 workers": Command((*prepare, str(place / "data"), "--workers", "2"), place),
        "train-tokenizer": Command((*tokenizer, str(place / "t.model")), place, refused=exists),
        "export": Command((*MORA, "export", str(given / "run"), str(place / "out")), place, refused=exists),
        "demo": Command((*demo, str(place / "demo")), place),
    }


def disturb(name: str, command: Command, faults: Faults, counts: Mapping[str, int], seed: int) -> list[Trial]:
    """Runs a command undisturbed, and then once for each fault. Returns the trials."""
    command.clear()
    status, err, operations = faults.run(command.words, command.place)
    if status:
        raise SystemExit(f"{name}, undisturbed, ended with status {status}:\n{err}")
    wanted = result(command.place)
    chance, trials = random.Random(f"{seed} {name}"), []
    for action, count in counts.items():
        for i in range(count):  # spread over all operations
            number = 1 + int((i + chance.random()) * len(operations) / count)
            trial = Trial(name, action, number)
            with contextlib.suppress(StopIteration):
                trial.wrong = next(problems(trial, command, faults, err, wanted))
            place = f"{action} at {number} of {len(operations)}, {trial.operation}"
            say(f"{name}: {place}: {trial.wrong or 'as promised'}")
            trials.append(trial)
    return trials


def problems(trial: Trial, command: Command, faults: Faults, usual: str, wanted: dict[str, str]) -> Any:
    """Yields a sentence for each difference from what is documented."""
    command.clear()
    plan = Plan(trial.number, trial.action)
    trial.status, err, operations = faults.run(command.words, command.place, plan)
    trial.operation = operations[trial.number - 1] if len(operations) >= trial.number else "not reached"
    yield from ended_wrongly(trial, err, usual)
    status, err = trial.status, ""
    while (status or not trial.starts) and trial.starts < STARTS:
        trial.starts += 1
        status, err, _ = faults.run(command.words, command.place)
        if status == exits.BAD_INPUT and command.refused and command.refused in err:
            break
    else:
        if status:
            yield f"the same command then ended with status {status}: {err}"
    found = result(command.place)
    names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if names:
        yield f"differs from the undisturbed command: {', '.join(names[:5])}"


def ended_wrongly(trial: Trial, err: str, usual: str) -> Any:
    """Yields a sentence if a disturbed command did not end as documented."""
    known = set(usual.splitlines())
    new = [line for line in err.splitlines() if line not in known and not quiet(line)]
    one = len(new) == 1 and new[0].startswith("mora: ")
    if trial.operation == "not reached":
        if trial.status or new:
            yield f"ended with status {trial.status} undisturbed: {err}"
    elif trial.action == "KILL":
        worker = trial.status == exits.BAD_INPUT and one and "worker process was killed" in new[0]
        if trial.status != -signal.SIGKILL and not worker:
            yield f"ended with status {trial.status}: {err}"
    elif not (trial.status == exits.DISK and one) and not (trial.status == 0 and not new):
        yield f"ended with status {trial.status}: {err}"


def quiet(line: str) -> bool:
    """Whether a line on stderr may come at any time: progress, and warnings."""
    return " · " in line or line.startswith("mora: warning: ") or "holds a run: resuming" in line


def result(place: Path) -> dict[str, str]:
    """Returns what a command made, by name: a hash of each file, a run's arrays, its log without times."""
    found = {}
    for path in sorted(path for path in place.rglob("*") if not path.is_dir()):
        name = path.relative_to(place)
        if not set(name.parts) & set(SKIPPED):
            found[str(name)] = content(path)
    for run in sorted(path.parent for path in place.rglob("checkpoints")):
        steps = sorted(path.name for path in (run / "checkpoints").iterdir())
        found[f"{run.relative_to(place)}/checkpoints"] = " ".join(steps)
        finished = (run / "checkpoints" / str(read_config(str(run)).steps)).exists()
        found[f"{run.relative_to(place)}/arrays"] = hash_of_arrays(run) if finished else "unfinished"
    return found


def content(path: Path) -> str:
    """Returns what identifies the content of a file, without what differs from run to run."""
    if path.name == "metrics.jsonl":
        return json.dumps(whole_lines(path.parent))
    if path.name == "summary.json":
        return json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != TIMED})
    return "a lock" if path.name == "lock" else sha256(path)


def print_table(trials: Sequence[Trial]) -> None:
    """Prints the counts of each command, and every trial that went wrong."""
    columns: dict[str, Callable[[Trial], bool]] = {
        "kills": lambda t: t.action == "KILL",
        "EIO": lambda t: t.action == "EIO",
        "ENOSPC": lambda t: t.action == "ENOSPC",
        "status 74": lambda t: t.status == exits.DISK,
        "no harm": lambda t: t.status == 0 and t.operation != "not reached",
        "not reached": lambda t: t.operation == "not reached",
        "wrong": lambda t: bool(t.wrong),
    }
    print(f"{'':24}" + "".join(f"{name:>12}" for name in columns))
    for name in [*dict.fromkeys(trial.command for trial in trials), "all"]:
        these = [trial for trial in trials if name in (trial.command, "all")]
        print(f"{name:24}" + "".join(f"{sum(map(counts, these)):12}" for counts in columns.values()))
    for trial in trials:
        if trial.wrong:
            print(f"{trial.command}, {trial.action} at {trial.number} ({trial.operation}): {trial.wrong}")


def finish(words: Sequence[str]) -> None:
    """Runs a command to its end."""
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with status {done.returncode}:\n{done.stderr}")


def environment() -> dict[str, str]:
    """Returns the environment of the programs, which run from this source and compile quickly."""
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    quick = {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | quick


def say(sentence: str) -> None:
    """Reports progress on stderr."""
    print(f"file faults: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    started = time.monotonic()
    status = main(tyro.cli(FileFaults, description=__doc__))
    say(f"{time.monotonic() - started:.0f} s")
    raise SystemExit(status)
