"""Text to tokens and back, for generation: prompts as a model was trained on them, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sentencepiece as spm

from mora_jax.errors import InputError, reason
from mora_jax.hf.chat import ChatTemplate, Message
from mora_jax.hf.tokenizer_files import TokenizerFiles

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
        return [*self.bos_ids, *self._tokens(text, self.adds_special)]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens of a conversation, up to where the answer begins.

        Raises:
          InputError: if the tokenizer has no chat template, or it refuses the messages.
        """
        # The template writes the special tokens.
        return self._tokens(ChatTemplate.read(self.files).render(messages), False)

    def decode(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """Returns the text of tokens that follow those of a prompt, without special tokens."""
        before = list(prompt[-_BEFORE:])
        return self._text([*before, *new])[len(self._text(before)) :]

    def _tokens(self, text: str, add_special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"a prompt is not Unicode text: {reason(error)}") from error
        if isinstance(self.encoder, spm.SentencePieceProcessor):
            return self.encoder.encode(text)
        return self.encoder.encode(text, add_special_tokens=add_special).ids

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
