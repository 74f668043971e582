"""What a process of its own is asked to measure. Plain data: both sides read it, and it starts no device."""

import dataclasses
import re

from mora_jax.errors import InputError
from train.perf.bench.cases import Case

PEERS = ("full", "lora", "mora", "mora-rotate")
PEER = re.compile(r"(?P<method>[a-z\-]+)(:(?P<rank>\d+))?(/(?P<options>[a-z0-9\-]+))?")


@dataclasses.dataclass(frozen=True)
class MatmulJob:
    """Measures the rate of matmuls in a type, and says what device and versions there are."""

    dtype: str


@dataclasses.dataclass(frozen=True)
class CheckJob:
    """Checks every path of the methods' layers."""

    case: Case
    methods: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StepJob:
    """Times the training step of one method.

    Attributes:
      case: model and batch.
      method: as `cases.with_method` reads it.
      warmup: steps before those that are timed.
      steps: timed steps.
    """

    case: Case
    method: str
    warmup: int
    steps: int


@dataclasses.dataclass(frozen=True)
class PeerJob:
    """Times the training step of one PyTorch program.

    Attributes:
      case: model and batch; with a bfloat16 base layers are computed again and adapters alone are trained.
      method: one of PEERS.
      rank: LoRA's, or the one that MoRA matches.
      compiled: by torch.compile.
      pure: everything is bfloat16; else trained parameters are float32 under autocast, as this project's are.
      warmup: steps before those that are timed.
      steps: timed steps.
    """

    case: Case
    method: str
    rank: int
    compiled: bool
    pure: bool
    warmup: int
    steps: int


def peer_job(case: Case, text: str, warmup: int, steps: int) -> PeerJob:
    """Reads METHOD[:RANK][/compiled][-bf16], such as lora:128/compiled-bf16.

    Raises:
      InputError: for a word that says nothing.
    """
    match = PEER.fullmatch(text)
    options = set((match["options"] or "").split("-")) - {""} if match else set()
    if not match or match["method"] not in PEERS or options - {"compiled", "bf16"}:
        raise InputError(
            f"no peer reads {text!r}: METHOD[:RANK][/compiled|/bf16|/compiled-bf16], "
            f"METHOD one of {', '.join(PEERS)}"
        )
    rank = int(match["rank"] or case.config.method.rank)
    return PeerJob(case, match["method"], rank, "compiled" in options, "bf16" in options, warmup, steps)
