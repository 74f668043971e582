"""Trains SmolLM2-135M with MoRA by the commands of `mora`; its exports go to transformers and PEFT.

    python tests/tools/adapt_smollm2.py MODEL TEXT VALIDATION WORK --steps 200

MODEL is the folder that smollm2.py makes, TEXT and VALIDATION are files in C4's format. The adapter over the
base in PEFT, and the merged model in transformers, must give the logits of the run. The script needs the
extra `parity`.
"""

import argparse
import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[2]
LENGTH = 128  # tokens of a row
BATCH = 4


def mora(*words: str) -> None:
    """Runs a command and prints how long it took."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "train.cli", *words], cwd=ROOT, check=True)
    print(f"mora {words[0]}: {time.monotonic() - started:.0f} s", flush=True)


def config(model: Path, data: Path, steps: int) -> dict[str, Any]:
    """Returns the run's config: MoRA of rank 8 on all linears, everything else frozen."""
    from mora_jax import hf

    return {
        "model": dataclasses.asdict(hf.read_config(model)),
        "data": {"directory": str(data), "sequence_length": LENGTH},
        "init_from": str(model),
        "steps": steps,
        "batch_size": BATCH,
        "compute": {"dtype": "float32", "layers": "scan", "remat": "dots", "loss_chunk": BATCH * LENGTH},
        "method": {"name": "mora", "rank": 8},
        "params": {"train": ""},
        "optimizer": {"learning_rate": 5e-4},
        "schedule": {"kind": "cosine", "warmup": steps // 10},
        "restart": {"every": 0},
        "eval": {"every": steps // 2, "batch_size": BATCH, "max_batches": 16},
        "checkpoint": {"every": steps // 2},
    }


def differences(model: Path, run: Path, adapter: Path, merged: Path) -> dict[str, float]:
    """Returns the largest difference of two logits, as a share of the largest logit, and what was learned."""
    import jax.numpy as jnp
    import peft
    import torch
    import transformers

    from mora_jax import Compute, Llama
    from train.run.model import load_model

    tokens_BT = np.random.default_rng(0).integers(0, 49_000, (2, LENGTH))
    params, ours = load_model(str(run))
    wanted = np.asarray(
        Llama(ours, Compute(dtype="float32", layers="scan")).apply({"params": params}, jnp.asarray(tokens_BT))
    )

    def logits(net: Any) -> np.ndarray:
        with torch.no_grad():
            return net(torch.tensor(tokens_BT)).logits.numpy()

    def load(folder: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    found = {"base, untrained": logits(load(model)), "merged, transformers": logits(load(merged))}
    found["adapter, PEFT"] = logits(peft.PeftModel.from_pretrained(load(model), adapter))
    return {name: float(np.abs(x - wanted).max() / np.abs(wanted).max()) for name, x in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("model", "text", "validation", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    paths = (args.model, args.text, args.validation, args.work)
    model, text, validation, work = (path.absolute() for path in paths)
    data, run, adapter, merged = (work / name for name in ("data", "run", "adapter", "merged"))
    words = ("--source", str(text), "--validation", str(validation), "--tokenizer", str(model))
    mora("prepare-data", *words, "--out", str(data), "--sequence-length", str(LENGTH))
    (work / "run.yaml").write_text(yaml.safe_dump(config(model, data, args.steps)))
    mora("evaluate", str(model), "--data", str(data), "--max-batches", "16", "--batch-size", str(BATCH))
    mora("pretrain", str(work / "run.yaml"), "--run-dir", str(run))
    mora("export", str(run), str(adapter), "--adapter")
    mora("export", str(run), str(merged))
    mora("merge", str(model), str(adapter), str(work / "merged_by_hand"))
    for name, difference in differences(model, run, adapter, merged).items():
        print(f"{name}: logits differ by {difference:.1e} of the largest")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
