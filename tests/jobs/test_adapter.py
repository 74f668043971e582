"""Adapters of runs as folders: what is written beside them, what is refused, and `mora merge`."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hf_folders import CONFIG
from peft_folders import FROZEN, random_adapted
from slow import slow

from mora_jax import LoRA, hf, save_adapter, trees
from mora_jax.errors import InputError
from mora_jax.hf.adapter_config import AdapterConfig
from train.cli import main as cli
from train.jobs import adapter as jobs
from train.run.model import load_model

UP = "layers/mlp/up_proj/kernel"


def run(capfd, *words: object) -> tuple[int, str, str]:
    """Runs a command. Returns its status, output and messages."""
    try:
        cli.main([str(word) for word in words])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capfd.readouterr()


def test_an_adapter_and_its_base_are_the_trained_model(tiny_run, tmp_path, capfd):
    """The run trained MoRA over ten restarts, and embedding, norms and head."""
    base, out = tmp_path / "base", tmp_path / "a"
    status, output, messages = run(capfd, "export", tiny_run.folder, out, "--adapter", "--with-base", base)
    assert status == 0
    assert output == f"written: {out} (0.1 MB)\nwritten: {base} (0.2 MB)\n"
    assert "vLLM serves one rank for all modules" in messages
    said = json.loads((out / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(base)
    assert said["modules_to_save"] is None
    assert (base / "tokenizer.json").exists()
    assert run(capfd, "merge", base, out, tmp_path / "merged")[:2] == (
        0,
        f"written: {tmp_path / 'merged'} (14 tensors changed)\n",
    )
    ours = trees.flatten(load_model(str(tiny_run.folder))[0])
    started = trees.flatten(hf.load_hf(base)[0])
    for path, leaf in trees.flatten(hf.load_hf(tmp_path / "merged")[0]).items():
        np.testing.assert_allclose(leaf, ours[path], atol=1e-6, err_msg=path)
    up = "layers/mlp/up_proj/kernel"
    assert np.abs(started[up] - ours[up]).max() > 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"base", "a", "merged"}


@pytest.mark.slow  # test_which_bases_others_have decides it
def test_a_base_that_nobody_has_is_refused(tiny_run, tmp_path, capfd):
    status, output, messages = run(capfd, "export", tiny_run.folder, tmp_path / "a", "--adapter")
    assert (status, output) == (2, "")
    assert messages == (
        f"mora: nobody else has the base of {tiny_run.folder}: it started from random weights; export the "
        f"merged model, without --adapter, or write the base beside it with --with-base DIR\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("out", "base"), [("a", "a"), ("a", "a/base"), ("b/a", "b"), ("a", "./x/../a")])
def test_an_adapter_and_its_base_are_two_folders(tiny_run, tmp_path, monkeypatch, capfd, out, base):
    monkeypatch.chdir(tmp_path)
    status, output, messages = run(capfd, "export", tiny_run.folder, out, "--adapter", "--with-base", base)
    assert (status, output) == (2, "")
    assert "must be two folders, neither in the other" in messages
    assert not list(tmp_path.iterdir())


def test_which_bases_others_have(tiny_run, tmp_path):
    public = dataclasses.replace(tiny_run.config, init_from=str(tmp_path))
    jobs._check_base("r", public, 2)  # the first restart, after update 2, follows the checkpoint
    with pytest.raises(InputError, match="restarts have merged adapters into it"):
        jobs._check_base("r", public, 3)
    of_a_run = dataclasses.replace(public, init_from=str(tiny_run.folder))
    with pytest.raises(InputError, match="it started from the run"):
        jobs._check_base("r", of_a_run, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pad-rank"], "are of adapters: give --adapter too"),
        (["--with-base", "b"], "are of adapters: give --adapter too"),
        (["--adapter", "--format", "mora", "--pad-rank"], "--format mora has none; leave one of them out"),
        (["--adapter", "--format", "gguf"], "--format"),
        slow(
            ["--adapter", "--format", "mora", "--with-base", "b"],
            r"mora (rank 4, align 8) has no place in the files",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(tiny_run, tmp_path, monkeypatch, capfd, words, message):
    """The last run's padding differs from the authors' where r_hat does not divide the inputs."""
    monkeypatch.chdir(tmp_path)
    status, output, messages = run(capfd, "export", tiny_run.folder, "out", *words)
    assert (status, output) == (2, "")
    assert message in messages
    assert not list(tmp_path.iterdir())


def test_what_vllm_does_not_take_is_said():
    said = AdapterConfig(8, 8, ("q_proj",))
    assert jobs.advice(said) == []
    assert "(norm)" in jobs.advice(dataclasses.replace(said, modules_to_save=("norm",)))[0]
    assert "DoRA" in jobs.advice(dataclasses.replace(said, use_dora=True))[0]
    assert "use --pad-rank" in jobs.advice(dataclasses.replace(said, r=12))[0]
    assert "use mora export" in jobs.advice(dataclasses.replace(said, r=652))[0]
    assert "use --pad-rank" in jobs.advice(dataclasses.replace(said, rank_pattern={"k_proj": 4}))[0]


# mora merge


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A base and two adapters."""
    folder = tmp_path_factory.mktemp("merge")
    for name, seed in (("a", 0), ("b", 1)):
        adapted = random_adapted([(UP, LoRA(4)), FROZEN], CONFIG, seed)
        if name == "a":
            hf.save_hf(folder / "base", adapted.base, CONFIG)
        save_adapter(folder / name, *adapted[1:], CONFIG, base="base")
    (folder / "run").mkdir()
    (folder / "run/config.yaml").touch()
    return folder


