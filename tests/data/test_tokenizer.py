"""The tokenizer: documents followed by EOS, its hash, training, and files that are not a tokenizer."""

import hashlib
import json
import pickle
import random
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from made_tokenizers import byte_level, write_folder

from mora_jax.errors import InputError
from train.data.tokenizer import Tokenizer, train_tokenizer


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=rng.randint(3, 40))).capitalize() + "." for _ in range(count)]


def write(path: Path, lines: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(write(folder / "a.json", texts(400)), str(folder / "t.model"), 400)


def test_documents_are_followed_by_eos(tokenizer: Tokenizer):
    documents = ["One text.", "", "Another, with ü and 漢字\nand lines."]
    tokens = tokenizer.encode_documents(documents)
    expected = [t for d in documents for t in [*tokenizer.encoder.encode(d), tokenizer.eos_id]]
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == expected
    assert (tokens == tokenizer.eos_id).sum() == 3


def test_no_document_gives_no_token(tokenizer: Tokenizer):
    assert tokenizer.encode_documents([]).shape == (0,)


def test_decoding_returns_the_exact_text(tokenizer: Tokenizer):
    text = "  two  spaces, 1234, tab\t and\nlines; ü 漢字 \U0001f600 "
    assert tokenizer.encoder.decode(tokenizer.encoder.encode(text)) == text


def test_the_hash_is_of_the_file(tokenizer: Tokenizer):
    assert tokenizer.sha256 == hashlib.sha256(Path(tokenizer.path).read_bytes()).hexdigest()
    assert tokenizer.vocab_size == 400
    assert Tokenizer.load(tokenizer.path) == tokenizer


def test_a_tokenizer_can_be_pickled(tokenizer: Tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode_documents(texts(3)).tolist() == tokenizer.encode_documents(texts(3)).tolist()


def test_training_is_deterministic_and_compresses(tokenizer: Tokenizer, tmp_path: Path):
    again = train_tokenizer(write(tmp_path / "a.json", texts(400)), str(tmp_path / "new" / "t.model"), 400)
    assert again.sha256 == tokenizer.sha256
    text = texts(1, seed=0)[0]
    assert len(tokenizer.encoder.encode(text)) < 0.7 * len(text)


def test_training_reads_no_further_than_asked(tokenizer: Tokenizer, tmp_path: Path):
    first = [write(tmp_path / f"{i}.json", texts(400)[200 * i : 200 * i + 200]) for i in range(2)]
    longer = tmp_path / "longer"
    longer.mkdir()
    for i, path in enumerate(first):
        (longer / f"{i}.json").write_text(Path(path).read_text() + "not JSON, and never read\n")
    limited = train_tokenizer(str(longer), str(tmp_path / "l.model"), 400, max_documents=400)
    assert limited.sha256 == tokenizer.sha256
    fewer = train_tokenizer(str(longer), str(tmp_path / "m.model"), 400, max_characters=20_000)
    assert fewer.sha256 != tokenizer.sha256


@pytest.mark.parametrize(("size", "reason"), [(259, "from 260"), (10**7, "to 1000000"), (9_000, "too high")])
def test_an_impossible_vocabulary(tmp_path: Path, size: int, reason: str):
    source = write(tmp_path / "a.json", texts(50))
    with pytest.raises(InputError, match=f"--vocab-size.*{reason}"):
        train_tokenizer(source, str(tmp_path / "t.model"), size)


@pytest.mark.parametrize(
    ("name", "said"), [("max_documents", "--max-documents"), ("max_characters", "max_characters")]
)
def test_limits_below_one(tmp_path: Path, name: str, said: str):
    with pytest.raises(InputError, match=f"{said} must be at least 1"):
        train_tokenizer("any", str(tmp_path / "t.model"), 400, **{name: 0})


def test_a_bucket_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"--out gs://b/t\.model is in a bucket; write .* to a disk"):
        train_tokenizer(str(tmp_path / "*.jsonl"), "gs://b/t.model", 300)


def test_no_text_to_train_on(tmp_path: Path):
    with pytest.raises(InputError, match="holds no text"):
        train_tokenizer(write(tmp_path / "a.json", [""]), str(tmp_path / "t.model"), 400)


def test_a_tokenizer_json_encodes_documents(tmp_path: Path):
    made = Tokenizer.load(write_folder(tmp_path / "hf", byte_level(texts(200))), bos=True)
    documents = [
        "One text.",
        "",
        "Another, with ü and 漢字\nand lines, and more than the eight tokens of the file.",
    ]
    tokens = made.encode_documents(documents).tolist()
    expected = [[1, *made.encoder.encode(text, add_special_tokens=False).ids, 0] for text in documents]
    assert tokens == list(chain.from_iterable(expected))
    assert [made.encoder.decode(ids) for ids in expected] == documents
    assert (made.vocab_size, made.bos_id, made.eos_id) == (400, 1, 0)
    copy = pickle.loads(pickle.dumps(made))  # as for worker processes
    assert copy == made
    assert copy.encode_documents(documents).tolist() == tokens


def test_a_vocabulary_with_gaps_reaches_to_its_last_id(tmp_path: Path):
    content = json.loads(byte_level(texts(20), 300))
    content["model"]["vocab"]["QQ"] = 70_000
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"t\.json has no end-of-text token to put around documents; add --no-eos"
    ):
        Tokenizer.load(tmp_path / "t.json")
    made = Tokenizer.load(tmp_path / "t.json", eos=False)
    assert made.vocab_size == 70_001
    assert made.encode_documents(["a"]).dtype == np.uint32


