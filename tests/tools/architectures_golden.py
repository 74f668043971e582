"""Records what transformers computes with the tiny models of `architectures`, for tests that need no torch.

python tests/tools/architectures_golden.py      # writes tests/library/hf/architectures.npz
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "support")]

from architectures import CONFIGS, LENGTH, random_params, tokens_BT

from mora_jax.hf import save_hf
from mora_jax.models.config import LlamaConfig

FILE = Path(__file__).parents[1] / "library/hf/architectures.npz"


def read_by_transformers(config: LlamaConfig, folder: Path) -> Any:
    """Returns the random model as transformers reads it, with all tensors found and none left over."""
    import torch
    import transformers

    save_hf(folder, random_params(config), config)
    auto = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    return model


def logits(model: Any, length: int) -> np.ndarray:
    """Returns transformers' logits (2, length, vocabulary)."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens_BT(length))).logits.numpy()


def positions(model: Any, length: int) -> np.ndarray:
    """Returns transformers' cos and sin of the rotary positions, (2, length, pairs of a head)."""
    import torch

    with torch.no_grad():
        both = model.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])
    return np.stack([half[0, :, : half.shape[-1] // 2].numpy() for half in both])


def some_logits(logits_BTV: np.ndarray) -> np.ndarray:
    """Returns the few logits that are recorded, those of the last position among them."""
    return logits_BTV[:, 1::13, ::20]


def main() -> None:
    recorded = {}
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            model = read_by_transformers(config, Path(folder) / "hf")
        recorded[f"logits/{name}"] = some_logits(logits(model, LENGTH))
        if config.rope.type != "default":
            recorded[f"positions/{name}"] = positions(model, LENGTH)[:, 1::13]
    np.savez_compressed(FILE, **recorded)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
