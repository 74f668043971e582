"""English prose that every machine has: the documentation inside the running Python installation.

The text is the language reference of `pydoc_data.topics` and the docstrings of the standard library and the
installed packages. Files are parsed with `ast` and never imported. A file with enough prose is one document.
No paragraph occurs in two documents.
"""

import ast
import gzip
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from mora_jax.errors import InputError
from train.console.progress import progress

LIMIT_BYTES = 14_000_000
SEED = 0
MIN_DOCUMENT = 200  # characters
MIN_WORDS = 8
MIN_LETTERS = 0.8  # share of a paragraph that is letters and spaces
MAX_SOURCE_BYTES = 1_000_000  # larger files hold tables and generated code
MIN_QUOTED_BYTES = 1_000
FILES_AT_ONCE = 64
TIMESTAMP = "2000-01-01T00:00:00Z"  # a field of C4; this text has no date

TOPICS = "pydoc_data/topics.py"
TESTS = {"test", "tests", "testing", "idlelib", "lib2to3", "__pycache__", "_vendor", "vendor"}
COMMON_WORDS = "a an and are as be by for from if in is it of on or that the this to when which will with"
COMMON = frozenset(COMMON_WORDS.split(" "))
CODE = re.compile(r">>>|\.\. |::|`{3}|[{}<>=|\\_]{2}|^[-*+#@:$%]|\w\(\w*,|https?:")
QUOTED = re.compile(rb'"""(.*?)"""', re.DOTALL)
UNDERLINE = re.compile(r"^\s*[-=~^]{3,}\s*$", re.MULTILINE)
SENTENCE = re.compile(r"^[A-Z\"'(`].*[.!?:)\"']$")


@dataclass(frozen=True)
class Prose:
    """How much text `write_shards` wrote."""

    train_documents: int
    validation_documents: int
    characters: int


def gather(limit_bytes: int = LIMIT_BYTES) -> Iterator[tuple[str, str]]:
    """Yields documents of prose in a fixed, shuffled order, each as (source file, text).

    Args:
      limit_bytes: UTF-8 bytes of text, at most.

    Yields:
      The name of the file, relative to the installation, and its paragraphs, one a line.
    """
    files = _source_files()
    seen: set[str] = set()
    taken = 0
    with progress("gathering prose", len(files), "files") as advance:
        for name, paragraphs in _read_all(files):
            advance(1)
            text = "\n".join(paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph not in seen)
            size = len(text.encode())
            if len(text) < MIN_DOCUMENT:
                continue
            if taken + size > limit_bytes:
                return
            seen.update(paragraphs)
            taken += size
            yield name, text


def write_shards(
    folder: str, shards: int = 4, validation_every: int = 25, limit_bytes: int = LIMIT_BYTES
) -> Prose:
    """Writes gathered prose in C4's format, as `c4-train.*.json.gz` and `c4-validation.*.json.gz`.

    Args:
      folder: where to write; made if it is missing.
      shards: files of training text.
      validation_every: one of so many documents becomes validation text.
      limit_bytes: UTF-8 bytes of text, at most.

    Returns:
      How much was written.

    Raises:
      InputError: this installation has fewer documents of prose than shards.
    """
    documents = list(gather(limit_bytes))
    held_out = documents[::validation_every]
    train = [document for i, document in enumerate(documents) if i % validation_every]
    if len(train) < shards:
        raise InputError(
            f"this Python installation has only {len(documents)} documents of prose; use C4 text instead"
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    for index in range(shards):
        _write(Path(folder) / f"c4-train.{index:05d}-of-{shards:05d}.json.gz", train[index::shards])
    _write(Path(folder) / "c4-validation.00000-of-00001.json.gz", held_out)
    return Prose(len(train), len(held_out), sum(len(text) for _, text in documents))


def prose_paragraphs(text: str) -> list[str]:
    """Returns the paragraphs of a docstring that are English sentences, each on one line."""
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", UNDERLINE.sub("", text)))
    return [paragraph for paragraph in paragraphs if _is_prose(paragraph)]


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split(" ")
    if len(words) < MIN_WORDS or not paragraph.isascii():
        return False
    if CODE.search(paragraph) or not SENTENCE.match(paragraph):
        return False
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    common = sum(word.lower() in COMMON for word in words)
    return letters >= MIN_LETTERS * len(paragraph) and 6 * common >= len(words)


def _source_files() -> list[tuple[str, str]]:
    """Returns (name relative to its root, path) of every file to read, sorted by name and then shuffled."""
    roots = dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    files = {}
    for root in map(Path, roots):
        for path in root.rglob("*.py"):
            name = path.relative_to(root).as_posix()
            if not name.startswith(("site-packages/", "dist-packages/")) and not TESTS & set(path.parts[:-1]):
                files[name] = str(path)
    ordered = sorted(files.items())
    random.Random(SEED).shuffle(ordered)
    return ordered


def _read_all(files: list[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Yields the paragraphs of every file in order. Processes share the parsing, which takes a minute."""
    blocks = [files[i : i + FILES_AT_ONCE] for i in range(0, len(files), FILES_AT_ONCE)]
    pool = ProcessPoolExecutor(mp_context=get_context("spawn"))
    try:
        for block in pool.map(_read_block, blocks):
            yield from block
    finally:
        pool.shutdown(cancel_futures=True)


def _read_block(files: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    return [(name, _read_file(name, Path(path))) for name, path in files]


def _read_file(name: str, path: Path) -> list[str]:
    """Returns the prose of one file, which is none if the file is not Python of this version."""
    try:
        source = path.read_bytes()
        if name != TOPICS and not _worth_parsing(source):
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # about escape sequences in other packages
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, OSError):
        return []
    if name == TOPICS:
        constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        texts = (value for value in constants if isinstance(value, str))
    else:
        texts = _docstrings(tree)
    return [paragraph for text in texts for paragraph in prose_paragraphs(text)]


def _worth_parsing(source: bytes) -> bool:
    """Returns whether a file holds enough between triple quotes; parsing takes nearly all of the time."""
    return len(source) <= MAX_SOURCE_BYTES and sum(map(len, QUOTED.findall(source))) >= MIN_QUOTED_BYTES


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yields the docstrings of a module, class or function and of those inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    for inner in (*getattr(node, "body", ()), *getattr(node, "orelse", ())):
        if hasattr(inner, "body"):
            yield from _docstrings(inner)


def _write(path: Path, documents: list[tuple[str, str]]) -> None:
    lines = [
        json.dumps({"text": text, "timestamp": TIMESTAMP, "url": f"pydoc:{name}"}) for name, text in documents
    ]
    path.write_bytes(gzip.compress("".join(line + "\n" for line in lines).encode(), compresslevel=6, mtime=0))
