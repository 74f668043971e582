"""The paper's tasks that the harness lacks, configs/tasks: their scores; the whole path on made-up rows."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from mora_jax.models.llama import Llama
from train.jobs.generate import load_generator

EXTRA = "needs the extra eval: pip install 'mora_jax[eval]'"
harness = pytest.importorskip("train.jobs.harness", reason=EXTRA)
datasets = pytest.importorskip("datasets", reason=EXTRA)

TASKS = Path(__file__).parents[2] / "configs" / "tasks"
ROWS = Path(__file__).parents[1] / "support" / "tasks"
NAMES = ("fpb", "fiqa_sa", "headline", "rct", "finance_ner", "convfinqa")


@pytest.fixture(scope="module")
def scores():
    from lm_eval.tasks._yaml_loader import _load_module_with_cache

    return _load_module_with_cache(TASKS / "scores.py")


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """The task files, with made-up rows of the same columns in the place of the data sets of the Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    for file in TASKS.glob("*.yaml"):
        name = next(line.split()[1] for line in file.read_text().splitlines() if line.startswith("task:"))
        rows = {"data_files": {"test": str(ROWS / f"{name}.json")}}
        data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": rows}
        words = {"include": str(file), "task": name, **data}
        (tmp_path / file.name).write_text(json.dumps(words))
    return str(tmp_path)


def test_f1_of_options_is_weighted_and_averaged_over_classes(scores):
    doc = {"gold_index": 1, "class_id": 3}
    assert scores.option(doc, [(-2.0, False), (-1.0, False)]) == {"acc": 1.0, "f1": (3, 1, 1)}
    assert scores.option({"gold_index": 0}, [(-2.0, True), (-1.0, False)]) == {"acc": 0.0, "f1": (0, 0, 1)}
    # One class: option 0 has F1 2/3, option 1 has 4/5, and they are right once and twice.
    one = [(0, 0, 0), (0, 1, 1), (0, 1, 1), (0, 0, 1)]
    assert scores.mean_weighted_f1(one) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert scores.mean_weighted_f1([*one, (1, 1, 0)]) == pytest.approx((2 / 3 + 4 / 5) / 4)


def test_an_entity_counts_if_word_and_type_are_right(scores):
    def f1(answer, label="Borea (ORG), Oslo (LOC)"):
        return scores.entities({"label": label}, [answer])["f1"]

    assert f1(" Oslo (LOC), Borea (ORG)") == 1
    assert f1("Borea (ORG), Oslo (PER)") == 0.5
    assert f1("Borea (ORG)", ["Borea (ORG), Oslo (LOC)"]) == pytest.approx(2 / 3)
    assert f1("none") == 0
    assert f1("none", "none") == 1


@pytest.mark.parametrize(
    ("answer", "label", "right"),
    [
        (" 1,500 dollars", "1500", 1),
        ("it is 24.6% or so", "25%", 1),
        ("0.25", "25%", 1),
        ("25", "25%", 0),
        ("-3.005", "-3", 1),
        ("none\n1500", "1500", 0),
    ],
)
def test_a_number_is_right_within_a_hundredth(scores, answer, label, right):
    assert scores.number({"label": label}, [answer]) == {"exact_match": right}


@pytest.mark.slow
def test_all_tasks_on_made_up_rows(tiny_run, made_up, capfd):
    generator = load_generator(str(tiny_run.folder), dtype="float32", rows=4)
    longer = dataclasses.replace(generator.model.config, max_position_embeddings=256)
    generator = dataclasses.replace(generator, model=Llama(longer, generator.model.compute))
    asked = harness.Asked(NAMES, made_up)
    found = harness.run_tasks(generator, harness.load_tasks(asked), asked, 4)
    assert {(score.task, score.metric) for score in found} == {
        ("fpb", "acc"),
        ("fpb", "f1"),
        ("fiqa_sa", "acc"),
        ("fiqa_sa", "f1"),
        ("headline", "acc"),
        ("headline", "f1"),
        ("rct", "acc"),
        ("finance_ner", "f1"),
        ("convfinqa", "exact_match"),
    }
    assert all(math.isfinite(score.value) and 0 <= score.value <= 1 for score in found)
    assert {score.documents for score in found if score.task in ("fpb", "headline")} == {3, 4}
    assert len(harness.load_tasks(harness.Asked(("finance",), made_up))["tasks"]) == 5
