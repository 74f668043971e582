"""MetaMath's tasks of the harness: which answers are right."""

import pytest
from paper_data import TASKS, write_tasks

from train.jobs.generate import load_generator

pytest.importorskip("lm_eval", reason="needs the extra eval: pip install 'mora_jax[eval]'")
datasets = pytest.importorskip("datasets")
harness = pytest.importorskip("train.jobs.harness")
HarnessModel = pytest.importorskip("train.jobs.harness_model").HarnessModel

GROUPS = ("metamath_gsm8k", "metamath_math")
# What the model says to each prompt, most of it right.
SAID = {
    "what is 0 + 1?": " Add.\nThe answer is: $1$.",
    "what is 1 + 1?": " The answer is: 3. Or not.\nThe answer is 2",
    "what is 2 + 1?": " It is 3",
    "what?": " The answer is: \\dfrac{1} {2}.",
}


@pytest.mark.slow
def test_answers_are_right_or_wrong(tiny_run, tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache")
    monkeypatch.setattr(
        HarnessModel, "generate_until", lambda _, asked: [SAID[each.args[0]] for each in asked]
    )
    asked = harness.Asked(GROUPS, str(write_tasks(tmp_path / "tasks")))
    generator = load_generator(str(tiny_run.folder), dtype="float32", rows=4)
    found = harness.run_tasks(generator, harness.load_tasks(asked), asked, 4)
    scores = {(score.task, score.metric): score.value for score in found}
    assert {task for task, _ in scores} == {file.stem for file in (TASKS / "math").glob("*.yaml")}
    assert scores["metamath_gsm8k", "exact_match"] == pytest.approx(2 / 3)
    assert scores["metamath_math", "exact_match"] == pytest.approx(1 / 3)  # of 0, 1/2 and 2/2
