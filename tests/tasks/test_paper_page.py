"""The commands of docs/paper.md, executed in order on a tiny model and made-up files of the same forms."""

import dataclasses
import gzip
import json
import re
import shlex
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import sentencepiece as spm
from hf_folders import CONFIG
from made_tokenizers import byte_level, write_folder
from paper_data import conversation, document, problem, write_lines, write_tasks

from mora_jax import hf
from mora_jax.models.generate import prefill
from mora_jax.models.llama import Llama
from train.cli.main import main
from train.data.rows.info import load_info

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/paper.md").read_text()
# What a run at the tiny size has otherwise. Words of the commands come after, and would win.
TINY = {
    "batch-size": 4,
    "microbatches": 1,
    "mesh.data": 1,
    "mesh.fsdp": 1,
    "schedule.warmup": 1,
    "compute.dtype": "float32",
    "compute.remat": "dots",
    "eval.batch-size": 4,
    "init-from": "model",
    "checkpoint.every": 2,
    "checkpoint.keep-every": 2,
}
PARTS = ("Mem", "Instr", "Math", "Cont", "Pretr", "Time", "GaLore")
LENGTH = {"80": "80", "256": "32", "1024": "256", "2048": "128"}  # tokens of a row: on the page, and here
# Pretraining begins without a model that says how large it is.
SMALL = {
    "steps": 6,
    "init-from": "",
    "data.sequence-length": 32,
    "model.vocab-size": 400,
    "model.hidden-size": 32,
    "model.intermediate-size": 48,
    "model.num-hidden-layers": 2,
    "model.num-attention-heads": 2,
    "model.num-key-value-heads": 2,
}
HUB = {
    "allenai/tulu-v2-sft-mixture": "made/tulu.jsonl",
    "meta-math/MetaMathQA": "made/metamath.jsonl",
    "meta-llama/Llama-2-7b-hf": "model",
    "configs/tasks": "tasks",
    "mmlu": "rct",  # any multiple choice
    "pubmedqa,medqa_4options": "rct",
}


def commands(part: str) -> list[list[str]]:
    """Returns the words of the commands in one part of the page."""
    section = PAGE.partition(f"\n## {part}")[2].partition("\n## ")[0]
    text = "".join(re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
    return [shlex.split(line)[1:] for line in text.replace("\\\n", " ").splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a tiny model with a tokenizer, and no chat template."""
    folder = tmp_path_factory.mktemp("model") / "model"
    config = dataclasses.replace(CONFIG, vocab_size=400, max_position_embeddings=1024)
    params = Llama(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    hf.save_hf(folder, params, config)
    return write_folder(folder, byte_level(["say what it is", "the answer is: of zinc"], 300))


@pytest.fixture
def place(tmp_path, model, monkeypatch):
    """A working folder with everything that the page speaks of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(model, tmp_path / "model")
    for name, made in (("tulu", conversation), ("metamath", problem)):
        write_lines(tmp_path / f"made/{name}.jsonl", map(made, range(60)))
    write_lines(tmp_path / "text/biomedicine/0.jsonl", map(document, range(60)))
    write_tasks(tmp_path / "tasks")
    texts = [document(i)["text"] for i in range(60)]
    for split in ("train", "validation"):
        (tmp_path / "c4").mkdir(exist_ok=True)
        with gzip.open(tmp_path / f"c4/c4-{split}.00000.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    write_t5(tmp_path / "t5.model", texts)
    return tmp_path


def write_t5(path: Path, texts: list[str]) -> None:
    """Writes a SentencePiece model that is of T5's kind: unigram, padding 0, end of text 1, no beginning."""
    with path.open("wb") as file:
        spm.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts),
            model_writer=file,
            model_type="unigram",
            vocab_size=300,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )


def run(words: list[str]) -> None:
    """Runs a command of the page at the tiny size."""
    words = [HUB.get(word, word) for word in words]
    match words[0]:
        case "finetune":
            task = re.search(r"paper/([a-z]+)_", words[1])[1]  # pyright: ignore[reportOptionalSubscript]
            tiny = TINY | {
                "data.sequence-length": {"uuid": 80, "metamath": 256}.get(task, 128),
                "epochs": 2 if task == "uuid" else 0.3,  # some steps
            }
            words[2:2] = [f"--{name}={value}" for name, value in tiny.items()]
        case "pretrain":
            tiny = TINY | SMALL
            if "galore" in words[1] or "_re" in words[1]:
                tiny |= {"restart.every": 3, "restart.warmup": 1}
            if "full" not in f"{words}":
                tiny |= {"method.rank": 4}
            words[2:2] = [f"--{name}={value}" for name, value in tiny.items()]
        case "prepare-data" if "--sequence-length" not in words:
            words = [*words, "--sequence-length", "32", "--workers", "1"]
        case "prepare-data":
            at = words.index("--sequence-length") + 1
            words[at] = LENGTH[words[at]]
            words = [*words, "--workers", "1"]
            words = ["0.2" if word == "0.005" else word for word in words]
        case "bench":
            return  # of a GPU
        case "study":
            words = [*words, "--report"]  # its runs take GPUs
        case "lm-eval":
            words = [*words, "--dtype", "float32"]
            words += [] if "--include-path" in words else ["--include-path", "tasks"]
        case "task" if words[1] == "uuid-pairs" and "--count" not in words:
            words = [*words, "--count", "12"]
    steps = {"300": "2", "500": "4", "700": "4", "900": "6"}
    main([steps.get(word, word) for word in words])


def test_every_command_is_on_the_page():
    found = [words for part in PARTS for words in commands(part)]
    assert found
    assert len(found) == PAGE.count("\nmora ")
    configs = {path.stem for path in (ROOT / "configs/paper").glob("*.yaml")}
    assert {Path(words[1]).stem for words in found if words[0] == "finetune"} <= configs
    assert all((ROOT / words[1]).exists() for words in found if words[0] == "pretrain")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["Mem", "Instr", "Math", "Cont", "Pretr", "GaLore"])
def test_the_commands_run(part, place, capfd):
    if part in ("Instr", "Math", "Cont"):
        pytest.importorskip("lm_eval", reason="needs the extra eval: pip install 'mora_jax[eval]'")
    before = prefill._cache_size()
    for words in commands(part):
        run(words)
    out = capfd.readouterr().out
    if part == "Pretr":
        assert {path.name for path in place.glob("fig*.png")} == {
            "fig4_250m.png",
            "fig5_lora.png",
            "fig5_remora.png",
        }
        assert out.count("validation perplexity") == 5
        return
    if part == "GaLore":
        info = load_info("data/c4_256", ("train",))
        assert info.counts["train"].documents == info.counts["train"].rows == 60
        assert info.counts["train"].cut
        assert (info.eos_id, info.bos_id) == (1, None)
        assert out.count("validation perplexity") == 5
        return
    if part == "Mem":
        assert (place / "uuid.png").exists()
        assert "character accuracy" in out
        assert prefill._cache_size() - before == 1  # for all checkpoints of both runs
    else:
        assert "acc" in out or "exact_match" in out
