"""mora show-data: rows as text, with what counts and where examples begin."""

import json
from pathlib import Path

import pytest
from made_text import prepared, random_texts
from made_tokenizers import byte_level, write_folder

from mora_jax.errors import InputError
from train.cli import main as cli
from train.data.rows.build import prepare
from train.data.rows.info import load_info
from train.data.rows.options import RowOptions
from train.data.show import show_rows
from train.data.text.forms import Form


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts in a row of 32 tokens."""
    folder = tmp_path_factory.mktemp("prompts")
    tokenizer = write_folder(folder / "tokenizer", byte_level(random_texts(200, seed=0)))
    lines = [{"prompt": f"Q{i}: ", "completion": f"A{i}\né\x1b"} for i in range(2)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "b.jsonl").write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n")
    source, held_out = str(folder / "a.jsonl"), str(folder / "b.jsonl")
    options = RowOptions(Form.of("prompt"))
    prepare(source, held_out, str(tokenizer), 32, str(folder / "data"), workers=1, options=options)
    return folder / "data"


def test_what_counts_is_marked(prompts: Path, capsys: pytest.CaptureFixture[str]):
    cli.main(["show-data", str(prompts)])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "train row 1 of 1: 22 tokens, 14 count, 10 padding",
        "--- 1 of 2: 11 tokens",
        "Q0: [[A0",
        "é\\x1b<|end|>]]",
        "--- 2 of 2: 11 tokens",
        "Q1: [[A1",
        "é\\x1b<|end|>]]",
        "",
    ]


def test_what_counts_is_green_on_a_terminal(prompts: Path):
    (text,) = show_rows(load_info(str(prompts)), "train", 3, ("", ""))
    green = [text.plain[span.start : span.end] for span in text.spans if span.style == "green"]
    assert green == ["A0\né\\x1b<|end|>", "A1\né\\x1b<|end|>"]


def test_joined_documents(text: Path, tmp_path: Path):
    info = prepared(text, tmp_path / "data", bos=True)
    shown = [row.plain for row in show_rows(info, "validation", 5, ("[[", "]]"))]
    assert len(shown) == 5
    assert "[[" not in "".join(shown)  # all counts
    assert shown[0].startswith(
        f"validation row 1 of {info.rows['validation']}: 48 tokens, 48 count, 0 padding"
    )
    assert "</s>\n--- 2 of " in "".join(shown)
    assert "tokens\n<s>" in "".join(shown)


def test_what_cannot_be_shown(prompts: Path):
    with pytest.raises(InputError, match="--rows must be at least 1, not 0"):
        next(show_rows(load_info(str(prompts)), "train", 0, ("", "")))
