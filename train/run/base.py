"""The base of a run: the parameters that are not trained, which checkpoints share while they do not change.

A checkpoint does not hold them. It refers to them, by a hash of their content, in one of two ways. `Named`:
they are those of the model that `init_from` names. `Kept`: they lie in a folder beside the checkpoints,
sealed as these are. A restart merges into the base, and so a new one is kept after it.
"""

import concurrent.futures
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

from mora_jax import hf, trees
from mora_jax.errors import InputError
from mora_jax.hf.safetensors import weight_files
from mora_jax.transform import Methods
from train.console.progress import progress
from train.step.state import TrainState
from train.storage.files import sha256

_HASHERS = 4
_MOST_RESTARTS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Kept:
    """A base in a folder beside the checkpoints.

    Attributes:
      restarts: restarts done when it became what it is.
      sha256: hash of the folder's manifest.
    """

    restarts: int
    sha256: str

    def __post_init__(self) -> None:
        if type(self.restarts) is not int or not 0 <= self.restarts <= _MOST_RESTARTS:
            raise ValueError(f"no count of restarts: {self.restarts!r}")
        if type(self.sha256) is not str:
            raise ValueError(f"no hash: {self.sha256!r}")

    def __str__(self) -> str:
        return folder_name(self.restarts)


@dataclasses.dataclass(frozen=True)
class Named:
    """A base that is the model in the folder of `init_from`, before any restart.

    Attributes:
      files: name and SHA-256 of each file of weights.
    """

    files: tuple[tuple[str, str], ...]
    restarts: ClassVar[int] = 0

    def __str__(self) -> str:
        return "init_from"


Base: TypeAlias = Kept | Named


def folder_name(restarts: int) -> str:
    """Returns the name of the folder of a base that is kept."""
    return f"base-{restarts}"


def is_folder_name(name: str) -> bool:
    """Returns whether a folder of this name is one of a base that is kept."""
    return bool(re.fullmatch(r"base-\d{1,10}", name, re.ASCII))


def to_json(base: Base) -> dict[str, Any]:
    """Returns plain data, from which `from_json` makes an equal object."""
    return {"files": dict(base.files)} if isinstance(base, Named) else dataclasses.asdict(base)


def from_json(plain: Mapping[str, Any]) -> Base:
    """Returns what `to_json` made plain. Raises ValueError, TypeError or AttributeError for anything else."""
    if "files" not in plain:
        return Kept(**plain)
    files = tuple(sorted(plain["files"].items()))
    if len(plain) > 1 or not all(type(text) is str for pair in files for text in pair):
        raise ValueError("no hashes of files")
    return Named(files)


def split(state: TrainState, methods: Methods) -> tuple[TrainState, Any]:
    """Returns a state without its base, and the base, None if every parameter is trained."""
    trained, base = trees.split(state.params, methods.trained().__contains__)
    return dataclasses.replace(state, params=trained), {"params": base} if base else None


def is_same(params: Any, others: Any, methods: Methods) -> bool:
    """Returns whether the base in two trees of parameters is one: the very same arrays."""
    one, other = (trees.flatten(tree) for tree in (params, others))
    return all(one[path] is other[path] for path in one.keys() - methods.trained())


def join(state: TrainState, base: Any) -> TrainState:
    """Returns the state that `split` has split."""
    return dataclasses.replace(state, params=trees.combine(state.params, base["params"]))


def name_model(init_from: str) -> Named:
    """Returns the reference to the model in a Hugging Face folder. Reads all of its weights.

    Raises:
      InputError: if the folder holds no weights.
    """
    files = weight_files(hf.local_folder(init_from))
    total = sum(file.stat().length for file in files) / 1e6
    with (
        progress(f"hashing {init_from}", total, "MB") as megabytes,
        concurrent.futures.ThreadPoolExecutor(_HASHERS) as pool,
    ):
        found = pool.map(lambda file: sha256(file, lambda n: megabytes(n / 1e6)), files)
        return Named(tuple(sorted(zip([file.name for file in files], found, strict=True))))


def difference(base: Named, init_from: str) -> str:
    """Returns which file is no longer what a checkpoint refers to, empty if all are. Reads all weights."""
    want = dict(base.files)
    try:
        have = dict(name_model(init_from).files)
    except InputError as error:
        return str(error)
    for name in sorted(want.keys() | have.keys()):
        if name not in have:
            return f"{name} is missing in {init_from}"
        if have[name] != want.get(name):
            return f"{name} in {init_from} is not what the run started from"
    return ""
