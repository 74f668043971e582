"""Checks TFDS's description of a data set before TFDS reads it, which imports whatever class a file names."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from mora_jax.errors import InputError
from mora_jax.io import is_unicode, read_json
from train.storage.buckets import in_bucket

FEATURES = "features.json"
INFO = "dataset_info.json"
# JSON keys under which TFDS looks for a Python class, in its present and its earlier formats.
_CLASSES = ("pythonClassName", "python_class_name", "type")
_OF_TFDS = re.compile(r"tensorflow_datasets\.core\.features(\.[A-Za-z_0-9]+)+", re.ASCII)
# Keys whose values become part of a file name.
_NAMES = ("name", "configName", "config_name", "version", "filepathTemplate", "filepath_template")
_LEAVES_FOLDER = re.compile(r"[/\\\0]|^\.\.?$")


def check_description(folder: epath.PathLike) -> None:
    """Raises InputError unless a description names only classes of TFDS and plain files of its own folder."""
    place = epath.Path(folder)
    for key, value in _pairs(_unicode(place / FEATURES)):
        if key in _CLASSES and isinstance(value, str) and not _OF_TFDS.fullmatch(value):
            raise InputError(f"{place / FEATURES} names {value!r}, which is not a feature of TFDS")
    for key, value in _pairs(_unicode(place / INFO)):
        if key in _NAMES and isinstance(value, str) and _LEAVES_FOLDER.search(value):
            raise InputError(f"{place / INFO} names {value!r}, which is not a file of this folder")
    _check_plain(folder)


def _unicode(path: epath.Path) -> Any:
    """Returns the content of a JSON file without lone surrogates, at which protobuf fails."""
    value = read_json(path)
    if not is_unicode(value):
        raise InputError(f"{path} is not Unicode text; copy or prepare the data set again")
    return value


def _check_plain(folder: epath.PathLike) -> None:
    """Raises InputError for a pipe, a device or a broken link: a description may name any file there."""
    for file in () if in_bucket(folder) else Path(folder).iterdir():
        if not (file.is_file() or file.is_dir()):
            raise InputError(
                f"{file} is not a regular file; remove it, and copy or prepare the data set again"
            )


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields every key and value of all mappings in a JSON value, at any depth."""
    left = [value]
    while left:
        here = left.pop()
        if isinstance(here, dict):
            yield from here.items()
            left += here.values()
        elif isinstance(here, list):
            left += here
