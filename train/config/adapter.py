"""The rules of a run that trains an adapter further: what is adapted, and how, comes from its file."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mora_jax import hf
from mora_jax.errors import InputError, located
from mora_jax.hf.names import places
from mora_jax.methods.registry import changed
from train.config.run import DEFAULT_METHOD, RunConfig
from train.config.sections import Params


def with_adapter(config: RunConfig, given: Mapping[str, Any] | None = None) -> RunConfig:
    """Returns a config with the rules of the adapter that it names, unless it has rules or names none.

    Args:
      config: the config.
      given: the keys of `method` that the user gives, in its flat form; None to take those of the config's
        method that are not the defaults.

    Raises:
      InputError: if the adapter is a run or does not fit the model, the file contradicts what is given, or
        `params` says what is adapted or trained.
    """
    if not config.adapter or config.rules:
        return config
    if config.params != Params():
        raise InputError("--adapter says what is adapted and trained: leave out params")
    if given is None:
        given = {} if config.method == DEFAULT_METHOD else _plain(config.method)
    with located(config.adapter, "--adapter"):
        if (hf.local_folder(config.adapter) / "config.yaml").exists():
            raise InputError(f"{config.adapter} is a run; export it first: mora export RUN OUT --adapter")
        found = hf.read_adapter(
            config.adapter, {name: place.shape for name, place in places(config.model).items()}
        )
        rules = hf.adapter_rules(found, config.model, given)
    return dataclasses.replace(config, rules=tuple(rules), method=DEFAULT_METHOD)


def _plain(method: Any) -> dict[str, Any]:
    return {"name": method} if isinstance(method, str) else changed(method)
