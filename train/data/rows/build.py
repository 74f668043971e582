"""From text to a TFDS data set of fixed-length rows: parallel over shards, continued where it stopped.

TFDS's own preparation starts afresh after an interruption and works in one process, so the row files are
written here, with TFDS's serializer, and described to TFDS at the end (`tfds.folder_dataset.write_metadata`).
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from mora_jax.errors import InputError
from mora_jax.io import read_json
from train.console.exits import naming
from train.console.progress import Bar
from train.data.rows import layout
from train.data.rows import workers as pool
from train.data.rows.read import DataInfo, load_info
from train.data.rows.shard import Advance, Counts, Job, TextShard
from train.data.text.c4 import file_shards
from train.data.text.tfds import PREFIX, tfds_shards
from train.data.tokenizer import Tokenizer
from train.storage import buckets, lock
from train.storage.buckets import in_bucket, reachable
from train.storage.files import sync, writable, write_whole


@dataclass(frozen=True)
class Settings:
    """All that the rows depend on. `train` and `validation` list the name and size of every shard of text."""

    sequence_length: int
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    train: list[list]
    validation: list[list]


def prepare(
    source: str,
    validation: str,
    tokenizer: str,
    sequence_length: int,
    out: str,
    skip_lines: int = 0,
    workers: int = 0,
    tfds_data_dir: str = "",
) -> DataInfo:
    """Writes the rows of `source` and `validation` into the TFDS data set `out`, or continues doing so.

    Args:
      source: training text: a glob, a folder, a file (see `c4.shards`) or `tfds:NAME`.
      validation: validation text, likewise; empty for a `tfds:` source: its own validation split.
      tokenizer: a SentencePiece `.model` file.
      sequence_length: tokens of a row.
      out: a folder on a disk, or in a bucket of gs:// or s3://: the rows are then written on this machine's
        disk and copied there in the end. One prepared with other settings is refused.
      skip_lines: bad lines that may be skipped, over all files together.
      workers: processes; 0 for one a core. The result does not depend on it.
      tfds_data_dir: where `tfds:NAME` is looked for; empty for TFDS's default.

    Returns:
      What `read.load_info` says of the finished data set.

    Raises:
      InputError: bad text, a bad tokenizer, a value out of range, too little text for one row, another data
        set in `out`, or another program that prepares it. Shards finished until then are kept, and not
        done again.
      OSError: the disk or the bucket is in trouble; the same call goes on once that is mended.
    """
    _check_numbers(sequence_length, skip_lines, workers)
    reachable("out", out)
    model = Tokenizer.load(tokenizer)
    text = _open(source, validation, tfds_data_dir)
    settings = _settings(sequence_length, model, text)
    folder = buckets.stand_in("prepare", out) if in_bucket(out) else Path(out)
    jobs = {split: _jobs(folder, split, text[split], model, sequence_length, skip_lines) for split in text}
    if not _is_there(out, settings):
        with lock.held(folder / layout.UNFINISHED / lock.LOCK, "out", out):
            if not _is_there(out, settings):  # another program may have finished it meanwhile
                _claim(folder, settings)
                _make(folder, jobs, settings, tokenizer, workers or os.cpu_count() or 1)
                if in_bucket(out):
                    load_info(str(folder))
                    _send(folder, out)
    info = load_info(out, splits=() if in_bucket(out) else layout.SPLITS)
    if not in_bucket(out):
        shutil.rmtree(folder / layout.UNFINISHED, ignore_errors=True)
    return info


def _check_numbers(sequence_length: int, skip_lines: int, workers: int) -> None:
    for name, value, least in (
        ("sequence_length", sequence_length, 2),
        ("skip_lines", skip_lines, 0),
        ("workers", workers, 0),
    ):
        if value < least:
            raise InputError(f"{name} must be at least {least}, not {value}")


def _open(source: str, validation: str, tfds_data_dir: str) -> dict[str, list[TextShard]]:
    """The shards of both splits; a file that is in both is refused."""
    if not validation and not source.startswith(PREFIX):
        raise InputError("validation is not given; only a tfds: source has a validation split of its own")
    text = {
        split: _shards(name, split, tfds_data_dir)
        for split, name in zip(layout.SPLITS, (source, validation or source), strict=True)
    }
    both = [shard for shard in text["train"] if shard in text["validation"]]
    if both:
        raise InputError(f"{both[0].name} is in the training and the validation text; name other files")
    return text


def _shards(source: str, split: str, tfds_data_dir: str) -> list[TextShard]:
    if source.startswith(PREFIX):
        return [*tfds_shards(source, split, tfds_data_dir)]
    return [*file_shards(source)]


def _settings(sequence_length: int, model: Tokenizer, text: dict[str, list[TextShard]]) -> Settings:
    files = {split: [[shard.name, shard.size] for shard in text[split]] for split in text}
    return Settings(sequence_length, model.sha256, model.vocab_size, model.eos_id, **files)


def _is_there(out: str, settings: Settings) -> bool:
    """Whether the data set is there whole; in part it may be, nothing else may."""
    there = buckets.objects(out) if in_bucket(out) else _entries(Path(out))
    if layout.SETTINGS in there:
        _compare(out, _held(epath.Path(out) / layout.SETTINGS), asdict(settings))
    elif any(name != layout.UNFINISHED for name in there):
        raise InputError(f"{out} is not empty and not a prepared data set; choose another folder")
    return layout.DESCRIBED in there


def _entries(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def _claim(folder: Path, settings: Settings) -> None:
    """Begins a data set in a folder of a disk, or sees that the one there has the same settings."""
    mark = folder / layout.SETTINGS
    if mark.exists():
        _compare(folder, _held(mark), asdict(settings))
        return
    beside = folder / layout.UNFINISHED / f"{layout.SETTINGS}.part"
    with writable(folder, f"{folder} cannot be written to"):
        beside.write_text(json.dumps(asdict(settings)))
        sync(beside)
        beside.replace(mark)


def _make(folder: Path, jobs: dict[str, list[Job]], settings: Settings, tokenizer: str, workers: int) -> None:
    """Does what is left to do of a data set on a disk."""
    if (folder / layout.DESCRIBED).exists():
        return
    write_whole(folder / layout.TOKENIZER, epath.Path(tokenizer).read_bytes())
    _run([*jobs["train"], *jobs["validation"]], workers)
    aside = folder / layout.UNFINISHED / "description"
    with naming(aside):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        _describe(aside, jobs, settings)
        _move_up(aside, folder)


def _move_up(aside: Path, folder: Path) -> None:
    """Puts files in their place, `DESCRIBED` last: where it is, the data set is whole."""
    names = {path.name for path in aside.iterdir() if not layout.is_rows(path.name)}
    for part in (names - {layout.DESCRIBED}, {layout.DESCRIBED}):
        for name in part:
            sync(aside / name)
            (aside / name).replace(folder / name)
        sync(folder)


def _send(folder: Path, out: str) -> None:
    """Copies a finished data set to its bucket: what it is made of first, its description last."""
    # All but UNFINISHED, which holds the lock.
    here = {name: size for name, size in buckets.files(folder).items() if "/" not in name}
    there = buckets.objects(out)
    first, last = {layout.SETTINGS}, {layout.DESCRIBED}
    rest = {name for name, size in here.items() if name not in there or there[name].size != size}
    with Bar(f"copying to {out}", sum(here[name] for name in rest) / 1e6, "MB") as bar:
        for names in (first, rest - first - last, last):
            buckets.upload(folder, out, names, lambda n: bar.advance(n / 1e6))
    shutil.rmtree(folder)


def _held(mark: epath.PathLike) -> dict:
    held = read_json(mark)
    if not isinstance(held, dict):
        raise InputError(f"{mark} is damaged; choose another folder")
    return held


def _compare(folder: epath.PathLike, held: dict, wanted: dict) -> None:
    for name, value in wanted.items():
        if held.get(name) != value:
            here, there = (
                f"{len(v)} shards of text" if isinstance(v, list) else v for v in (value, held.get(name))
            )
            raise InputError(
                f"{folder} was prepared with another {name} ({there}, now {here}); choose another folder"
            )


def _jobs(
    folder: Path,
    split: str,
    text: Sequence[TextShard],
    model: Tokenizer,
    sequence_length: int,
    skip_lines: int,
) -> list[Job]:
    return [
        Job(
            shard,
            model,
            sequence_length,
            skip_lines,
            target=folder / layout.shard_file(split, index, len(text)),
            record=folder / layout.UNFINISHED / f"{split}-{index:05d}.json",
        )
        for index, shard in enumerate(text)
    ]


def _run(jobs: Sequence[Job], workers: int) -> None:
    """Does the jobs that are not finished, with a progress bar."""
    left = [job for job in jobs if not job.finished]
    size = sum(job.shard.size for job in left)
    started = time.monotonic()
    done = Advance(0, 0, 0)
    with Bar("preparing", len(jobs), "shards", start=len(jobs) - len(left)) as bar:

        def report(advance: Advance) -> None:
            nonlocal done
            done = Advance(*(sum(pair) for pair in zip(done, advance, strict=True)))
            rate = done.tokens / (time.monotonic() - started)
            facts = f"{done.documents:,} documents, {done.tokens:,} tokens, {rate / 1e6:.2f}M tokens/s"
            bar.advance(advance.units / size * len(left), facts)

        pool.run(left, workers, report)


def _describe(aside: Path, jobs: dict[str, list[Job]], settings: Settings) -> None:
    """Sums the records up, refuses what is empty, and writes what TFDS and `read` need to know."""
    counts = {split: [job.counts() for job in jobs[split]] for split in jobs}
    sums = {split: _sum(counts[split]) for split in counts}
    _check_sums(sums, jobs)
    train_V, validation_V = (sum(job.piece_counts() for job in jobs[split]) for split in layout.SPLITS)
    np.savez_compressed(aside / layout.UNIGRAM, train=train_V, validation=validation_V)
    facts = {name: value for name, value in asdict(settings).items() if name not in layout.SPLITS}
    for split in jobs:  # by the files' names TFDS knows the splits
        (aside / jobs[split][0].target.name).touch()
    tfds.folder_dataset.write_metadata(
        data_dir=aside,
        features=layout.row_features(settings.sequence_length, settings.vocab_size),
        split_infos=[
            tfds.core.SplitInfo(
                name=split, shard_lengths=[c.rows for c in counts[split]], num_bytes=sums[split].file_bytes
            )
            for split in counts
        ],
        check_data=False,  # it would read with TensorFlow
        description=f"Text as rows of {settings.sequence_length} tokens, documents joined with EOS.",
        metadata=tfds.core.MetadataDict(**facts, splits={split: asdict(sums[split]) for split in sums}),
    )


def _sum(counts: Sequence[Counts]) -> Counts:
    return Counts(*(sum(column) for column in zip(*(asdict(c).values() for c in counts), strict=True)))


def _check_sums(sums: dict[str, Counts], jobs: dict[str, list[Job]]) -> None:
    skip_lines = jobs["train"][0].skip_lines
    skipped = sum(total.skipped_lines for total in sums.values())
    if skipped > skip_lines:
        raise InputError(
            f"{skipped} bad lines in all, of which skip_lines allows {skip_lines}; mend them or raise it"
        )
    for split, total in sums.items():
        if total.documents == 0:
            raise InputError(f"the {split} text ({jobs[split][0].shard.name}, ...) holds no document")
        if total.rows == 0:
            raise InputError(
                f"the {split} text has {total.dropped_tokens} tokens, fewer than a row of "
                f"{jobs[split][0].sequence_length}; give more text or a smaller sequence_length"
            )
