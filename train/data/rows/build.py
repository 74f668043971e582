"""From text to a TFDS data set of fixed-length rows: parallel over shards, resumed after an interruption.

TFDS's own preparation starts from scratch after an interruption and runs in one process. So the row files are
written here with TFDS's serializer, and described to TFDS at the end.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from mora_jax import hf
from mora_jax.errors import InputError, located
from mora_jax.hf.tokenizer_files import FOLDER, MODEL
from mora_jax.io import path_of
from train.console.progress import Bar
from train.console.terminal import warn
from train.data.rows import layout
from train.data.rows import workers as pool
from train.data.rows.info import DataInfo, load_info
from train.data.rows.metadata import write_metadata
from train.data.rows.options import JOINED, RowOptions
from train.data.rows.settings import (
    HASHED,
    Settings,
    check_settings,
    check_text,
    has_finished_shards,
    read_settings,
    settings_of,
    start,
)
from train.data.rows.shard import Advance, Job
from train.data.rows.template import with_template
from train.data.text.share import TextShard
from train.data.text.sources import open_text
from train.data.tokenizer import Tokenizer
from train.storage import buckets, lock
from train.storage.buckets import in_bucket
from train.storage.files import is_part, naming_errors, refuse_links, remove_parts, sync, write_whole


def prepare(
    source: str,
    validation: str,
    tokenizer: str,
    sequence_length: int,
    out: str,
    skip_lines: int = 0,
    workers: int = 0,
    tfds_data_dir: str = "",
    bos: bool = False,
    eos: bool = True,
    options: RowOptions = JOINED,
    template: str = "",
    validation_share: float = 0.0,
    mixture: Sequence[str] = (),
) -> DataInfo:
    """Writes the rows of `source` and `validation` into the TFDS data set `out`, or resumes doing so.

    Args:
      source: training text: a glob, a folder, a file (see `files.shards`) or `tfds:NAME`; empty for a data
        set that can only be evaluated on.
      validation: validation text, likewise; empty for the validation split of a `tfds:` source.
      tokenizer: a SentencePiece `.model` file, a tokenizer.json, or a folder (see `hf.read_tokenizer`).
      sequence_length: tokens of a row.
      out: a folder on a disk or in a bucket of gs:// or s3://. For a bucket, the rows are written on this
        machine's disk and uploaded at the end.
      skip_lines: bad lines that may be skipped, over all files together.
      workers: processes; 0 for one a core. The result does not depend on it.
      tfds_data_dir: folder in which `tfds:NAME` is looked up; empty for TFDS's default.
      bos: whether each document begins with the tokenizer's begin-of-text token.
      eos: whether it ends with the end-of-text token. A chat template writes both itself.
      options: what an example is made of, and how rows are made of examples; without a template.
      template: a file with the chat template; empty for the tokenizer's own.
      validation_share: fraction of the training text that is the validation text instead; 0 for none.
      mixture: in the place of `source`, several, each as SOURCE=TIMES: how often its examples are read.

    Returns:
      The facts about the finished data set, as `load_info` does.

    Raises:
      InputError: bad text, a bad tokenizer, a value out of range, too little text for one row, another data
        set in `out`, or another program that prepares it. Finished shards are kept and not written again.
      OSError: the disk or the bucket failed. The same call resumes.
    """
    _check_numbers(sequence_length, skip_lines, workers)
    path_of(out, "--out")
    with located(tokenizer, "--tokenizer"):
        files = hf.read_tokenizer(tokenizer)
    files, options = with_template(files, options, template, bos)
    with located(tokenizer, "--tokenizer"):
        model = Tokenizer.load(files, bos, eos and options.template is None)
    _warn_of_export(files)
    text = open_text(source, validation, tfds_data_dir, options.form, validation_share, mixture)
    settings = settings_of(sequence_length, model, text, options, validation_share)
    folder = buckets.stand_in("prepare", out) if in_bucket(out) else Path(out)
    jobs = {
        split: _jobs(folder, split, text[split], model, sequence_length, skip_lines, options)
        for split in text
    }
    held, splits = folder / layout.UNFINISHED / lock.LOCK, () if in_bucket(out) else layout.SPLITS
    if not _is_complete(out, settings):
        with lock.lock_file(held, "--out", out):
            if _is_complete(out, settings):  # by another program meanwhile
                check_text(out, text)
            else:
                start(folder, settings)
                _complete(folder, text, jobs, settings, files, workers or os.cpu_count() or 1)
                if in_bucket(out):
                    load_info(str(folder))
                    _upload(folder, out)
            info = load_info(out, splits=splits)
            _remove_unfinished(held)
        return info
    check_text(out, text)
    info = load_info(out, splits=splits)
    if _is_ours(held.parent):  # a kill left it behind; the disk may be read-only now
        with contextlib.suppress(InputError, OSError), lock.lock_file(held, "--out", out):
            _remove_unfinished(held)
    return info


def _warn_of_export(tokenizer: hf.TokenizerFiles) -> None:
    """Warns of a tokenizer that Hugging Face's format cannot express, before days of training with it."""
    if tokenizer.encoder != MODEL:
        return
    try:
        hf.check_tokenizer(tokenizer.files[MODEL])
    except InputError as error:
        warn([f"{error}; models can be trained, and are exported without tokenizer.json"], every_process=True)


