"""Kills a small run in a bucket, resumes it as another machine would, and compares it with a run on a disk.

    python tests/tools/bucket_trial.py gs://my-bucket/trial --kills 3

The data and the run lie below the given folder of the bucket, which must be empty. The run is killed with
SIGKILL when a checkpoint appears there, and each start has an empty cache of its own. In the end all lines of
metrics and all arrays must equal those of an undisturbed run on this machine's disk. Else the status is 1.
The packages find emulated stores by their own variables: AWS_ENDPOINT_URL; STORAGE_EMULATOR_HOST and
TENSORSTORE_GCS_HTTP_URL.
"""

import argparse
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from etils import epath

from mora_jax import sharding
from mora_jax.errors import InputError
from train.data.rows.build import prepare
from train.data.tokenizer import train_tokenizer
from train.run.folder import open_checkpoints, read_config
from train.run.metrics import read_metrics
from train.run.state import restore_state
from train.storage import buckets

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from tiny import TINY, tiny_documents  # noqa: E402

STEPS = 90
TIMES = ("data_wait", "tokens_per_second")


def prepared(folder: Path, out: str) -> None:
    """Prepares made-up text as a data set with rows of 32 tokens."""
    for name, seed in (("train", 0), ("validation", 1)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in tiny_documents(200, seed))
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(lines.encode()))
    tokenizer = str(folder / "t.model")
    if not Path(tokenizer).exists():
        train_tokenizer(str(folder / "train.*"), tokenizer, 384)
    prepare(str(folder / "train.*"), str(folder / "validation.*"), tokenizer, 32, out, workers=1)


def started(config: Path, run: str, data: str, cache: Path) -> subprocess.Popen:
    """Starts or resumes the run in a new process."""
    words = ["pretrain", str(config), "--run-dir", run, "--data.directory", data]
    return subprocess.Popen(
        [sys.executable, "-m", "train.cli", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), buckets.CACHE: str(cache)},
        stdout=subprocess.DEVNULL,
    )


def saves(run: str) -> tuple[set[int], set[int]]:
    """Returns the steps of all checkpoints in the bucket, and of the complete ones."""
    names = [name.split("/") for name in buckets.objects(run) if name.startswith("checkpoints/")]
    names = [name for name in names if name[1].isdigit()]  # no bases
    return {int(name[1]) for name in names}, {int(name[1]) for name in names if name[2:] == ["manifest.json"]}


def disturbed(config: Path, run: str, data: str, folder: Path, kills: int, rng: random.Random) -> None:
    """Starts the run until it finishes, and kills it `kills` times before."""
    for start in range(kills + 1):
        before, program = saves(run)[0], started(config, run, data, folder / f"cache{start}")
        wanted = rng.randint(1, STEPS // 3 // (kills + 1))
        while start < kills and program.poll() is None and len(saves(run)[0] - before) < wanted:
            time.sleep(0.02)
        if start < kills:
            time.sleep(rng.random() / 2)
            program.send_signal(signal.SIGKILL)
        status, (found, sealed) = program.wait(), saves(run)
        logged = [line["step"] for line in read_metrics(f"{run}/metrics.jsonl") if "loss" in line]
        newest = max(sealed, default=0)
        left = sorted(found - sealed)
        print(f"status {status}; sealed {newest}, unfinished {left}, {len(logged)} lines of loss", flush=True)
        if missing := set(range(newest)).difference(logged):
            sys.exit(f"lines of updates before a checkpoint are lost: {sorted(missing)}")
        if status not in (0, -signal.SIGKILL):
            sys.exit(status)


def outcome(run: str) -> tuple[list[dict], list[np.ndarray]]:
    """Returns the log of a finished run without times, and its final arrays."""
    lines = [
        {k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(f"{run}/metrics.jsonl")
    ]
    config = read_config(run)
    with open_checkpoints(config) as saved:
        state, _ = restore_state(config, saved, STEPS, sharding.make_mesh(1))
    return lines, [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bucket", help="an empty folder in a bucket of gs:// or s3://")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    args = parser.parse_args()
    if buckets.objects(args.bucket):
        raise InputError(f"{args.bucket} is not empty")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ[buckets.CACHE] = str(folder / "cache")
        config = folder / "trial.yaml"
        config.write_text(f"data: {{sequence_length: 32}}\n{TINY}".replace("steps: 22", f"steps: {STEPS}"))
        here, there = f"{folder}/data", f"{args.bucket}/data"
        prepared(folder, here)
        prepared(folder, there)
        if started(config, f"{folder}/run", here, folder / "none").wait():
            sys.exit("the undisturbed run failed")
        disturbed(config, f"{args.bucket}/run", there, folder, args.kills, random.Random(args.seed))
        (lines, arrays), (there_lines, final) = outcome(f"{folder}/run"), outcome(f"{args.bucket}/run")
    same = all(np.array_equal(ours, theirs) for ours, theirs in zip(arrays, final, strict=True))
    print(f"lines equal: {lines == there_lines} ({len(there_lines)}); arrays equal: {same} ({len(final)})")
    epath.Path(args.bucket).rmtree()
    sys.exit(not (lines == there_lines and same))


if __name__ == "__main__":
    main()
