"""The exported tokenizer gives SentencePiece's ids and text; models for which it cannot are refused."""

import functools
import gzip
import io
import json
import pydoc_data.topics
import unicodedata

import numpy as np
import pytest
import sentencepiece
from hf_folders import random_params
from sentencepiece import sentencepiece_model_pb2
from slow import quick

from mora_jax.errors import InputError
from mora_jax.hf import save_hf, save_tokenizer, special_ids
from mora_jax.hf.tokenizer import SPACE
from mora_jax.models.llama import LlamaConfig

PARITY = "needs the extra `parity`"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)

ADVERSARIAL = [
    *("", " ", "  ", " a", "a ", "  a  b ", "\n", "\t", "\r\n", "a\r\nb", "a\n\nb\t c", "\n a"),
    *("</s>", "x</s>y", "</s></s>", "<s>", " <unk> ", "<pad>", "<0x0A>", "a<0xFF>b", "<0x41", "<sep>a<sep>"),
    *("\x00", "\x01\x7f", "\x01", "\u200b", "\ufeff", "\u200da", "\u3000x\u3000\u3000y", "\u00a0"),
    *("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u6f22\u5b57", "\ufb01", "\u00bd"),
    *("\u00e9", "e\u0301", "\u0301a", " \u0301", "\u00a8 \u00a8", "\u1100\u1161", "a\u0323\u0302"),
    *(SPACE, f"{SPACE}a", f"{SPACE}{SPACE}a", f"a{SPACE} ", f"a{SPACE}\u0301"),
    *(" " * n + end for n in range(2, 50) for end in ("", "x", "\n", "1")),
]


def train(**options):
    """Returns a small model of English technical prose."""
    text = [line for topic in pydoc_data.topics.topics.values() for line in topic.splitlines()]
    model = io.BytesIO()
    defaults = {"vocab_size": 800, "character_coverage": 0.98, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text[:3000]), model_writer=model, **(defaults | options)
    )
    return model.getvalue()


@functools.cache
def plain_bpe():
    return train(model_type="bpe", byte_fallback=True, pad_id=3)


def edited(change, content=None):
    model = sentencepiece_model_pb2.ModelProto.FromString(content or plain_bpe())
    change(model)
    return model.SerializeToString()


def prose():
    text = "\n".join(pydoc_data.topics.topics.values())
    lines = text.splitlines()[3000:5000]
    documents = [text[start : start + 2000] for start in range(0, 200_000, 2000)]
    return [*lines, *documents, *(unicodedata.normalize("NFD", line) for line in lines[:50])]


def read_back(folder, content):
    tokenizers = pytest.importorskip("tokenizers", reason=PARITY)
    save_tokenizer(folder, content)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # as split_special_tokens asks
    return tokenizer


def differences(folder, content, texts):
    """Returns the texts whose ids differ, with both ids. Asserts that both decode to the same text."""
    ours = sentencepiece.SentencePieceProcessor(model_proto=content)
    theirs = read_back(folder, content)
    pairs = [(text, ours.encode(text), theirs.encode(text).ids) for text in texts]
    for text, ids, other in pairs:
        assert ours.decode(ids) == theirs.decode(other, skip_special_tokens=False), text
    return [pair for pair in pairs if pair[1] != pair[2]]


# Equality


@pytest.mark.slow
def test_real_model_on_real_text(tmp_path, tokenizers, corpus):
    transformers = pytest.importorskip("transformers", reason=PARITY)
    pytest.importorskip("torch", reason=PARITY)
    file = tokenizers / "mistral_v1_32k.model"
    with gzip.open(corpus / "c4-real-validation.00000-of-00001.json.gz") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    texts = ADVERSARIAL + documents[:300] + [s for d in documents[300:1000] for s in d.split("\n")]
    config = LlamaConfig(32_000, 8, 8, 1, 1, 1)
    save_hf(tmp_path / "hf", random_params(config), config, special_ids=special_ids(file))
    save_tokenizer(tmp_path / "hf", file)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(file))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text, ids in zip(texts, theirs(texts).input_ids, strict=True):
        assert ids == ours.encode(text), text
        assert theirs.decode(ids) == ours.decode(ids), text


BOTH_NORMALISERS = pytest.mark.parametrize("normaliser", quick(["nmt_nfkc"], ["identity", "nmt_nfkc"]))
WHITESPACE = pytest.mark.parametrize(
    ("prefix", "strip"), quick([(False, False)], [(True, True), (True, False), (False, False)])
)


@BOTH_NORMALISERS
@WHITESPACE
@pytest.mark.parametrize("byte_fallback", quick([True], [True, False]))
def test_bpe(tmp_path, normaliser, prefix, strip, byte_fallback):
    model = train(
        model_type="bpe",
        normalization_rule_name=normaliser,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=strip,
        byte_fallback=byte_fallback,
    )
    assert differences(tmp_path, model, ADVERSARIAL + prose()) == []


@BOTH_NORMALISERS
@pytest.mark.parametrize("byte_fallback", quick([True], [True, False]))
def test_unigram(tmp_path, normaliser, byte_fallback):
    model = train(
        model_type="unigram", normalization_rule_name=normaliser, byte_fallback=byte_fallback, pad_id=3
    )
    texts = ADVERSARIAL + prose()
    scores = np.array([piece.score for piece in sentencepiece_model_pb2.ModelProto.FromString(model).pieces])
    ties = differences(tmp_path, model, texts)
    # Only splits of equal score differ, which rounding decides; rows of dashes have many.
    for text, ids, other in ties:
        np.testing.assert_allclose(scores[ids].sum(), scores[other].sum(), rtol=1e-6, err_msg=text)
    assert len(ties) < len(texts) / 40


