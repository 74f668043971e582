"""The flags of the benchmarks that take a model: every flag of a run's config, and their own."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import tyro

from mora_jax.errors import InputError
from train import flags
from train.bench.cases import SIZES, Case
from train.config import RunConfig

CaseName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CASE")]
Run = Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class BenchProfile:
    """The costliest kernels of a training step.

    Attributes:
      case: 250m, 1.3b, 7b (the paper's Table 5), tiny, or a config file.
      base_dtype: type that the frozen parameters are held in.
      method: what is trained: NAME[-OPERATOR][:RANK][/PATH], such as mora, mora-rotate:8, lora:128/merged,
        full, frozen; config for what a config file says.
      profiled_steps: steps to profile.
      top: kernels to print.
      out: JSON file for all kernels; empty for none.
    """

    case: CaseName
    run: Run
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    method: str = "mora"
    profiled_steps: int = 3
    top: int = 10
    out: str = ""


def read(command: type[C], args: Sequence[str], name: str) -> C:
    """`mora bench ... CASE [flags]`: the case's values, and the user's flags over them.

    Raises:
      InputError: naming what is wrong, also where no case comes first.
    """
    if set(args) & {"-h", "--help"}:
        return flags.parse(command, ["--help"], name)
    if not args or args[0].startswith("-"):
        raise InputError(f"{name} needs a case first: {', '.join(SIZES)} or a config file")
    if args[0] in SIZES:
        return flags.parse(command, args, name, _default(command, args[0], SIZES[args[0]]()))
    words, rules = flags.words_of_yaml(args[0])
    default = _default(command, args[0], Case(RunConfig(rules=rules)))
    return flags.parse(command, [args[0], *words, *args[1:]], name, default)


def _default(command: type[C], name: str, case: Case) -> Any:
    return command(case=name, run=case.config, base_dtype=case.base_dtype)  # pyright: ignore[reportCallIssue]
