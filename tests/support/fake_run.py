"""Stands for `mora pretrain` in tests of studies: writes the files of a run at once, without any training.

Usage: fake_run.py FOLDER STEPS LOSS [BEHAVIOUR]. It evaluates after every second update, resumes where its
log ends, and stops on SIGTERM with status 75.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(folder: Path, steps: int, loss: float, behaviour: str = "") -> int:
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "starts").open("a").write("x")
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    first = sum('"loss"' in line for line in lines)
    starts = len((folder / "starts").read_text())
    with log.open("a") as file:
        for step in range(first, steps):
            if stop:
                return 75
            if behaviour == "fail" or (behaviour == "fail once" and starts == 1):
                print("mora: warning: odd\nmora: it is broken\nafterwards", flush=True)
                return 2
            if behaviour == "gpu 1" and os.environ.get("CUDA_VISIBLE_DEVICES") == "1":
                print("CUDA_ERROR_NO_DEVICE", flush=True)
                return 1
            if behaviour == "diverge" and step == 3:
                (folder / "diverged.json").write_text('{"step": 3}')
                return 3
            if (behaviour == "killed once" and step == 2 and starts == 1) or behaviour == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            values = {"step": step, "loss": loss + 1 / (step + 1), "tokens_per_second": 100.0}
            file.write(json.dumps(values) + "\n")
            if step % 2:
                file.write(json.dumps({"step": step, "validation_loss": loss + 1 / (step + 1)}) + "\n")
            file.flush()
            time.sleep(0.02)
    summary = {"steps": steps, "validation_loss": loss, "tokens_per_second": 100.0, "device": "a fake"}
    (folder / "summary.json").write_text(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:]))
