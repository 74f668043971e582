"""A data set that is damaged while a run reads it."""

import contextlib
import dataclasses
import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from mora_jax.errors import InputError
from train.data.rows.build import prepare
from train.jobs import pretrain as loop
from train.run.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def large_data(tiny_text, tmp_path_factory) -> Path:
    """Rows that do not fit into what a reader holds in memory."""
    folder = tmp_path_factory.mktemp("large")
    words = np.random.default_rng(0).choice(["abab", "cd", "ghi", "fed", "jaja"], (1500, 200))
    lines = "".join(json.dumps({"text": " ".join(text)}) + "\n" for text in words)
    (folder / "c4.json.gz").write_bytes(gzip.compress(lines.encode()))
    source, validation = str(folder / "c4.json.gz"), str(tiny_text / "c4-validation.*")
    prepare(source, validation, str(tiny_text / "t.model"), 32, str(folder / "data"), workers=1)
    return folder / "data"


def cut(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 3)


def blank(shard: Path) -> None:
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.seek(size // 3)
        file.write(bytes(size // 3))


@pytest.mark.slow  # tests/data/test_read.py has what libraries raise for such rows
@pytest.mark.parametrize(
    ("split", "harm", "message"),
    [
        ("train", cut, r"the train rows take \d+ bytes, not"),
        ("train", blank, "cannot be read: Corrupted"),
        ("train", Path.unlink, ""),
        ("validation", cut, r"the validation rows take \d+ bytes, not"),
        ("validation", blank, "cannot be read: "),
        ("validation", Path.unlink, r"the validation rows take \d+ bytes, not"),
    ],
)
def test_a_shard_damaged_during_a_run(free, large_data, tmp_path, monkeypatch, split, harm, message):
    """The run stops and says so. A training shard that is removed is open and still read; the next start
    misses it. Validation shards are opened for each evaluation."""
    data = Path(shutil.copytree(large_data, tmp_path / "data"))
    config = dataclasses.replace(free, data=dataclasses.replace(free.data, directory=str(data)))
    real, asked = loop.next_batch, iter(range(22))

    def next_batch(*args):
        if next(asked) == 4:
            harm(next(data.glob(f"*-{split}.array_record-*")))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "next_batch", next_batch)
        with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
            loop.pretrain(config)
    with Checkpoints(str(Path(config.run_dir) / "checkpoints")) as saved:
        step, damaged = saved.latest_good()
    assert (step == 22, damaged) == (not message, [])
    assert step is not None
    assert step >= 3
    if harm is not blank:
        with pytest.raises(InputError, match=rf"the {split} rows take \d+ bytes, not"):
            loop.pretrain(config)


def test_missing_counts_of_pieces_are_found_before_training(tiny_run, tmp_path):
    data = shutil.copytree(tiny_run.config.data.directory, tmp_path / "data")
    (data / "unigram.npz").unlink()
    there = dataclasses.replace(tiny_run.config.data, directory=str(data))
    config = dataclasses.replace(tiny_run.config, run_dir=str(tmp_path / "run"), data=there)
    with pytest.raises(InputError, match=r"unigram\.npz is missing"):
        loop.pretrain(config)
    assert not (tmp_path / "run").exists()
