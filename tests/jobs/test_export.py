"""The exported folder holds the merged weights and the tokenizer, whole or not at all."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from made_tokenizers import TEMPLATE, byte_level, write_folder
from sentencepiece import SentencePieceTrainer
from slow import quick, slow
from tiny import tiny_documents

from mora_jax import hf, trees
from mora_jax.errors import InputError
from train.data.rows.build import prepare
from train.data.tokenizer import Tokenizer
from train.jobs.export import export, save_tokenizer
from train.run.model import load_model
from train.run.tokenizer import keep_tokenizer


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "out"
    export(str(tiny_run.folder), str(out))
    return out, *load_model(str(tiny_run.folder))


def test_an_export_reloads_as_the_merged_model_bit_for_bit(tiny_run, exported):
    out, params, model = exported
    read, config = hf.load_hf(out)
    for path, leaf in trees.flatten(read).items():
        np.testing.assert_array_equal(leaf, trees.flatten(params)[path])
    assert config == model
    assert model == tiny_run.config.model


def test_the_tokenizer_is_exported(tiny_run, exported):
    out, *_ = exported
    data_tokenizer = f"{tiny_run.config.data.directory}/tokenizer/tokenizer.model"
    assert (out / "tokenizer.model").read_bytes() == Path(data_tokenizer).read_bytes()
    content = json.loads((out / "tokenizer.json").read_text())
    assert len(content["model"]["vocab"]) == 384
    config = json.loads((out / "config.json").read_text())
    tokenizer = Tokenizer.load(data_tokenizer)
    assert config["eos_token_id"] == tokenizer.eos_id
    assert config["bos_token_id"] == tokenizer.encoder.bos_id()


@pytest.mark.slow  # tests/library/hf/test_weights.py rounds what it writes
def test_bfloat16_rounds_after_merging(tiny_run, exported, tmp_path):
    export(str(tiny_run.folder), str(tmp_path / "out"), "bfloat16")
    read, _ = hf.load_hf(tmp_path / "out")
    _, params, _ = exported
    ours = trees.flatten(params)["layers/mlp/up_proj/kernel"]
    theirs = trees.flatten(read)["layers/mlp/up_proj/kernel"]
    np.testing.assert_array_equal(theirs, np.asarray(ours.astype(jnp.bfloat16).astype(jnp.float32)))
    assert not np.array_equal(theirs, ours)


def test_an_existing_folder_is_not_changed(tiny_run, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="exists already; choose another name"):
        export(str(tiny_run.folder), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("kind", quick(["folder"], ["file", "folder"]))
def test_what_is_called_partial_stays(tiny_run, tmp_path, kind):
    mine = tmp_path / "out.partial"
    mine.mkdir() if kind == "folder" else mine.write_text("years of work")
    if kind == "folder":
        (mine / "thesis.tex").write_text("years of work")
    export(str(tiny_run.folder), str(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.partial"}
    assert (mine / "thesis.tex" if kind == "folder" else mine).read_text() == "years of work"


@pytest.mark.slow  # tests/library/hf/test_folder.py removes leftovers
def test_what_a_killed_export_left_is_removed(tiny_run, tmp_path):
    (tmp_path / "out.0123abcd.mora-partial").mkdir()
    (tmp_path / "out.mora-partial").mkdir()
    (tmp_path / "out2.0123abcd.mora-partial").mkdir()
    export(str(tiny_run.folder), str(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "out",
        "out.mora-partial",
        "out2.0123abcd.mora-partial",
    }


@pytest.mark.slow  # tests/storage/test_own_files.py locks an output
def test_a_second_export_to_the_same_folder_is_refused(tiny_run, tmp_path, monkeypatch):
    run, out, real, seen = str(tiny_run.folder), str(tmp_path / "out"), hf.save_hf, []

    def save(*args, **kwargs):
        command = [sys.executable, "-m", "train.cli.main", "export", run, out]
        seen.append(subprocess.run(command, capture_output=True, text=True, check=False))
        real(*args, **kwargs)

    monkeypatch.setattr("mora_jax.hf.save_hf", save)
    export(run, out)
    assert seen[0].returncode == 2
    assert seen[0].stderr.startswith(f"mora: {out} is in use by process ")
    assert len(seen[0].stderr.splitlines()) == 1
    assert (tmp_path / "out/model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A copy of the run whose data set is away."""
    copy = shutil.copytree(tiny_run.folder, tmp_path / "run")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"]["directory"] = str(tmp_path / "nowhere")
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow  # the weights below are, too
def test_a_run_is_exported_without_its_data_set(run, exported, tmp_path, capfd):
    export(str(run), str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(exported[0])
    assert "warning" not in capfd.readouterr().err


@pytest.mark.slow
def test_the_data_sets_tokenizer_serves_a_run_that_has_none(tiny_run, exported, tmp_path):
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    (run / "tokenizer" / "tokenizer.model").unlink()
    export(str(run), str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(exported[0])


@pytest.mark.parametrize("damage", [Path.unlink, slow(lambda path: path.write_bytes(b"other"))])
def test_weights_are_exported_without_a_tokenizer(run, exported, tmp_path, capfd, damage):
    damage(run / "tokenizer" / "tokenizer.model")
    export(str(run), str(tmp_path / "out"))
    assert sorted(contents(tmp_path / "out")) == ["config.json", "model.safetensors"]
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (exported[0] / weights).read_bytes()
    assert "warning: no tokenizer is exported" in capfd.readouterr().err


@pytest.fixture
def tokens_of(tmp_path, tiny_text):
    """Prepares data with a tokenizer, keeps it as a run does, and exports that."""

    def kept(tokenizer):
        validation = str(tiny_text / "c4-validation.*")
        info = prepare("", validation, str(tokenizer), 32, str(tmp_path / "data"), workers=1)
        keep_tokenizer(str(tmp_path / "run"), info)
        shutil.rmtree(tmp_path / "data")
        (tmp_path / "out").mkdir()
        save_tokenizer(tmp_path / "out", hf.read_tokenizer(tmp_path / "run"), "run")
        return contents(tmp_path / "out")

    return kept


def test_a_tokenizer_json_is_exported_as_it_came(tokens_of, tmp_path):
    files = {
        "chat_template": TEMPLATE,
        "generation_config": {"eos_token_id": [0, 7]},
        "config": {"eos_token_id": 5},
    }
    folder = write_folder(tmp_path / "hf", byte_level(tiny_documents(50, 1)), **files)
    made = tokens_of(folder)
    assert made == {name: content for name, content in contents(folder).items() if name != "config.json"}
    assert hf.read_tokenizer(tmp_path / "run").special_ids() == {
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 2,
    }


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"user_defined_symbols": ["<sep>"]}, "user-defined symbols need add_dummy_prefix false"),
        (
            {"user_defined_symbols": ["<pad>"], "add_dummy_prefix": False, "model_type": "unigram"},
            "user-defined symb",
        ),
    ],
)
def test_what_cannot_be_converted_is_told_before_and_exported_beside_it(
    tokens_of, tmp_path, capfd, options, fault
):
    with (tmp_path / "t.model").open("wb") as file:
        how = {"vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2} | options
        SentencePieceTrainer.train(sentence_iterator=iter(tiny_documents(80, 1)), model_writer=file, **how)
    made = tokens_of(tmp_path / "t.model")
    said = " ".join(capfd.readouterr().err.split())
    assert re.search(f"{fault}.*; models can be trained, and are exported without tokenizer.json", said)
    assert re.search(f"{fault}.*; the weights and tokenizer.model are exported without tokenizer.json", said)
    assert made == {"tokenizer.model": (tmp_path / "t.model").read_bytes()}


@pytest.mark.slow
def test_weights_are_exported_beside_a_tokenizer_that_cannot_be_written(run, tmp_path, monkeypatch, capfd):
    def refuse(*_):
        raise InputError("cannot be expressed")

    monkeypatch.setattr("mora_jax.hf.save_tokenizer", refuse)
    export(str(run), str(tmp_path / "out"))
    assert sorted(contents(tmp_path / "out")) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert "warning: cannot be expressed; the weights and tokenizer.model are exp" in capfd.readouterr().err


@pytest.mark.slow
def test_transformers_reads_it_with_the_same_logits(exported, tiny_text):
    transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    from mora_jax.models.llama import Compute, Llama

    out, params, model = exported
    loaded, loading = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tokens_BT = np.random.default_rng(0).integers(0, 384, (2, 32))
    ours = Llama(model, Compute(dtype="float32")).apply({"params": params}, jnp.asarray(tokens_BT))
    with torch.no_grad():
        theirs = loaded(torch.tensor(tokens_BT)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_full_disk_names_the_folder(tiny_run, disk, capfd):
    disk.fill()
    filler = disk.path / "filler"
    os.truncate(filler, filler.stat().st_size - (40 << 10))
    with pytest.raises(OSError, match="No space left") as full:
        export(str(tiny_run.folder), str(disk.path / "out"))
    assert full.value.filename == str(disk.path / "out")
    assert not (disk.path / "out").exists()


@pytest.mark.slow
def test_the_working_folder_is_filled(tiny_run, exported, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(str(tiny_run.folder), ".")
    assert contents(tmp_path / "here") == contents(exported[0])
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
