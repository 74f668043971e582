"""`mora generate`: prompts to completions, as text or JSON lines; a chat in the terminal."""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Literal

import tyro
from etils import epath

from mora_jax.errors import InputError
from mora_jax.models.generate import Sampling
from train.cli.commands.arguments import Folder
from train.config.paths import spell_out
from train.storage.files import check_free, naming_errors, write_whole

if TYPE_CHECKING:
    from train.jobs.generate import Completion, Generator


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continues prompts with a run or a Hugging Face model, or chats in the terminal.

    Without --prompt and --prompts, --chat answers what is typed, until Ctrl-C or the end of the input.

    Attributes:
      path: folder of a run, Hugging Face folder, or id of a model on the Hub (org/name, org/name@revision).
      prompt: text to continue; may be given several times.
      prompts: file of JSON lines with a `prompt` each, instead; empty for none.
      out: file of JSON lines to write: prompt, completion, tokens (new ones) and finish ("stop" at a stop
        string or an end-of-text token, "length" at the most tokens or the model's context); empty for
        standard output.
      overwrite: replace the file of --out if there is one; otherwise it is an error.
      chat: take each prompt as what a user says, in the tokenizer's chat template.
      max_new_tokens: most new tokens of each prompt.
      temperature: what logits are divided by before tokens are drawn; 0 takes the most probable token.
      top_p: tokens are drawn from the fewest whose probabilities sum to this, in (0, 1]; 1 for all.
      seed: seed of the random numbers. Each prompt has its own, which do not depend on other prompts.
      stop: text that ends a completion and is not part of it; may be given several times.
      batch_size: prompts that are computed at a time.
      merged: merge a run's adapters; with --no-merged they are computed beside the kernels.
      dtype: type of products.
    """

    path: Folder
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    prompts: str = ""
    out: str = ""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    chat: tyro.conf.FlagCreatePairsOff[bool] = False
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    batch_size: int = 8
    merged: bool = True
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        spell_out(self, "", "path")
        spell_out(self, "--", optional=("prompts", "out"))
        given = bool(self.prompt) + bool(self.prompts)
        if given > 1 or (not given and not self.chat):
            raise InputError("give --prompt TEXT, --prompts FILE, or --chat alone to chat in the terminal")
        if self.out and not given:
            raise InputError("--out is of --prompt and --prompts; a chat is written to the terminal")
        if self.batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, not {self.batch_size}")
        if "" in self.stop:
            raise InputError("--stop must not be empty")
        self.sampling()

    def sampling(self) -> Sampling:
        """Returns how tokens are chosen. Raises InputError for bad values."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.seed)


def generate(command: Generate) -> None:
    """Runs `mora generate`."""
    check_free(command.out, "--out", command.overwrite)
    _complete(command)


def _complete(command: Generate) -> None:
    """Completes the prompts of a command, or chats if it has none.

    Raises:
      InputError: for a folder without a model, a tokenizer or (with --chat) a chat template, or a prompt that
        the model cannot continue.
    """
    from train.jobs.generate import complete, load_generator, read_prompts

    texts = read_prompts(command.prompts) if command.prompts else list(command.prompt)
    rows = min(command.batch_size, len(texts)) or 1
    generator = load_generator(command.path, command.merged, command.dtype, rows)
    if not texts:
        return _chat(command, generator)
    codec = generator.codec
    asked = [codec.encode_chat([_said(text)]) if command.chat else codec.encode(text) for text in texts]
    found = complete(generator, asked, command.sampling(), command.stop, command.batch_size)
    if command.out or command.prompts:
        return _write_lines(command.out, texts, found)
    for number, completion in enumerate(found, 1):
        if len(found) > 1:
            print(f"[{number}]")
        print(completion.text)
    return None


def _said(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _write_lines(out: str, texts: list[str], found: "list[Completion]") -> None:
    lines = ""
    for text, each in zip(texts, found, strict=True):
        row = {"prompt": text, "completion": each.text, "tokens": each.tokens, "finish": each.finish}
        lines += json.dumps(row, ensure_ascii=False) + "\n"
    if not out:
        sys.stdout.write(lines)
        return
    with naming_errors(out):
        write_whole(epath.Path(out), lines.encode())
    print(f"written: {out}, completions: {len(found)}")


def _chat(command: Generate, generator: "Generator") -> None:
    """Chats until the end of the input or Ctrl-C, which is no error here."""
    from train.jobs.generate import chat, typed_lines

    def write(part: str) -> None:
        sys.stdout.write(part)
        sys.stdout.flush()

    try:
        chat(generator, command.sampling(), command.stop, typed_lines(), write)
    except KeyboardInterrupt:
        write("\n")
