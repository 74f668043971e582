"""Examples as tokens, and which of them the loss counts.

The parts of an example, such as a prompt and its completion, are encoded apart, the later ones as text that
follows other text. So the tokens of the prompt are those that generation starts from.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from mora_jax.errors import InputError
from train.data.rows.layout import token_dtype
from train.data.rows.options import RowOptions
from train.data.text.entries import Content, Record
from train.data.tokenizer import Tokenizer

Parts = Sequence[tuple[str, bool]]  # texts, and whether each is what the model is to say


class Example(NamedTuple):
    """The tokens of an example, and 1 for those that the loss counts as the ones to predict, else 0."""

    tokens_N: np.ndarray
    weights_N: np.ndarray


def encode(tokenizer: Tokenizer, options: RowOptions, records: Sequence[Record]) -> Iterator[Example | str]:
    """Yields the tokens of each example, or what is wrong with it."""
    found = [_parts(record.content, options) for record in records]
    texts, begins = [], []
    for parts in found:
        started = False
        for text, _ in () if isinstance(parts, str) else parts:
            texts.append(text)
            begins.append(not started)
            started |= bool(text)
    encoded = iter(tokenizer.encode_parts(texts, begins))
    for parts in found:
        yield parts if isinstance(parts, str) else _example(parts, encoded, tokenizer, options)


def _parts(content: Content | None, options: RowOptions) -> Parts | str:
    """Returns the parts of an example, or what is wrong with it."""
    if isinstance(content, tuple):
        prompt, completion = content
        if options.template is None:
            return [(prompt, False), (completion, True)]
        content = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if not isinstance(content, list):
        return [(content or "", True)]
    assert options.template is not None
    try:
        return options.template.parts(content)
    except InputError as error:
        return f"is a conversation that cannot be written: {error}"


def _example(
    parts: Parts, encoded: Iterator[list[int]], tokenizer: Tokenizer, options: RowOptions
) -> Example | str:
    pieces = [(next(encoded), said) for _, said in parts]
    if options.form.name != "text" and not any(ids for ids, said in pieces if said):
        return "has a completion of no token"
    before, after = ([] if token is None else [token] for token in (tokenizer.bos_id, tokenizer.eos_id))
    pieces = [(before, False), *pieces, (after, True)]
    sizes = [len(ids) for ids, _ in pieces]
    counts = [said or options.loss == "all" for _, said in pieces]
    tokens = chain.from_iterable(ids for ids, _ in pieces)
    tokens_N = np.fromiter(tokens, token_dtype(tokenizer.vocab_size), sum(sizes))
    return Example(tokens_N, np.repeat(np.array(counts, np.uint8), sizes))
