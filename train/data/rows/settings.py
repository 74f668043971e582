"""settings.json: what the rows of a data set depend on, written at the first start and compared later."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from etils import epath

from mora_jax.errors import InputError
from mora_jax.io import read_json
from train.data.rows import layout
from train.data.text.sources import TextShard
from train.data.tokenizer import Tokenizer
from train.storage.files import remove_parts, writable, write_whole
from train.storage.format import FORMAT, KEY, check_format


@dataclass(frozen=True)
class Settings:
    """What the rows depend on. `train` and `validation` list the name and size of every shard of text."""

    sequence_length: int
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    train: list[list]
    validation: list[list]


def settings_of(
    sequence_length: int, tokenizer: Tokenizer, text: Mapping[str, Sequence[TextShard]]
) -> Settings:
    """Returns the settings of rows that are made of these shards with this tokenizer."""
    files = {split: [[shard.name, shard.size] for shard in shards] for split, shards in text.items()}
    return Settings(sequence_length, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eos_id, **files)


def read_settings(folder: epath.PathLike, name: str) -> dict[str, Any]:
    """Returns what the settings.json of a data set states.

    Args:
      folder: where to read it, which may be in a bucket.
      name: the data set, as the user names it.

    Raises:
      InputError: the file is damaged, or the data set has a newer format.
    """
    stated = read_json(epath.Path(folder) / layout.SETTINGS)
    if not isinstance(stated, dict):
        raise InputError(f"{name}/{layout.SETTINGS} is damaged; choose another folder")
    check_format(stated, name)
    return stated


def check_settings(folder: epath.PathLike, settings: Settings) -> None:
    """Raises InputError if a data set was started with other settings; of any format that can be read."""
    stated = read_settings(folder, str(folder))
    for name, wanted in asdict(settings).items():
        held = stated.get(name)
        if held != wanted:
            was, now = (f"{len(v)} shards of text" if isinstance(v, list) else v for v in (held, wanted))
            raise InputError(
                f"{folder} was prepared with another {name} ({was}, now {now}); choose another folder"
            )


def start(folder: Path, settings: Settings) -> None:
    """Writes the settings of a new data set on a disk; compares those of one that was started before."""
    path = folder / layout.SETTINGS
    if path.exists():
        check_settings(folder, settings)
        return
    with writable(folder, f"{folder} cannot be written to"):
        remove_parts(folder)
        write_whole(path, json.dumps({KEY: FORMAT, **asdict(settings)}))
