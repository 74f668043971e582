"""settings.json: what the rows of a data set depend on, written at the first start and compared later."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from etils import epath

from mora_jax.errors import InputError
from mora_jax.io import read_json, read_object
from train.console.progress import progress
from train.data.rows import layout
from train.data.rows.options import RowOptions
from train.data.text.entries import TEXT_KEY
from train.data.text.share import TextShard
from train.data.tokenizer import Tokenizer
from train.storage.files import remove_parts, writable, write_whole
from train.storage.format import FORMAT, KEY, check_format

HASHED = 4  # shards of text that are hashed at a time


@dataclass(frozen=True)
class Settings:
    """What the rows depend on. Those with a default are not stated by earlier versions, which mean it.

    `train` and `validation` list the name and size of every shard of text. `bos_id` and `eos_id` are put
    around each document; None for none. `text_key` is of the form "text", `fields` of others; for both, and
    what follows, see `RowOptions`.
    """

    sequence_length: int
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int | None
    train: list[list]
    validation: list[list]
    bos_id: int | None = None
    text_key: str = TEXT_KEY
    form: str = "text"
    fields: str = ""
    loss: str = "completions"
    pack: bool = True
    overlong: str = "drop"
    template_sha256: str = ""
    validation_share: float = 0.0

    @property
    def joined(self) -> bool:
        """Whether rows are cut from joined documents: they have tokens alone, which all count."""
        return self.form == "text" and self.pack


def settings_of(
    sequence_length: int,
    tokenizer: Tokenizer,
    text: Mapping[str, Sequence[TextShard]],
    options: RowOptions,
    validation_share: float,
) -> Settings:
    """Returns the settings of rows that are made of these shards, in this way, with this tokenizer."""
    train, validation = ([[s.name, s.size] for s in text.get(split, ())] for split in layout.SPLITS)
    return Settings(
        sequence_length=sequence_length,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        train=train,
        validation=validation,
        bos_id=tokenizer.bos_id,
        text_key=options.form.keys[0] if options.form.name == "text" else TEXT_KEY,
        **options.facts(),
        validation_share=validation_share,
    )


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


def check_settings(folder: epath.PathLike, settings: Settings, finished: bool) -> bool:
    """Compares the settings of a data set, of any format that can be read.

    Args:
      folder: the data set.
      settings: those that are wanted.
      finished: whether the sizes of the text must be equal. Before, each finished shard knows its text.

    Returns:
      Whether the stated settings are exactly the wanted ones.

    Raises:
      InputError: if the data set was started with other ones.
    """
    stated = read_settings(folder, str(folder))
    stated = {f.name: f.default for f in fields(Settings) if f.default is not MISSING} | stated
    same = stated.get(KEY) == FORMAT
    for name, wanted in asdict(settings).items():
        held = stated.get(name)
        same &= held == wanted
        if held != wanted and (finished or _names(held) != _names(wanted)):
            was, now = (f"{len(v)} shards of text" if isinstance(v, list) else v for v in (held, wanted))
            if was == now and isinstance(held, list):
                was, now = _first_difference(held, wanted)
            raise InputError(
                f"{folder} was prepared with another {name} ({was}, now {now}); choose another folder"
            )
    return same


def check_text(folder: epath.PathLike, text: Mapping[str, Sequence[TextShard]]) -> None:
    """Raises InputError if a finished data set was made from text of another content.

    Data sets of earlier versions do not state it.
    """
    file = epath.Path(folder) / layout.TEXT
    if not file.exists():
        return
    stated = read_object(file)
    shards = [(split, index, shard) for split in text for index, shard in enumerate(text[split])]
    with progress("comparing the text", len(shards), "shards") as advance, ThreadPoolExecutor(HASHED) as pool:
        for (split, index, shard), found in zip(
            shards, pool.map(lambda each: each[2].sha256(), shards), strict=True
        ):
            advance(1)
            held = stated.get(split)
            if not isinstance(held, list) or held[index : index + 1] != [found]:
                raise InputError(
                    f"{folder} was prepared with another {split} text: {shard.name} has other content now; "
                    "choose another folder"
                )


def _names(value: Any) -> Any:
    """The names in a list of shards; any other setting as it is."""
    if isinstance(value, list) and all(isinstance(pair, list) and pair for pair in value):
        return [pair[0] for pair in value]
    return value


def _first_difference(held: list, wanted: list) -> tuple[str, str]:
    """The first shards of equally many that differ."""
    pair = next((a, b) for a, b in zip(held, wanted, strict=True) if a != b)
    was, now = (" of ".join(map(str, shard[::-1])) if isinstance(shard, list) else shard for shard in pair)
    return f"size {was}", f"size {now}"


def has_finished_shards(folder: Path) -> bool:
    """Returns whether an unfinished data set on a disk has shards that a further attempt keeps."""
    return any((folder / layout.UNFINISHED).glob("*.json"))


def start(folder: Path, settings: Settings) -> None:
    """Writes the settings of a new data set on a disk; compares those of one that was started before.

    Text that was mended since then has other sizes, which are stated from now on. Before a shard is finished,
    the settings may still change.
    """
    path = folder / layout.SETTINGS
    if path.exists() and has_finished_shards(folder) and check_settings(folder, settings, finished=False):
        return
    with writable(folder, f"{folder} cannot be written to"):
        remove_parts(folder)
        write_whole(path, json.dumps({KEY: FORMAT, **asdict(settings)}))
