"""The command line as users meet it: help, results, and one line for every error."""

import contextlib
import dataclasses
import errno
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import typing
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sentencepiece import sentencepiece_model_pb2
from slow import quick, slow

from train.cli import main as cli
from train.cli.commands import training
from train.cli.explain import explain
from train.config import flags
from train.config.sections import YAML_ONLY
from train.console.terminal import print_summary
from train.run.checkpoint import Checkpoints
from train.run.folder import CONFIG
from train.run.metrics import read_metrics
from train.run.model import load_model
from train.storage.format import FORMAT

BENCHES = {"bench profile", "bench sweep", "bench scaling"}  # "bench step" has most of their flags
SMALL = str(Path(__file__).parents[2] / "configs/demo.yaml")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def program(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The real program in a process of its own, with one device."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "train.cli", *args],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def mora(capfd):
    """Calls the command line in this process and gives (status, stdout, stderr)."""

    def call(*args: str) -> tuple[int, str, str]:
        status = 0
        try:
            cli.main(list(args))
        except SystemExit as stop:
            status = stop.code or 0
        captured = capfd.readouterr()
        return int(status), captured.out, captured.err

    return call


@pytest.fixture
def refused(mora):
    """Calls the command line, checks that it refuses as it must, and gives its one line."""

    def call(*args: str) -> str:
        status, out, err = mora(*args)
        assert (status, out) == (2, "")
        assert re.fullmatch(r"mora: \S.*\n", err), err
        assert "Traceback" not in err
        return err

    return call


# Bad input of every kind, reported in one line


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--optimizer.learnin-rate", "1"], "did you mean --optimizer.learning-rate?"),
        (["--optimizer.learning-rate", "-1"], "optimizer.learning_rate must be above 0, not -1.0"),
        (["--optimizer.learning-rate", "fast"], "'fast'"),
        (["--steps", "0"], "steps must be at least 1, not 0"),
        (["--seed", "-1"], "seed must lie in [0, 2**32), not -1"),
        (["--microbatches", "3"], "batch_size 4 does not divide into 3 microbatches"),
        (["--mesh.data", "64"], "mesh.data 64 needs 64 devices; 8 (cpu) are here"),
        (["--mesh.data", "4", "--batch-size", "6"], "6 does not divide among 4 devices"),
        (["--model.vocab-size", "300"], "vocabulary of 384 tokens, more than model.vocab_size 300"),
        slow(["--batch-size", "100000"], "fewer than one batch of 100000"),
        (["--data.directory", "nowhere"], "nowhere is not a data set made by prepare-data"),
        (["--params.adapt", "nope/.*"], "rule 'nope/.*' matches no parameter"),
        (["--init-from", "nowhere"], "nowhere is missing"),
        (["--run-dir", "/dev/null/run"], "--run-dir /dev/null/run cannot be made"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_pretrain_refuses(refused, tiny_yaml, tmp_path, args, expected):
    assert expected in refused("pretrain", str(tiny_yaml), "--run-dir", str(tmp_path / "run"), *args)
    assert not (tmp_path / "run" / CONFIG).exists()


@pytest.mark.parametrize("command", ["prepare-data --tokenizer t", "train-tokenizer --source s"])
def test_an_empty_key_of_the_text(refused, command):
    assert "--text-key is empty" in refused(*command.split(), "--out", "o", "--text-key", "")


def test_a_misspelt_key(refused, tiny_yaml, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(tiny_yaml.read_text() + "stepz: 3\n")
    assert f"{path}: unknown key stepz; did you mean steps?" in refused("pretrain", str(path))


def test_a_section_that_is_one_value(refused, tiny_yaml, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(tiny_yaml.read_text() + "distributed: 5\n")
    expected = f"{path}: distributed is a section with keys such as distributed.coordinator_address, not 5"
    assert expected in refused("pretrain", str(path))


def test_flags_before_the_config_are_not_taken_for_defaults(refused, tiny_yaml):
    assert "needs a config file first" in refused("pretrain", "--dry-run", str(tiny_yaml))
    assert "needs a config file first" in refused("pretrain")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["plot", "a", "b", "--out", "p.pdf"], "--out p.pdf must end in .png"),
        (["spectrum", "a", "--picture", "s.jpg"], "--picture s.jpg must end in .png"),
        (["bench", "sweep", "tiny", "--picture", "s"], "--picture s must end in .png"),
        (["bench", "data", "--source", "x", "--tokenizer", "x", "--batch-size", "0"], "--batch-size must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_could_not_be_made_is_refused_before_any_work(refused, tmp_path, monkeypatch, args, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(*args)


@pytest.mark.parametrize(
    ("args", "flag"),
    [
        (["plan", SMALL, "--devices", "1"], "--out"),
        (["bench", "data", "--source", "x", "--tokenizer", "x"], "--out"),
        (["bench", "profile", "tiny"], "--out"),
        (["bench", "sweep", "tiny"], "--picture"),
        (["bench", "scaling", "tiny"], "--picture"),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_results_replace_no_file_unasked(refused, tmp_path, args, flag):
    mine = tmp_path / "mine.png"
    mine.write_text("years of work")
    line = f"{flag} {mine} exists already; choose another name, or add --overwrite to replace it"
    assert line in refused(*args, flag, str(mine))
    assert mine.read_text() == "years of work"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["pretrian"], "there is no command 'pretrian'; did you mean pretrain?"),
        (["bench"], "did you mean bench "),
        (["pretrain", "nowhere.yaml"], "nowhere.yaml is missing"),
        (["evaluate", "nowhere"], "nowhere holds no run"),
        (["export", "nowhere", "out"], "nowhere holds no run"),
        (["evaluate", "x", "--batch-size", "0"], "eval.batch_size must be at least 1, not 0"),
        (["demo", "--config", "nowhere.yaml"], "nowhere.yaml is missing"),
        (["train-tokenizer", "--source", "nowhere*", "--out", "t.model"], "nowhere* matches no file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_commands_refuse(refused, tmp_path, monkeypatch, args, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(*args)
    assert not list(tmp_path.iterdir())


def test_a_run_directory_that_holds_another_config(refused, tiny_run, tiny_yaml):
    before = contents(tiny_run.folder)
    here = ["pretrain", str(tiny_yaml), "--run-dir", str(tiny_run.folder)]
    assert "already holds a run; remove --no-resume" in refused(*here, "--no-resume")
    line = refused(*here, "--optimizer.learning-rate", "0.5")
    assert "holds a run with optimizer.learning_rate 0.01, not 0.5" in line
    assert contents(tiny_run.folder) == before


# Bad text


@pytest.fixture
def prepare(tiny_text, tmp_path):
    """The words of a `prepare-data` of one training file, given by its content."""

    def words(content: bytes, *more: str) -> list[str]:
        (tmp_path / "bad.json.gz").write_bytes(content)
        return [
            "prepare-data", "--source", str(tmp_path / "bad.json.gz"), "--validation",
            str(tiny_text / "c4-validation.*"), "--tokenizer", str(tiny_text / "t.model"), "--out",
            str(tmp_path / "data"), "--sequence-length", "32", "--workers", "1", *more,
        ]  # fmt: skip

    return words


@pytest.fixture
def good(tiny_text) -> bytes:
    """The lines of a good shard."""
    return gzip.decompress((tiny_text / "c4-train.0.json.gz").read_bytes())


def test_a_source_that_matches_no_file(refused, prepare, tmp_path):
    words = prepare(b"", "--source", str(tmp_path / "nowhere.*.json.gz"))
    assert "nowhere.*.json.gz matches no file" in refused(*words)
    assert not (tmp_path / "data").exists()


def test_a_truncated_gzip(refused, prepare, good):
    assert "bad.json.gz is a truncated gzip file" in refused(*prepare(gzip.compress(good)[:-30]))


@pytest.mark.parametrize("line", [b"{oops", b'{"url": "x"}', b'{"text": 3}', b'"text"'])
def test_lines_that_are_no_documents(refused, mora, prepare, good, tmp_path, line):
    content = gzip.compress(good + line + b"\n" + good)
    number = good.count(b"\n") + 1
    assert f"bad.json.gz: line {number} " in refused(*prepare(content))
    status, out, err = mora(*prepare(content, "--skip-lines", "1"))
    assert (status, err) == (0, "")
    assert f"{tmp_path / 'data'}: train " in out
    described = tfds.builder_from_directory(tmp_path / "data").info.metadata["splits"]["train"]
    assert described["skipped_lines"] == 1
    assert described["documents"] == 2 * (number - 1)


def test_an_empty_corpus(refused, prepare):
    assert "holds no document" in refused(*prepare(gzip.compress(b"")))


def test_another_tokenizer_than_the_data_sets(refused, tiny_data, tiny_text, tiny_yaml, tmp_path):
    """One is given to continue a preparation; one lies in the place of the data set's own."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    model = sentencepiece_model_pb2.ModelProto.FromString((tiny_text / "t.model").read_bytes())
    model.pieces[300].piece, model.pieces[301].piece = model.pieces[301].piece, model.pieces[300].piece
    (tmp_path / "other.model").write_bytes(model.SerializeToString())
    before = contents(data)
    source, validation = (str(tiny_text / f"c4-{split}.*") for split in ("train", "validation"))
    words = ["prepare-data", "--source", source, "--validation", validation, "--sequence-length", "32"]
    line = refused(*words, "--tokenizer", str(tmp_path / "other.model"), "--out", str(data))
    assert "was prepared with another tokenizer_sha256" in line
    assert contents(data) == before
    shutil.copy(tmp_path / "other.model", data / "tokenizer" / "tokenizer.model")
    run = ["--data.directory", str(data), "--run-dir", str(tmp_path / "run")]
    assert "is not the tokenizer that the rows were made with" in refused("pretrain", str(tiny_yaml), *run)
    assert not (tmp_path / "run").exists()


# Help


@pytest.mark.parametrize(
    ("number", "status"),
    [(errno.ENAMETOOLONG, 2), (errno.EISDIR, 2), (errno.ELOOP, 2), (errno.ENOSPC, 74), (errno.EIO, 74)],
)
def test_an_error_that_comes_again_is_bad_input(number, status, capsys):
    assert explain(OSError(number, os.strerror(number), "x")) == status
    assert capsys.readouterr().err == f"mora: x: {os.strerror(number)}\n"


def test_the_version_and_the_format(mora):
    assert mora("--version") == (0, f"mora {version('mora_jax')}, format {FORMAT}\n", "")


def test_help_lists_the_commands(mora):
    status, out, _ = mora("--help")
    assert status == 0
    assert all(f"mora {name} " in out for name in cli.COMMANDS)
    assert mora() == (0, out, "")


@pytest.mark.parametrize("name", quick(cli.COMMANDS.keys() - BENCHES, cli.COMMANDS))
def test_help_explains_every_field(mora, name):
    status, out, err = mora(*name.split(), "--help")
    assert (status, err) == (0, "")
    assert len(out.splitlines()) < 20 + 4 * len(list(flags.scalar_fields(cli.COMMANDS[name][0])))
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", out).split())
    for field, words in explained(cli.COMMANDS[name][0]).items():
        assert words, field
        assert words in text or words.replace(" ", "") in text.replace(" ", ""), field
    for flag in flags.scalar_fields(cli.COMMANDS[name][0]):
        places = ("config", "case", "page", "path", "paths", "run_dir", "runs", "out")
        positional = flag.rpartition(".")[2] in places
        assert positional or re.search(rf"--{flag.replace('_', '-')}[ ,]", text), flag
    assert not re.search(r"\(default: ([A-Z]{2,})?\)", text)  # a word that stands for a value, or nothing


def explained(cls: type) -> dict[str, str]:
    """What the docstrings say of every field that has a flag, written without the code under test."""
    found: dict[str, str] = {}
    said: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, attributes = (base.__doc__ or "").partition("Attributes:\n")
        entries = re.split(r"\n {6}(?=\w+: )", "\n" + attributes)
        said |= {e.partition(":")[0].strip(): " ".join(e.partition(":")[2].split()) for e in entries}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            inner = explained(hints[field.name])
            found |= {f"{field.name}.{name}": words for name, words in inner.items()}
        elif field.name not in YAML_ONLY:
            found[field.name] = said.get(field.name, "")
    return found


# Results


def test_evaluate_and_export_agree(mora, tiny_run, tmp_path):
    run, out, data = str(tiny_run.folder), str(tmp_path / "out"), tiny_run.config.data.directory
    how = ["--dtype", "float32", "--batch-size", "4", "--max-batches", "3"]
    status, table, _ = mora("evaluate", run, *how)
    assert status == 0
    assert f"{tiny_run.summary['validation_perplexity']:,.4g}" in table
    assert mora("export", run, out) == (0, f"written: {out}\n", "")
    status, again, _ = mora("evaluate", out, "--data", data, *how)
    assert figures(again) == figures(table)
    assert len(figures(table)) == 2


def figures(table: str) -> list[str]:
    return [row.split("│")[2].strip() for row in table.splitlines() if row.count("│") == 3]


@pytest.mark.slow  # tests/run/test_folder.py compares the weights that a warm start takes
def test_a_warm_start_begins_with_the_others_loss(mora, tiny_run, tiny_yaml, tmp_path):
    """From a run and from its export: the loss of the first batch is that of the merged model."""
    mora("export", str(tiny_run.folder), str(tmp_path / "hf"))
    first = {}
    for kind, path in {"run": tiny_run.folder, "hf": tmp_path / "hf"}.items():
        where = ["--run-dir", str(tmp_path / "warm" / kind), "--init-from", str(path)]
        steps = [
            "--steps",
            "1",
            "--schedule.warmup",
            "1",
            "--restart.every",
            "0",
            "--schedule.kind",
            "cosine",
        ]
        status, out, err = mora("pretrain", str(tiny_yaml), *where, *steps)
        assert status == 0, err
        assert "validation perplexity" in out
        first[kind] = read_metrics(str(tmp_path / "warm" / kind / "metrics.jsonl"))[0]["loss"]
    assert first["run"] == first["hf"]
    np.testing.assert_allclose(first["run"], loss_of_first_batch(tiny_run), rtol=1e-6)
    assert first["run"] < read_metrics(str(tiny_run.folder / "metrics.jsonl"))[0]["loss"] - 0.3


def loss_of_first_batch(tiny_run) -> float:
    from mora_jax.models.llama import Llama
    from train.data.rows.info import load_info
    from train.data.rows.read import train_batches

    params, model = load_model(str(tiny_run.folder))
    batch = next(train_batches(load_info(tiny_run.config.data.directory), 4, 0, 0))
    variables = {"params": params}
    total, count = Llama(model, tiny_run.config.compute).apply(variables, batch, method=Llama.loss)
    return float(total / count)


# In processes of their own


@pytest.mark.slow  # the tests of one line run in this process
def test_the_program_refuses_with_status_2_and_one_line(tiny_yaml, prepare, good, tmp_path):
    for words, expected in (
        (prepare(gzip.compress(good)[:-30], "--workers", "2"), "is a truncated gzip file"),
        (["pretrain", str(tiny_yaml), "--run-dir", "run", "--mesh.data", "2"], "2 devices; 1 (cpu) are here"),
    ):
        done = program(*words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"mora: \S.*\n", done.stderr), done.stderr
        assert expected in done.stderr


@pytest.mark.parametrize("words", [["--version"], ["nonsense"]], ids=["result", "refusal"])
def test_ctrl_c_is_ignored_once_the_command_is_done(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["mora", *words])
    before = signal.getsignal(signal.SIGINT)
    assert before != signal.SIG_IGN
    with contextlib.suppress(SystemExit):
        cli.main(words)  # as a part of another program
    assert signal.getsignal(signal.SIGINT) == before
    try:
        with contextlib.suppress(SystemExit):
            cli.main()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("command", "seen"), [("export", ""), ("evaluate", "done\n")])
def test_what_work_prints_is_shown_once_ctrl_c_is_ignored(monkeypatch, capsys, command, seen):
    shown = []

    def run(_):
        print("done", flush=True)
        shown.append(capsys.readouterr().out)

    monkeypatch.setattr(cli, "run", run)
    cli.main([command])
    assert shown == [seen]
    assert capsys.readouterr().out == "done\n".removeprefix(seen)


def test_ctrl_c_ends_a_run_from_its_imports_on(tiny_run, monkeypatch):
    """An exception for it is lost in a callback of JAX, which comes while modules are imported, too."""
    seen = []

    class Importing(types.ModuleType):
        def __getattr__(self, name):
            seen.append(signal.getsignal(signal.SIGINT))
            return lambda *_: {}

    monkeypatch.setitem(sys.modules, "train.jobs.pretrain", Importing("pretrain"))
    training.train(training.Pretrain("", tiny_run.config))
    assert seen
    assert set(seen) == {signal.SIG_DFL}


@pytest.mark.slow
def test_ctrl_c_while_a_finished_preparation_exits(prepare, good, tmp_path):
    """Python takes a while to exit, and a signal then killed it without a line."""
    words = [sys.executable, "-m", "train.cli", *prepare(gzip.compress(good), "--workers", "2")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(words, cwd=tmp_path, env=environment, text=True, **pipes) as process:
        assert process.stdout
        first = process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate()
    assert (process.returncode, "mora:" in err) == (0, False), first + err


@pytest.mark.slow  # tests/jobs/test_resume.py resumes in one process
def test_a_run_goes_on_bit_for_bit_in_another_process(tiny_run, tiny_yaml, tmp_path):
    """The first half is the uninterrupted run's own; the program says nothing but its progress and table."""
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    for step in (12, 15, 18, 21, 22):
        shutil.rmtree(folder / "checkpoints" / str(step))
    done = program("pretrain", str(tiny_yaml), "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *progress = done.stderr.splitlines()
    assert first == "mora: run holds a run: resuming after 9 of 22 updates"
    assert all(line.startswith("training ") for line in progress), done.stderr
    assert {"run", "steps", "restarts", "device"} <= set(re.findall(r"\w+", done.stdout))
    metas = []
    for run in (folder, tiny_run.folder):
        with Checkpoints(str(run / "checkpoints")) as saved:
            metas.append(saved.read_meta(22)["methods"])
    assert metas[0] == metas[1]
    ours, theirs = (losses(run) for run in (folder, tiny_run.folder))
    assert len(ours) == 22
    assert ours == theirs
    merged, expected = (load_model(str(run))[0] for run in (folder, tiny_run.folder))
    np.testing.assert_array_equal(merged["lm_head"]["kernel"], expected["lm_head"]["kernel"])
    assert json.loads((folder / "summary.json").read_text())["restarts"] == 10


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(str(folder / "metrics.jsonl")) if "loss" in line]


@pytest.mark.parametrize(
    ("words", "redirection", "status"),
    [
        ("methods", ">/dev/full", 74),
        slow("methods", ">&-", 0),
        slow("evaluate nowhere", "2>/dev/full", 2),
        slow("evaluate nowhere", ">&- 2>&-", 2),
    ],
)
def test_the_status_is_right_where_output_cannot_be_written(tmp_path, words, redirection, status):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    shell = ["sh", "-c", f'exec "$0" -m train.cli {words} {redirection}', sys.executable]
    done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True)
    expected = "mora: input or output: No space left on device\n" if status == 74 else ""
    assert (done.returncode, done.stderr) == (status, expected)


def test_a_bug_shows_where_it_is(mora, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "methods", (training.SurveyMethods, lambda _: 1 / 0))
    status, out, err = mora("methods")
    assert (status, out) == (1, "")
    assert err.startswith("Traceback")
    assert err.endswith("ZeroDivisionError: division by zero\n")


def test_what_a_folder_is_called_is_no_markup(capsys):
    print_summary({"device": "[/y]", "\x1b[31m": "a\nb"}, "runs/N[/x]")
    out = capsys.readouterr().out
    assert "runs/N[/x]" in out
    assert "[/y]" in out
    assert r"\x1b[31m" in out
    assert r"a\nb" in out


INTERRUPTING = """
import os, signal, sys

class Hook:
    def find_spec(self, name, *_):
        if name == "rich":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Hook())
from train.cli.__main__ import start
start()
"""


def test_ctrl_c_while_the_program_is_imported_is_one_line():
    done = subprocess.run([sys.executable, "-c", INTERRUPTING], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "mora: interrupted\n")
