"""The configs of the paper's tasks: each value as section and table state it, each fits LLaMA-2 7B."""

import json
import re
from pathlib import Path

import pytest
from slow import quick

from mora_jax.hf.config import config_json
from mora_jax.methods import LoRA, MoRA
from mora_jax.models.llama import LlamaConfig
from train.config import flags
from train.run.state import assign_methods

FOLDER = Path(__file__).parents[2] / "configs/paper"
PAGE = (FOLDER.parents[1] / "docs/paper.md").read_text()
CONFIGS = sorted(FOLDER.glob("*.yaml"))
ROWS = ("full", "lora_r8", "lora_r256", "mora_r8", "mora_r256")
# Of Table 6 and, for uuid, of the text: schedule, warm-up, epochs, and the rates of each row. None is ours.
LORA = ("1e-4", "2e-4", "3e-4")
TASKS = {
    "uuid": (None, None, 100, "3e-5", LORA, LORA, ("5e-5", "7e-5", "1e-4"), ("5e-5", "7e-5", "1e-4")),
    "tulu": ("cosine", 500, 2, "2e-5", LORA, LORA, LORA, ("3e-5", "5e-5", "7e-5")),
    "metamath": ("cosine", 300, 3, "2e-5", LORA, LORA, LORA, ("3e-5", "5e-5", "7e-5")),
    "continual": (
        *("linear", 150, None, "3e-5"),
        *(("3e-4", "4e-4", "5e-4"),) * 3,
        ("5e-5", "7e-5", "1e-4"),
    ),
}
SEVEN_B = LlamaConfig(32_000, 4096, 11_008, 32, 32, 32, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a model with LLaMA-2 7B's sizes, and without its weights."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(config_json(SEVEN_B, "float32", {})))
    return folder


def test_there_is_a_config_for_each_row():
    assert {path.stem for path in CONFIGS} == {f"{task}_{row}" for task in TASKS for row in ROWS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_has_the_values_of_the_paper(path, source):
    task, _, row = path.stem.partition("_")
    kind, warmup, epochs, *rates = TASKS[task]
    config = flags.read_config(str(path), ["--init-from", str(source)])
    assert config.model == SEVEN_B
    assert config.warnings() == []
    assert Path(config.run_dir).name == path.stem
    assert f"{kind}" in ("None", config.schedule.kind)
    assert warmup in (None, config.schedule.warmup)
    assert epochs in (None, config.epochs)
    if task in ("uuid", "continual"):
        assert config.batch_size == {"uuid": 1000, "continual": 128}[task]
    of_row = rates[ROWS.index(row)]
    said = "paper" if isinstance(of_row, str) else f"paper: the best of {', '.join(of_row)}"
    rate = of_row if isinstance(of_row, str) else of_row[1]
    assert f"  learning_rate: {rate}  # {said}\n" in path.read_text()
    assert config.optimizer.learning_rate == float(rate)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_what_its_row_says(path, source):
    config = flags.read_config(str(path), ["--init-from", str(source)])
    methods = assign_methods(config)
    adapted = [method for _, method in methods.adapted()]
    match path.stem.partition("_")[2]:
        case "full":
            assert config.method == "full"
            return
        case "lora_r8":
            assert config.method == LoRA(8, alpha=16.0)
        case "lora_r256":
            assert config.method == LoRA(256, alpha=128.0)
        case "mora_r8":
            assert isinstance(config.method, MoRA)
            assert (config.method.rank, config.method.operator.name) == (8, "rotate")
        case "mora_r256":
            assert isinstance(config.method, MoRA)
            assert (config.method.rank, config.method.operator.name) == (256, "share")
    assert len(adapted) == 7
    assert {choice for _, choice in methods.choices if isinstance(choice, str)} == {"frozen"}


@pytest.mark.parametrize("row", quick(["lora_r8"], ["lora_r8", "lora_r256"]))
@pytest.mark.parametrize("task", TASKS)
def test_the_flags_of_the_other_rows(task, row, source):
    """Those of the page's table, on the files that it names."""
    path, start = str(FOLDER / f"{task}_{row}.yaml"), ["--init-from", str(source)]
    found = re.findall(r"^\| \S+ \| `_lora_r8` with `(--[^`]*)`", PAGE, re.MULTILINE)
    assert len(found) == 5
    changed = [flags.read_config(path, [*start, *words.split()]) for words in found]
    plain = flags.read_config(path, start)
    assert all(config != plain for config in changed)
    assert sum(bool(config.restart.every) for config in changed) == 1


@pytest.mark.parametrize("operator", ["truncate", "share", "decouple", "rotate"])
@pytest.mark.parametrize("row", ["mora_r8", "mora_r256"])
def test_the_operators_of_table_4(operator, row, source):
    words = ["--init-from", str(source), "--method.operator", operator]
    method = flags.read_config(str(FOLDER / f"metamath_{row}.yaml"), words).method
    assert isinstance(method, MoRA)
    assert method.operator.name == operator
