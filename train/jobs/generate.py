"""Generates text from a run or a Hugging Face folder: completes prompts, and chats in a terminal."""

import bisect
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
from etils import epath
from jax.sharding import Mesh

from mora_jax import hf, transform, trees
from mora_jax.errors import InputError
from mora_jax.hf.names import parameter_shapes
from mora_jax.io import parse_json, read_bytes
from mora_jax.models.generate import Sampling, check_prompts, generate
from mora_jax.models.llama import Compute, Llama
from mora_jax.transform import Methods
from train.config.run import RunConfig
from train.console.progress import progress
from train.console.terminal import warn
from train.data.codec import Codec
from train.data.rows.info import load_info
from train.run.folder import CONFIG, read_config
from train.run.model import load_merged, load_state, widest_mesh
from train.run.tokenizer import run_tokenizer
from train.runtime.backend import attention_here

PROMPT_BYTES = 1 << 30  # most of a file of prompts
STREAMED = 4  # tokens of an answer that are shown at a time


@dataclasses.dataclass(frozen=True)
class Generator:
    """A model with its tokenizer, ready to generate. `load_generator` makes one.

    Attributes:
      model: the model.
      params: its parameters, joined to adapters that are not merged.
      codec: the tokenizer.
      mesh: the devices.
      step: updates of the run's checkpoint; None if this is no run.
    """

    model: Llama
    params: Any = dataclasses.field(repr=False)
    codec: Codec
    mesh: Mesh
    step: int | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model answers to a prompt.

    Attributes:
      text: the new text, without what ended it.
      tokens: new tokens.
      finish: "stop" at a stop string or an end-of-text token, "length" at the most tokens or the context.
    """

    text: str
    tokens: int
    finish: Literal["stop", "length"]


def load_generator(
    path: str,
    merged: bool = True,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    rows: int = 1,
    step: int | None = None,
) -> Generator:
    """Returns the model of a run or of a Hugging Face folder, sharded over all devices that divide the rows.

    Args:
      path: folder of a run, Hugging Face folder, or id of a model on the Hub.
      merged: whether a run's adapters are merged, in float32; otherwise they are computed beside the kernels.
      dtype: type of products, and in which kernels are held.
      rows: prompts that are computed at a time.
      step: updates of a run's checkpoint; None for its newest good one.

    Raises:
      InputError: if the folder holds no model or no tokenizer, or no adapters and `merged` is false.
    """
    path = str(hf.local_folder(path))
    is_run = (epath.Path(path) / CONFIG).exists()
    mesh = widest_mesh(path, 1 << (rows - 1).bit_length())  # rows are padded to a power of two
    codec = _codec_of_run(path) if is_run else Codec.of_model(hf.read_tokenizer(path))
    if merged:
        config = read_config(path).model if is_run else hf.read_config(path)
        types = dict.fromkeys(filter(_is_multiplied, parameter_shapes(config)), dtype)
        if is_run:
            params, config, step = load_merged(path, None, mesh, types, step)
        else:
            params, config = hf.load_hf(path, mesh, types)
    elif is_run:
        run, state, methods = load_state(path, mesh=mesh, step=step)
        params, config, step = _held(state.params, methods, dtype), run.model, int(state.step)
        params = transform.bind(params, state.adapters, methods)
    else:
        raise InputError(f"{path} is no run and has no adapters: leave out --no-merged")
    kernel = attention_here(config.head_width, dtype)  # for scores; a cache is read by XLA
    compute = Compute(dtype=dtype, attention=kernel, layers="scan")
    return Generator(Llama(config, compute), params, codec, mesh, step)


def complete(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    joined: bool = True,
) -> list[Completion]:
    """Returns completions of prompts, longest prompts first, some at a time.

    Args:
      generator: the model.
      prompts: their tokens.
      sampling: how tokens are chosen. The tokenizer's end-of-text tokens end a completion in any case.
      stop: texts that end a completion.
      batch_size: prompts that are computed at a time.
      joined: whether a completion begins as it follows its prompt, with a space where the tokenizer has one;
        else its tokens are decoded alone, as transformers does.

    Raises:
      InputError: if the model cannot continue a prompt.
    """
    check_prompts(generator.model.config, prompts)
    sampling, found = _with_eos(sampling, generator.codec), {}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    with jax.set_mesh(generator.mesh), progress("generating", len(prompts), "prompts") as advance:
        for at in range(0, len(order), batch_size):
            numbers = order[at : at + batch_size]
            batch = [prompts[i] for i in numbers]
            stops = [Stops(generator.codec, prompt if joined else (), stop) for prompt in batch]
            new = generate(
                generator.model,
                generator.params,
                batch,
                sampling,
                numbers,
                lambda row, tokens, stops=stops: stops[row].kept(tokens),
            )
            rows = zip(numbers, stops, new, strict=True)
            found |= {i: each.completion(tokens, sampling) for i, each, tokens in rows}
            advance(len(batch))
    return [found[i] for i in range(len(prompts))]


def chat(
    generator: Generator,
    sampling: Sampling,
    stop: Sequence[str],
    lines: Iterable[str],
    write: Callable[[str], None],
) -> None:
    """Answers line by line, as the tokenizer's chat template says, and keeps the history.

    Args:
      generator: the model.
      sampling: how tokens are chosen.
      stop: texts that end an answer.
      lines: what the user says; blank ones are ignored.
      write: takes an answer in parts.

    Raises:
      InputError: if there is no chat template, it fails, or the conversation fills the model's context.
    """
    _ = generator.codec.chat_template  # before anybody types
    messages, sampling = [], _with_eos(sampling, generator.codec)
    for line in filter(str.strip, lines):
        messages.append({"role": "user", "content": line})
        prompt = generator.codec.encode_chat(messages)
        answer = _answer(generator, prompt, sampling, stop, write)
        messages.append({"role": "assistant", "content": answer})


def _answer(
    generator: Generator,
    prompt: list[int],
    sampling: Sampling,
    stop: Sequence[str],
    write: Callable[[str], None],
) -> str:
    """Returns the answer to one prompt, written as it is generated, with a line break at its end."""
    stops, shown = Stops(generator.codec, prompt, stop), 0

    def show(_: int, tokens: list[int]) -> int | None:
        nonlocal shown
        settled = stops.settled(tokens)
        write(settled[shown:])
        shown = len(settled)
        return stops.kept(tokens)

    with jax.set_mesh(generator.mesh):
        new = generate(generator.model, generator.params, [prompt], sampling, None, show, STREAMED)
    answer = stops.completion(new[0], sampling).text
    write(answer[shown:] + "\n")
    return answer


@dataclasses.dataclass(frozen=True)
class Stops:
    """Where the text of one row ends.

    Attributes:
      codec: the tokenizer.
      prompt: the row's prompt.
      stop: texts that end it.
    """

    codec: Codec
    prompt: Sequence[int]
    stop: Sequence[str]

    def kept(self, tokens: list[int]) -> int | None:
        """Returns the fewest of the row's new tokens whose text has a stop string, None if none has."""
        counts = range(1, len(tokens) + 1)
        if not self._stopped(tokens):
            return None
        return 1 + bisect.bisect_left(counts, True, key=lambda n: self._stopped(tokens[:n]))

    def settled(self, tokens: list[int]) -> str:
        """Returns the text that further tokens do not change: no part of a character or of a stop string."""
        text = self._cut(self.codec.decode(self.prompt, tokens)).rstrip("\ufffd")
        parts = (s[:n] for s in self.stop for n in range(1, len(s)))
        return text[: len(text) - max((len(part) for part in parts if text.endswith(part)), default=0)]

    def completion(self, tokens: list[int], sampling: Sampling) -> Completion:
        """Returns the result of a row that has ended."""
        stopped = tokens[-1] in sampling.eos_ids or self._stopped(tokens)
        text = self._cut(self.codec.decode(self.prompt, tokens))
        return Completion(text, len(tokens), "stop" if stopped else "length")

    def _stopped(self, tokens: list[int]) -> bool:
        text = self.codec.decode(self.prompt, tokens) if self.stop else ""
        return any(stop in text for stop in self.stop)

    def _cut(self, text: str) -> str:
        return text[: min((text.find(stop) for stop in self.stop if stop in text), default=len(text))]


