"""`mora generate`: prompts to completions, as text or JSON lines; a chat in the terminal."""

import json
import sys

from etils import epath

from train.cli.commands import Generate
from train.jobs.generate import (
    Completion,
    Generator,
    chat,
    complete,
    load_generator,
    read_prompts,
    typed_lines,
)
from train.storage.files import naming_errors, write_whole


def run(command: Generate) -> None:
    """Completes the prompts of a command, or chats if it has none.

    Raises:
      InputError: for a folder without a model, a tokenizer or (with --chat) a chat template, or a prompt that
        the model cannot continue.
    """
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


def _write_lines(out: str, texts: list[str], found: list[Completion]) -> None:
    lines = ""
    for text, each in zip(texts, found, strict=True):
        row = {"prompt": text, "completion": each.text, "tokens": each.tokens, "finish": each.finish}
        lines += json.dumps(row, ensure_ascii=False) + "\n"
    if not out:
        sys.stdout.write(lines)
        return
    with naming_errors(out):
        write_whole(epath.Path(out), lines.encode())
    print(f"written: {out} ({len(found)} completions)")


def _chat(command: Generate, generator: Generator) -> None:
    """Chats until the end of the input or Ctrl-C, which is no error here."""

    def write(part: str) -> None:
        sys.stdout.write(part)
        sys.stdout.flush()

    try:
        chat(generator, command.sampling(), command.stop, typed_lines(), write)
    except KeyboardInterrupt:
        write("\n")
