"""What a checkpoint holds beside its arrays, and how it is verified."""

from typing import Any

from mora_jax.errors import InputError
from mora_jax.transform import Methods
from train.config import flags, old
from train.config import run as run_config
from train.config.run import RunConfig
from train.data.rows.info import DataInfo
from train.data.rows.read import rows_from
from train.run.checkpoint import Checkpoints
from train.step.spec import spec_of
from train.step.state import random_state
from train.storage.format import FORMAT, KEY, check_format


def build_meta(
    config: RunConfig, methods: Methods, info: DataInfo, step: int, evaluation: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns what is saved beside the arrays of a step: all that gives them meaning, as JSON holds it.

    Args:
      config: the run's config.
      methods: what was done with each parameter.
      info: the data set.
      step: updates done.
      evaluation: the score of this very state, if it was evaluated.
    """
    text = {"tokenizer_sha256": info.tokenizer_sha256, "rows": info.rows["train"]}
    text["loss_tokens"] = _loss_tokens(info)
    derived = _derived(config, step, info.rows["train"])
    return derived | {
        KEY: FORMAT,
        "config": run_config.to_plain(config),
        "methods": methods.to_json(),
        "data": derived["data"] | text,
        "evaluation": evaluation,
    }


def read_meta(saved: Checkpoints, step: int) -> dict[str, Any]:
    """Returns what `build_meta` built for a checkpoint; those of older formats with today's names.

    Raises:
      InputError: if the checkpoint has a newer format, or holds anything else, whoever wrote it.
    """
    found = saved.read_meta(step)
    unknown = f"{saved.folder(step)} was not saved by a run of this version"
    if not isinstance(found, dict):
        raise InputError(unknown)
    number = check_format(found, str(saved.folder(step)))
    try:
        if number == 1:
            found = found | {KEY: number, "config": old.upgrade_config(found["config"])}
        found = found | {"methods": old.upgrade_methods(found["methods"])}
        Methods.from_json(found["methods"])
        data, score, restarts = found["data"], found["evaluation"], found["restarts"]
        valid = isinstance(found["config"], dict)
        valid &= type(restarts) is int and 0 <= restarts <= step
        valid &= type(data["rows"]) is int and 0 < data["rows"] < 2**62
        valid &= isinstance(data["tokenizer_sha256"], str)
        valid &= score is None or {n: type(v) for n, v in score.items()} == {
            "loss": float,
            "predictions": int,
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{unknown}: {error!r}") from error
    if not valid:
        raise InputError(unknown)
    return found


def check_data(saved: Checkpoints, step: int, info: DataInfo, resume: bool = False) -> None:
    """Raises InputError unless a data set has a checkpoint's tokenizer, and its counts to resume."""
    seen = read_meta(saved, step)["data"]
    if seen["tokenizer_sha256"] != info.tokenizer_sha256:
        raise InputError(f"{info.directory} was made with another tokenizer than the run's data set")
    if resume and seen["rows"] != info.rows["train"]:
        raise InputError(
            f"{info.directory} has {info.rows['train']} training rows, not the run's {seen['rows']}"
        )
    held, now = seen.get("loss_tokens", 0), _loss_tokens(info)
    if resume and held and now and held != now:  # earlier versions do not state it
        raise InputError(f"{info.directory} has {now} training tokens that count, not the run's {held}")


def check_derived(config: RunConfig, step: int, found: dict[str, Any]) -> None:
    """Raises InputError if what was saved at a step differs from what the config derives for that step."""
    derived = dict(flags.flatten(_derived(config, step, found["data"]["rows"])))
    saved = dict(flags.flatten(found))
    for name, value in derived.items():
        if name not in saved or saved[name] != value:
            raise InputError(
                f"{config.run_dir}: checkpoint {step} was saved with {name} {saved.get(name)}, but resuming "
                f"would use {value}; resume with the versions of jax and grain that the run started with"
            )


def group_type(methods: Methods) -> str:
    """Returns the patterns that restarts switch, such as MoRA's group type "0", joined by commas."""
    return ", ".join(sorted({method.pattern for _, method in methods.adapted()} - {""}))


def _loss_tokens(info: DataInfo) -> int:
    """Returns how many training tokens the loss counts, 0 if an earlier version prepared them."""
    return info.counts["train"].loss_tokens if "train" in info.counts else 0


def _derived(config: RunConfig, step: int, rows: int) -> dict[str, Any]:
    """What follows from the number of updates alone, as JSON holds it."""
    return {
        "restarts": config.restarts_before(step),
        "data": {
            "step": step,
            "seed": config.seed,
            "next_rows": rows_from(rows, config.seed, config.rows_before(step), min(4, config.batch_size)),
        },
        "random": random_state(spec_of(config), step),
    }