@pytest.mark.parametrize("data", [b"", b"hello", b'{"model": "a tokenizer.json"}', bytes(100)])
def test_a_file_that_is_not_a_model(tmp_path: Path, data: bytes):
    path = tmp_path / "t.model"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"t\.model.*\.model file"):
        Tokenizer.load(path)


def test_a_truncated_model(tokenizer: Tokenizer, tmp_path: Path):
    path = tmp_path / "t.model"
    path.write_bytes(Path(tokenizer.path).read_bytes()[:2000])
    with pytest.raises(InputError, match="is not a SentencePiece model"):
        Tokenizer.load(path)


def test_a_missing_model(tmp_path: Path):
    with pytest.raises(InputError, match=r"gone\.model is missing"):
        Tokenizer.load(tmp_path / "gone.model")


def test_a_model_without_eos(tmp_path: Path):
    path = tmp_path / "t.model"
    with path.open("wb") as file:
        spm.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts(100)), model_writer=file, vocab_size=60, eos_id=-1, minloglevel=2
        )
    with pytest.raises(InputError, match="has no end-of-text token to put around documents; add --no-eos"):
        Tokenizer.load(path)
    assert Tokenizer.load(path, eos=False).eos_id is None


def test_a_real_model(tokenizers: Path):
    tokenizer = Tokenizer.load(tokenizers / "mistral_v1_32k.model")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (32_000, 2)
    assert tokenizer.encode_documents(["Hello world", "Hi"]).tolist() == [22557, 1526, 2, 15359, 2]


def test_a_file_in_the_place_of_the_model_is_replaced_only_if_asked(text, tmp_path):
    out = tmp_path / "t.model"
    out.write_text("years of work")
    with pytest.raises(InputError, match=r"t\.model exists already; .* --overwrite"):
        train_tokenizer(str(text / "train.0*"), str(out), 300)
    assert out.read_text() == "years of work"
    train_tokenizer(str(text / "train.0*"), str(out), 300, overwrite=True)
    assert Tokenizer.load(out).vocab_size == 300
    assert [path.name for path in tmp_path.iterdir()] == ["t.model"]


@pytest.mark.parametrize(("step", "trained"), [("_sample", False), ("_train", True)])
def test_a_file_is_kept_before_the_text_is_read_and_after(text, tmp_path, monkeypatch, step, trained):
    """Nothing is read if the file is there from the start; nor is one replaced that appeared meanwhile."""
    out, calls = tmp_path / "t.model", []
    if not trained:
        out.touch()

    def record(*_):
        calls.append(step)
        out.touch()
        return b"a model"

    monkeypatch.setattr(f"train.data.tokenizer.{step}", record)
    with pytest.raises(InputError, match=r"t\.model exists already"):
        train_tokenizer(str(text / "train.0*"), str(out), 300)
    assert (bool(calls), out.read_bytes()) == (trained, b"")
