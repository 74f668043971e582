"""A study's file: how it expands into runs, and what is refused before any of them starts."""

import itertools
from pathlib import Path

import pytest
import yaml
from slow import quick
from studies import LORA, PLAIN, ROOT, study

from mora_jax.errors import InputError
from mora_jax.methods import LoRA, MoRA
from train.config import flags
from train.config.run import RunConfig
from train.config.study import Halving, expand, read_study, short

STUDIES = sorted((ROOT / "configs/studies").glob("*.yaml"))
SMALL = [path for path in STUDIES if not path.stem.startswith("table3")]


def names(made) -> list[str]:
    return [run.name for run in made.runs]


def test_variants_and_axes_become_runs_with_checked_configs():
    made = study()
    assert names(made) == [
        "LoRA_lr1e-3_seed0",
        "LoRA_lr2e-3_seed0",
        "ReMoRA_lr1e-3_seed0",
        "ReMoRA_lr2e-3_seed0",
    ]
    assert made.rows() == ["LoRA", "ReMoRA"]
    first, last = made.runs[0], made.runs[-1]
    assert isinstance(first.config.method, LoRA)
    assert first.config.restart.every == 0
    assert isinstance(last.config.method, MoRA)
    assert (last.rate, last.seed, last.config.steps) == (2e-3, 0, 100)
    assert last.config.run_dir == "runs/s/ReMoRA_lr2e-3_seed0"


def test_the_words_of_a_run_give_its_config():
    for run in study(seeds_at_best=[1]).runs:
        assert flags.read_config(run.base, run.words) == run.config


def test_other_axes_than_rate_and_seed_name_the_row():
    made = study(axes={"method.rank": [8, 16], "seed": [0, 1]})
    assert made.rows() == ["LoRA, rank 8", "LoRA, rank 16", "ReMoRA, rank 8", "ReMoRA, rank 16"]
    assert names(made)[:2] == ["LoRA-rank-8_lr5e-3_seed0", "LoRA-rank-8_lr5e-3_seed1"]


def test_without_variants_the_axes_name_the_rows():
    made = study(
        variants={"": {}},
        set={"steps": 100, "restart.every": 0, "schedule.kind": "cosine"},
        axes={"method.name": ["lora", "mora"]},
    )
    assert made.rows() == ["name lora", "name mora"]
    alone = {key: value for key, value in PLAIN.items() if key != "variants"}
    assert expand("f", alone).rows() == ["mora"]


def test_a_variant_replaces_settings_and_axes():
    variants = {
        "LoRA": {**LORA, "optimizer": {"learning_rate": [5e-4]}, "steps": 50},
        "fixed": {"optimizer.learning_rate": 7e-4},
        "full": {"method.name": "full", "restart.every": 0, "schedule.kind": "cosine", "method.rank": None},
    }
    made = study(variants=variants, axes={"optimizer.learning_rate": [1e-3], "method.rank": [8]})
    assert [(run.row, run.rate, run.config.steps) for run in made.runs] == [
        ("LoRA, rank 8", 5e-4, 50),
        ("fixed, rank 8", 7e-4, 100),
        ("full", 1e-3, 100),
    ]


def test_a_variant_may_have_a_config_of_its_own():
    base = str(ROOT / "configs/60m_remora.yaml")
    made = study(variants={"large": {"base": base}}, set={})
    assert {run.base for run in made.runs} == {base}
    assert made.runs[0].config.model.hidden_size == 512


