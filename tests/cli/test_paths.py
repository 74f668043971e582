"""Every flag, key and argument that takes a path takes one on a disk or in a bucket, and nothing else."""

import dataclasses
import typing
from pathlib import Path

import pytest

from mora_jax.errors import InputError
from train.cli import main as cli
from train.cli.commands.generate import Generate
from train.config.run import RunConfig
from train.config.sections import Compilation, Data

WORDS = (
    "topology",
    "topologies",
    "methods",
    "method",
    "peers",
    "meshes",
    "flags",
    "axes",
    "case",
    "text_key",
    "fields",
    "prompt",
    "stop",
    "tasks",
    "set",
    "sbatch",
)  # strings that are no paths
# Read by the config's reader, before the flags are known.
READ_FIRST = dict.fromkeys(("Pretrain", "Finetune", "Plan"), ("config",))


def paths_of(command: type) -> list[str]:
    """Returns the fields of a command that take a path, or several."""
    kinds = typing.get_type_hints(command)
    skipped = (*WORDS, *READ_FIRST.get(command.__name__, ()))
    return [n for n, kind in kinds.items() if kind in (str, tuple[str, ...]) and n not in skipped]


def made(command: type, **given: typing.Any) -> typing.Any:
    """Returns a command with the given fields, and something for those that have no default."""
    needed: dict[str, typing.Any] = {
        f.name: "x" for f in dataclasses.fields(command) if f.default is dataclasses.MISSING
    }
    if "run" in needed:
        needed["run"] = RunConfig()
    if command is Generate and "prompts" not in given:
        needed["prompt"] = "x"  # one of the two must be given
    kinds = typing.get_type_hints(command)
    return command(**{n: (v,) if kinds[n] == tuple[str, ...] else v for n, v in (needed | given).items()})


@pytest.mark.parametrize("name", [name for name, (command, _) in cli.COMMANDS.items() if paths_of(command)])
def test_every_path_of_a_command(name, monkeypatch):
    command = cli.COMMANDS[name][0]
    monkeypatch.setenv("HOME", "/home/me")
    for field in paths_of(command):
        for url in ("https://a/b", "file:///a", "hf://a/b"):
            with pytest.raises(InputError, match=f"{field.replace('_', '.')} {url} is no path"):
                made(command, **{field: url})
        value = getattr(made(command, **{field: "~/a"}), field)
        assert value in ("/home/me/a", ("/home/me/a",))


def test_every_path_of_a_config(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    sections: list[tuple[type, str, str]] = [
        (RunConfig, "run_dir", "run_dir"),
        (RunConfig, "init_from", "init_from"),
        (Data, "directory", "data.directory"),
        (Compilation, "cache", "compilation.cache"),
    ]
    for section, field, name in sections:
        with pytest.raises(InputError, match=f"^{name} hf://a is no path"):
            section(**{field: "hf://a"})
        assert getattr(section(**{field: "~/a"}), field) == "/home/me/a"
    assert RunConfig().init_from == ""
    with pytest.raises(InputError, match=r"^run_dir is empty"):
        RunConfig(run_dir="")


@pytest.mark.parametrize(
    "args",
    [
        ["pretrain", "https://a/c.yaml"],
        ["plan", "hf://a/c.yaml"],
        ["evaluate", "hf://a"],
        ["evaluate", "x", "--data", "file:///a"],
        ["generate", "x", "--prompts", "hf://a"],
        ["export", "https://a", "out"],
        ["export", "x", "https://a"],
        ["checkpoints", "https://a"],
        ["demo", "--folder", "hf://a"],
        ["bench", "step", "hf://a"],
        ["train-tokenizer", "--source", "https://a", "--out", "t.model"],
        ["prepare-data", "--source", "tfds:https://a", "--tokenizer", "t.model", "--out", "o"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_url_is_one_line(args, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    line = capfd.readouterr().err
    assert stop.value.code == 2
    assert "is no path: give one on a disk, or in a bucket of gs:// or s3://" in line
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "/run", "/run/deeper"])
def test_a_run_in_the_folder_of_its_data_set(below, tiny_data, tiny_yaml, capfd):
    before = sorted(Path(tiny_data).rglob("*"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", str(tiny_yaml), "--run-dir", f"{tiny_data}{below}"])
    assert stop.value.code == 2
    assert "is in the data set's folder" in capfd.readouterr().err
    assert sorted(Path(tiny_data).rglob("*")) == before
