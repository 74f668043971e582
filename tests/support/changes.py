"""Random changes of files that were good: of structured values and of bytes."""

import functools
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import yaml

NUMBERS = (0, 1, -1, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e-300, 1e308)
ODD = (
    None,
    True,
    "",
    "x",
    "\\0",
    "../x",
    "/etc/hosts",
    "\u2028",
    "\ud800",
    "nan",
    "1e400",
    "--help",
    "=",
    [],
    {},
)
NOT_NUMBERS = (float("nan"), float("inf"), float("-inf"))
NEW_KEYS = ("name", "x", "rank", "sha256", "__metadata__", "<<")
INSERTED = ("x", "0", "/", "..", "\\", "[", "(", "*", "\0", "\n", "é", "\ud800", " ", "9" * 30)
INSERTED_BYTES = (b"\0", b"\xff" * 8, b"[" * 2000, b"{" * 500, b'"', b"\n", b"\xef\xbb\xbf")


# Changes of values


def change(rng: random.Random, value: Any) -> Any:
    """Returns a JSON-like value with one change somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        return _change_mapping(rng, value)
    if isinstance(value, list) and value and rng.random() < 0.85:
        return _change_list(rng, value)
    return _another(rng, value)


def _change_mapping(rng: random.Random, value: dict) -> dict:
    key = rng.choice(list(value))
    kind = rng.randrange(8)
    if kind == 0:
        return {k: v for k, v in value.items() if k != key}
    if kind == 1:
        return {_another_key(rng, k) if k == key else k: v for k, v in value.items()}
    if kind == 2:
        return value | {rng.choice(NEW_KEYS): _another(rng, value[key])}
    return value | {key: change(rng, value[key])}


def _change_list(rng: random.Random, value: list) -> list:
    i = rng.randrange(len(value))
    kind = rng.randrange(6)
    if kind == 0:
        return value[:i] + value[i + 1 :]
    if kind == 1:
        return value[:i] + [value[i]] * rng.choice((2, 3, 50)) + value[i:]
    if kind == 2:
        return rng.sample(value, len(value))
    return [*value[:i], change(rng, value[i]), *value[i + 1 :]]


def _another(rng: random.Random, value: Any) -> Any:
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice(NUMBERS + NOT_NUMBERS)
    if kind == 1:
        return rng.choice(ODD)
    if kind == 2:
        return rng.choice(([value], {"name": value}, [[value, value]], {"x": {"y": value}}))
    if kind == 3:
        return functools.reduce(lambda inner, _: [inner], range(rng.choice((3, 50, 400))), value)
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, -value, value * 2, value * 1000, str(value), min(value, 1e9) * 0.5))
    if isinstance(value, str):
        return another_text(rng, value)
    return rng.choice(ODD)


def _another_key(rng: random.Random, key: Any) -> Any:
    return (
        another_text(rng, key)
        if isinstance(key, str) and rng.random() < 0.8
        else rng.choice((1, None, 0.5, True, ""))
    )


def another_text(rng: random.Random, text: str) -> str:
    i = rng.randrange(len(text) + 1)
    inserted = rng.choice(INSERTED)
    return rng.choice((text[:i] + inserted + text[i:], text[:i], text[i:], text * 3, text.upper()))


# Changes of bytes


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    """Returns bytes with a flipped bit, or with a piece removed, repeated, overwritten or inserted."""
    if not content:
        return rng.randbytes(rng.randint(0, 20))
    i = rng.randrange(len(content))
    j = min(len(content), i + rng.choice((1, 1, 2, 4, 16, 200)))
    kind = rng.randrange(8)
    if kind <= 1:
        return content[:i] + bytes([content[i] ^ 1 << rng.randrange(8)]) + content[i + 1 :]
    if kind == 2:
        return content[:i]
    if kind == 3:
        return content[:i] + content[j:]
    if kind == 4:
        return content[:j] + content[i:j] * rng.choice((1, 2, 100)) + content[j:]
    if kind == 5:
        return content[:i] + rng.randbytes(j - i) + content[j:]
    if kind == 6:
        return content[:i] + rng.choice(INSERTED_BYTES) + content[i:]
    return content[:i] + struct.pack("<q", rng.choice((0, -1, 2**31, 2**62))) + content[i + 8 :]


def changed(rng: random.Random, value: Any, render: Callable[[Any], bytes]) -> bytes:
    """Returns a rendered value, changed up to three times. In three of ten cases its bytes change too."""
    if rng.random() < 0.85:
        for _ in range(rng.choice((1, 1, 2, 3))):
            value = change(rng, value)
    content = render(value)
    return change_bytes(rng, content) if rng.random() < 0.3 else content


def as_json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except (
        TypeError,
        ValueError,
        RecursionError,
    ):  # keys that JSON does not have, numbers that Python does not print
        return b"[" * 1000


def as_yaml(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, TypeError, ValueError, RecursionError):
        return as_json(value)
