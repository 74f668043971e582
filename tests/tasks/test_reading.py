"""Reading comprehension: questions that a text answers itself, and files of it."""

import json
import random

import pytest
from tiny import tiny_documents

from mora_jax.errors import InputError
from train.cli.main import main
from train.data.text.files import documents
from train.tasks.reading import RELATIONS, comprehension, convert, questions

BEFORE = "The first of these sentences is long enough."
ANSWER = "the second one is long enough as well."


def answers(text: str) -> list[str]:
    return [found.answer for found in questions(text, random.Random(0))]


@pytest.mark.parametrize(
    ("begin", "found"),
    [
        ("Therefore, ", True),
        ("thus ", True),
        ("As a consequence, ", True),
        ("In contrast, ", True),
        ("However ", True),
        ("That is, ", True),
        ("For instance, ", True),
        ("Furthermore, ", True),
        ("That is ", False),
        ("Thusly, ", False),
        ("Then, ", False),
    ],
)
def test_a_connective_makes_a_question(begin, found):
    text = f"{BEFORE} {begin[0].upper()}{begin[1:]}{ANSWER}"
    assert ("The second one is long enough as well." in answers(text)) == found
    if found:
        asked = questions(text, random.Random(0))[0].asked
        assert BEFORE in asked
        assert any(asked in [q.format(BEFORE) for q in r.questions] for r in RELATIONS.values())


def test_a_however_that_is_no_connective():
    assert len(answers(f"{BEFORE} However long it takes, we wait for the end of it.")) == 1  # what comes next


def test_a_reason_makes_a_question():
    asked, answer = questions("The rats were ill because they ate too much zinc.", random.Random(0))[0]
    assert asked == "Why is this so: The rats were ill."
    assert answer == "They ate too much zinc."
    assert not answers("The rats were very ill because of too much zinc.")


@pytest.mark.parametrize(("first", "titled"), [("Zinc in rats", True), ("Zinc is in rats.", False)])
def test_a_title_is_asked_for(first, titled):
    assert (first in answers(f"{first}\n{BEFORE}")) == titled


@pytest.mark.parametrize("text", ["", "\n", "One.", "Zinc in rats", BEFORE, "a\n\n"])
def test_a_text_without_a_question_stays(text):
    if not answers(text):
        assert comprehension(text) == text.rstrip()


def test_the_questions_follow_the_text_and_are_of_the_seed():
    text = f"Zinc in rats\n{BEFORE} Thus, {ANSWER} {BEFORE} However, {ANSWER} {BEFORE} In short, {ANSWER}"
    made = comprehension(text, seed=1, most=3)
    assert made == comprehension(text, seed=1, most=3)
    assert len({comprehension(text, seed=n, most=3) for n in range(8)}) > 1
    assert made.startswith(text + "\n\nQuestion: ")
    assert made.count("\nQuestion: ") == made.count("\nAnswer: ") == 3
    assert comprehension(text, most=99).count("\nQuestion: ") == 5  # with the title, and what comes next


def test_files_are_read_and_written(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    texts = {"a": [f"{BEFORE} Thus, {ANSWER}", "One."], "b": tiny_documents(1, seed=0)}
    for name, found in texts.items():
        lines = "".join(json.dumps({"body": text}) + "\n" for text in found)
        (tmp_path / "in" / f"{name}.jsonl").write_text(lines)
    out, words = tmp_path / "out", ["--source", str(tmp_path / "in"), "--text-key", "body"]
    main(["task", "reading", *words, "--out", str(out)])
    assert "3 documents, 1 with questions" in capsys.readouterr().out
    made = [list(documents(file, 0)) for file in sorted(out.iterdir())]
    assert [len(each) for each in made] == [2, 1]
    assert made[0][0].startswith(texts["a"][0] + "\n\nQuestion: ")
    assert (made[0][1], made[1]) == ("One.", texts["b"])
    with pytest.raises(InputError, match="exists already"):
        convert(str(tmp_path / "in"), str(out), "body")
    with pytest.raises(InputError, match="has no string `text`"):
        convert(str(tmp_path / "in"), str(tmp_path / "other"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
