"""Chat templates of tokenizer folders: how a conversation becomes the text that a model continues."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from mora_jax.errors import InputError, reason
from mora_jax.hf.tokenizer_files import TokenizerFiles
from mora_jax.io import parse_json

_FILE, _OLD_FILE, _KEY = "chat_template.jinja", "chat_template.json", "chat_template"
Message = Mapping[str, Any]


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
        """Returns the template of a tokenizer, the default of several. Raises InputError if it has none."""
        config = files.config
        source = config.get(_KEY)
        if _OLD_FILE in files.files:
            old = parse_json(files.files[_OLD_FILE], f"{files.place}/{_OLD_FILE}")
            source = old.get(_KEY) if isinstance(old, dict) else None
        if _FILE in files.files:
            source = files.files[_FILE].decode(errors="replace")
        if isinstance(source, list):
            named = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            raise InputError(
                f"{files.place} has no chat template ({_FILE}, or {_KEY} in tokenizer_config.json)"
            )
        tokens = {name: files.token(name) for name in config if name.endswith("_token")}
        return cls(files.place, source, {name: token for name, token in tokens.items() if token})

    def render(self, messages: Sequence[Message]) -> str:
        """Returns a conversation as text, up to where the assistant's answer begins.

        Args:
          messages: each with `role` ("system", "user" or "assistant") and `content`.

        Raises:
          InputError: if the template is wrong, or refuses the messages.
        """
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        env.filters["tojson"] = _to_json
        env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            template = env.from_string(self.source)
            return template.render(messages=list(messages), add_generation_prompt=True, **self.tokens)
        except Exception as error:  # a template is a program
            raise InputError(f"the chat template of {self.place} fails: {reason(error)}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    """Returns JSON without the escapes for HTML that Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
