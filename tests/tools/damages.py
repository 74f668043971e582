"""Damages checkpoints at random and checks that every damage is found.

    python tests/tools/damages.py --count 1000 --seed 0

Each damage is done to a copy of two good checkpoints. `damage` must report it, the checkpoint must not load,
and `latest_good` must return the newest undamaged one.
"""

import argparse
import collections
import random
import sys
import tempfile
import time
from pathlib import Path

from train.console.progress import progress

sys.path.append(str(Path(__file__).parents[1] / "support"))
from checkpoint_damages import make_pristine, undetected


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="number of damages")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damages")
    args = parser.parse_args()
    kinds: collections.Counter[str] = collections.Counter()
    failures, started = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder, progress("damaging", args.count, "times") as advance:
        make_pristine(Path(folder) / "pristine")
        for i in range(args.count):
            rng = random.Random(f"{args.seed} {i}")
            kind, wrong = undetected(rng, Path(folder) / "pristine", Path(folder) / "work")
            kinds[kind] += 1
            failures += [f"damage {i}, {kind}: {wrong}"] if wrong else []
            advance(1)
    for name, count in sorted(kinds.items()):
        print(f"{count:6,} {name}")
    print(*failures, sep="\n", end="\n" * bool(failures))
    seconds = time.monotonic() - started
    print(f"{args.count:,} damages, seed {args.seed}, {seconds:.0f} s: {len(failures)} not found")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
