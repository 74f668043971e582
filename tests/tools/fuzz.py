"""Damages files at random and reads them: a reader must return or raise InputError.

    python tests/tools/fuzz.py --cases 100000 --seed 0

Each case takes a good file of one kind and changes it a few times, mostly in its structure (values, keys,
lengths, nesting) and else in its bytes. Any other exception is a crash. So is a message, or a cell of the
table of checkpoints, with a character that controls a terminal. A crash is printed with the options that
repeat it: `--target NAME --only NUMBER`.
"""

import argparse
import collections
import faulthandler
import functools
import gzip
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import yaml
from backports import zstd
from pyarrow import parquet

from mora_jax import hf
from mora_jax.errors import InputError
from mora_jax.hf.tokenizer_files import FOLDER
from mora_jax.models.llama import Compute, Llama, LlamaConfig
from train.config import flags
from train.console.progress import progress
from train.data.rows import build, info, layout, read, shard
from train.data.rows.description import check_description
from train.data.text import files
from train.data.tokenizer import Tokenizer, train_tokenizer
from train.run import inventory, manifest
from train.run.checkpoint import Checkpoints

sys.path.append(str(Path(__file__).parents[1] / "support"))
import changes
from changes import as_json
from made_tokenizers import SPECIAL, byte_level

CONFIGS = Path(__file__).parents[2] / "configs"
TINY_WORDS = ["".join(random.Random(n).choices("abcdefghij", k=2 + n % 6)) for n in range(40)]
SECONDS = 20.0  # of processor time. A case that takes longer counts as a crash.


class Target(NamedTuple):
    """A kind of file and its reader.

    Attributes:
      share: of all cases.
      write: puts a changed file into a folder.
      read: reads the folder.
    """

    share: int
    write: Callable[[random.Random, Path], None]
    read: Callable[[Path], Any]


# Configs

ALIASES = (
    "&a ",
    "*a",
    "&a [*a]",
    "<<: *a",
    "!!int ",
    "!!python/object:os.system ",
    "!!timestamp ",
    "!!binary ",
    "? ",
    "- ",
)


@functools.cache
def _configs() -> tuple[Any, ...]:
    rules = [
        ["layers/.*_proj/kernel", {"name": "mora", "rank": 8, "operator": {"name": "share", "group": [0, 1]}}]
    ]
    rules += [["embed.*", "train"], ["x", {"name": "lora", "alpha": 2.0}], [".*", "frozen"]]
    files = [yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.glob("*.yaml"))]
    return (*files, {key: value for key, value in files[0].items() if key != "method"} | {"rules": rules})


def write_config(rng: random.Random, folder: Path) -> None:
    content = changes.changed(rng, rng.choice(_configs()), changes.as_yaml)
    if rng.random() < 0.2:
        i = rng.randrange(len(content) + 1)
        content = content[:i] + rng.choice(ALIASES).encode() + content[i:]
    (folder / "c.yaml").write_bytes(content)


def read_config(folder: Path) -> None:
    flags.read_config(str(folder / "c.yaml"))


# Text


def write_text(rng: random.Random, folder: Path) -> None:
    lines = [
        {"text": f"document {i} é", "timestamp": "2000-01-01T00:00:00Z", "url": f"u{i}"} for i in range(4)
    ]
    lines = [changes.change(rng, line) if rng.random() < 0.5 else line for line in lines]
    content = b"\n".join(map(as_json, lines)) + b"\n"
    if rng.random() < 0.3:
        content = changes.change_bytes(rng, content)
    suffix, pack = rng.choice(PACKED)
    content = pack(content)
    if suffix and rng.random() < 0.4:
        content = changes.change_bytes(rng, content)
    (folder / f"t.json{suffix}").write_bytes(content)


def write_parquet(rng: random.Random, folder: Path) -> None:
    file = io.BytesIO()
    how = {"compression": rng.choice(("snappy", "none", "zstd")), "use_dictionary": rng.random() < 0.5}
    columns = {"id": list(range(40)), "text": [f"document {i} é" for i in range(40)]}
    parquet.write_table(pa.table(columns), file, row_group_size=16, **how)
    content = file.getvalue()
    if rng.random() < 0.3:
        content = content[:4] + changes.change_bytes(rng, content[4:-8]) + content[-8:]
    (folder / "t.parquet").write_bytes(changes.change_bytes(rng, content))


