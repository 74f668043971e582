"""The demo from text to export on very little text, and which folders it may replace."""

import gzip
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mora_jax.errors import InputError
from train.cli.demo import MADE, MARK, demo
from train.console.exits import Preempted


@pytest.fixture
def short(monkeypatch):
    """Replaces the gathering of text, which has its own tests, by a copy of a given folder."""

    def write(tiny_text):
        def copy(folder: str, limit_bytes: int) -> None:
            shutil.copytree(tiny_text, folder)

        monkeypatch.setattr("train.cli.demo.write_shards", copy)

    return write


@pytest.fixture
def config(tiny_yaml, tmp_path) -> str:
    """The tiny config with few steps, and a vocabulary large enough for the characters of real text."""
    path = tmp_path / "demo.yaml"
    text = tiny_yaml.read_text()
    for was, now in (("steps: 22", "steps: 4"), ("vocab_size: 384", "vocab_size: 512")):
        assert was in text
        text = text.replace(was, now)
    path.write_text(text)
    return str(path)


@pytest.mark.slow
def test_the_whole_path(config, tmp_path, capsys):
    folder = tmp_path / "demo"
    demo(config, str(folder), text_bytes=60_000)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["restarts"] == 1
    shards = sorted((folder / "text").glob("*.json.gz"))
    lines = [line for path in shards for line in gzip.decompress(path.read_bytes()).splitlines()]
    texts = [json.loads(line)["text"] for line in lines]
    assert 20_000 < sum(len(text.encode()) for text in texts) <= 60_000
    np.testing.assert_allclose(summary["exported_perplexity"], summary["validation_perplexity"], rtol=1e-5)
    assert summary["unigram_perplexity"] > 1
    assert summary["tokens_per_second"] > 0
    for name in ("metrics.jsonl", "loss.png", "export/model.safetensors", "export/tokenizer.json"):
        assert (folder / name).stat().st_size > 0
    out = capsys.readouterr().out
    for name in ("metrics.jsonl", "summary.json", "loss.png", "export/", "unigram"):
        assert name in out


@pytest.mark.slow
def test_a_second_demo_starts_from_scratch(config, tmp_path, tiny_text, short, monkeypatch):
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / MARK).write_text(MADE)
    (folder / "left-over").write_text("x")
    monkeypatch.setattr("train.cli.demo.pretrain", stop)
    short(tiny_text)
    with pytest.raises(KeyboardInterrupt):
        demo(config, str(folder))
    assert not (folder / "left-over").exists()
    assert (folder / "data/dataset_info.json").exists()
    assert (folder / MARK).exists()  # so that an interrupted demo can be started again


def stop(config):
    raise KeyboardInterrupt


HOLD = """
import sys
from train.storage import lock
with lock.lock_run(sys.argv[1]):
    print(flush=True)
    input()
"""


def test_a_running_demo_is_not_removed(config, tmp_path):
    (tmp_path / MARK).write_text(MADE)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline()
        with pytest.raises(InputError, match="is in use by process"):
            demo(config, str(tmp_path))
        other.kill()
    assert (tmp_path / MARK).exists()


@pytest.mark.slow
def test_a_second_demo_at_once_is_refused_and_leaves_the_text(config, tmp_path, monkeypatch):
    """From its first moment, when the first one still gathers text."""
    folder, words = tmp_path / "demo", [sys.executable, "-m", "train.cli.main", "demo"]
    refused = []

    def gather(text: str, limit_bytes: int) -> None:
        (folder / "text").mkdir()
        (folder / "text/first").touch()
        command = [*words, "--config", config, "--folder", str(folder)]
        refused.append(subprocess.run(command, capture_output=True, text=True, check=False))
        raise KeyboardInterrupt

    monkeypatch.setattr("train.cli.demo.write_shards", gather)
    with pytest.raises(KeyboardInterrupt):
        demo(config, str(folder))
    assert refused[0].returncode == 2
    assert refused[0].stderr.startswith(f"mora: {folder} is in use by process ")
    assert (folder / "text/first").exists()


def test_a_folder_whose_file_has_the_name_of_the_mark_is_not_removed(config, tmp_path):
    (tmp_path / MARK).write_text("A demo, recorded in 2019: see demo.mp4")
    (tmp_path / "demo.mp4").touch()
    with pytest.raises(InputError, match="holds something else than a demo"):
        demo(config, str(tmp_path))
    assert (tmp_path / "demo.mp4").exists()


@pytest.mark.slow
def test_a_stopped_demo_names_the_command_that_resumes_its_training(
    config, tiny_text, tmp_path, short, monkeypatch
):
    def preempted(config):
        raise Preempted("stopped after 3 of 10 updates; the same command resumes")

    monkeypatch.setattr("train.cli.demo.pretrain", preempted)
    short(tiny_text)
    with pytest.raises(Preempted, match=r"mora pretrain .*/demo/config\.yaml resumes its training"):
        demo(config, str(tmp_path / "demo"))


def test_a_folder_of_something_else_is_not_removed(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds something else than a demo"):
        demo(config, str(tmp_path))
    with pytest.raises(InputError, match="holds something else than a demo"):
        demo(config, str(tmp_path / "thesis.tex"))
    with pytest.raises(InputError, match="cannot be written to"):
        demo(config, str(tmp_path / "thesis.tex" / "demo"))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_bad_config_removes_no_demo(tmp_path):
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / MARK).write_text(MADE)
    (folder / "loss.png").write_text("x")
    with pytest.raises(InputError, match=r"nowhere\.yaml is missing"):
        demo(str(tmp_path / "nowhere.yaml"), str(folder))
    assert (folder / "loss.png").exists()
