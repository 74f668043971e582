"""The jobs of measuring processes: plain data for both sides, which starts no device."""

import dataclasses
import re

from mora_jax.errors import InputError
from train.perf.bench.cases import Case

PEERS = ("full", "lora", "mora", "mora-rotate")
PEER = re.compile(r"(?P<method>[a-z\-]+)(:(?P<rank>\d+))?(/(?P<options>[a-z0-9\-]+))?")


@dataclasses.dataclass(frozen=True)
class MatmulJob:
    """Measures the rate of matmuls in a dtype, and reports the device and the versions."""

    dtype: str


@dataclasses.dataclass(frozen=True)
class CheckJob:
    """Checks every path of computing the methods' layers."""

    case: Case
    methods: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StepJob:
    """Times the training step of one method.

    Attributes:
      case: model and batch.
      method: as `cases.with_method` parses it.
      warmup: steps before the timed ones.
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
      case: model and batch.
      method: one of PEERS.
      rank: LoRA's rank, or the one whose parameter count MoRA matches.
      compiled: whether torch.compile compiles it.
      pure: whether everything is bfloat16. Otherwise trained parameters are float32 under autocast, as in
        this project.
      warmup: steps before the timed ones.
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
    """Parses METHOD[:RANK][/compiled][-bf16], such as lora:128/compiled-bf16.

    Raises:
      InputError: for a word of another form.
    """
    match = PEER.fullmatch(text)
    options = set((match["options"] or "").split("-")) - {""} if match else set()
    if not match or match["method"] not in PEERS or options - {"compiled", "bf16"}:
        raise InputError(
            f"{text!r} is not a peer: give METHOD[:RANK][/compiled|/bf16|/compiled-bf16], "
            f"METHOD one of {', '.join(PEERS)}"
        )
    rank = int(match["rank"] or getattr(case.config.method, "rank", 128))
    return PeerJob(case, match["method"], rank, "compiled" in options, "bf16" in options, warmup, steps)
