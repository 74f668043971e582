"""Jinja as chat templates expect it: a sandbox, loop controls, and `{% generation %}` around answers."""

import functools
import json
import secrets
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_BEGIN, _END = (f"\N{START OF TEXT}{secrets.token_hex(8)}" for _ in range(2))


class Generation(Extension):
    """Marks the output between `{% generation %}` and `{% endgeneration %}`."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def render(source: str, variables: Mapping[str, Any], today: datetime) -> list[tuple[str, bool]]:
    """Returns the output of a template in parts, each with whether it is between generation marks.

    Args:
      source: the template.
      variables: what it reads.
      today: the date that it may write.

    Raises:
      jinja2.TemplateError: the template is wrong or refuses the variables; or any other exception, as a
        template is a program.
    """
    text = compiled(source).render(variables, strftime_now=today.strftime)
    parts, end = [], 0
    while (start := text.find(_BEGIN, end)) >= 0:
        parts.append((text[end:start], False))
        end = text.index(_END, start)
        parts.append((text[start + len(_BEGIN) : end], True))
        end += len(_END)
    return [*parts, (text[end:], False)]


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """Returns a template, ready to render. Raises jinja2.TemplateError if it is wrong."""
    extensions = [loopcontrols, Generation]
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _refuse
    return env.from_string(source)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Returns JSON without the escapes for HTML that Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