@pytest.mark.slow
def test_weights_of_adapters(folders, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(folders)
    status, output, _ = run(capfd, "merge", "base", "a:0.5", "b:-1", tmp_path / "out", "--dtype", "bfloat16")
    assert (status, output) == (0, f"written: {tmp_path / 'out'} (3 tensors changed)\n")
    jobs.merge_adapters("base", [("a", 0.5), ("b", -1.0)], str(tmp_path / "again"), "bfloat16")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base", "out"], "give a model, an adapter and a folder to write: mora merge BASE ADAPTER OUT"),
        (["base", "a:nan", "out"], "give an adapter and a finite weight"),
        (["base", "a:x", "out"], "a:x: 'x' is no weight; give a number, such as A:0.5"),
        (["base", "c:x", "out"], "c:x/adapter_config.json is missing"),
        (["run", "a", "out"], "run is a run; export it first: mora export RUN OUT"),
        (["base", "run", "out"], "run is a run; export it first: mora export RUN OUT --adapter"),
        (["base", "base", "out"], "adapter_config.json is missing"),
        (["a", "a", "out"], "a is an adapter; merge it into its base first: mora merge BASE a OUT"),
        (["c", "a", "out"], "c is missing"),
        (["base", "a", "b"], "b exists already"),
    ],
)
def test_bad_merges_are_one_line(folders, monkeypatch, capfd, words, message):
    monkeypatch.chdir(folders)
    status, output, messages = run(capfd, "merge", *words)
    assert (status, output, len(messages.splitlines())) == (2, "", 1)
    assert message in messages
    assert {path.name for path in folders.iterdir()} == {"base", "a", "b", "run"}


@pytest.mark.slow
def test_a_base_that_an_old_checkpoint_holds_is_compared(tmp_path, capfd):
    """Today's checkpoints refer to the files, whose hashes are compared."""
    made = random_adapted([(UP, LoRA(2)), ("norm/scale", "train"), FROZEN], CONFIG)
    hf.save_hf(tmp_path / "base", made.base, CONFIG)
    held = jax.tree.map(jax.numpy.asarray, made.params)  # the norm was trained
    digest = jobs._hash_of(tmp_path / "base", held, made.methods)
    assert digest == jobs._hash_of(tmp_path / "base")
    other = trees.replaced(held, {UP: trees.flatten(held)[UP].at[0, 0, 0].add(1)})
    with pytest.raises(
        InputError, match=r"layers\.0\.mlp\.up_proj\.weight in .* is not what the run started"
    ):
        jobs._hash_of(tmp_path / "base", other, made.methods)
    absent = jax.eval_shape(lambda: other)
    assert jobs._hash_of(tmp_path / "base", absent, made.methods) == digest