def read_prompts(path: str) -> list[str]:
    """Returns the prompts of a file of JSON lines, `{"prompt": "..."}`. Raises InputError for a bad line."""
    prompts = []
    for number, line in enumerate(read_bytes(epath.Path(path), PROMPT_BYTES).splitlines(), 1):
        value = parse_json(line, f"{path}: line {number}") if line.strip() else {}
        prompt = value.get("prompt") if isinstance(value, dict) else None
        if line.strip() and not isinstance(prompt, str):
            raise InputError(f"{path}: line {number} is no JSON object with a string `prompt`")
        prompts += [prompt] if line.strip() else []
    if not prompts:
        raise InputError(f"{path} has no prompt")
    return prompts


def typed_lines() -> Iterator[str]:
    """Yields what is typed, up to the end of the input; marks each line on a terminal."""
    mark = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(mark)
        except EOFError:
            return


def _codec_of_run(path: str) -> Codec:
    files = run_tokenizer(path)
    if files is None:
        raise InputError(f"{path} has no tokenizer, and its data set is away")
    return Codec.of_run(files, _begins_documents(read_config(path)))


def _begins_documents(config: RunConfig) -> bool:
    """Returns whether the documents of a run's data set begin with the begin-of-text token."""
    try:
        return load_info(config.data.directory, splits=()).bos_id is not None
    except InputError as error:
        warn([f"{error}; prompts begin without a begin-of-text token"])
        return False


def _held(params: Any, methods: Methods, dtype: str) -> Any:
    """Returns parameters whose kernels have the type of products, in which they would be used anyway.

    A kernel whose method needs it exactly keeps its type: one whose update is not added to it.
    """
    exact = {path for path, method in methods.adapted() if not method.additive}
    wanted = {
        path: array.astype(dtype)
        for path, array in trees.flatten(params).items()
        if _is_multiplied(path) and path not in exact
    }
    return trees.replaced(params, wanted)


def _is_multiplied(path: str) -> bool:
    return path.endswith(("/kernel", "/embedding"))


def _with_eos(sampling: Sampling, codec: Codec) -> Sampling:
    return dataclasses.replace(sampling, eos_ids=(*sampling.eos_ids, *codec.eos_ids))
