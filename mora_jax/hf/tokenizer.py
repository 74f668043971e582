"""Converts a SentencePiece model to a Hugging Face tokenizer that gives the same ids and the same text.

transformers converts such models too, but its result encodes some texts differently. This tokenizer.json
encodes as SentencePiece does; models that the format cannot express exactly are refused.
"""

import base64
import json
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from mora_jax.errors import InputError
from mora_jax.io import path_of, read_bytes

Model = Any  # the parsed ModelProto, whose generated class has no static type
Json = dict[str, Any]

SPACE = "\u2581"  # what SentencePiece writes for a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # SentencePiece.Type
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_MODEL_BYTES = 1 << 26
_PIECE_CHARACTERS = 1024  # `_merges` tries to cut a piece at every character
_CHARSMAPS = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf")


def save_tokenizer(
    path: epath.PathLike, sentencepiece_model: bytes | epath.PathLike, chat_template: Any = None
) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and tokenizer.model.

    `AutoTokenizer.from_pretrained(path)` then encodes as SentencePiece does: it adds neither BOS nor EOS, and
    treats text that looks like a special token as text. The ids are equal, with two rare exceptions:

    * A unigram model may choose another split of the same score, where SentencePiece decides by the rounding
      of float32.
    * A model that normalises (nmt_nfkc and the like) may differ where a combining mark follows a
      compatibility character, and where marks are not in canonical order.

    Args:
      path: the folder; created if it does not exist.
      sentencepiece_model: a .model file or its content; BPE or unigram.
      chat_template: what tokenizer_config.json says of it; None for nothing.

    Raises:
      InputError: if this is not a SentencePiece model, or the format cannot express it exactly.
    """
    content = _content(sentencepiece_model)
    model = _parse(content)
    names = _special_names(model)
    files = {
        "tokenizer.json": tokenizer_json(model),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "split_special_tokens": True,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            **names,
            **({} if chat_template is None else {"chat_template": chat_template}),
        },
        "special_tokens_map.json": names,
    }
    folder = path_of(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(content)
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def check_tokenizer(sentencepiece_model: bytes | epath.PathLike) -> None:
    """Raises InputError if `save_tokenizer` cannot write this model."""
    tokenizer_json(_parse(_content(sentencepiece_model)))


def converted(sentencepiece_model: bytes) -> Json:
    """Returns what `save_tokenizer` writes as tokenizer.json. Raises InputError as it does."""
    return json.loads(json.dumps(tokenizer_json(_parse(sentencepiece_model))))


def pieces(sentencepiece_model: bytes) -> list[str]:
    """Returns the names of all pieces, in the order of their ids."""
    return [piece.piece for piece in _parse(sentencepiece_model).pieces]


def special_ids(sentencepiece_model: bytes | epath.PathLike) -> dict[str, int]:
    """Returns `bos_token_id`, `eos_token_id` and `pad_token_id`, those that the model has."""
    model = _parse(_content(sentencepiece_model))
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    return {f"{role}_id": ids[name] for role, name in _special_names(model).items() if role != "unk_token"}


def tokenizer_json(model: Model) -> Json:
    """Returns the content of tokenizer.json. Raises InputError if it cannot express the model exactly."""
    _check_exact(model)
    is_bpe = model.trainer_spec.model_type == _BPE
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(model),
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model.normalizer_spec)},
        "pre_tokenizer": None if is_bpe else _pre_tokenizer(model),
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": _decoders(model)},
        "model": _bpe(model) if is_bpe else _unigram(model),
    }


# Reading


def _content(sentencepiece_model: bytes | epath.PathLike) -> bytes:
    if isinstance(sentencepiece_model, bytes):
        return sentencepiece_model
    return read_bytes(sentencepiece_model, _MODEL_BYTES)


def _parse(content: bytes) -> Model:
    # Imported here, so that `import mora_jax` does not load protobuf.
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise InputError(f"the tokenizer is not a SentencePiece model: {error}") from error
    if not model.pieces:
        raise InputError("the tokenizer is not a SentencePiece model: it has no pieces")
    spec = model.trainer_spec
    special = (spec.unk_piece, spec.bos_piece, spec.eos_piece, spec.pad_piece, spec.unk_surface)
    texts = [piece.piece for piece in model.pieces] + [*special, model.normalizer_spec.name]
    if not all(isinstance(text, str) for text in texts):  # protobuf gives bytes for what is not UTF-8
        raise InputError("the tokenizer is damaged: a piece is not UTF-8 text")
    return model


def _of_type(model: Model, *types: int) -> list[str]:
    return [piece.piece for piece in model.pieces if piece.type in types]


def _special_names(model: Model) -> dict[str, str]:
    """Returns the names of the special tokens that the model has, by role (`bos_token`, ...)."""
    spec, special = model.trainer_spec, set(_of_type(model, _CONTROL, _UNKNOWN))
    names = {
        "bos_token": spec.bos_piece,
        "eos_token": spec.eos_piece,
        "unk_token": spec.unk_piece,
        "pad_token": spec.pad_piece,
    }
    return {role: name for role, name in names.items() if name in special}


# What cannot be expressed


def _check_exact(model: Model) -> None:
    """Raises InputError, with the first reason, if tokenizer.json cannot express the model exactly."""
    trainer, spec = model.trainer_spec, model.normalizer_spec
    own_rules = bool(spec.precompiled_charsmap) and spec.name not in _CHARSMAPS
    faults = {
        "its type must be BPE or unigram": trainer.model_type not in (_UNIGRAM, _BPE),
        "it treats whitespace as a suffix": trainer.treat_whitespace_as_suffix,
        f"a piece has more than {_PIECE_CHARACTERS} characters": any(
            len(piece.piece) > _PIECE_CHARACTERS for piece in model.pieces
        ),
        "it has unused pieces": bool(_of_type(model, _UNUSED)),
        "it must have exactly one unknown piece": len(_of_type(model, _UNKNOWN)) != 1,
        "it rewrites text when decoding": bool(model.denormalizer_spec.precompiled_charsmap),
        f"it normalises by rules of its own ({spec.name!r})": own_rules,
        **_user_defined_faults(model),
        **(_bpe_faults(model) if trainer.model_type == _BPE else {}),
    }
    for fault, holds in faults.items():
        if holds:
            raise InputError(f"the tokenizer cannot be exported exactly: {fault}")


def _user_defined_faults(model: Model) -> dict[str, bool]:
    """Returns what would make user-defined symbols differ, and whether it holds.

    They split the text before it is normalised, so every part would be normalised as a text of its own.
    """
    spec, symbols = model.normalizer_spec, _of_type(model, _USER_DEFINED)
    if not symbols:
        return {}
    return {
        "user-defined symbols need add_dummy_prefix false": spec.add_dummy_prefix,
        "user-defined symbols need remove_extra_whitespaces false": spec.remove_extra_whitespaces,
        "user-defined symbols need the normaliser 'identity'": bool(spec.precompiled_charsmap),
        "user-defined symbols need a BPE model": model.trainer_spec.model_type != _BPE,
        "a user-defined symbol holds a space": any(SPACE in s or " " in s for s in symbols),
    }


def _bpe_faults(model: Model) -> dict[str, bool]:
    normal = [piece for piece in model.pieces if piece.type == _NORMAL]
    lone = set("".join(piece.piece for piece in normal)) - {piece.piece for piece in normal}
    # SentencePiece merges pieces of equal score from the left; tokenizer.json needs an order of merges. The
    # order of `_merges` is right for runs of spaces, but not for other pieces.
    scores = [piece.score for piece in normal if len(piece.piece) > 1 and set(piece.piece) != {SPACE}]
    return {
        f"the character {min(lone, default='')!r} occurs in pieces but is not a piece": bool(lone),
        "several pieces have the same score": len(set(scores)) < len(scores),
    }


# The parts of tokenizer.json


def _added_tokens(model: Model) -> list[Json]:
    return [
        {
            "id": i,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": piece.type != _USER_DEFINED,
        }
        for i, piece in enumerate(model.pieces)
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]


def _normalizers(spec: Any) -> list[Json]:
    """Returns the steps of SentencePiece's normaliser, in its order."""
    space = SPACE if spec.escape_whitespaces else " "
    prefix = [{"type": "Prepend", "prepend": " "}] if spec.add_dummy_prefix else []
    escape = [_replace(" ", SPACE)] if spec.escape_whitespaces else []
    if not spec.remove_extra_whitespaces:
        # The prefix comes first: it is also added where the charsmap removes the whole text.
        return prefix + _charsmap(spec) + escape
    collapse = [_replace_regex(r"\A +", ""), _replace_regex(" +", " ")]
    return _charsmap(spec) + collapse + prefix + escape + [_replace_regex(rf"{space}+\z", "")]


