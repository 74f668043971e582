"""The forms of text: which fields of a line or row make an example, and what they must hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mora_jax.errors import InputError, nearest, some
from mora_jax.io import is_unicode
from train.data.text.entries import TEXT_KEY, Content

FormName = Literal["text", "prompt", "messages", "query"]
_ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "text": (TEXT_KEY,),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
    "query": ("query", "response"),
}


@dataclass(frozen=True)
class Form:
    """What an example is made of. `Form.of` makes one.

    Attributes:
      name: "text", one string; "prompt" and "query", a prompt and its completion; "messages", a conversation.
      keys: the keys or columns that hold its fields, in order.
    """

    name: str = "text"
    keys: tuple[str, ...] = (TEXT_KEY,)

    @classmethod
    def of(cls, name: str, fields: str = "", text_key: str = TEXT_KEY) -> "Form":
        """Returns a form whose fields have other keys.

        Args:
          name: of the form.
          fields: such as "prompt=instruction,completion=output"; fields that are left out keep their names.
          text_key: the key of the form "text", which has no fields.

        Raises:
          InputError: an unknown form or field, no `field=key`, or what is of another form.
        """
        if name not in _FIELDS:
            raise InputError(f"--form {name!r} must be one of {', '.join(_FIELDS)}{nearest(name, _FIELDS)}")
        if name == "text":
            if fields:
                raise InputError(f"--fields {fields} is not for the form text: --text-key names its key")
            return cls(name, (text_key,))
        if text_key != TEXT_KEY:
            raise InputError(f"--text-key {text_key} is not for the form {name}: --fields names its keys")
        keys = {field: field for field in _FIELDS[name]}
        for pair in filter(None, fields.split(",")):
            field, _, key = pair.partition("=")
            if field not in keys or not key:
                known = ", ".join(f"{each}=KEY" for each in keys)
                raise InputError(f"--fields {pair!r} is not one of {known} (form {name})")
            keys[field] = key
        return cls(name, tuple(keys.values()))

    @property
    def fields(self) -> str:
        """The fields with their keys, as `Form.of` takes them."""
        return ",".join(f"{f}={key}" for f, key in zip(_FIELDS[self.name], self.keys, strict=True))

    def content(self, row: Any) -> tuple[Content | None, str]:
        """Returns the example in a row and "", or None and what is wrong with the row."""
        if self.name == "messages":
            return _messages(row, self.keys[0], self)
        texts = []
        for key in self.keys:
            text = row.get(key) if isinstance(row, dict) else None
            if not isinstance(text, str):
                others = f" ({self.names(list(row))})" if isinstance(row, dict) and key not in row else ""
                return None, f"has no string `{key}`{others}"
            if not is_unicode(text):
                return None, f"has a `{key}` with a lone surrogate, which is not Unicode"
            texts.append(text)
        return texts[0] if len(texts) == 1 else tuple(texts), ""

    def names(self, keys: list[str]) -> str:
        """Returns the keys or columns that there are, for a message; names may be long and many."""
        flag = "--text-key names the one to read" if self.name == "text" else "--fields names those to read"
        return f"it has {some([key[:40] for key in keys], 8) or 'none'}; {flag}"


TEXT = Form()


def _messages(row: Any, key: str, form: Form) -> tuple[Content | None, str]:
    found = row.get(key) if isinstance(row, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(each, dict) for each in found):
        others = f" ({form.names(list(row))})" if isinstance(row, dict) and key not in row else ""
        return None, f"has no list of messages `{key}`{others}"
    messages = [_without_nulls(message) for message in found]
    for number, message in enumerate(messages, start=1):
        if wrong := _wrong(message):
            return None, f"has a message {wrong} (message {number} of `{key}`)"
    if messages[-1]["role"] == "user":
        return None, f"has a conversation that ends with the user, so without an answer (`{key}`)"
    if all(message["role"] != "assistant" for message in messages):
        return None, f"has a conversation without a message of the assistant (`{key}`)"
    return messages, ""


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message as its author wrote it: Parquet fills absent keys with null."""
    stated = {name: value for name, value in message.items() if value is not None}
    return stated | {"content": stated.get("content", "")} if "tool_calls" in stated else stated


def _wrong(message: dict[str, Any]) -> str:
    role, content = message.get("role"), message.get("content")
    if role is None:
        return "without `role`"
    if role not in _ROLES:
        return f"of the unknown role {str(role)[:40]!r}; known are {', '.join(_ROLES)}"
    if not isinstance(content, str):
        return "without a string `content`"
    if not is_unicode(content):
        return "with a lone surrogate, which is not Unicode"
    if role == "assistant" and not content and "tool_calls" not in message:
        return "of the assistant without text"
    return ""
