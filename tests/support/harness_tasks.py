"""Made-up tasks of lm-evaluation-harness: multiple choice, rolling log-likelihood, generation."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import yaml

WORDS = ["abc", "bcd", "de", "fgh", "hij", "ij", "ga", "bc", "ef", "dd"]
_COMMON = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.5}}
_ASK = "Question: {{q}}\nAnswer:"
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "fewshot_split": "test",
        "doc_to_text": _ASK,
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        ],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": _ASK,
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "a"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(folder: Path, documents: int = 5, longest: int = 8, known: Sequence[str] = WORDS) -> Path:
    """Writes the tasks and their data, questions of up to so many words and texts of four times as many."""
    rng = random.Random(0)

    def words(most: int) -> str:
        return " ".join(rng.choices(known, k=rng.randint(1, most)))

    rows = {
        "choice": lambda: {
            "q": words(longest),
            "choices": [words(3) for _ in range(3)],
            "answer": rng.randrange(3),
        },
        "text": lambda: {"text": words(4 * longest)},
        "answer": lambda: {"q": words(longest), "answer": words(2)},
    }
    folder.mkdir(exist_ok=True)
    for name, made in rows.items():
        data = folder / f"{name}.json"
        data.write_text("".join(json.dumps(made()) + "\n" for _ in range(documents)))
        task = {"task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}, **_COMMON, **TASKS[name]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder
