"""Adapters with random arrays, and a reader of PEFT's folders that knows nothing of this project."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from mora_jax import trees
from mora_jax.models.llama import STACKED, LlamaConfig, abstract_params
from mora_jax.transform import Methods, Rules, assign, attach, merge

FROZEN = (".*", "frozen")


class Adapted(NamedTuple):
    """A base, and the model that training made of it."""

    base: Any
    params: Any
    adapters: Any
    methods: Methods

    def merged(self) -> Any:
        """Returns the trained model's parameters."""
        return jax.jit(lambda *trees: merge(*trees, self.methods))(self.params, self.adapters)


def random_adapted(rules: Rules, config: LlamaConfig, seed: int = 0) -> Adapted:
    """Returns a model that is all random, what methods make zero too."""
    rng = np.random.default_rng(seed)

    def noise(leaf):
        return rng.normal(0, 0.2, leaf.shape).astype(np.float32)

    base = jax.tree.map(noise, abstract_params(config))
    methods = assign(rules, base, STACKED)
    shapes = jax.eval_shape(lambda: attach(jax.random.key(0), base, methods))
    flat = trees.flatten(base)
    trained = {path: flat[path] + noise(flat[path]) for path in methods.trained()}
    return Adapted(base, trees.replaced(base, trained), jax.tree.map(noise, shapes), methods)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns adapter_config.json and the tensors without their common prefix."""
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], **metadata: str
) -> None:
    """Writes what `read_folder` reads."""
    folder.mkdir(exist_ok=True)
    named = {f"base_model.model.{n}": np.ascontiguousarray(t) for n, t in tensors.items()}
    safetensors.numpy.save_file(named, folder / "adapter_model.safetensors", metadata or None)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merged(folder: Path, base: dict[str, np.ndarray], patterns: bool = True) -> dict[str, np.ndarray]:
    """Returns a base's tensors with an adapter, by the definitions of LoRA and DoRA.

    Args:
      folder: the adapter.
      base: tensors by their names in Hugging Face folders.
      patterns: whether to respect ranks and alphas of single modules.
    """
    config, tensors = read_folder(folder)
    result = dict(base) | {name: tensors[name] for name in base.keys() & tensors.keys()}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        r, alpha = (
            _by_pattern(config[f"{kind}_pattern"] if patterns else {}, module, config[field])
            for kind, field in (("rank", "r"), ("alpha", "lora_alpha"))
        )
        a, b = tensors[name], tensors[f"{module}.lora_B.weight"]
        assert not patterns or len(a) == r
        w = base[f"{module}.weight"] + alpha / (r**0.5 if config["use_rslora"] else r) * (b @ a)
        if config["use_dora"]:
            lengths = np.linalg.norm(w, axis=1)
            w = w * (tensors[f"{module}.lora_magnitude_vector"] / lengths)[:, None]
        result[f"{module}.weight"] = w
    return result


def _by_pattern(pattern: dict[str, float], module: str, default: float) -> float:
    return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)
