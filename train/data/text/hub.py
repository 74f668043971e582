"""Text from data sets of the Hugging Face Hub: their files, as they lie there."""

import re
from pathlib import Path

from etils import epath

from mora_jax.errors import InputError
from mora_jax.hf.hub import DATASETS, dataset_folder, is_hub_id
from train.data.text.files import SUFFIXES

# How files of a split are named. Those that name no split are training text.
_NAMES = {"train": "train", "validation": "valid|validation|val|dev"}
_ALL = "train|valid|validation|val|dev|test"
_ABOUT = ("dataset_infos.json", "dataset_info.json", "state.json", "config.json")  # no text


def is_dataset(source: str) -> bool:
    """Returns whether a source is a data set of the Hub, and not a file or folder.

    >>> is_dataset("hf://datasets/org/name/data/train-*.parquet"), is_dataset("text/a.jsonl")
    (True, False)
    """
    return source.startswith(DATASETS) or (is_hub_id(source) and not source.lower().endswith(SUFFIXES))


def hub_files(source: str, split: str) -> list[epath.Path]:
    """Returns local copies of the files of a split, sorted by name. They are downloaded first.

    Args:
      source: `org/name[@revision]` or `hf://datasets/org/name[@revision]`, then the files whose names say
        that they are of the split; or `/` and a folder, file or pattern of this data set behind that.
      split: "train" or "validation".

    Raises:
      InputError: there is no such data set or file; see `dataset_folder`.
      OSError: the Hub cannot be reached.
    """
    owner, _, rest = source.removeprefix(DATASETS).partition("/")
    name, _, path = rest.partition("/")
    if path:
        found = _files(f"{owner}/{name}", [path, f"{path.rstrip('/')}/*"], _under(path))
    else:
        words = _NAMES[split].split("|")
        found = _files(f"{owner}/{name}", [f"*{word}*" for word in words], _names(_NAMES[split]))
    if not found and not path and split == "train":
        found = _files(f"{owner}/{name}", ["*"], re.compile(f"^(?!.*{_names(_ALL).pattern})"))
    if not found:
        raise InputError(
            f"{source} has no file of {split} text ({', '.join(SUFFIXES)}); name some of its files: "
            f"{DATASETS}{owner}/{name}/data/train-*.parquet"
        )
    return found


def _files(name: str, patterns: list[str], wanted: re.Pattern) -> list[epath.Path]:
    """Returns the files of text of a data set whose names are wanted. `patterns` are a superset."""
    folder = dataset_folder(name, [pattern for each in patterns for pattern in _of_text(each)])
    files = [file for file in Path(folder).rglob("*") if file.name.lower().endswith(SUFFIXES)]
    found = [file for file in files if wanted.search(str(file.relative_to(folder)))]
    return [epath.Path(file) for file in sorted(found) if file.name not in _ABOUT]


def _of_text(pattern: str) -> list[str]:
    return [f"{pattern}{suffix}" for suffix in SUFFIXES] if pattern.endswith("*") else [pattern]


def _names(words: str) -> re.Pattern:
    """Returns what finds one of some words, split by |, in the name of a file."""
    return re.compile(rf"(?<![A-Za-z])({words})(?![A-Za-z])")


def _under(path: str) -> re.Pattern:
    """Returns what finds files of this name, with * and ?, or in a folder of it."""
    whole = re.escape(path.rstrip("/")).replace(r"\*", ".*").replace(r"\?", ".")
    return re.compile(f"^{whole}(/.*)?$")
