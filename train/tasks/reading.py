"""Raw text to reading comprehension: each document with questions about it, whose answers it gives itself.

The idea is AdaptLLM's (arXiv:2309.09530): connectives such as "therefore" say how two sentences are related,
and the relation becomes a question. The program and its wordings are our own. The result is plain text, which
a model is trained on as a whole.
"""

import random
import re
from collections.abc import Mapping
from typing import NamedTuple

from mora_jax.hf.folder import whole_folder
from mora_jax.io import json_text
from train.console.progress import progress
from train.data.text.entries import TEXT_KEY
from train.data.text.files import documents, shards
from train.storage.files import naming_errors

QUESTIONS = 5
# A sentence ends at a mark that space and a capital, a digit or a quotation mark follow.
_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])")
_LEAST, _MOST = 5, 60  # words of a sentence that is asked about
_TITLE = 25  # words of a title, at most


class Relation(NamedTuple):
    """How a sentence follows from the one before it.

    Attributes:
      connectives: what the sentence begins with, as a regular expression.
      questions: wordings of the question; `{}` stands for the sentence before.
    """

    connectives: str
    questions: tuple[str, ...]


RELATIONS: Mapping[str, Relation] = {
    "effect": Relation(
        "therefore|thus|hence|consequently|accordingly|as a (?:result|consequence)|for this reason",
        ("What follows from this: {}", "State a consequence. {}", "{} What does this lead to?"),
    ),
    "contrast": Relation(
        "however|in contrast|by contrast|conversely|on the other hand|nevertheless|nonetheless",
        ("What stands against this: {}", "Name something that contrasts with it. {}"),
    ),
    "same": Relation(
        "in other words|that is to say|that is(?=,)|put differently|in short",
        ("Say it in other words: {}", "What does this mean: {}"),
    ),
    "example": Relation(
        "for example|for instance|as an example",
        ("Give an example of this: {}", "{} What is an example?"),
    ),
    "addition": Relation(
        "moreover|furthermore|in addition|additionally|similarly|likewise",
        ("What else is there to say: {}", "What supports this: {}"),
    ),
}
# Without a comma, a connective is one if the sentence's subject follows: "Thus the", not "However long".
_SUBJECT = r"(?=(?:the|an?|this|these|those|its?|they|their|we|our|he|she|there)\b)"
_BEGINS = {
    name: re.compile(rf"(?:{relation.connectives})(?:,\s+|\s+{_SUBJECT})", re.IGNORECASE)
    for name, relation in RELATIONS.items()
}
_BECAUSE = re.compile(r"^(.*\w),?\s+because\s+(?!of\b)(.+)$", re.IGNORECASE | re.DOTALL)
_ABOUT_TITLE = ("What would be a title of this text?", "What is this text about, in a few words?")
_GOES_ON = ("How does the text go on after this: {}", "Which sentence comes next? {}")


class Question(NamedTuple):
    """A question about a text, and its answer."""

    asked: str
    answer: str


def questions(text: str, rng: random.Random) -> list[Question]:
    """Returns all questions that are found in a text, in the order of the text.

    >>> found, _ = questions("All men here are mortal. Thus, every king will die.", random.Random(0))
    >>> found.answer
    'Every king will die.'
    """
    first, _, rest = text.partition("\n")
    titled = bool(rest.strip()) and len(first.split()) <= _TITLE and not first.rstrip().endswith(".")
    found = [Question(rng.choice(_ABOUT_TITLE), first.strip())] if titled and first.strip() else []
    sentences = _sentences(rest if titled else text)
    for before, sentence in zip(["", *sentences], sentences, strict=False):
        found += _related(before, sentence, rng)
    fitting = [at for at in range(1, len(sentences)) if _fits(sentences[at - 1]) and _fits(sentences[at])]
    if fitting:
        at = rng.choice(fitting)
        found.append(Question(rng.choice(_GOES_ON).format(sentences[at - 1]), sentences[at]))
    return found


def comprehension(text: str, seed: int = 0, most: int = QUESTIONS) -> str:
    """Returns a text with questions about it and their answers. One in which none is found stays as it is.

    Args:
      text: the document; a short first line without a full stop is its title.
      seed: of the choice of questions and wordings, which also depends on the text.
      most: questions, at most.
    """
    rng = random.Random(f"{seed} {text}")
    found = questions(text, rng)
    kept = sorted(rng.sample(range(len(found)), min(most, len(found))))
    asked = [f"Question: {found[at].asked}\nAnswer: {found[at].answer}" for at in kept]
    return "\n\n".join([text.rstrip(), *asked])


def convert(
    source: str, out: str, key: str = TEXT_KEY, seed: int = 0, most: int = QUESTIONS
) -> tuple[int, int]:
    """Writes the documents of files, each with questions, as JSON lines of `text`: a file for each file.

    Args:
      source: a file, a glob or a folder of text.
      out: the folder to write, which must not exist, or be empty.
      key: the key or column that holds the text.
      seed: of the choice of questions.
      most: questions of a document.

    Returns:
      The number of documents, and of those in which a question was found.

    Raises:
      InputError: bad text (see `documents`), or a folder that is not empty.
    """
    files, read, asked = shards(source), 0, 0
    with naming_errors(out), whole_folder(out) as folder, progress("reading", len(files), "files") as advance:
        for number, file in enumerate(files):
            with (folder / f"{number:05}.jsonl").open("w") as lines:
                for text in documents(file, 0, key):
                    made = comprehension(text, seed, most)
                    lines.write(json_text({TEXT_KEY: made}) + "\n")
                    read, asked = read + 1, asked + (made != text.rstrip())
            advance(1)
    return read, asked


def _sentences(text: str) -> list[str]:
    return [sentence for part in text.splitlines() for sentence in _END.split(part.strip()) if sentence]


def _fits(sentence: str) -> bool:
    return _LEAST <= len(sentence.split()) <= _MOST


def _related(before: str, sentence: str, rng: random.Random) -> list[Question]:
    """Returns the questions that a sentence and the one before it give."""
    found = []
    for name, begins in _BEGINS.items():
        match = begins.match(sentence)
        if match and _fits(before) and _fits(sentence):
            asked = rng.choice(RELATIONS[name].questions).format(before)
            found.append(Question(asked, _capital(sentence[match.end() :])))
            break
    because = _BECAUSE.match(sentence)
    if because and _fits(sentence):
        found.append(Question(f"Why is this so: {because[1]}.", _capital(because[2])))
    return found


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
