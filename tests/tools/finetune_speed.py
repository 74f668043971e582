"""Times fine-tuning and generation of a Hugging Face folder beside transformers and PEFT, on one device.

    python tests/tools/finetune_speed.py MODEL [--out FILE.json] [--examples 1024] [--batch 32] [--new 128]

Fine-tuning: LoRA r 8 on all linears, bfloat16 base, made-up examples of 16 to 512 tokens (mean about 190). Of
ours, MoRA r 8 (rotate) too; rows are packed (1,024 and 2,048 tokens) or one example each. The peer pads each
batch to its longest example, as its trainer does, with SDPA attention. Speed counts the examples' own tokens.
Generation: greedy, equal prompts, as many new tokens for each. The script needs the extra `parity`.
"""

import argparse
import dataclasses
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax import LoRA, MoRA, Rotate, assign, hf
from mora_jax.models.batch import Batch
from mora_jax.models.generate import Sampling, generate
from mora_jax.models.llama import STACKED, Compute, Llama
from train.config.run import RunConfig
from train.config.sections import LINEARS, Data, Optimizer, Schedule
from train.runtime import backend
from train.step.spec import spec_of
from train.step.state import init_state
from train.step.step import train_step

WARM_UP, TIMED = 3, 20


def lengths(count: int, most: int = 512) -> np.ndarray:
    """Returns lengths of examples as instruction data has them: many short ones, few long ones."""
    drawn = np.random.default_rng(0).lognormal(5.0, 0.7, count)
    return np.clip(drawn, 16, most).astype(int)


def examples(count: int, vocab_size: int) -> list[np.ndarray]:
    """Returns examples of random tokens."""
    rng = np.random.default_rng(1)
    return [rng.integers(3, vocab_size, n) for n in lengths(count)]


def packed(sequences: list[np.ndarray], length: int, most: int) -> Batch:
    """Returns all sequences in rows: first fit, at most `most` segments a row, padding included."""
    rows: list[list[np.ndarray]] = []
    for sequence in sequences:
        fits = (r for r in rows[-64:] if sum(map(len, r)) + len(sequence) <= length and len(r) < most - 1)
        row = next(fits, None)
        if row is None:
            rows.append(row := [])
        row.append(sequence)
    tokens_BT, segments_BT = (np.zeros((len(rows), length), np.int32) for _ in range(2))
    for b, row in enumerate(rows):
        ends = np.cumsum([0, *map(len, row)])
        for i, sequence in enumerate(row):
            tokens_BT[b, ends[i] : ends[i + 1]] = sequence
            segments_BT[b, ends[i] : ends[i + 1]] = i + 1
    return Batch(tokens_BT, np.ones(tokens_BT.shape, np.float32), segments_BT, most_segments=most)  # pyright: ignore[reportArgumentType]


def batches(whole: Batch, rows: int) -> list[Batch]:
    """Returns full batches of so many rows."""
    count = len(whole.tokens_BT) // rows
    return [
        jax.tree.map(lambda a, i=i: jnp.asarray(a[i * rows : (i + 1) * rows]), whole) for i in range(count)
    ]


def rate(step: Callable[[Any], Any], work: Iterator[tuple[Any, int]], done: Callable[[Any], None]) -> float:
    """Returns the examples' tokens a second of the median of three timings."""
    for batch, _ in itertools.islice(work, WARM_UP):
        done(step(batch))
    found = []
    for _ in range(3):
        began, tokens, last = time.perf_counter(), 0, None
        for batch, count in itertools.islice(work, TIMED):
            last, tokens = step(batch), tokens + count
        done(last)
        found.append(tokens / (time.perf_counter() - began))
    return sorted(found)[1]


def ours(folder: str, whole: Batch, rows: int, method: Any, attention: Any) -> dict[str, float]:
    """Trains with the program's own step."""
    config = hf.read_config(folder)
    length = whole.tokens_BT.shape[1]
    run = RunConfig(
        model=config,
        compute=Compute(attention=attention),
        batch_size=rows,
        data=Data("nowhere", length),
        method=method,
        base_dtype="bfloat16",
        optimizer=Optimizer(learning_rate=1e-5),
        schedule=Schedule("cosine", 1),
    )
    run = dataclasses.replace(run, params=dataclasses.replace(run.params, train=""))
    methods = assign([(LINEARS, method), (".*", "frozen")], hf.load_hf(folder)[0], STACKED)
    spec = spec_of(run)
    state = jax.jit(init_state, static_argnums=(0, 1))(spec, methods, hf.load_hf(folder)[0])
    holder = [state]

    def step(batch: Batch) -> Any:
        holder[0], scalars = train_step(spec, methods, holder[0], batch)
        return scalars["loss"]

    parts = batches(whole, rows)
    counted = [(part, int((part.segments_BT > 0).sum())) for part in parts]  # pyright: ignore[reportOptionalOperand]
    speed = rate(step, itertools.cycle(counted), lambda loss: loss.block_until_ready())
    used = sum(n for _, n in counted) / sum(part.tokens_BT.size for part in parts)
    return {"tokens_per_second": speed, "rows": rows, "length": length, "filled": used}


