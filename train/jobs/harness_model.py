"""A model as lm-evaluation-harness asks one: log-likelihoods of continuations and of texts, generation.

Texts become tokens as in the harness's own backend for transformers (`hf`), so that scores can be compared.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval import utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]

from mora_jax.errors import InputError, some
from mora_jax.hf.chat import Message
from mora_jax.models.generate import Sampling
from mora_jax.models.score import Row, score
from train.console.progress import progress
from train.console.terminal import warn
from train.jobs.generate import Generator, complete

Tokens = list[int]

# Arguments of generation that change nothing if they have one of these values, or if nothing is sampled.
_NEUTRAL = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1, 1.0),
    "use_cache": (True,),
}
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


class HarnessModel(LM):
    """A generator that answers the harness's requests.

    Attributes:
      cut: requests so far that were longer than the model's context and lost tokens on the left.
      asked: requests so far.
    """

    def __init__(self, generator: Generator, batch_size: int) -> None:
        """Takes the model, and the number of requests that are computed at a time."""
        super().__init__()
        self._generator, self._batch_size = generator, batch_size
        self.cut = self.asked = 0

    @property
    def max_length(self) -> int:
        """The model's context in tokens."""
        return self._generator.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests, which is not used."""
        return self._generator.codec.files.place.replace("/", "__")

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as text, up to where the answer begins, or continues if it has begun."""
        template = self._generator.codec.chat_template
        render = template.render if add_generation_prompt else template.render_open
        try:
            return render(chat_history)
        except InputError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = render(others)
            warn([f"{error}; the system's message is left out"])
            return text

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns for each request, a context and its continuation, what `_scores` returns.

        The tokens of the continuation are those behind the tokens of the context alone, in the tokens of
        both. An empty context is the begin-of-text token, or the end-of-text token if there is none.
        """
        return self._scores(self._pairs(_arguments(requests)))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text, in windows of the model's context that do not overlap."""
        texts = [text for (text,) in _arguments(requests)]
        pairs, owners = [], []
        for owner, tokens in enumerate(self._generator.codec.encode_all(texts)):
            windows = utils.get_rolling_token_windows(tokens, self._prefix(), self.max_length, 1)
            windows = [utils.make_disjoint_window(window) for window in windows]
            pairs += windows
            owners += [owner] * len(windows)
        totals = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._scores(pairs), strict=True):
            totals[owner] += log_p
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the new text of each request, without what stopped it.

        A context that leaves no room for the new tokens loses tokens on the left.

        Raises:
          InputError: if a task asks for what generation cannot do, or for more new tokens than the context.
        """
        asked, groups, found = _arguments(requests), defaultdict(list), {}
        for i, (_, how) in enumerate(asked):
            groups[json.dumps(how, sort_keys=True)].append(i)
        for numbers in groups.values():
            sampling, stop = self._how(asked[numbers[0]][1])
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise InputError(
                    f"a task asks for {sampling.max_new_tokens:,} new tokens, which the model's context of "
                    f"{self.max_length:,} does not hold (max_gen_toks in the task's generation_kwargs)"
                )
            prompts = self._generator.codec.encode_all([asked[i][0] for i in numbers])
            self._count(sum(len(prompt) > room for prompt in prompts), len(prompts))
            prompts = [prompt[-room:] or [self._prefix()] for prompt in prompts]
            new = complete(self._generator, prompts, sampling, stop, self._batch_size, joined=False)
            found |= {i: each.text for i, each in zip(numbers, new, strict=True)}
        return [found[i] for i in range(len(requests))]

    def _how(self, arguments: Mapping[str, Any]) -> tuple[Sampling, list[str]]:
        """Returns how tokens are chosen and the stop strings, of a task's `generation_kwargs`."""
        given: dict[str, Any] = {**normalize_gen_kwargs(dict(arguments), 256)}
        samples, length, until = (given.pop(name) for name in ("do_sample", "max_gen_toks", "until"))
        ignored = {name: (given[name],) for name in _OF_SAMPLING if name in given and not samples}
        allowed = _NEUTRAL | ignored | {"top_k": (0, None)}
        temperature = given.pop("temperature", 1.0) if samples else 0.0
        top_p = given.pop("top_p", 1.0) if samples else 1.0
        if odd := [f"{name}: {value}" for name, value in given.items() if value not in allowed.get(name, ())]:
            raise InputError(
                f"a task's generation_kwargs have {some(odd)}; possible are until, max_gen_toks, do_sample, "
                "temperature and top_p"
            )
        special = [self._generator.codec.special_id(text) for text in until]
        eos_ids = tuple(token for token in special if token is not None)
        return Sampling(length, temperature, top_p, eos_ids=eos_ids), [text for text in until if text]

    def _prefix(self) -> int:
        return self._generator.codec.prefix_id

    def _count(self, cut: int, asked: int) -> None:
        self.cut, self.asked = self.cut + cut, self.asked + asked

    def _pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
        """Returns the tokens of contexts, and of what follows them."""
        codec, prefix = self._generator.codec, self._prefix()
        contexts = [context.rstrip() for context, _ in pairs]  # spaces at the end are the continuation's
        given = sorted({context for context in contexts if context})
        of_context = dict(zip(given, codec.encode_all(given), strict=True))
        whole = codec.encode_all([context + rest for context, rest in pairs])
        alone = iter(codec.encode_all([c + r for c, r in pairs if not c.rstrip()], special=False))
        found = []
        for context, tokens in zip(contexts, whole, strict=True):
            if context:
                found.append((of_context[context], tokens[len(of_context[context]) :]))
                continue
            tokens = next(alone)
            begun = tokens[:1] == [prefix]
            found.append((tokens[:1], tokens[1:]) if begun else ([prefix], tokens))
        for (_, continuation), (_, rest) in zip(found, pairs, strict=True):
            if not continuation:
                raise InputError(f"a continuation has no token of its own: {rest!r}")
        return found

    def _scores(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether each of its tokens is the likeliest.

        What does not fit into the context is cut from the left. Requests that read the same tokens, such as
        answers of one token to one question, are computed together.
        """
        limit, vocabulary = self.max_length, self._generator.model.config.vocab_size
        of_input: dict[bytes, list[int]] = defaultdict(list)
        for i, (context, continuation) in enumerate(pairs):
            if len(continuation) > limit:
                raise InputError(
                    f"a continuation has {len(continuation):,} tokens, and the model a context of {limit:,}"
                )
            tokens = np.array([*context, *continuation], np.int32)[-limit - 1 :]
            if tokens.max() >= vocabulary:
                raise InputError(
                    f"the tokenizer has token {tokens.max()}, and the model a vocabulary of {vocabulary:,}: "
                    "the tokenizer is another model's"
                )
            of_input[tokens[:-1].tobytes()].append(i)
        self._count(sum(len(a) + len(b) > limit + 1 for a, b in pairs), len(pairs))
        rows = []
        for tokens, numbers in of_input.items():
            read = np.frombuffer(tokens, np.int32)
            targets = [pairs[i][1] for i in numbers]
            at = [np.arange(len(read) - len(each), len(read)) for each in targets]
            rows.append(Row(read, np.concatenate(at), np.concatenate(targets)))
        with jax.set_mesh(self._generator.mesh), progress("scoring", len(rows), "sequences") as advance:
            model, params = self._generator.model, self._generator.params
            scored = score(model, params, rows, self._batch_size, advance)
        found = {}
        for numbers, scores in zip(of_input.values(), scored, strict=True):
            start = 0
            for i in numbers:
                part = slice(start, start := start + len(pairs[i][1]))
                found[i] = math.fsum(scores.log_p_Q[part]), bool(scores.greedy_Q[part].all())
        return [found[i] for i in range(len(pairs))]


def _arguments(requests: Sequence[Any]) -> list[Any]:
    """Returns what is asked: a context and what continues it, a text, or a context and how to continue it."""
    return [request.args for request in requests]
