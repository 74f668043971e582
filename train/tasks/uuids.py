"""The paper's memory task (Table 1): pairs of UUIDs, and how much of each value a model gives for its key.

Nothing but the training text says which value belongs to a key, so what a model gets right it has memorised.
"""

import dataclasses
import random
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from etils import epath

from mora_jax.errors import InputError
from mora_jax.io import json_text, parse_json, read_bytes, read_json
from mora_jax.models.generate import Sampling
from train.jobs.generate import complete, load_generator
from train.run.folder import open_checkpoints, read_config
from train.run.metrics import add_scores
from train.storage.files import write_result, write_whole

SCORES = "uuid_accuracy.json"
# A prompt is the key on a line of its own. The value follows on the next one.
PROMPT = "{key}\n"
FILE_BYTES = 1 << 30  # most of a file of pairs


@dataclasses.dataclass(frozen=True)
class Pair:
    """A key as a prompt, and the value that completes it."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Score:
    """What a checkpoint gets right.

    Attributes:
      step: updates of the checkpoint.
      character_accuracy: share of the hexadecimal digits of all values. Guessing gets 9.8%, since the digit
        of the version is always the same, and that of the variant one of four.
      exact: share of the values that are right as a whole.
    """

    step: int
    character_accuracy: float
    exact: float


def make_pairs(count: int, seed: int) -> list[Pair]:
    """Returns pairs of random UUIDs of version 4, the same for a seed.

    >>> make_pairs(1, seed=0)[0].completion
    'f728b4fa-4248-4e3a-8a5d-2f346baa9455'
    """
    rng = random.Random(seed)
    made = [[str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2)] for _ in range(count)]
    return [Pair(PROMPT.format(key=key), value) for key, value in made]


def write_pairs(path: str, pairs: Sequence[Pair]) -> None:
    """Writes pairs as JSON lines of `prompt` and `completion`, the form "prompt" of `mora prepare-data`."""
    write_result(path, "".join(json_text(dataclasses.asdict(pair)) + "\n" for pair in pairs))


def read_pairs(path: str) -> list[Pair]:
    """Returns the pairs in a file. Raises InputError for a line that is none."""
    pairs = []
    for number, line in enumerate(read_bytes(epath.Path(path), FILE_BYTES).splitlines(), 1):
        value = parse_json(line, f"{path}: line {number}")
        match value:
            case {"prompt": str(prompt), "completion": str(completion)} if _places(completion):
                pairs.append(Pair(prompt, completion))
            case _:
                raise InputError(
                    f"{path}: line {number} has no strings `prompt` and `completion`, with digits"
                )
    if not pairs:
        raise InputError(f"{path} has no pair")
    return pairs


def character_accuracy(value: str, said: str) -> float:
    """Returns the share of a value's letters and digits that stand in the same place of what was said.

    >>> character_accuracy("12-34", "12-44")
    0.75
    """
    places = _places(value)
    return sum(said[at : at + 1] == value[at] for at in places) / len(places)


def score_run(
    run_dir: str,
    pairs: Sequence[Pair],
    steps: Sequence[int] = (),
    batch_size: int = 2048,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> list[Score]:
    """Generates the values of all keys with a run's checkpoints, and writes `SCORES` into its folder.

    TensorBoard and, if the run logs there, Weights & Biases show them too. Generation is greedy, and is
    compiled once for all checkpoints.

    Args:
      run_dir: the run's folder.
      pairs: what it was trained on.
      steps: the checkpoints; empty for all that the run has kept.
      batch_size: prompts that are computed at a time.
      dtype: type of products.

    Raises:
      InputError: if the folder holds no run, or lacks a checkpoint.
    """
    config = read_config(run_dir)
    with open_checkpoints(config) as saved:
        steps = steps or saved.steps()
    if not steps:
        raise InputError(f"{run_dir} holds no complete checkpoint")
    sampling = Sampling(max_new_tokens=max(len(pair.completion) for pair in pairs))  # a token has a character
    scores = []
    for step in steps:
        generator = load_generator(run_dir, dtype=dtype, rows=min(batch_size, len(pairs)), step=step)
        prompts = [generator.codec.encode(pair.prompt) for pair in pairs]
        said = [each.text for each in complete(generator, prompts, sampling, batch_size=batch_size)]
        scores.append(_score(step, pairs, said))
    content = {"pairs": len(pairs), "scores": [dataclasses.asdict(score) for score in scores]}
    write_whole(epath.Path(run_dir) / SCORES, json_text(content, indent=2) + "\n")
    shown = [
        (max(s.step - 1, 0), {"uuid/character_accuracy": s.character_accuracy, "uuid/exact": s.exact})
        for s in scores
    ]
    add_scores(run_dir, shown, config.log.wandb)
    return scores


def read_scores(run_dir: str) -> list[Score]:
    """Returns what `score_run` wrote into a run's folder. Raises InputError if it has not been called."""
    path = epath.Path(run_dir) / SCORES
    if not path.exists():
        raise InputError(f"{run_dir} has no scores: mora task uuid-score {run_dir} computes them")
    content: Any = read_json(path)
    try:
        return [Score(**score) for score in content["scores"]]
    except (LookupError, TypeError) as error:
        raise InputError(f"{path} is damaged: run mora task uuid-score again") from error


def _places(value: str) -> list[int]:
    """Returns where a value has letters and digits."""
    return [at for at, character in enumerate(value) if character.isalnum()]


def _score(step: int, pairs: Sequence[Pair], said: Sequence[str]) -> Score:
    shares = [character_accuracy(pair.completion, text) for pair, text in zip(pairs, said, strict=True)]
    return Score(step, sum(shares) / len(shares), sum(share == 1 for share in shares) / len(shares))
