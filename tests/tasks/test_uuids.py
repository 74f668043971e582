"""The memory task: pairs, the share of right characters, scores of a run's checkpoints, the picture."""

import shutil
import uuid

import numpy as np
import pytest

from mora_jax.errors import InputError
from train.cli.main import main
from train.jobs.generate import load_generator
from train.run.model import load_state
from train.tasks import uuids
from train.tasks.uuids import Pair, Score, character_accuracy, make_pairs, read_pairs, score_run, write_pairs

PAIRS = [Pair("abc\n", "de"), Pair("d\n", "fgh")]


def test_pairs_are_of_a_seed_and_uuids_of_version_4():
    made = make_pairs(50, seed=3)
    assert made == make_pairs(50, seed=3)
    assert made[:20] == make_pairs(20, seed=3)
    assert made != make_pairs(50, seed=4)
    texts = [text for pair in made for text in (pair.prompt.removesuffix("\n"), pair.completion)]
    assert len(set(texts)) == 100
    assert all(str(uuid.UUID(text)) == text and uuid.UUID(text).version == 4 for text in texts)


def test_pairs_are_read_as_they_were_written(tmp_path):
    made = make_pairs(3, seed=0)
    write_pairs(str(tmp_path / "a" / "p.jsonl"), made)
    assert read_pairs(str(tmp_path / "a" / "p.jsonl")) == made


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no pair"),
        ('{"prompt": "a"}', "line 1 has no strings"),
        ('{"prompt": "a", "completion": ""}', "line 1 has no strings"),
        ('{"prompt": "a", "completion": "--"}', "line 1 has no strings"),
        ('{"prompt": "a", "completion": "b"}\n[]', "line 2 has no strings"),
        ("{", "line 1"),
    ],
)
def test_a_file_without_pairs_is_refused(tmp_path, content, message):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        read_pairs(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize(
    ("said", "share"),
    [
        ("01234567-abcd", 1),
        ("01234567abcd", 8 / 12),  # behind a missing hyphen, nothing stands in its place
        ("01234567-abcd and more", 1),
        ("01234567", 8 / 12),
        ("", 0),
        ("00000000-0000", 1 / 12),
    ],
)
def test_characters_count_where_they_belong(said, share):
    assert character_accuracy("01234567-abcd", said) == pytest.approx(share)


def test_guessing_gets_as_much_as_is_said():
    """As little as the paper reports of models that have learned nothing."""
    values, guesses = ([pair.completion for pair in make_pairs(2000, seed)] for seed in (0, 1))
    shares = [character_accuracy(*both) for both in zip(values, guesses, strict=True)]
    assert np.mean(shares) == pytest.approx(0.098, abs=0.002)


@pytest.mark.slow
def test_a_step_names_its_checkpoint(tiny_run):
    path = str(tiny_run.folder)
    assert [int(load_state(path, step=step)[1].step) for step in (6, 22, None)] == [6, 22, 22]
    with pytest.raises(InputError, match=r"holds no complete checkpoint 7; it has 3, 6, 9, 12"):
        load_state(path, step=7)


@pytest.fixture(scope="module")
def scored(tiny_run, tmp_path_factory):
    """The tiny run with scores, and what its checkpoints were asked to load and to answer."""
    folder = shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("scored") / "run")
    asked = {}

    def complete(generator, prompts, *_, **__):
        step = loaded[-1]
        asked[step] = [generator.codec.decode((), prompt) for prompt in prompts]
        return [FakeCompletion({3: "de", 22: "fgx"}[step])] * 2

    loaded = []

    def load(*args, step, **others):
        loaded.append(step)
        return load_generator(*args, step=step, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uuids, "complete", complete)
        patch.setattr(uuids, "load_generator", load)
        found = score_run(str(folder), PAIRS, (3, 22), dtype="float32")
    return folder, found, asked


class FakeCompletion:
    def __init__(self, text: str) -> None:
        self.text = text


def test_scores_are_of_each_step(scored):
    folder, found, asked = scored
    assert found == [Score(3, 0.5, 0.5), Score(22, (0 + 2 / 3) / 2, 0.0)]
    assert uuids.read_scores(str(folder)) == found
    (events,) = (folder / "tensorboard/uuid").iterdir()
    assert events.read_bytes().count(b"uuid/character_accuracy") == 2
    assert asked == {3: ["abc\n", "d\n"], 22: ["abc\n", "d\n"]}


def test_runs_are_drawn(scored, tmp_path, capsys):
    folder = str(scored[0])
    main(["task", "uuid-plot", folder, folder, "--out", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_one_line(scored, tiny_run, tmp_path, capsys):
    file = str(tmp_path / "p.jsonl")
    write_pairs(file, PAIRS)
    for words, message in (
        (["uuid-plot", str(tiny_run.folder), "--out", str(tmp_path / "q.png")], "mora task uuid-score"),
        (["uuid-plot", "--out", str(tmp_path / "q.png")], "give the folders of runs"),
        (["uuid-score", str(tmp_path), "--pairs", file], "holds no run"),
        (
            ["uuid-score", str(scored[0]), "--pairs", file, "--steps", "5"],
            "checkpoint 5",
        ),
        (["uuid-pairs", file], "exists already"),
        (["uuid-pair"], "did you mean task uuid-pairs"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["task", *words])
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert message in error
        assert error.count("\n") == 1
