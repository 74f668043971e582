"""Kills one of several processes of a run, again and again, and checks how the others end.

    python tests/tools/soak_processes.py --processes 4 --kills 5 --platform cuda

Prepares made-up text and trains a small ReMoRA run on it without disturbance: by several processes of one
device each, and by one process that drives all devices. The two are compared, but may differ. Then one of the
processes is killed (SIGKILL), and all are started again, many times: while they compile, at random times, in
a save, at a restart and in an evaluation. All others must end in time, with the status of a lost process.
Finally one of them gets a SIGTERM, and all must save and end. What the processes log and the arrays of the
finished run must equal those of the undisturbed ones. Otherwise the exit
status is 1.

The default limit follows from the program's heartbeat: after 10 seconds of silence a process counts as lost,
and within 5 more the runtime ends all others (`train/runtime/distributed.py`).
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Literal

import soak  # first: it sets the platform of this program, which computes nothing
import tyro
from run_folders import hash_of_arrays, identity, logged, missing_or_repeated, updates
from tiny import TINY, write_tiny_text

from train.config.sections import Distributed
from train.console import exits
from train.data.tokenizer import train_tokenizer
from train.run.metrics import read_metrics
from train.runtime.backend import CACHE

KINDS = ("update", "save", "start", "restart", "evaluation")
HUNG_SECONDS = 90.0  # a process that lives longer is killed
COMPILING_SECONDS = 3.0  # a kill of kind "start" comes within this time after the log was opened
# On a CPU, where programs of several devices are not kept, most of the time goes into compiling.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
_LAUNCHED: list[subprocess.Popen] = []
_HASHING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Options:
    """Kills one of several processes of a run, again and again, and checks how the others end.

    Attributes:
      processes: number of processes, at least two.
      mesh: sizes of data, fsdp and tensor; by default 2 2 1 for four processes, else all in data.
      kills: number of kills; 0 only compares the processes with one that drives all devices.
      alone: whether one process that drives all devices trains too.
      steps: updates of a run.
      limit: seconds within which all others must end after a kill.
      side_by_side: runs that share the kills, trained at once; the one process, too, which is slower then.
      seed: seed of the times, kinds and victims of the kills.
      platform: where the runs train, cpu or cuda. Runs on GPUs are deterministic.
      folder: where all files are written; empty for a temporary folder.
      report: JSON file for the figures; empty for none.
    """

    processes: int = 4
    mesh: tuple[int, ...] = ()
    kills: int = 4
    alone: bool = True
    steps: int = 40
    limit: float = Distributed.heartbeat_timeout + 5.0
    side_by_side: int = 1
    seed: int = 0
    platform: Literal["cpu", "cuda"] = "cpu"
    folder: str = ""
    report: str = ""


@dataclasses.dataclass(frozen=True)
class Strike:
    """A signal to one process: the event it waits for, the process, updates before, lateness (0 to 1)."""

    kind: str
    victim: int
    ahead: int
    late: float


@dataclasses.dataclass
class Figures:
    """The figures. Seconds are wall time, those of an end from the signal until no process is left."""

    undisturbed: dict[str, float] = dataclasses.field(default_factory=dict)
    alone: dict[str, float] = dataclasses.field(default_factory=dict)
    ends: list[dict] = dataclasses.field(default_factory=list)
    starts: int = 0
    resumes: int = 0
    first_difference: str = ""
    undisturbed_hash: str = ""
    final_hashes: list[str] = dataclasses.field(default_factory=list)
    lines: soak.Figures = dataclasses.field(default_factory=soak.Figures)


def main(options: Options) -> int:
    """Runs the soak and prints the figures. Returns the exit status."""
    os.environ["JAX_PLATFORMS"] = options.platform  # of the programs that are started
    soak.PATIENCE = HUNG_SECONDS  # many processes on few cores take long to start
    figures, began = Figures(), time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(options.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(end_all)
        prepare(folder, options)
        measure(folder, options, figures)
    names = ("lines_compared", "differing_lines", "differing_losses", "lines_lost_or_doubled")
    plain = dataclasses.asdict(figures) | {name: getattr(figures.lines, name) for name in names}
    del plain["lines"]
    plain["seconds"] = round(time.monotonic() - began, 1)
    # A SIGTERM has no such limit: updates in flight are finished first, and what they compile.
    ended_well = all(
        end["as_documented"] and (end["kind"] == "SIGTERM" or end["seconds"] <= options.limit)
        for end in figures.ends
    )
    plain["good"] = (
        ended_well
        and not any(plain[name] for name in names[1:])
        and set(figures.final_hashes) <= {figures.undisturbed_hash}
    )
    for name, value in plain.items():
        for one in map(short, value) if name == "ends" else [value]:
            print(f"{name.replace('_', ' '):24} {one}")
    if options.report:
        Path(options.report).write_text(json.dumps(plain, indent=2) + "\n")
    return 0 if plain["good"] else 1


def end_all() -> None:
    """Ends all processes that have not ended, before their files are removed."""
    for process in _LAUNCHED:
        process.kill()
        process.wait()


def prepare(folder: Path, options: Options) -> None:
    """Writes made-up text, prepares it, and writes the config of all runs."""
    soak.say("preparing")
    write_tiny_text(folder, train=300, validation=40)
    train_tokenizer(str(folder / "c4-train.*"), str(folder / "t.model"), 384)
    soak.finish(soak.preparation(folder, "data"))
    config = TINY.replace("steps: 22", f"steps: {options.steps}")
    config = config.replace("batch_size: 4", f"batch_size: {max(4, options.processes)}")
    data = f"data: {{directory: {folder / 'data'}, sequence_length: 32}}"
    (folder / "run.yaml").write_text(
        f"{data}\ndeterministic: {str(options.platform != 'cpu').lower()}\n{config}"
    )


def measure(folder: Path, options: Options, figures: Figures) -> None:
    """Trains without disturbance by the processes and by one alone, and then with kills."""
    figures.undisturbed = train(folder, "undisturbed", options)
    figures.undisturbed_hash = hash_of_arrays(folder / "undisturbed")
    strikes, runs = draw(options), max(1, min(options.side_by_side, options.kills))
    with ThreadPoolExecutor(runs + 1 if runs > 1 else 1) as pool:
        jobs = [pool.submit(compare_with_one, folder, options, figures)] if options.alone else []
        for i in range(runs if strikes else 0):
            jobs.append(pool.submit(disturb, folder, f"disturbed{i}", strikes[i::runs], options, figures))
        for job in jobs:
            job.result()


def compare_with_one(folder: Path, options: Options, figures: Figures) -> None:
    """Trains the run by one process that drives all devices, and compares its losses."""
    figures.alone = train(folder, "alone", options, alone=True)
    ours, theirs = logged(folder / "alone"), logged(folder / "undisturbed")
    pairs = [
        (ours[at][name], line[name]) for at, line in theirs.items() for name in soak.LOSSES if name in line
    ]
    figures.alone["losses"] = len(pairs)
    figures.alone["equal_losses"] = sum(a == b for a, b in pairs)
    figures.alone["largest_relative_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)


def train(folder: Path, name: str, options: Options, alone: bool = False) -> dict[str, float]:
    """Trains the run to its end. Returns its time and speed, without its first steps."""
    soak.say(f"training: {name}")
    began = time.monotonic()
    finish(folder / name, launch(folder, name, options, alone))
    seconds = round(time.monotonic() - began, 1)
    lines = read_metrics(str(folder / name / "metrics.jsonl"))
    rates = [line["tokens_per_second"] for line in lines if line["step"] > 5 and "tokens_per_second" in line]
    return {"seconds": seconds, "median_tokens_per_second": round(median(rates), 1)}


def draw(options: Options) -> list[Strike]:
    """Draws the kills: every kind, and every process, before one comes again. A SIGTERM is the last."""
    chance = random.Random(options.seed)
    kinds, victims = (
        chance.sample(KINDS, len(KINDS)),
        chance.sample(range(options.processes), options.processes),
    )
    words = [kinds[i % len(kinds)] for i in range(options.kills)] + ["SIGTERM"] * (options.kills > 0)
    few = max(1, options.steps // (len(words) + 2))
    each = ((kind, victims[i % len(victims)]) for i, kind in enumerate(words))
    return [Strike(kind, victim, chance.randrange(few), chance.random()) for kind, victim in each]


def disturb(folder: Path, name: str, left: list[Strike], options: Options, figures: Figures) -> None:
    """Starts the processes until all signals have come, and lets the last run finish."""
    run_dir, undisturbed = folder / name, folder / "undisturbed"
    expected = logged(undisturbed)
    while True:
        if (undisturbed / CACHE).exists() and not (run_dir / CACHE).exists():
            shutil.copytree(undisturbed / CACHE, run_dir / CACHE)  # each compilation gives another program
        before, processes = identity(run_dir), launch(folder, name, options)
        waited = bool(left) and wait(left[0], run_dir, before, processes, options)
        if waited:
            figures.ends.append(struck(left.pop(0), run_dir, processes))
            soak.say(f"{name}, {len(left)} to come: {short(figures.ends[-1])}")
        else:
            finish(run_dir, processes)
        found = re.findall(r"resuming after (\d+) of", (folder / f"{name}-0.err").read_text())
        resumed = int((found or [0])[0])
        figures.starts += 1
        figures.resumes += resumed > 0
        if identity(run_dir) != before:  # else they ended before they logged anything
            soak.compare(run_dir, resumed, expected, figures.lines)
            for at, line in logged(run_dir).items():
                if line != expected.get(at) and not figures.first_difference:
                    figures.first_difference = f"{name}, {at}: {line} instead of {expected.get(at)}"
        if not waited:
            with _HASHING:
                figures.final_hashes.append(hash_of_arrays(run_dir))
            figures.lines.lines_lost_or_doubled += missing_or_repeated(run_dir, undisturbed)
            if not left:
                return
            shutil.rmtree(run_dir)


# Processes


def launch(folder: Path, name: str, options: Options, alone: bool = False) -> list[subprocess.Popen]:
    """Starts the processes of a run, or one that drives all devices. Their errors go to NAME-PROCESS.err."""
    count = options.processes
    mesh = options.mesh or ((2, 2) if count == 4 else (count,))
    words = soak.command(folder, name)
    for axis, size in zip(("data", "fsdp", "tensor"), (*mesh, 1, 1), strict=False):
        words += [f"--mesh.{axis}", str(size)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    if not alone:
        words += ["--distributed.coordinator-address", address, "--distributed.num-processes", str(count)]
    processes = []
    for i in range(1 if alone else count):
        if options.platform == "cpu":
            devices = {"JAX_NUM_CPU_DEVICES": str(count if alone else 1), **QUICK}
        elif alone:
            devices = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))}
        else:
            devices = {"JAX_LOCAL_DEVICE_IDS": str(i)}
        # Runs side by side share the memory of GPUs.
        environment = soak.environment() | devices | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        own = [*words, *([] if alone else ["--distributed.process-id", str(i)])]
        with (folder / f"{name}-{i}.err").open("w") as err:
            processes.append(subprocess.Popen(own, stdout=subprocess.DEVNULL, stderr=err, env=environment))
    _LAUNCHED.extend(processes)
    return processes


def wait(
    strike: Strike, run_dir: Path, before: int, processes: list[subprocess.Popen], options: Options
) -> bool:
    """Waits until a signal is to come. Returns whether none of the processes has ended, or is about to."""
    victim = processes[strike.victim]
    if strike.kind == "start":  # once all have met: before that, they wait for each other for minutes
        soak.wait_until(victim, lambda: identity(run_dir) != before)
        soak.pause(victim, COMPILING_SECONDS * strike.late)
    else:
        kind = "update" if strike.kind == "SIGTERM" else strike.kind
        soak.Strike(kind, run_dir, strike.ahead, strike.late / 5, before).wait(victim)
    return updates(run_dir) < options.steps and all(process.poll() is None for process in processes)


def struck(strike: Strike, run_dir: Path, processes: list[subprocess.Popen]) -> dict:
    """Sends the signal to one process, and waits for all. Returns how they ended."""
    stop = strike.kind == "SIGTERM"
    seen, began, hung = updates(run_dir), time.monotonic(), 0
    processes[strike.victim].send_signal(signal.SIGTERM if stop else signal.SIGKILL)
    for process in processes:
        try:
            process.wait(max(0.0, began + HUNG_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            hung += 1
            process.kill()
    seconds = round(time.monotonic() - began, 2)
    statuses = [process.wait() for process in processes]
    wanted = [exits.PREEMPTED if stop else exits.LOST] * len(processes)
    if not stop:
        wanted[strike.victim] = -signal.SIGKILL
    end: dict = {"kind": strike.kind, "victim": strike.victim, "updates": seen, "seconds": seconds}
    end |= {"statuses": statuses, "hung": hung, "as_documented": statuses == wanted}
    if statuses != wanted:
        end["errors"] = errors(run_dir, processes)
        soak.say("\n".join(end["errors"]))
    return end


def short(end: dict) -> str:
    """Returns how the processes ended, in one line."""
    return ", ".join(f"{name} {value}" for name, value in end.items() if name != "errors")


def finish(run_dir: Path, processes: list[subprocess.Popen]) -> None:
    """Waits for processes that must end well."""
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise SystemExit(
            f"{run_dir.name} ended with statuses {statuses}:\n" + "\n".join(errors(run_dir, processes))
        )


def errors(run_dir: Path, processes: list[subprocess.Popen]) -> list[str]:
    """Returns the end of what each process wrote to standard error."""
    paths = [run_dir.parent / f"{run_dir.name}-{i}.err" for i in range(len(processes))]
    return [path.read_text(errors="replace")[-4000:] for path in paths]


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
