"""A tokenizer's files: which one encodes, what identifies it, and its special tokens as in transformers."""

import hashlib
import io
import json
import pydoc_data.topics
from pathlib import Path

import pytest
import sentencepiece
from made_tokenizers import SPECIAL, TEMPLATE, byte_level, write_folder

from mora_jax.errors import InputError
from mora_jax.hf import read_tokenizer, save_tokenizer, tokenizer_files

PARITY = "needs the extra `parity`"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


TEXTS = [line for topic in pydoc_data.topics.topics.values() for line in topic.splitlines()][:3000]


@pytest.fixture(scope="module")
def bpe() -> str:
    return byte_level(TEXTS[:300])


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type="bpe", vocab_size=400, minloglevel=2
    )
    return model.getvalue()


@pytest.fixture
def folder(tmp_path: Path, bpe: str) -> Path:
    return write_folder(
        tmp_path / "hf", bpe, chat_template=TEMPLATE, generation_config={"eos_token_id": [0, 7]}
    )


def ids(folder: Path) -> tuple[int | None, ...]:
    found = read_tokenizer(folder).special_ids()
    return tuple(found.get(f"{role}_token_id") for role in ("bos", "eos", "pad"))


def test_a_folder_and_its_file_are_one_tokenizer(folder: Path, bpe: str):
    (folder / "model.safetensors").write_bytes(b"weights")
    whole, file = read_tokenizer(folder), read_tokenizer(folder / "tokenizer.json")
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert whole.files.keys() == file.files.keys() == names
    assert whole.sha256 == file.sha256 == hashlib.sha256(bpe.encode()).hexdigest()
    assert whole.has_hash(whole.sha256)
    assert not whole.has_hash("0" * 64)
    for name in ("data.json", "data.MODEL"):  # a folder may have any name
        folder = folder.rename(folder.with_name(name))
        assert read_tokenizer(folder).files == whole.files


def test_texts_are_neither_cut_nor_padded_nor_begun(folder: Path):
    encoder = read_tokenizer(folder).load()
    for text in ("a", "words " * 50):
        assert encoder.decode(encoder.encode(text, add_special_tokens=False).ids) == text


def test_special_tokens_are_named_by_the_tokenizers_own_files_first(folder: Path):
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 9, "eos_token_id": 8, "pad_token_id": 7}))
    assert ids(folder) == (1, 0, 2)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": SPECIAL[2]}}))
    assert ids(folder) == (1, 2, 2)
    config = {"eos_token": SPECIAL[0], "added_tokens_decoder": {}}  # with these the map is not read
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert ids(folder) == (9, 0, 7)
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert ids(folder) == (9, 0, 7)  # generation_config comes before config, and the first of its list counts
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"bos_token_id": -1, "eos_token_id": 10**9}))
    assert ids(folder) == (None, None, None)


def test_special_tokens_in_a_text(folder: Path):
    text = f"a{SPECIAL[0]}"
    assert 0 in read_tokenizer(folder).load().encode(text, add_special_tokens=False).ids
    (folder / "tokenizer_config.json").write_text(json.dumps({"split_special_tokens": True}))
    assert 0 not in read_tokenizer(folder).load().encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["added_tokens", "tokenizer_config"])
def test_tokens_that_transformers_would_add_are_refused(folder: Path, name: str):
    added = (
        {"<new>": 400} if name == "added_tokens" else {"added_tokens_decoder": {"400": {"content": "<new>"}}}
    )
    (folder / f"{name}.json").write_text(json.dumps(added))
    with pytest.raises(
        InputError, match=r"tokens were added that tokenizer.json lacks \(<new>\); let transf"
    ):
        read_tokenizer(folder).load()


def test_our_conversion_of_a_sentencepiece_model_is_that_model(tmp_path: Path, sentencepiece_model: bytes):
    (tmp_path / "t.model").write_bytes(sentencepiece_model)
    save_tokenizer(tmp_path / "hf", sentencepiece_model, TEMPLATE)
    model, folder = read_tokenizer(tmp_path / "t.model"), read_tokenizer(tmp_path / "hf")
    assert folder.encoder == "tokenizer.model"
    assert folder.sha256 == model.sha256
    assert folder.config["chat_template"] == TEMPLATE
    changed = json.loads((tmp_path / "hf" / "tokenizer.json").read_text()) | {"normalizer": None}
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(changed))
    other = read_tokenizer(tmp_path / "hf")
    assert other.encoder == "tokenizer.json"
    assert other.sha256 != model.sha256
    assert other.has_hash(model.sha256)


def test_a_model_of_the_hub_is_downloaded_first(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer_files, "local_folder", {"org/tiny@main": folder}.__getitem__)
    assert read_tokenizer("org/tiny@main").files == read_tokenizer(folder / "tokenizer.json").files
    with pytest.raises(InputError, match=r"gone/tokenizer\.json is missing"):  # a file is not looked up there
        read_tokenizer("gone/tokenizer.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "tokenizer.json is damaged, or of another version"),
        ("[]", "tokenizer.json is damaged, or of another version"),
        ('{"model": {"type": "BPE"}}', "tokenizer.json is damaged, or of another version"),
        (LFS, "tokenizer.json is a Git LFS pointer: run git lfs pull"),
    ],
)
def test_a_damaged_tokenizer_is_named(folder: Path, content: str, said: str):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=said):
        read_tokenizer(folder).load()


def test_a_folder_without_a_tokenizer(tmp_path: Path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"holds neither tokenizer\.json nor tokenizer.model; let transformers"
    ):
        read_tokenizer(tmp_path)


@pytest.mark.slow
def test_ids_and_special_tokens_are_those_of_transformers(folder: Path):
    transformers = pytest.importorskip("transformers", reason=PARITY)
    theirs, files = transformers.AutoTokenizer.from_pretrained(folder), read_tokenizer(folder)
    assert ids(folder) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert theirs.chat_template == files.files["chat_template.jinja"].decode()
    texts = [*TEXTS, f"a{SPECIAL[0]}b", "", " \n\t", "é 漢字 \U0001f600"]
    for text, found in zip(texts, files.load().encode_batch(texts, add_special_tokens=False), strict=True):
        assert found.ids == theirs(text, add_special_tokens=False).input_ids
