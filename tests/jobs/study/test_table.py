"""The result of a study as Markdown, JSON and pictures."""

import functools

import pytest
from matplotlib.image import imread
from studies import LORA, finished, study

from mora_jax.io import json_text
from train.jobs.study import study as job
from train.jobs.study.outcomes import Outcome
from train.jobs.study.table import Results, markdown, to_json
from train.jobs.study.verdicts import verdicts


@functools.cache
def results(folder=None):
    made = study(folder, axes={"optimizer.learning_rate": ["1e-3", "2e-3"], "seed": [0, 1]})
    losses = {"LoRA": (3.0, 3.1, 2.0, 2.1), "ReMoRA": (2.5, None, 2.7, 2.7)}
    found = {}
    for row, values in losses.items():
        names = [run.name for run in made.runs if run.row == row]
        for name, loss in zip(names, values, strict=True):
            found[name] = finished(loss) if loss else Outcome("failed", 7, note="status 2: a | b")
    return Results(made, found, verdicts(made, found))


def test_the_table_has_means_spreads_and_the_best_rate():
    text = markdown(results())
    assert "|  | 1e-3 | 2e-3 |" in text
    assert "| LoRA | 21.14 ± 1.49 (2) | **7.78 ± 0.55** (2) |" in text
    assert "| ReMoRA | **12.18**, 1 failed | 14.88 ± 0.00 (2) |" in text


def test_rows_are_compared_at_their_best_rates_and_at_shared_ones():
    text = markdown(results())
    best = text.partition("each at its best rate")[2]
    assert best.index("| LoRA | 2e-3 | 7.78 ± 0.55 | 2 |") < best.index("| ReMoRA | 1e-3 | 12.18 | 1 |")
    assert "| 1e-3 | ReMoRA 12.18 < LoRA 21.14 |" in text
    assert "| 2e-3 | LoRA 7.78 < ReMoRA 14.88 |" in text


def test_rates_are_compared_by_the_seeds_that_all_rows_have():
    made = study(seeds_at_best=[1])
    losses = {"LoRA_lr1e-3_seed0": 2.0, "LoRA_lr1e-3_seed1": 9.0, "ReMoRA_lr1e-3_seed0": 2.5}
    found = {run.name: finished(losses.get(run.name, 3.0)) for run in made.runs}
    text = markdown(Results(made, found, verdicts(made, found)))
    assert "| 1e-3 | LoRA 7.39 < ReMoRA 12.18 |" in text


def test_what_has_not_finished_is_listed_with_its_reason():
    assert "| ReMoRA_lr1e-3_seed1 | failed | 7/100 | status 2: a / b |" in markdown(results())


@pytest.mark.slow
def test_the_json_has_every_run_and_its_command():
    plain = to_json(results())
    assert json_text(plain)
    assert len(plain["runs"]) == 8
    failed = next(run for run in plain["runs"] if run["state"] == "failed")
    assert failed["perplexity"] is None
    assert failed["command"].startswith("mora pretrain ")
    assert "--run-dir=runs/s/ReMoRA_lr1e-3_seed1" in failed["command"]


def test_files_are_written_without_any_finished_run(tmp_path):
    made = study(tmp_path / "s", variants={"LoRA": LORA})
    job.write(job.report(made))
    assert "| LoRA | waiting | waiting |" in (tmp_path / "s/table.md").read_text()
    assert imread(tmp_path / "s/rates.png").shape[0] > 100


@pytest.mark.slow
def test_the_pictures_are_drawn(tmp_path):
    job.write(results(tmp_path / "s"))
    assert imread(tmp_path / "s/rates.png").shape[0] > 100