PACKED = ((".gz", functools.partial(gzip.compress, compresslevel=1)), (".zst", zstd.compress), ("", bytes))


def read_text(folder: Path) -> None:
    (path,) = folder.iterdir()
    for skip_lines in (0, 1000):
        for text in files.documents(path, skip_lines):
            text.encode()


# Model folders

MODEL = LlamaConfig(24, 8, 8, 2, 2, 1, 16)


@functools.cache
def _model_files() -> dict[str, bytes]:
    tokens = jax.ShapeDtypeStruct((1, 2), np.int32)
    shapes = jax.eval_shape(Llama(MODEL, Compute(layers="scan")).init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    with tempfile.TemporaryDirectory() as folder:
        hf.save_hf(Path(folder) / "one", params, MODEL)
        hf.save_hf(Path(folder) / "many", params, MODEL, max_shard_bytes=1500)
        return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def write_model(rng: random.Random, folder: Path) -> None:
    kind = rng.choice(("one", "one", "many"))
    files = {n.partition("/")[2]: c for n, c in _model_files().items() if n.startswith(kind)}
    for name in rng.sample(sorted(files), rng.choice((1, 1, 1, 2))):
        if name.endswith("tensors"):
            files[name] = _changed_weights(rng, files[name])
        else:
            files[name] = changes.changed(rng, json.loads(files[name]), as_json)
    if rng.random() < 0.05:
        del files[rng.choice(sorted(files))]
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _changed_weights(rng: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.25:
        return changes.change_bytes(rng, content)
    header = json.loads(content[8 : 8 + length])
    rendered = changes.changed(rng, header, as_json)
    stated = len(rendered) if rng.random() < 0.9 else rng.choice((0, 1, len(rendered) + 1, 2**40, 2**63))
    return stated.to_bytes(8, "little") + rendered + content[8 + length :]


def read_model(folder: Path) -> None:
    hf.load_hf(folder)


# Manifests


@functools.cache
def _manifest() -> Any:
    files = {name: {"bytes": len(name), "sha256": "0" * 64} for name in ("a", "inner/b")}
    meta = {"methods": {"a": {"name": "mora", "rank": 8}}, "restarts": 3, "config": {}}
    meta |= {"data": {"rows": 10, "tokenizer_sha256": "x"}, "evaluation": {"loss": 1.0, "predictions": 2}}
    return {"step": 7, "meta": meta, "arrays": {"w": "float32[2, 3]"}, "files": files}


def write_manifest(rng: random.Random, folder: Path) -> None:
    value = changes.change(rng, _manifest()) if rng.random() < 0.9 else _manifest()
    if rng.random() < 0.3:
        value = _manifest() | {"meta": changes.change(rng, _manifest()["meta"])}
    if isinstance(value, dict) and rng.random() < 0.3:
        value |= {
            "base": changes.change(rng, rng.choice(({"restarts": 3, "sha256": "x"}, {"files": {"a": "x"}})))
        }
    try:
        content = manifest.render(value).encode()  # with the right hash of itself
    except (TypeError, ValueError, RecursionError):
        content = as_json(value)
    if rng.random() < 0.4:
        content = (
            changes.change_bytes(rng, content) if rng.random() < 0.5 else changes.changed(rng, value, as_json)
        )
    place = folder / "7"
    (place / "inner").mkdir(parents=True)
    (place / manifest.MANIFEST).write_bytes(content)
    odd = changes.another_text(rng, "a").replace("/", "").replace("\0", "").encode("utf-8", "surrogatepass")
    for name in (b"a", odd, *([b"a\xff"] if rng.random() < 0.1 else [])):
        if name not in (b"", b".", b".."):
            Path(os.fsdecode(bytes(place) + b"/" + name)).write_bytes(b"a")


def read_manifest(folder: Path) -> None:
    with Checkpoints(str(folder)) as saved:
        entries = inventory.entries_of(saved)
        check_shown(entries)
        assert [entry.state for entry in entries] == ["damaged"]  # inner/b is never there
        json.dumps(saved.read_meta(7))


def check_shown(entries: list[inventory.Entry]) -> None:
    """Checks every text that `mora checkpoints` would print."""
    cells = [cell for column in inventory.table(entries, "").columns for cell in column.cells]
    for text in (*cells, *inventory.problems(entries)):
        assert str(text).isprintable(), f"{text!r} would reach the terminal"


# Descriptions of data sets, and tokenizers: readers of libraries, with fewer cases


def write_description(rng: random.Random, folder: Path) -> None:
    tensor = {
        "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
        "tensor": {"shape": {}},
    }
    features = {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict"}
    features |= {"featuresDict": {"features": {"tokens": tensor}}}
    split = {"filepathTemplate": "{DATASET}-{SPLIT}", "name": "train", "shardLengths": ["3"]}
    (folder / "features.json").write_bytes(changes.changed(rng, features, as_json))
    (folder / "dataset_info.json").write_bytes(
        changes.changed(rng, {"name": "rows", "splits": [split]}, as_json)
    )


@functools.cache
def _tokenizer() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ["".join(random.Random(n).choices("abcdefghij", k=2 + n % 6)) for n in range(200)]
        (folder / "t.jsonl").write_text(json.dumps({"text": " ".join(words * 5)}) + "\n")
        train_tokenizer(str(folder / "t.jsonl"), str(folder / "t.model"), 300)
        return (folder / "t.model").read_bytes()


def write_tokenizer(rng: random.Random, folder: Path) -> None:
    content = _tokenizer()
    for _ in range(rng.choice((1, 1, 2, 8))):
        content = changes.change_bytes(rng, content)
    (folder / "t.model").write_bytes(content)


def read_tokenizer(folder: Path) -> None:
    try:
        hf.save_tokenizer(folder / "out", folder / "t.model")
    finally:
        Tokenizer.load(folder / "t.model").encode_documents(["abc déf"])


@functools.cache
def _tokenizer_json() -> Any:
    return json.loads(byte_level([" ".join(TINY_WORDS)], 280))


def write_tokenizer_json(rng: random.Random, folder: Path) -> None:
    config = {"eos_token": SPECIAL[0], "pad_token": {"content": SPECIAL[2]}, "split_special_tokens": True}
    others = {"tokenizer_config": config, "special_tokens_map": {"bos_token": SPECIAL[1]}, "added_tokens": {}}
    files = {"tokenizer": _tokenizer_json(), **others, "config": {"eos_token_id": [0, 1], "pad_token_id": 2}}
    for name in rng.sample(sorted(files), rng.choice((1, 2))):
        files[name] = changes.change(rng, files[name])
    for name, value in files.items():
        content = as_json(value)
        if rng.random() < 0.05:
            content = changes.change_bytes(rng, content)
        (folder / f"{name}.json").write_bytes(content)


def read_tokenizer_json(folder: Path) -> None:
    Tokenizer.load(folder, eos=False).encode_documents(["abc déf", SPECIAL[0]])


# Prepared data sets, and the pieces of an unfinished one

T = 16
PIECES = ("train-00000.json", "train-00000.npy")


def _tiny_text(folder: Path, name: str, documents: int) -> str:
    (folder / name).write_text((json.dumps({"text": " ".join(TINY_WORDS)}) + "\n") * documents)
    (folder / "t.model").write_bytes(_tokenizer())
    return str(folder / name)


@functools.cache
def _data_set() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "out"
        train, validation = (_tiny_text(folder, f"{split}.jsonl", 3) for split in layout.SPLITS)
        build.prepare(train, validation, str(folder / "t.model"), T, str(out), workers=1)
        files = (path for path in out.rglob("*") if path.is_file())
        return {str(path.relative_to(out)): path.read_bytes() for path in files}


def write_data_set(rng: random.Random, folder: Path) -> None:
    files = dict(_data_set())
    for name in rng.sample(("metadata.json", "dataset_info.json", "features.json"), rng.choice((1, 1, 2))):
        files[name] = changes.changed(rng, json.loads(files[name]), as_json)
    if rng.random() < 0.3:
        files[layout.UNIGRAM] = changes.change_bytes(rng, files[layout.UNIGRAM])
    (folder / FOLDER).mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read_data_set(folder: Path) -> None:
    facts = info.load_info(str(folder))
    info.check_trainable(facts)  # as pretrain does
    info.unigram_perplexity(facts)
    next(read.train_batches(facts, 1, 0, 0))
    next(read.eval_batches(facts, "validation", 1, 1))


def _job(folder: Path) -> shard.Job:
    (text,) = files.file_shards(_tiny_text(folder, "t.jsonl", 2))
    paths = (folder / name for name in ("rows", PIECES[0]))
    return shard.Job(text, Tokenizer.load(folder / "t.model"), T, 0, *paths)


@functools.cache
def _pieces() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        shard.write_shard(_job(Path(name)), lambda advance: None)
        return {path.name: path.read_bytes() for path in Path(name).iterdir()}


def write_pieces(rng: random.Random, folder: Path) -> None:
    record, counts = (_pieces()[name] for name in PIECES)
    (folder / PIECES[0]).write_bytes(changes.changed(rng, json.loads(record), as_json))
    (folder / PIECES[1]).write_bytes(_changed_counts(rng, counts) if rng.random() < 0.7 else counts)
    (folder / "rows").write_bytes(_pieces()["rows"])


def _changed_counts(rng: random.Random, npy: bytes) -> bytes:
    if rng.random() < 0.5:
        return changes.change_bytes(rng, npy)
    header = changes.change_bytes(rng, npy[10:128])
    return npy[:8] + len(header).to_bytes(2, "little") + header + npy[128:]


def read_pieces(folder: Path) -> None:
    job = _job(folder)
    assert job.finished in (True, False)
    job.counts()
    job.piece_counts()


TARGETS = {
    "config": Target(8, write_config, read_config),
    "text": Target(40, write_text, read_text),
    "parquet": Target(4, write_parquet, read_text),
    "weights": Target(14, write_model, read_model),
    "manifest": Target(32, write_manifest, read_manifest),
    "description": Target(5, write_description, lambda folder: check_description(folder)),
    "tokenizer": Target(1, write_tokenizer, read_tokenizer),
    "tokenizer_json": Target(4, write_tokenizer_json, read_tokenizer_json),
    "data_set": Target(4, write_data_set, read_data_set),
    "pieces": Target(4, write_pieces, read_pieces),
}


def crash(target: str, seed: int, number: int, folder: Path) -> str:
    """Runs one case in an emptied folder. Returns what went wrong, or an empty string."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write, read = TARGETS[target][1:]
    write(random.Random(f"{target} {seed} {number}"), folder)
    started = time.process_time()
    try:
        read(folder)
    except InputError as error:
        if not str(error).isprintable():
            return f"the message holds characters that control a terminal: {str(error)!r}"
    except Exception:
        return traceback.format_exc(limit=-6)
    took = time.process_time() - started
    return f"it took {took:.0f} s" if took > SECONDS else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="cases in all, divided among the targets")
    parser.add_argument("--seed", type=int, default=0, help="seed of the changes")
    parser.add_argument("--target", choices=TARGETS, help="run this target only")
    parser.add_argument("--only", type=int, help="run this case only")
    args = parser.parse_args()
    faulthandler.enable()
    targets = {n: t for n, t in TARGETS.items() if args.target in (None, n)}
    shares = sum(t.share for t in targets.values())
    cases: collections.Counter[str] = collections.Counter()
    crashes, started = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder, progress("reading", args.cases, "cases") as advance:
        for name, target in targets.items():
            count = -(-args.cases * target.share // shares)
            for number in range(count) if args.only is None else (args.only,):
                wrong = crash(name, args.seed, number, Path(folder) / "case")
                cases[name] += 1
                if wrong:
                    crashes.append(f"{name} --seed {args.seed} --only {number}: {wrong}")
                    print(crashes[-1], flush=True)
                advance(1)
            print(f"{cases[name]:8,} {name}, {time.monotonic() - started:.0f} s", flush=True)
    total, seconds = sum(cases.values()), time.monotonic() - started
    print(f"{total:,} cases, seed {args.seed}, {seconds:.0f} s: {len(crashes)} crashes")
    raise SystemExit(bool(crashes))


if __name__ == "__main__":
    main()