def _charsmap(spec: Any) -> list[Json]:
    if not spec.precompiled_charsmap:
        return []
    encoded = base64.b64encode(spec.precompiled_charsmap).decode()
    precompiled = {"type": "Precompiled", "precompiled_charsmap": encoded}
    # Precompiled replaces a whole grapheme by its shortest match. Letters are composed first, since a
    # composed letter has no shorter match. \r forms a grapheme with \n, and a visible space with a mark, so
    # both become spaces first.
    spaces = [_replace_regex(f"[\r{SPACE}]", " ")] if spec.name.startswith("nmt") else []
    return [*spaces, {"type": "NFC"}, precompiled]


def _pre_tokenizer(model: Model) -> Json | None:
    """Splits text such as `</s>`, which a unigram model would otherwise find in its vocabulary."""
    normal = _of_type(model, _NORMAL)
    joined = {piece[i : i + 2] for piece in normal for i in range(len(piece) - 1)}
    literals = _of_type(model, _CONTROL, _UNKNOWN)
    patterns = [_cut([re.escape(c) for c in name], list(name), joined, set(normal)) for name in literals]
    if _of_type(model, _BYTE):
        patterns.append(_cut(["<", "0", "x", "[0-9A-F]{2}>"], list("<0x"), joined, set(normal)))
    pattern = {"Regex": "|".join(patterns)}
    return {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}


def _cut(regexes: Sequence[str], chars: Sequence[str], joined: set[str], normal: set[str]) -> str:
    """Returns a regex for the first characters of a literal, up to a boundary that no piece spans.

    One of the characters at the boundary must be a piece: adjacent unknown characters form one unknown piece.
    """
    for i in range(1, len(chars)):
        left, right = chars[i - 1], chars[i]
        if left + right not in joined and (left in normal or right in normal):
            return f"{''.join(regexes[:i])}(?={''.join(regexes[i:])})"
    raise InputError(
        f"the tokenizer cannot be exported exactly: "
        f"the text {''.join(chars)!r} would be encoded as the special token"
    )


def _decoders(model: Model) -> list[Json]:
    spec, trainer = model.normalizer_spec, model.trainer_spec
    unknown = rf"\A{re.escape(_of_type(model, _UNKNOWN)[0])}\z"
    spaces = 2**31 - 1 if spec.remove_extra_whitespaces else int(spec.add_dummy_prefix)
    return [
        _replace_regex(unknown, trainer.unk_surface),
        *([{"type": "ByteFallback"}] if trainer.byte_fallback else []),
        {"type": "Fuse"},
        {"type": "Strip", "content": SPACE, "start": spaces, "stop": 0},
        _replace(SPACE, " "),
    ]


def _bpe(model: Model) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": _of_type(model, _UNKNOWN)[0],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.piece: i for i, piece in enumerate(model.pieces)},
        "merges": _merges(model),
    }


def _merges(model: Model) -> list[tuple[str, str]]:
    """Returns every pair of pieces that makes a piece, best score first, then the longer left part.

    SentencePiece merges the leftmost pair of equal scores, so runs of one character grow from the left.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    ranked = [
        (score, cut, piece)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(piece[:cut], piece[cut:]) for _, cut, piece in sorted(ranked, reverse=True)]


def _unigram(model: Model) -> Json:
    return {
        "type": "Unigram",
        "unk_id": [piece.type for piece in model.pieces].index(_UNKNOWN),
        "vocab": [(piece.piece, piece.score) for piece in model.pieces],
        "byte_fallback": model.trainer_spec.byte_fallback,
    }


def _replace(text: str, by: str) -> Json:
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


def _replace_regex(regex: str, by: str) -> Json:
    return {"type": "Replace", "pattern": {"Regex": regex}, "content": by}