def test_runs_of_spaces_of_equal_score(tmp_path):
    def add_runs(model):
        for n in (2, 3, 4, 6, 7, 11):
            model.pieces.add(piece=SPACE * n, score=-1e9, type=NORMAL)

    model = train(model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False)
    assert differences(tmp_path, edited(add_runs, model), ADVERSARIAL) == []


def test_user_defined_symbols(tmp_path):
    model = train(
        model_type="bpe",
        user_defined_symbols=["<sep>", "<sep>a", "@@"],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    )
    texts = [*ADVERSARIAL, "<sep>", "a <sep> b<sep>a<sep>", "@@@", " @@ <sep>"]
    assert differences(tmp_path, model, texts) == []


def test_spaces_that_are_not_escaped(tmp_path):
    def unescape(model):
        model.normalizer_spec.escape_whitespaces = False
        for piece in model.pieces:
            piece.piece = piece.piece.replace(SPACE, " ")

    for strip in (True, False):
        model = train(model_type="bpe", byte_fallback=True, remove_extra_whitespaces=strip)
        assert differences(tmp_path, edited(unescape, model), ADVERSARIAL + prose()[:200]) == []


# The folder


@pytest.mark.slow
def test_transformers_reads_the_special_tokens(tmp_path):
    transformers = pytest.importorskip("transformers", reason=PARITY)
    save_tokenizer(tmp_path, plain_bpe())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert (tokenizer.unk_token, tokenizer.pad_token) == ("<unk>", "<pad>")
    ours = sentencepiece.SentencePieceProcessor(model_proto=plain_bpe())
    encoded = tokenizer(["a</s>", "a b c"], padding=True)
    assert encoded.keys() == {"input_ids", "attention_mask"}
    assert encoded.input_ids[0][: len(ours.encode("a</s>"))] == ours.encode("a</s>")
    assert tokenizer.decode([*ours.encode("a  b"), tokenizer.eos_token_id], skip_special_tokens=True) == "a b"
    assert len(tokenizer) == ours.get_piece_size()


def test_special_ids_are_those_the_model_has(tmp_path):
    assert special_ids(plain_bpe()) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    like_t5 = train(model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    assert special_ids(like_t5) == {"eos_token_id": 1, "pad_token_id": 0}
    save_tokenizer(tmp_path, like_t5)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["model_input_names"] == ["input_ids", "attention_mask"]  # LLaMA takes no token types
    names = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert names == {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def test_the_sentencepiece_model_is_copied(tmp_path):
    (tmp_path / "x.model").write_bytes(plain_bpe())
    save_tokenizer(tmp_path / "hf", tmp_path / "x.model")
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == plain_bpe()


# Refusals


def set_type(model, index, kind):
    model.pieces[index].type = kind


def keep_symbol(model, symbol="@@", kind=2, charsmap=b"", strip=False):
    """Changes one thing in a model whose user-defined symbols could be exported."""
    model.trainer_spec.model_type = kind
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = strip
    model.normalizer_spec.precompiled_charsmap = charsmap
    model.pieces[-1].piece = symbol
    set_type(model, -1, USER_DEFINED)


def equal_scores(model):
    merged = [piece for piece in model.pieces if piece.type == NORMAL and len(piece.piece) > 1]
    merged[0].score = merged[1].score


EDITS = {
    "suffix": lambda m: setattr(m.trainer_spec, "treat_whitespace_as_suffix", True),
    "unused": lambda m: set_type(m, -1, UNUSED),
    "exactly one unknown piece": lambda m: set_type(m, 0, CONTROL),
    "when decoding": lambda m: setattr(m.denormalizer_spec, "precompiled_charsmap", b"x"),
    "rules of its own": lambda m: setattr(m.normalizer_spec, "name", "user_defined"),
    "add_dummy_prefix": lambda m: set_type(m, -1, USER_DEFINED),
    "remove_extra_whitespaces": lambda m: keep_symbol(m, strip=True),
    "the normaliser 'identity'": lambda m: keep_symbol(m, charsmap=b"x"),
    "need a BPE model": lambda m: keep_symbol(m, kind=1),
    "symbol holds a space": lambda m: keep_symbol(m, symbol=f"a{SPACE}"),
    "same score": equal_scores,
    "occurs in pieces but is not a piece": lambda m: m.pieces.add(piece="a\u6f22", score=-1e4, type=NORMAL),
}


@pytest.mark.parametrize("message", EDITS)
def test_models_that_cannot_be_exact_are_refused(tmp_path, message):
    with pytest.raises(InputError, match=message):
        save_tokenizer(tmp_path / "hf", edited(EDITS[message]))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("kind", ["word", "char"])
def test_other_kinds_of_model_are_refused(tmp_path, kind):
    with pytest.raises(InputError, match="BPE or unigram"):
        save_tokenizer(tmp_path, train(model_type=kind, vocab_size=40))


def test_unigram_whose_pieces_span_a_special_token_is_refused(tmp_path):
    def span(model):
        for left, right in zip("</s", "/s>", strict=True):
            model.pieces.add(piece=left + right, score=-20, type=NORMAL)

    model = train(model_type="unigram")
    with pytest.raises(InputError, match="</s>"):
        save_tokenizer(tmp_path, edited(span, model))


@pytest.mark.parametrize("content", [b"", b"no model at all"])
def test_other_files_are_refused(tmp_path, content):
    with pytest.raises(InputError, match="not a SentencePiece model"):
        save_tokenizer(tmp_path, content)
    with pytest.raises(InputError, match="is missing"):
        save_tokenizer(tmp_path, tmp_path / "absent.model")
