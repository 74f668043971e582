"""Small tokenizers: a tokenizer.json as those of Llama 3, Qwen and SmolLM, with what lies beside it."""

import json
from pathlib import Path
from typing import Any

import tokenizers

SPECIAL = ("<|end|>", "<|start|>", "<|pad|>")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"


def byte_level(texts: list[str], vocab_size: int = 400) -> str:
    """Returns a tokenizer.json of byte-level BPE. The special tokens have the ids 0, 1 and 2."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    # Documents are never cut or padded, whatever the file says.
    made.enable_truncation(8)
    made.enable_padding(length=8)
    return made.to_str()


def write_folder(folder: Path, tokenizer_json: str, **others: Any) -> Path:
    """Writes a folder of Hugging Face with a tokenizer.

    Args:
      folder: made if it is missing.
      tokenizer_json: the content of tokenizer.json.
      others: the content of other files by name without the suffix: text, or what JSON holds.
    """
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    config = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[0], "pad_token": SPECIAL[2]}
    for name, value in ({"tokenizer_config": config} | others).items():
        suffix = "jinja" if isinstance(value, str) else "json"
        (folder / f"{name}.{suffix}").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder
