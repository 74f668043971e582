"""The files of a tokenizer: which of them encodes, its hash, its special tokens.

A tokenizer is a SentencePiece model (tokenizer.model) or a tokenizer.json of the library `tokenizers`, with
what transformers keeps beside it: the names of special tokens, the chat template. All are kept as they came.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

from mora_jax.errors import InputError, reason, some
from mora_jax.hf.config import CONFIG
from mora_jax.hf.hub import local_folder
from mora_jax.hf.tokenizer import converted, pieces, special_ids
from mora_jax.io import is_plain_file, is_unicode, parse_json, path_of, read_bytes

MODEL = "tokenizer.model"
JSON = "tokenizer.json"
FOLDER = "tokenizer"  # of a data set or a run
LIMIT = 1 << 26  # bytes of a file

_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_ADDED = "added_tokens.json"
_OWN = (MODEL, JSON, _CONFIG, _MAP, _ADDED, "chat_template.jinja", "chat_template.json")
# Of the model that the tokenizer came with. They name special tokens where the tokenizer's own files do not.
_OF_MODEL = ("generation_config.json", CONFIG)
_ROLES = ("bos_token", "eos_token", "pad_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's files.

    Attributes:
      place: where they were read, for messages.
      files: their content by name, as it came.
    """

    place: str
    files: Mapping[str, bytes]

    @functools.cached_property
    def encoder(self) -> str:
        """The name of the file that encodes text: MODEL or JSON.

        JSON comes first, as in transformers, unless it is our own conversion of MODEL.
        """
        if JSON not in self.files:
            return MODEL
        return MODEL if MODEL in self.files and self._is_converted() else JSON

    @property
    def sha256(self) -> str:
        """The hash of the file that encodes text, which identifies the tokenizer."""
        return hashlib.sha256(self.files[self.encoder]).hexdigest()

    def has_hash(self, sha256: str) -> bool:
        """Returns whether one of the files that could encode text has this hash."""
        return sha256 in [hashlib.sha256(c).hexdigest() for n, c in self.files.items() if n in (MODEL, JSON)]

    @property
    def config(self) -> dict[str, Any]:
        """What tokenizer_config.json says, and special_tokens_map.json where transformers reads that."""
        config = self._object(_CONFIG)
        return config if "added_tokens_decoder" in config else config | self._object(_MAP)

    def special_ids(self) -> dict[str, int]:
        """Returns `bos_token_id`, `eos_token_id` and `pad_token_id`, those that there are.

        As in transformers: the tokens that its own files name; else the numbers in the model's configs.
        """
        if self.encoder == MODEL:
            return special_ids(self.files[MODEL])
        tokenizer, config, found = self.load(), self.config, {}
        numbers = self._object(_OF_MODEL[1]) | self._object(_OF_MODEL[0])
        for role in _ROLES:
            token, number = _content(config.get(role)), numbers.get(f"{role}_id")
            number = number[0] if isinstance(number, list) and number else number
            if token is not None:
                number = tokenizer.token_to_id(token)
            elif type(number) is not int or number < 0 or tokenizer.id_to_token(number) is None:
                number = None
            found |= {} if number is None else {f"{role}_id": number}
        return found

    def eos_ids(self) -> tuple[int, ...]:
        """Returns the tokens that end a text: the tokenizer's own, and those of the model's configs."""
        own = self.special_ids().get("eos_token_id")
        configs = [self._object(name).get("eos_token_id") for name in _OF_MODEL]
        given = next((ids for ids in configs if ids is not None), [])
        found = [own, *(given if isinstance(given, list) else [given])]
        return tuple(sorted({i for i in found if type(i) is int and 0 <= i < 2**31}))

    def token(self, role: str) -> str | None:
        """Returns the text of a special token, such as "bos_token"; None if there is none."""
        return _content(self.config.get(role))

    def load(self) -> Any:
        """Returns what encodes: a `sentencepiece.SentencePieceProcessor` or a `tokenizers.Tokenizer`.

        The latter encodes as transformers does.

        Raises:
          InputError: if the file is damaged, or transformers would add tokens to it.
        """
        encoder = self._sentencepiece() if self.encoder == MODEL else self._tokenizers()
        config = self.config.get("added_tokens_decoder")
        added = [*map(_content, config.values())] if isinstance(config, dict) else []
        if added := [token for token in (*added, *self._object(_ADDED)) if token]:
            known = pieces(self.files[MODEL]) if self.encoder == MODEL else encoder.get_vocab()
            if missing := [token for token in added if token not in known]:
                raise InputError(
                    f"{self.place}: tokens were added that {self.encoder} lacks ({some(missing)}); let "
                    f"transformers write {JSON} anew: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
                )
        return encoder

    def exported(self) -> dict[str, bytes]:
        """Returns what an exported model's folder holds: all files as they came, but the model's config."""
        return {name: content for name, content in self.files.items() if name != CONFIG}

    def _sentencepiece(self) -> Any:
        import sentencepiece

        content = self.files[MODEL]
        if not content:  # SentencePiece reads it as a model without pieces
            raise InputError(f"tokenizer {self.place} is empty; it must be a SentencePiece .model file")
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise InputError(
                f"{self.place} is not a SentencePiece model; it must be a .model file, or a {JSON}"
            ) from error

    def _tokenizers(self) -> Any:
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_str(self.files[JSON].decode())
        except BaseException as error:  # plain Exceptions, and panics of Rust that are not even those
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise InputError(
                f"{self.place}: {JSON} is damaged, or of another version: {reason(error)}"
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = self.config.get("split_special_tokens") is True
        named = [_content(self.config.get(role)) for role in (*_ROLES, "unk_token")]
        tokenizer.add_special_tokens([t for t in named if t and tokenizer.token_to_id(t) is not None])
        return tokenizer

    def _is_converted(self) -> bool:
        try:
            return converted(self.files[MODEL]) == json.loads(self.files[JSON])
        except (InputError, ValueError, RecursionError):
            return False

    def _object(self, name: str) -> dict[str, Any]:
        value = parse_json(self.files[name], f"{self.place}/{name}") if name in self.files else {}
        if not isinstance(value, dict):
            raise InputError(f"{self.place}/{name} must hold a JSON object")
        if not is_unicode(value):
            raise InputError(f"{self.place}/{name} is not Unicode text; download it again")
        return value


def read_tokenizer(path: epath.PathLike) -> TokenizerFiles:
    """Reads a tokenizer.

    Args:
      path: a SentencePiece model (.model), a tokenizer.json, or a folder that holds one of them: of a Hugging
        Face model, a data set or a run; or the id of a model on the Hub.

    Raises:
      InputError: if there is none, or a file cannot be read.
    """
    place = path_of(path)
    if (place.suffix.lower() in (".json", ".model") and not place.is_dir()) or is_plain_file(place):
        if place.name != JSON:
            name = JSON if place.suffix.lower() == ".json" else MODEL
            return TokenizerFiles(str(place), {name: read_bytes(place, LIMIT)})
        read_bytes(place, LIMIT)
        folder = place.parent
    else:
        folder = local_folder(path)
        if any((folder / FOLDER / name).exists() for name in (JSON, MODEL)):
            folder /= FOLDER
    there = [name for name in (*_OWN, *_OF_MODEL) if (folder / name).exists()]
    if not {JSON, MODEL} & set(there):
        raise InputError(
            f"{folder} holds neither {JSON} nor {MODEL}; let transformers write the former "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    return TokenizerFiles(str(folder), {name: read_bytes(folder / name, LIMIT) for name in there})


def _content(token: Any) -> str | None:
    """Returns the text of a token, which is a string or an object with its `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
