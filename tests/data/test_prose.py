"""Prose from Python files: what is kept, what is left out, and the files that are written."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from mora_jax.errors import InputError
from train.data.text import prose

SENTENCES = [
    "This is the first of the sentences that a reader may find in the file.",
    "The second one is about the weather, and it says that it will rain.",
    "When the third one is read, the reader knows that there is no fourth one.",
]
FILLER = "\n".join(f"It is one of the many lines that make {word} longer." for word in "abcdefghijklmno")


def a_file(docstring: str, *more: str) -> str:
    functions = "\n".join(f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(more))
    return f'"""{docstring}\n\n{FILLER * 2}\n"""\n{functions}\nraise SystemExit("imported")\n'


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the Python installation. Importing one of its files would raise."""
    monkeypatch.setattr(prose.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    monkeypatch.setattr(prose, "_read_all", lambda files: prose._read_block(files))
    (tmp_path / "lib" / "site-packages").mkdir(parents=True)
    return tmp_path / "lib"


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences_are_kept(sentence: str):
    assert prose.prose_paragraphs(f"{sentence}\n\n    {sentence}\n") == [sentence, sentence]


def test_a_paragraph_is_put_on_one_line():
    text = "This is a paragraph\n    that goes over three\n    lines of the file."
    assert prose.prose_paragraphs(text) == ["This is a paragraph that goes over three lines of the file."]


@pytest.mark.parametrize(
    "text",
    [
        "Too short.",
        ">>> it is the code that is in the example of a docstring.",
        "See https://example.org for the rest of the text that is in it.",
        "Dies ist ein deutscher Satz, der nicht zur englischen Prosa zählt.",
        "Dieser deutsche Satz hat keine Umlaute und auch keine der Worte.",
        "a name in lower case begins this one and it is not kept",
        "The table 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 is of numbers.",
        "It is a path of the kind ``{a}{b}==c`` that is in the code of it.",
    ],
)
def test_code_and_other_languages_are_left_out(text: str):
    assert prose.prose_paragraphs(text) == []


def test_docstrings_of_everything_that_has_one(library: Path):
    (library / "a.py").write_text(
        a_file(SENTENCES[0])
        + f'class C:\n    """{SENTENCES[1]}"""\n    if True:\n        async def f(self):\n'
        + f'            """{SENTENCES[2]}"""\n            x = "{FILLER[:40]}, which is no docstring."\n'
    )
    ((name, text),) = prose.gather()
    assert name == "a.py"
    assert all(sentence in text for sentence in SENTENCES)
    assert "no docstring" not in text


def test_the_topics_of_pydoc(library: Path):
    (library / "pydoc_data").mkdir()
    text = "\n\n".join([*SENTENCES, "x = {1: 2}"])
    (library / "pydoc_data" / "topics.py").write_text(f"topics = {{'if': {text!r}}}\n")
    assert list(prose.gather()) == [("pydoc_data/topics.py", "\n".join(SENTENCES))]


def test_tests_and_invalid_python_are_left_out(library: Path):
    (library / "tests").mkdir()
    (library / "tests" / "a.py").write_text(a_file(SENTENCES[0]))
    (library / "broken.py").write_text(a_file(SENTENCES[1]) + "def (:")
    (library / "null.py").write_bytes(a_file(SENTENCES[1]).encode() + b"\0")
    (library / "fine.py").write_text(a_file(SENTENCES[2]))
    assert [name for name, _ in prose.gather()] == ["fine.py"]


def test_no_paragraph_occurs_twice(library: Path):
    for name in "abc":
        (library / f"{name}.py").write_text(
            a_file(SENTENCES[0], SENTENCES[1], f"{SENTENCES[2]} {SENTENCES[0]}")
        )
    paragraphs = [p for _, text in prose.gather() for p in text.split("\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert SENTENCES[1] in paragraphs


def test_the_order_is_shuffled_and_always_the_same(library: Path):
    names = [f"{i:02d}.py" for i in range(20)]
    for name in reversed(names):
        (library / name).write_text(a_file(" ".join([f"The number of it is {name}, and that is all."] * 6)))
    order = [name for name, _ in prose.gather()]
    assert order == [name for name, _ in prose.gather()]
    assert sorted(order) == names != order


def test_the_limit(library: Path):
    for i in range(20):
        (library / f"{i}.py").write_text(a_file(" ".join([f"The number of it is {i}, and that is all."] * 9)))
    whole = list(prose.gather())
    size = sum(len(text.encode()) for _, text in whole)
    part = list(prose.gather(limit_bytes=size // 2))
    assert part == whole[: len(part)]
    assert 0 < sum(len(text.encode()) for _, text in part) <= size // 2


def test_shards_are_in_c4_s_format(library: Path, tmp_path: Path):
    for i in range(20):
        (library / f"{i}.py").write_text(a_file(" ".join([f"The number of it is {i}, and that is all."] * 9)))
    written = prose.write_shards(str(tmp_path / "out"), shards=3, validation_every=5)
    names = [f"c4-train.0000{i}-of-00003.json.gz" for i in range(3)] + [
        "c4-validation.00000-of-00001.json.gz"
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    rows = {
        name: [
            json.loads(line) for line in gzip.decompress((tmp_path / "out" / name).read_bytes()).splitlines()
        ]
        for name in names
    }
    assert {tuple(row) for part in rows.values() for row in part} == {("text", "timestamp", "url")}
    assert sorted(row["text"] for part in rows.values() for row in part) == sorted(
        t for _, t in prose.gather()
    )
    assert (
        (written.train_documents, written.validation_documents) == (16, 4) == (20 - 4, len(rows[names[-1]]))
    )
    assert all(str(tmp_path) not in row["url"] for part in rows.values() for row in part)


def test_too_little_prose(library: Path, tmp_path: Path):
    (library / "a.py").write_text(a_file(SENTENCES[0]))
    with pytest.raises(InputError, match="has only 1 documents of prose"):
        prose.write_shards(str(tmp_path / "out"))


@pytest.mark.slow
def test_every_file_of_this_python_is_found_once():
    names = [name for name, _ in prose._source_files()]
    assert len(names) == len(set(names))
    assert {"argparse.py", "numpy/__init__.py"} <= set(names)
    assert not any("site-packages" in name or "/tests/" in name for name in names)


@pytest.mark.slow
def test_processes_return_files_in_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prose, "FILES_AT_ONCE", 2)
    folder = Path(sys.modules["json"].__file__ or "").parent
    files = [(path.name, str(path)) for path in sorted(folder.glob("*.py"))]
    assert list(prose._read_all(files)) == prose._read_block(files)
    assert sum(len(paragraphs) for _, paragraphs in prose._read_block(files)) > 5