def peer(folder: str, sequences: list[np.ndarray], rows: int, compiled: bool) -> dict[str, float]:
    """Trains LoRA with transformers and PEFT: bfloat16 base, float32 adapters, padded batches."""
    import peft
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=names))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    forward = torch.compile(model, dynamic=True) if compiled else model

    def batch(at: int) -> tuple[Any, int]:
        part = sequences[at : at + rows]
        longest = max(map(len, part))
        ids = np.zeros((rows, longest), np.int64)
        mask = np.zeros((rows, longest), np.int64)
        for i, sequence in enumerate(part):
            ids[i, : len(sequence)], mask[i, : len(sequence)] = sequence, 1
        ids, mask = (torch.tensor(a, device=device) for a in (ids, mask))
        return (ids, mask, ids.masked_fill(mask == 0, -100)), sum(map(len, part))

    def step(batch: Any) -> Any:
        ids, mask, labels = batch
        with torch.autocast(device, torch.bfloat16):
            loss = forward(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    work = [batch(at) for at in range(0, len(sequences) - rows + 1, rows)]
    return {"tokens_per_second": rate(step, itertools.cycle(work), lambda loss: loss.item()), "rows": rows}


def prompts(count: int, vocab_size: int) -> list[list[int]]:
    """Returns prompts of 32 to 128 random tokens."""
    rng = np.random.default_rng(2)
    return [rng.integers(3, vocab_size, rng.integers(32, 129)).tolist() for _ in range(count)]


def our_generation(folder: str, rows: int, new: int, layers: Any) -> float:
    """Returns new tokens a second."""
    params, config = hf.load_hf(folder)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    model = Llama(config, Compute(layers=layers))

    def run() -> float:
        asked = prompts(rows, config.vocab_size)
        began = time.perf_counter()
        found = generate(model, params, asked, Sampling(max_new_tokens=new))
        return sum(map(len, found)) / (time.perf_counter() - began)

    run()
    return sorted(run() for _ in range(3))[1]


def peer_generation(folder: str, rows: int, new: int) -> float:
    """Returns new tokens a second of transformers' `generate`."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    asked = prompts(rows, model.config.vocab_size)
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in asked], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked], device=device)

    def run() -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return (found.shape[1] - longest) * rows / (time.perf_counter() - began)

    run()
    return sorted(run() for _ in range(3))[1]


def main() -> None:
    """Prints every figure, and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--examples", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64, help="examples of a padded batch")
    parser.add_argument("--new", type=int, default=128, help="new tokens of a prompt")
    parser.add_argument("--only", default="", help="regex of the names of what is timed")
    parser.add_argument("--compiled", action="store_true", help="time the compiled peer too")
    options = parser.parse_args()
    backend.set_flags(deterministic=False)  # as in a run
    figures: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}

    def note(name: str, measure: Callable[[], Any]) -> None:
        if not re.search(options.only, name):
            return
        try:
            figures[name] = measure()
        except Exception as error:  # the others count all the same
            figures[name] = f"{type(error).__name__}: {str(error)[:200]}"
        print(name, json.dumps(figures[name]), flush=True)
        if options.out:
            options.out.write_text(json.dumps(figures, indent=1) + "\n")

    attention = "cudnn" if jax.devices()[0].platform == "gpu" else "xla"
    sequences = examples(options.examples, hf.read_config(options.model).vocab_size)
    tokens = options.batch * 512
    layouts = {"unpacked": (512, 2), "packed 1024": (1024, 16), "packed 2048": (2048, 32)}
    methods = {"LoRA": LoRA(8, alpha=16), "MoRA": MoRA(8, Rotate())}
    for (name, method), (layout, (length, most)) in itertools.product(methods.items(), layouts.items()):
        whole = packed(sequences, length, most)
        rows = min(tokens // length, len(whole.tokens_BT))
        note(
            f"train, {name}, {layout}",
            lambda whole=whole, rows=rows, method=method: ours(options.model, whole, rows, method, attention),
        )
    for layers in ("scan", "unrolled"):
        note(
            f"generate, {layers}",
            lambda layers=layers: our_generation(options.model, options.batch, options.new, layers),
        )
    note("train, peer", lambda: peer(options.model, sequences, options.batch, False))
    if options.compiled:
        note("train, peer compiled", lambda: peer(options.model, sequences, options.batch, True))
    note("generate, peer", lambda: peer_generation(options.model, options.batch, options.new))


if __name__ == "__main__":
    main()