def test_further_seeds_are_expanded_for_every_rate_once():
    made = study(axes={"optimizer.learning_rate": [1e-3, 2e-3], "seed": [0, 1]}, seeds_at_best=[2, 3])
    later = [run for run in made.runs if run.at_best]
    assert len(made.runs) == 2 * 2 * 2 + len(later)
    assert sorted((run.row, run.rate, run.seed) for run in later) == sorted(
        itertools.product(["LoRA", "ReMoRA"], [1e-3, 2e-3], [2, 3])
    )
    assert not any(run.at_best for run in made.runs[:8])  # trained first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": None}, "base is the config file"),
        ({"base": "none.yaml"}, "none.yaml is missing"),
        ({"run_dir": None}, "run_dir is the folder of the study"),
        ({"axes": {"optimizer.learning_ratee": [1e-3]}}, "did you mean --optimizer.learning-rate"),
        ({"axes": {"method.rank": []}}, "method.rank has no value"),
        ({"axes": {"method.rank": 4}}, "method.rank is a list of values, not 4"),
        ({"axes": {"method.rank": ["many"]}}, "variant LoRA, method.rank many: .*invalid literal"),
        ({"axes": {"method.rank": [4, -1]}}, "variant LoRA, method.rank -1: LoRA's rank is at least 1"),
        ({"axes": {"method.align": [1]}}, "variant LoRA, method.align 1: method lora has no field align"),
        ({"axes": {"seed": [0, 0]}}, "two runs are named LoRA_lr5e-3_seed0: a value is given twice"),
        ({"axes": {"optimizer.learning_rate": ["1e-3", 0.001]}}, "two runs are named LoRA_lr1e-3_seed0"),
        ({"seeds_at_best": [0]}, "two runs are named LoRA_lr1e-3_seed0"),
        ({"seeds_at_best": 3}, "seeds_at_best is a list"),
        ({"axes": {"steps": [100]}}, "steps is in set and in axes"),
        ({"axes": {"run_dir": ["a"]}}, "run_dir is that of the study"),
        ({"set": {"rules": 1}}, "rules has no flag; give the variant a config file of its own"),
        ({"set": 3}, "set is a mapping"),
        ({"set": {"steps": [1, 2]}}, r"steps is one value, not \[1, 2\]"),
        ({"set": {"steps": None}}, "steps has no value"),
        ({"variants": {}}, "variants is empty"),
        ({"variants": {"a": {}, "A": {}}}, "two runs are named A_lr"),
        ({"variants": {"a": {}, "b": {}}}, "a_lr1e-3_seed0 and b_lr1e-3_seed0 are the same run"),
        ({"variants": {"?": {}}}, "'\\?' names a folder"),
        ({"axes": {"seed": [*range(1001)]}}, "more than 1,000 runs"),
        ({"halving": {"at": [0.5], "kep": 1}}, "halving.kep; did you mean keep"),
        ({"halving": {"at": [0.5, 0.25]}}, "increasing fractions"),
        ({"halving": {"at": []}}, "halving.at has no value"),
        ({"halving": {"at": [0.5], "keep": 1}}, "halving.keep must lie in"),
        ({"halving": {"at": ["half"]}}, "halving.at is a number"),
        ({"halving": {"at": [0.25]}}, "after 25 of 100 steps, where eval.every 2 evaluates none"),
    ],
)
def test_what_no_run_can_have_is_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message):
        study(**changes)


def test_halving_needs_steps(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("epochs: 1")
    with pytest.raises(InputError, match="halving needs steps, and the run has epochs"):
        study(base=str(tmp_path / "base.yaml"), set={}, variants={"": {}}, halving={"at": [0.5]})


def test_a_file_is_read_with_its_texts_and_settings(tmp_path: Path):
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({**PLAIN, "set": {"data": {"directory": "x"}}}).replace(": x", ": off"))
    made = read_study(str(file), str(tmp_path / "out"), ["batch-size=8", "log.wandb=a=b"])
    config = made.runs[0].config
    assert (config.data.directory, config.batch_size, config.log.wandb) == ("off", 8, "a=b")
    assert made.run_dir == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bas: x", "s.yaml: unknown key bas; did you mean base"),
        ("- 1", "a config is a mapping"),
        ("base: [", "not YAML"),
        ("base: a\nbase: b", "line 2: base is given again"),
        ("set: {method: {rank: 1}, method.rank: 2}", "set.method.rank is given again"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_study(str(tmp_path / "s.yaml"))


def test_a_bad_setting_of_the_command_line_is_named(tmp_path: Path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(PLAIN))
    with pytest.raises(InputError, match="--set steps: give KEY=VALUE"):
        read_study(str(tmp_path / "s.yaml"), settings=["steps"])


@pytest.mark.parametrize("path", quick(SMALL, STUDIES), ids=lambda path: path.stem)
def test_the_studies_of_the_project_expand(path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = read_study(str(path.relative_to(ROOT)))
    assert len(made.rows()) > 1
    assert all(isinstance(run.config, RunConfig) for run in made.runs)


def test_halving_counts_steps():
    run = study().runs[0]
    assert Halving((0.1, 0.5)).steps(run.config) == [10, 50]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-3, "1e-3"),
        (2.5e-4, "2.5e-4"),
        (1e-2, "1e-2"),
        (0.5, "0.5"),
        (3000.0, "3000"),
        (8, "8"),
        ("x", "x"),
    ],
)
def test_values_are_short(value, text):
    assert short(value) == text
