"""Writes constraints.txt: the versions that pip resolves for the project and its extras on each Python.

Usage: constraints.py PYTHON_3_11 PYTHON_3_12. Installs nothing. Later Pythons share the pins of 3.12.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

HEADER = """\
# The versions the project is tested with: `pip install -c constraints.txt`. Written by `make constraints`.
# The CUDA libraries are not pinned: jax and torch require different versions of them.
"""
EXTRAS = ["cuda13", "tpu", "wandb", "cloud", "hub", "eval", "test"]
# Parity is resolved and tested on one Python only, with one version of torch.
PARITY_PYTHON = "3.11"
PARITY = [".[parity]", "torch==2.13.0"]
CUDA_LIBRARY = re.compile(r"(nvidia|cuda)-|triton$")
MARKERS = {"3.11": 'python_version < "3.12"', "3.12": 'python_version >= "3.12"'}


def resolve(python: str, requirements: list[str]) -> dict[str, str]:
    """Returns name -> version (without the local part) of what pip would install, except CUDA libraries."""
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    run = subprocess.run([*command, *requirements], stdout=subprocess.PIPE, text=True, check=True)
    found = [item["metadata"] for item in json.loads(run.stdout)["install"]]
    pins = {normalised(each["name"]): each["version"].split("+")[0] for each in found}
    return {name: version for name, version in pins.items() if not CUDA_LIBRARY.match(name)}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def python_version(python: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.check_output([python, "-c", code], text=True).strip()


def merged(pins: dict[str, dict[str, str]]) -> list[str]:
    """Returns one line for a package with the same version on all Pythons, else one line for each Python."""
    lines = []
    for name in sorted(set().union(*pins.values()) - {"mora-jax"}):
        versions = {python: found[name] for python, found in pins.items() if name in found}
        if len(set(versions.values())) == 1:
            lines.append(f"{name}=={next(iter(versions.values()))}")
        else:
            lines += [f"{name}=={version} ; {MARKERS[python]}" for python, version in versions.items()]
    return lines


def main(pythons: list[str]) -> None:
    pins = {}
    for python in pythons:
        version = python_version(python)
        print(f"Resolving for Python {version} ...", file=sys.stderr)
        parity = PARITY if version == PARITY_PYTHON else []
        pins[version] = resolve(python, [f".[{','.join(EXTRAS)}]", *parity])
    if set(pins) != set(MARKERS):
        sys.exit(f"constraints.py needs one Python of each of {', '.join(MARKERS)}, got {', '.join(pins)}")
    Path("constraints.txt").write_text(HEADER + "\n".join(merged(pins)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
