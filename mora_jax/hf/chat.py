"""Chat templates of tokenizer folders: how a conversation becomes the text that a model continues."""

import contextlib
import hashlib
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from mora_jax.errors import InputError, reason
from mora_jax.hf.tokenizer_files import TokenizerFiles
from mora_jax.io import parse_json

TEMPLATE_FILE = "chat_template.jinja"
_OLD_FILE, _KEY = "chat_template.json", "chat_template"
Message = Mapping[str, Any]
DATE = datetime(2024, 7, 26)  # what a template writes as today's date into data
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template in Jinja, which runs in a sandbox. `ChatTemplate.read` makes one.

    Attributes:
      place: where it was read, for messages.
      source: the template.
      tokens: the special tokens that it may write, by role, such as "bos_token".
    """

    place: str
    source: str = field(repr=False)
    tokens: Mapping[str, str]

    @classmethod
    def read(cls, files: TokenizerFiles) -> "ChatTemplate":
        """Returns the template of a tokenizer, the default of several.

        Raises:
          InputError: if it has none, or one that is no Jinja.
        """
        config = files.config
        source = config.get(_KEY)
        if _OLD_FILE in files.files:
            old = parse_json(files.files[_OLD_FILE], f"{files.place}/{_OLD_FILE}")
            source = old.get(_KEY) if isinstance(old, dict) else None
        if TEMPLATE_FILE in files.files:
            source = files.files[TEMPLATE_FILE].decode(errors="replace")
        if isinstance(source, list):
            named = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            raise InputError(
                f"{files.place} has no chat template ({TEMPLATE_FILE}, or {_KEY} in tokenizer_config.json)"
            )
        tokens = {name: files.token(name) for name in config if name.endswith("_token")}
        made = cls(files.place, source, {name: token for name, token in tokens.items() if token})
        with made._errors():
            _jinja().compiled(source)
        return made

    def render(self, messages: Sequence[Message]) -> str:
        """Returns a conversation as text, up to where the assistant's answer begins.

        Args:
          messages: each with `role` ("system", "user" or "assistant") and `content`.

        Raises:
          InputError: if the template is wrong, or refuses the messages.
        """
        return _text(self._render(messages, True, datetime.now()))

    def render_open(self, messages: Sequence[Message]) -> str:
        """Returns a conversation as text, up to where the content of its last message ends.

        Args:
          messages: as those of `render`. The last one is to be continued.

        Raises:
          InputError: if the template is wrong, refuses the messages, or leaves out the last one.
        """
        *before, last = messages
        mark = f"{secrets.token_hex(8)} "  # its space says whether the template strips what is said
        marked = {**last, "content": last["content"] + mark}
        text, found, behind = _text(self._render([*before, marked], False, datetime.now())).rpartition(
            mark.rstrip()
        )
        if not found:
            raise InputError(f"the chat template of {self.place} does not write the last message as it is")
        return text if behind.startswith(" ") else text.rstrip()

    def parts(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """Returns a whole conversation as text in parts, each with whether the assistant says it.

        The assistant says what the template marks by `{% generation %}`. Without such marks it says what a
        turn adds to the prompt for it, up to the end-of-text token. The date is always DATE.

        Args:
          messages: as those of `render`, with the answers.

        Raises:
          InputError: if the template is wrong, refuses the messages, or changes earlier turns in later ones.
        """
        parts = self._render(messages, False, DATE)
        return parts if _MARK.search(self.source) else self._by_turns(messages, _text(parts))

    @property
    def sha256(self) -> str:
        """The hash of the template."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def _by_turns(self, messages: Sequence[Message], whole: str) -> list[tuple[str, bool]]:
        parts, end, eos = [], 0, self.tokens.get("eos_token")
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = _text(self._render(messages[:index], True, DATE))
            said = _text(self._render(messages[: index + 1], False, DATE))
            if not (said.startswith(prompt) and whole.startswith(said) and len(prompt) >= end):
                raise InputError(
                    f"the chat template of {self.place} writes a turn in another way once others follow; "
                    "mark what the assistant says by {% generation %} in a template of your own"
                )
            stop = said.rfind(eos, len(prompt)) if eos else -1
            stop = len(said) if stop < 0 else stop + len(eos or "")
            parts += [(whole[end : len(prompt)], False), (whole[len(prompt) : stop], True)]
            end = stop
        return [*parts, (whole[end:], False)]

    def _render(self, messages: Sequence[Message], prompt: bool, today: datetime) -> list[tuple[str, bool]]:
        variables = {**self.tokens, "messages": list(messages), "add_generation_prompt": prompt}
        with self._errors():
            return _jinja().render(self.source, variables, today)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a template is a program
            raise InputError(f"the chat template of {self.place} fails: {reason(error)}") from error


def _jinja() -> Any:
    from mora_jax.hf import jinja  # only chats need it

    return jinja


def _text(parts: Sequence[tuple[str, bool]]) -> str:
    return "".join(text for text, _ in parts)
