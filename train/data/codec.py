"""Text to tokens and back, for generation: prompts as a model was trained on them, and what it answers."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sentencepiece as spm

from mora_jax.errors import InputError
from mora_jax.hf.chat import ChatTemplate, Message
from mora_jax.hf.tokenizer_files import TokenizerFiles
from mora_jax.io import is_unicode

# Tokens of the prompt that are decoded with what follows, so that its first space is kept.
_BEFORE = 8


@dataclass(frozen=True)
class Codec:
    """A tokenizer for generation. `Codec.of_run` and `Codec.of_model` make one.

    Attributes:
      files: the tokenizer's files.
      eos_ids: tokens that end a text.
      encoder: what encodes.
      bos_ids: tokens before every prompt.
      adds_special: whether the encoder adds special tokens itself, as transformers lets it.
    """

    files: TokenizerFiles
    eos_ids: tuple[int, ...]
    encoder: Any = field(repr=False)
    bos_ids: tuple[int, ...] = ()
    adds_special: bool = False

    @classmethod
    def of_model(cls, files: TokenizerFiles) -> "Codec":
        """Returns that of a Hugging Face folder: prompts begin as transformers begins them."""
        encoder, bos_ids = files.load(), ()
        if isinstance(encoder, spm.SentencePieceProcessor) and files.config.get("add_bos_token") is True:
            bos_ids = _bos(files)
        return cls(files, files.eos_ids(), encoder, bos_ids, adds_special=True)

    @classmethod
    def of_run(cls, files: TokenizerFiles, bos: bool) -> "Codec":
        """Returns that of a run, whose documents begin with the begin-of-text token if `bos`."""
        return cls(files, files.eos_ids(), files.load(), _bos(files) if bos else ())

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text that is to be continued."""
        return self._tokens([text], True)[0]

    def encode_all(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Returns the tokens of each text, as `encode` does, all at once.

        Args:
          texts: the texts. Those that begin with the begin-of-text token get no other one.
          special: whether texts begin with special tokens.
        """
        begun, found = self._name(self.prefix_id), {}
        for whole in (True, False):
            numbers = [i for i, t in enumerate(texts) if (special and not t.startswith(begun)) is whole]
            found |= zip(numbers, self._tokens([texts[i] for i in numbers], whole), strict=True)
        return [found[i] for i in range(len(texts))]

    @functools.cached_property  # it reads the tokenizer's files again
    def prefix_id(self) -> int:
        """The token before a text that has no context: begin-of-text, else end-of-text.

        Runs whose documents do not begin with the former have never seen it.
        """
        ids = self.files.special_ids()
        begins = bool(self.bos_ids) or self.adds_special
        for role in ("bos_token_id", "eos_token_id")[0 if begins else 1 :]:
            if role in ids:
                return ids[role]
        raise InputError(f"{self.files.place} has neither a begin-of-text nor an end-of-text token")

    def special_id(self, text: str) -> int | None:
        """Returns the special token that is written as this text, None if there is none."""
        if isinstance(self.encoder, spm.SentencePieceProcessor):
            token = self.encoder.piece_to_id(text)
            return token if self.encoder.is_control(token) else None
        token = self.encoder.token_to_id(text)
        return token if token is not None and not self._text([token]) else None

    @functools.cached_property  # it reads the tokenizer's files again
    def chat_template(self) -> ChatTemplate:
        """The chat template. Reading it raises InputError if there is none, or one that is no Jinja."""
        return ChatTemplate.read(self.files)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens of a conversation, up to where the answer begins.

        Raises:
          InputError: if the tokenizer has no chat template, or it refuses the messages.
        """
        # The template writes the special tokens.
        return self._tokens([self.chat_template.render(messages)], False)[0]

    def decode(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """Returns the text of tokens that follow those of a prompt, without special tokens."""
        before = list(prompt[-_BEFORE:])
        return self._text([*before, *new])[len(self._text(before)) :]

    def _name(self, token: int) -> str:
        if isinstance(self.encoder, spm.SentencePieceProcessor):
            return self.encoder.id_to_piece(token)
        return self.encoder.id_to_token(token)

    def _tokens(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        if not is_unicode("".join(texts)):
            raise InputError("a prompt is not Unicode text: it has a lone surrogate")
        if isinstance(self.encoder, spm.SentencePieceProcessor):
            found = self.encoder.encode(list(texts))
        else:
            adds = special and self.adds_special
            found = [each.ids for each in self.encoder.encode_batch(list(texts), add_special_tokens=adds)]
        return [[*self.bos_ids, *tokens] for tokens in found] if special else found

    def _text(self, tokens: list[int]) -> str:
        if isinstance(self.encoder, spm.SentencePieceProcessor):
            size = self.encoder.vocab_size()  # a model may have more
            return self.encoder.decode([token for token in tokens if token < size])
        return self.encoder.decode(tokens, skip_special_tokens=True)


def _bos(files: TokenizerFiles) -> tuple[int, ...]:
    ids = files.special_ids()
    if "bos_token_id" not in ids:
        raise InputError(f"{files.place} has no begin-of-text token, which prompts should begin with")
    return (ids["bos_token_id"],)
