"""The jobs of measuring processes: plain data for both sides, which starts no device."""

import dataclasses
import re
from collections.abc import Sequence

from mora_jax import transform
from mora_jax.errors import InputError
from mora_jax.methods import Method
from mora_jax.models.llama import LlamaConfig
from mora_jax.on import method_of
from train.perf.bench.cases import Case, DType, with_method
from train.step.spec import StepSpec, spec_of

CHECKED_TOKENS = 4096  # at most
# PyTorch programs, and what their rows have in common with those of this project's methods.
PEERS = {
    "full": {"name": "full"},
    "lora": {"name": "lora"},
    "mora": {"name": "mora", "operator": "share"},
    "mora-rotate": {"name": "mora", "operator": "rotate"},
}
PEER = re.compile(r"(?P<method>[a-z\-]+)(:(?P<rank>\d+))?(/(?P<options>[a-z0-9\-]+))?")


@dataclasses.dataclass(frozen=True)
class MatmulJob:
    """Measures the rate of matmuls in a dtype, and reports the device and the versions."""

    dtype: str


@dataclasses.dataclass(frozen=True)
class CheckJob:
    """Checks every path of computing the methods' layers.

    Attributes:
      model: the model whose layers are checked.
      methods: the methods to check.
      tokens: tokens of the input.
      base_dtype: dtype of the kernels.
      deterministic: whether XLA excludes nondeterministic operations.
    """

    model: LlamaConfig
    methods: tuple[Method, ...]
    tokens: int
    base_dtype: DType
    deterministic: bool


@dataclasses.dataclass(frozen=True)
class StepJob:
    """Times the training step of one method.

    The methods travel as objects, not as words, so a process needs no table of methods.

    Attributes:
      spec: what the step computes.
      rules: regexes of parameters and their methods.
      batch: sequences and tokens of a batch, of all devices together.
      deterministic: whether XLA excludes nondeterministic operations.
      warmup: steps before the timed ones.
      steps: timed steps.
      mesh: sizes of the axes data, fsdp and tensor.
      profiled: steps under the profiler on a mesh of several devices, to see what communication costs.
    """

    spec: StepSpec
    rules: transform.Rules
    batch: tuple[int, int]
    deterministic: bool
    warmup: int
    steps: int
    mesh: tuple[int, int, int] = (1, 1, 1)
    profiled: int = 3


@dataclasses.dataclass(frozen=True)
class Placement:
    """One way to compute a step: on a mesh, with flags of the compiler.

    Attributes:
      mesh: sizes of the axes data, fsdp and tensor.
      batch: sequences of a batch, of all devices together.
      flags: options of XLA as NAME=VALUE, for this program alone.
    """

    mesh: tuple[int, int, int]
    batch: int
    flags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ScalingJob:
    """Times the training step of one method on one device, and beside it on meshes.

    Attributes:
      step: the step on one device.
      placements: the meshes.
      baseline: whether one device is measured.
      compilers: programs that are compiled at a time.
    """

    step: StepJob
    placements: tuple[Placement, ...]
    baseline: bool = True
    compilers: int = 1


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


def check_job(case: Case, jobs: Sequence[StepJob]) -> CheckJob:
    """Returns the check of the methods that some jobs time."""
    found = (method_of(choice) for job in jobs for _, choice in job.rules)
    methods = dict.fromkeys(method for method in found if method)
    tokens = min(CHECKED_TOKENS, case.config.tokens_per_step())
    config = case.config
    return CheckJob(config.model, tuple(methods), tokens, config.base_dtype, config.deterministic)


def step_job(case: Case, text: str, warmup: int, steps: int, profiled: int = 3) -> StepJob:
    """Returns the job for a method, as `cases.with_method` parses it, on the mesh of the case.

    Raises:
      InputError: as `cases.with_method`.
    """
    config = with_method(case.config, text)
    batch = (config.batch_size, config.data.sequence_length)
    rules, exact = config.parameter_rules(), config.deterministic
    mesh = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    return StepJob(spec_of(config), rules, batch, exact, warmup, steps, mesh, profiled)


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
