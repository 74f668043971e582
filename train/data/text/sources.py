"""The kinds of text that rows are made of: files, data sets of TFDS, and those of the Hugging Face Hub."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mora_jax.errors import InputError
from train.data.text.files import FileShard, file_shards
from train.data.text.forms import TEXT, Form
from train.data.text.hub import hub_files, is_dataset
from train.data.text.share import Share, TextShard, repeated
from train.data.text.tfds import PREFIX, tfds_shards

MOST_TIMES = 1_000


def open_text(
    source: str,
    validation: str,
    tfds_data_dir: str = "",
    form: Form = TEXT,
    share: float = 0.0,
    mixture: Sequence[str] = (),
) -> dict[str, list[TextShard]]:
    """Returns the shards of the splits "train" and "validation"; without a source, of the latter alone.

    Args:
      source: training text: a glob, a folder, a file (see `files.shards`), `tfds:NAME`, or a data set of the
        Hub (see `hub_files`); empty for none.
      validation: validation text, likewise; empty for the validation split of a `tfds:` source.
      tfds_data_dir: folder in which `tfds:NAME` is looked up; empty for TFDS's default.
      form: which keys, columns or features hold what.
      share: fraction of the training text that is the validation text instead; 0 for none.
      mixture: in the place of `source`, several, each as SOURCE=TIMES: how often its examples are read.

    Raises:
      InputError: text is missing, cannot be read, or belongs to both splits.
    """
    if source and mixture:
        raise InputError("--source and --mixture exclude each other; a mixture holds all training text")
    if share:
        _check_share(share, validation, source or mixture)
    elif not validation and not source.startswith(PREFIX):
        raise InputError(
            "--validation is missing, or --validation-share; only a tfds: source has a validation split"
        )
    sources = [(source, 1.0)] if source else list(map(_times, mixture))
    read = [(times, _shards(name, "train", tfds_data_dir, form)) for name, times in sources]
    train = [shard for _, shards in read for shard in shards]
    if twice := [shard for shard, count in Counter(map(_place, train)).items() if count > 1]:
        raise InputError(f"{twice[0]} is in the training text twice; state by --mixture how often it is read")
    if share:
        held_out: list[TextShard] = [Share(shard, share, validation=True, first=False) for shard in train]
    else:
        held_out = _shards(validation or source, "validation", tfds_data_dir, form)
    places = set(map(_place, held_out))
    if both := [shard for shard in train if _place(shard) in places]:
        raise InputError(f"{both[0].name} is in the training and the validation text; name other files")
    parts = [part for times, shards in read for shard in shards for part in repeated(shard, times, share)]
    return ({"train": parts} if parts else {}) | {"validation": held_out}


def _check_share(share: float, validation: str, source: object) -> None:
    if not 0 < share < 1:
        raise InputError(f"--validation-share must be above 0 and below 1, not {share}")
    if validation or not source:
        raise InputError("--validation-share needs --source or --mixture, and no --validation")


def _place(shard: TextShard) -> object:
    """Returns what identifies the text of a shard, however the path of its file is written."""
    return Path(shard.path).absolute() if isinstance(shard, FileShard) else shard


def _times(given: str) -> tuple[str, float]:
    """Returns a source of a mixture, and how often it is read."""
    source, _, times = given.rpartition("=")
    with contextlib.suppress(ValueError):
        if source and 0 < float(times) <= MOST_TIMES:
            return source, float(times)
    raise InputError(f"--mixture {given} must be SOURCE=TIMES, with times above 0 and up to {MOST_TIMES}")


def _shards(source: str, split: str, tfds_data_dir: str, form: Form) -> list[TextShard]:
    if source.startswith(PREFIX):
        if form.name != "text":
            raise InputError(f"{source} holds text alone; for the form {form.name}, name files")
        return [*tfds_shards(source, split, tfds_data_dir, *form.keys)]
    if is_dataset(source):
        return [FileShard(path, path.stat().length, form) for path in hub_files(source, split)]
    return [*file_shards(source, form)]
