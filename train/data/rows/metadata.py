"""The description of a finished data set: TFDS's files and how often each piece occurs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from mora_jax.errors import InputError
from train.data.rows import layout
from train.data.rows.counts import Counts
from train.data.rows.settings import Settings
from train.data.rows.shard import Job


def write_metadata(folder: Path, jobs: Mapping[str, Sequence[Job]], settings: Settings) -> None:
    """Sums up the counts of all finished jobs and writes what describes the data set.

    Args:
      folder: an empty folder. Empty files named as the rows are left in it.
      jobs: those of each split.
      settings: those of the data set.

    Raises:
      InputError: too many bad lines were skipped, or a split has no row.
    """
    counts = {split: [job.counts() for job in jobs[split]] for split in jobs}
    sums = {split: sum(counts[split], Counts()) for split in counts}
    _check_sums(sums, jobs)
    pieces = {split: sum(job.piece_counts() for job in jobs[split]) for split in jobs}
    np.savez_compressed(folder / layout.UNIGRAM, **pieces)  # pyright: ignore[reportArgumentType]
    facts = {name: value for name, value in asdict(settings).items() if name not in layout.SPLITS}
    hashes = {split: [job.text_sha256() for job in jobs[split]] for split in jobs}
    (folder / layout.TEXT).write_text(json.dumps(hashes))
    for split in jobs:  # TFDS finds the splits by the names of files
        (folder / jobs[split][0].target.name).touch()
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=layout.row_features(settings.sequence_length, settings.vocab_size, settings.joined),
        split_infos=[
            tfds.core.SplitInfo(
                name=split, shard_lengths=[c.rows for c in counts[split]], num_bytes=sums[split].file_bytes
            )
            for split in counts
        ],
        check_data=False,  # would need TensorFlow
        description=_description(settings),
        metadata=tfds.core.MetadataDict(**facts, splits={split: asdict(sums[split]) for split in sums}),
    )


def _description(settings: Settings) -> str:
    how = "documents joined" if settings.joined else "whole examples" if settings.pack else "one example each"
    return f"Text as rows of {settings.sequence_length} tokens, {how}."


def _check_sums(sums: Mapping[str, Counts], jobs: Mapping[str, Sequence[Job]]) -> None:
    allowed = jobs["validation"][0].skip_lines
    skipped = sum(total.skipped_lines for total in sums.values())
    if skipped > allowed:
        raise InputError(
            f"the text has {skipped} bad lines, and --skip-lines {allowed} allows {allowed}; "
            "fix them or raise --skip-lines"
        )
    for split, total in sums.items():
        job = jobs[split][0]
        if total.documents == 0:
            raise InputError(f"the {split} text ({job.shard.name}, ...) holds no document")
        if total.rows == 0 and job.options.joined:
            raise InputError(
                f"the {split} text has {total.dropped_tokens} tokens, fewer than a row of "
                f"{job.sequence_length}; add text or lower --sequence-length"
            )
        if total.rows == 0:
            raise InputError(
                f"the {split} text has {total.documents} examples, and none is left: they are longer than "
                f"a row of {job.sequence_length} tokens (see --overlong), or have nothing to predict"
            )
