"""Models of the Hugging Face Hub, `org/name` or `org/name@revision` where a folder may stand; data sets."""

import errno
import re
from collections.abc import Sequence

from etils import epath

from mora_jax.errors import InputError, reason
from mora_jax.io import path_of

DATASETS = "hf://datasets/"
# What is downloaded of models: weights as safetensors, configs, the tokenizer's files. Pickles never are.
_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")
_OTHERS = ("*/*", "consolidated*")  # other formats of the same weights
_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)


def is_hub_id(path: epath.PathLike) -> bool:
    """Returns whether a path is the id of a model on the Hub: it has the form, and no such folder is here."""
    return _ID.fullmatch(str(path)) is not None and not path_of(path).exists()


def local_folder(path: epath.PathLike) -> epath.Path:
    """Returns a folder as it is, and the local copy of a model on the Hub, which is downloaded first.

    `huggingface_hub` downloads and caches it. Its variables hold here too: HF_HOME, HF_ENDPOINT, HF_TOKEN,
    HF_HUB_OFFLINE. Files that are in its cache already are not downloaded again.

    Args:
      path: a folder, or `org/name`, with `@` and a branch, tag or commit if it is not the default branch.

    Raises:
      InputError: if the Hub has no such model or revision, gives no access to it, or the package is missing.
      OSError: if the Hub cannot be reached and its cache lacks the model.

    Example:
      >>> is_hub_id("HuggingFaceTB/SmolLM2-135M@main"), is_hub_id("runs/demo/export")
      (True, False)
    """
    if not is_hub_id(path):
        return path_of(path)
    return _download(str(path), str(path), "model", _FILES, _OTHERS)


def dataset_folder(name: str, patterns: Sequence[str]) -> epath.Path:
    """Returns the local copy of files of a data set on the Hub, which are downloaded first, as models are.

    Args:
      name: `org/name`, with `@` and a branch, tag or commit if it is not the default branch.
      patterns: which files, where `*` stands for anything.

    Raises:
      InputError: as `local_folder`.
      OSError: as `local_folder`.
    """
    return _download(f"{DATASETS}{name}", name, "dataset", patterns, ())


def _download(given: str, name: str, kind: str, allow: Sequence[str], ignore: Sequence[str]) -> epath.Path:
    """Returns the folder of a downloaded snapshot. `given` is what the user named it."""
    found = _ID.fullmatch(name)
    if not found:
        raise InputError(f"{given} must be org/name or org/name@revision")
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError as error:
        raise InputError(
            f"{given} is no folder here; to read it from the Hugging Face Hub: pip install 'mora_jax[hub]'"
        ) from error
    repo, revision = found["repo"], found["revision"]
    hub = constants.ENDPOINT + ("/datasets" if kind == "dataset" else "")
    try:
        folder = snapshot_download(
            repo, repo_type=kind, revision=revision, allow_patterns=list(allow), ignore_patterns=list(ignore)
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{given} is gated: accept its terms at {hub}/{repo}, then log in (hf auth login, or HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{given} is no folder here, and {hub} has no {kind} of this name, or it is private "
            "(hf auth login)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{hub}/{repo} has no revision {revision}") from error
    except ValueError as error:  # no valid name
        raise InputError(f"{given} is no folder here: {reason(error)}") from error
    except Exception as error:  # of the package, and of the one that it sends requests with
        why = f"no folder here, not in the cache, and {hub} cannot be read: {reason(_first(error))}"
        raise OSError(errno.EIO, why, given) from error
    return epath.Path(folder)


def _first(error: BaseException) -> BaseException:
    """Returns the error that caused this one: it says what failed in the fewest words."""
    return _first(error.__cause__) if error.__cause__ else error