def _check_numbers(sequence_length: int, skip_lines: int, workers: int) -> None:
    for flag, value, least in (
        ("--sequence-length", sequence_length, 2),
        ("--skip-lines", skip_lines, 0),
        ("--workers", workers, 0),
    ):
        if value < least:
            raise InputError(f"{flag} must be at least {least}, not {value}")


def _jobs(
    folder: Path,
    split: str,
    text: Sequence[TextShard],
    model: Tokenizer,
    sequence_length: int,
    skip_lines: int,
    options: RowOptions,
) -> list[Job]:
    return [
        Job(
            shard,
            model,
            sequence_length,
            skip_lines,
            target=folder / layout.shard_file(split, index, len(text)),
            record=folder / layout.UNFINISHED / f"{split}-{index:05d}.json",
            options=options,
        )
        for index, shard in enumerate(text)
    ]


def _is_complete(out: str, settings: Settings) -> bool:
    """Returns whether the data set is complete. Raises InputError if `out` holds anything else."""
    if in_bucket(out):
        names = set(buckets.objects(out))
        free = not names
    else:
        refuse_links(Path(out), [layout.UNFINISHED, FOLDER])
        names = {entry.name for entry in Path(out).iterdir()} if Path(out).is_dir() else set()
        free = _is_started(Path(out))
    if layout.SETTINGS in names:
        finished = layout.DESCRIBED in names
        if finished or in_bucket(out) or has_finished_shards(Path(out)):
            check_settings(out, settings, finished)
        else:
            read_settings(out, out)
    elif not free:
        raise InputError(f"{out} is not empty and not a prepared data set; choose another folder")
    return layout.DESCRIBED in names


def _is_started(folder: Path) -> bool:
    """Returns whether a folder without settings is free, or holds nothing but the start of a data set."""
    if not folder.is_dir():
        return not folder.exists()
    names = {path.name for path in folder.iterdir() if not is_part(path.name)}
    return not names or (names == {layout.UNFINISHED} and _is_ours(folder / layout.UNFINISHED))


def _is_ours(unfinished: Path) -> bool:
    """Returns whether a folder is that of an unfinished preparation: it has a lock, or nothing."""
    return unfinished.is_dir() and ((unfinished / lock.LOCK).exists() or not any(unfinished.iterdir()))


def _remove_unfinished(held: Path) -> None:
    """Removes the folder of an unfinished preparation, its lock last: a kill leaves it known as ours."""
    with contextlib.suppress(OSError):
        for path in held.parent.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != held:
                path.unlink()
        shutil.rmtree(held.parent)


def _complete(
    folder: Path,
    text: Mapping[str, Sequence[TextShard]],
    jobs: Mapping[str, Sequence[Job]],
    settings: Settings,
    tokenizer: hf.TokenizerFiles,
    workers: int,
) -> None:
    """Does what is left to do of a data set on a disk."""
    if (folder / layout.DESCRIBED).exists():
        check_text(folder, text)
        return
    (folder / FOLDER).mkdir(exist_ok=True)
    for place in (folder, folder / FOLDER):
        remove_parts(place)
    for name, content in tokenizer.files.items():
        write_whole(folder / FOLDER / name, content)
    _run([job for split in jobs for job in jobs[split]], workers)
    aside = folder / layout.UNFINISHED / "description"
    with naming_errors(aside):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        write_metadata(aside, jobs, settings)
        _move_up(aside, folder)


def _run(jobs: Sequence[Job], workers: int) -> None:
    """Does the jobs that are not finished, with a progress bar."""
    with ThreadPoolExecutor(HASHED) as threads:
        finished = list(threads.map(lambda job: job.finished, jobs))
    left = [job for job, done in zip(jobs, finished, strict=True) if not done]
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


def _move_up(aside: Path, folder: Path) -> None:
    """Moves the description into the data set, `DESCRIBED` last, which marks it as complete."""
    names = {path.name for path in aside.iterdir() if not layout.is_rows(path.name)}
    for part in (names - {layout.DESCRIBED}, {layout.DESCRIBED}):
        for name in part:
            sync(aside / name)
            (aside / name).replace(folder / name)
        sync(folder)


def _upload(folder: Path, out: str) -> None:
    """Uploads a complete data set to its bucket, `TEXT` first and `DESCRIBED` last; removes it here."""
    here = {name: size for name, size in buckets.files(folder).items() if layout.belongs(name)}
    there = buckets.objects(out)
    text = (folder / layout.TEXT).read_bytes() if (folder / layout.TEXT).exists() else b""
    if layout.TEXT not in there or (epath.Path(out) / layout.TEXT).read_bytes() != text:
        with buckets.store_errors(out):  # what an upload of other text left
            for name in here.keys() & there.keys():
                (epath.Path(out) / name).unlink()
        there = {}
    first, last = here.keys() & {layout.SETTINGS, layout.TEXT}, {layout.DESCRIBED}
    rest = {name for name, size in here.items() if name not in there or there[name].size != size}
    with Bar(f"uploading to {out}", sum(here[name] for name in rest) / 1e6, "MB") as bar:
        for names in (first, rest - first - last, last):
            buckets.upload(folder, out, names, lambda n: bar.advance(n / 1e6))
    shutil.rmtree(folder)
