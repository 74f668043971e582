"""The sections of a run's config: frozen dataclasses that check their values."""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from mora_jax.errors import InputError, check_float32
from train.config.paths import spell_out

LINEARS = "layers/.*_proj/kernel"
REST = "embed_tokens/embedding|.*norm/scale|lm_head/kernel"
# Fields of a config that have no flag.
YAML_ONLY = ("rules", "groups")

# The largest int32 of JAX; no count of a run comes near it.
MOST = 2**31 - 1
MOST_SEQUENCES = 2**24
# Every update sorts the window, and every checkpoint holds it.
MOST_WINDOW = 100_000
MOST_ROWS = 2**40


# Of the learning rate, of its multiples and of weight decay. With a finite gradient norm, no product of these
# and of an update of Adam or Muon leaves float32, so the step need not look at every parameter afterwards.
LARGEST_FACTOR = 1e6


def at_least(name: str, value: float, least: float, most: float = MOST) -> None:
    """Raises InputError for a value below `least`, above `most`, not a number or zero in float32 alone."""
    if not value >= least or value == math.inf:
        raise InputError(f"{name} must be at least {least}, not {value}")
    if value > most:
        raise InputError(f"{name} must be at most {most:,}, not {value}")
    check_float32(name, value)


def above(name: str, value: float, bound: float, most: float = math.inf) -> None:
    """Raises InputError for a value not above `bound`, above `most`, or not finite or zero in float32."""
    if not bound < value < math.inf:
        raise InputError(f"{name} must be above {bound}, not {value}")
    check_float32(name, value)
    if value > most:
        raise InputError(f"{name} must be at most {most:,}, not {value}")


def number(name: str, value: Any) -> float:
    """Returns a number of YAML, which reads 1e-3 as text. Raises InputError for anything else."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    raise InputError(f"{name} is a number, not {value!r}")


@dataclasses.dataclass(frozen=True)
class Data:
    """The prepared text.

    Attributes:
      directory: data set made by `mora prepare-data`; one in gs:// or s3:// is first downloaded to this
        machine's disk, into MORA_CACHE or ~/.cache/mora_jax.
      sequence_length: tokens per row; must be that of the data set.
      skip_rows: rows passed over at the start, in the order of the seed, such as those that the source of a
        warm start has read.
      document_mask: tokens attend to their own document only, and positions are counted from its start, as
        if each document were a sequence of its own; for rows of joined documents.
    """

    directory: str = "data/c4"
    sequence_length: int = 512
    skip_rows: int = 0
    document_mask: bool = False

    def __post_init__(self) -> None:
        spell_out(self, "data.", "directory")
        at_least("data.sequence_length", self.sequence_length, 2)
        at_least("data.skip_rows", self.skip_rows, 0, MOST_ROWS)


@dataclasses.dataclass(frozen=True)
class Params:
    """Which parameters are adapted and which are trained themselves. All others are frozen.

    Attributes:
      adapt: regex of the paths of kernels that get an adapter; not used by full and frozen.
      train: regex of the paths of parameters that are trained themselves; empty for none; full trains all.
        The default leaves biases frozen.
    """

    adapt: str = LINEARS
    train: str = REST


@dataclasses.dataclass(frozen=True)
class GroupRule:
    """What the optimizer does differently with the arrays that a regex matches.

    Attributes:
      lr_scale: multiple of the learning rate.
      weight_decay: decoupled decay per unit of learning rate; None for `Optimizer.weight_decay`.
    """

    lr_scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        at_least("lr_scale of optimizer.groups", self.lr_scale, 0, LARGEST_FACTOR)
        if self.weight_decay is not None:
            at_least("weight_decay of optimizer.groups", self.weight_decay, 0, LARGEST_FACTOR)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW, or Muon for matrices.

    Attributes:
      learning_rate: the peak rate.
      matrices: what updates kernels and the matrices of adapters: adamw; or muon, which makes their momentum
        orthogonal, keeps no second moments, and moves an entry by about 0.2 of the rate (arXiv:2502.16982).
        AdamW updates all others: embedding, head, norms, biases, DoRA's magnitudes.
      momentum: decay of muon's momentum.
      embedding_lr_scale: multiple of the rate for the token embedding and the head, where they are trained.
      b1: decay of AdamW's first moment.
      b2: decay of its second moment.
      eps: added to the square root of the second moment.
      weight_decay: decoupled weight decay per unit of learning rate; norms, biases and the like have none.
      clip_norm: largest global norm of the gradient; 0 for no clipping.
      groups: (regex of paths, GroupRule), first match wins; YAML and Python only.
    """

    learning_rate: float = 5e-4
    embedding_lr_scale: float = 1.0
    matrices: Literal["adamw", "muon"] = "adamw"
    momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    groups: Annotated[tuple[tuple[str, GroupRule], ...], tyro.conf.Suppress] = ()

    def __post_init__(self) -> None:
        above("optimizer.learning_rate", self.learning_rate, 0, LARGEST_FACTOR)
        at_least("optimizer.embedding_lr_scale", self.embedding_lr_scale, 0, LARGEST_FACTOR)
        if self.matrices not in ("adamw", "muon"):
            raise InputError(f"optimizer.matrices is adamw or muon, not {self.matrices!r}")
        for name in ("momentum", "b1", "b2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise InputError(f"optimizer.{name} must lie in [0, 1), not {value}")
            if np.float32(value) == 1:
                raise InputError(f"optimizer.{name} {value} is 1 in float32; choose at most 0.9999999")
        above("optimizer.eps", self.eps, 0)
        at_least("optimizer.weight_decay", self.weight_decay, 0, LARGEST_FACTOR)
        at_least("optimizer.clip_norm", self.clip_norm, 0)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate over the run.

    Attributes:
      kind: shape after the warm-up; jagged-cosine warms up again after every restart.
      warmup: optimizer steps of linear warm-up from 0.
      min_ratio: rate at the end as a fraction of the peak.
    """

    kind: Literal["linear", "cosine", "jagged-cosine"] = "cosine"
    warmup: int = 1000
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        at_least("schedule.warmup", self.warmup, 0)
        if not 0 <= self.min_ratio <= 1:
            raise InputError(f"schedule.min_ratio must lie in [0, 1], not {self.min_ratio}")


@dataclasses.dataclass(frozen=True)
class BadSteps:
    """Updates that are skipped: those whose loss or gradient is not finite or spikes.

    Attributes:
      window: number of preceding good steps whose median is compared with; no spike is detected before there
        are as many (for gradients, since the last restart). 0 detects no spikes.
      factor: a spike is a perplexity or a gradient norm above this multiple of the median.
      patience: consecutive bad steps that stop the run. After half of them, a gradient that is still high, at
        an ordinary loss, counts as a new level.
    """

    window: int = 100
    factor: float = 10.0
    patience: int = 10

    def __post_init__(self) -> None:
        at_least("bad_steps.window", self.window, 0, MOST_WINDOW)
        above("bad_steps.factor", self.factor, 1)
        at_least("bad_steps.patience", self.patience, 1)


@dataclasses.dataclass(frozen=True)
class Restart:
    """Restarts of ReMoRA and ReLoRA: merge, initialise again, switch the pattern.

    Attributes:
      every: optimizer steps before the first restart, and between restarts unless they grow; 0 for none.
      warmup: optimizer steps of linear warm-up after a restart.
      optimizer: the adapters' optimizer state: "reset" zeroes all; "magnitude" and "random" zero a
        fraction of each moment's entries, the smallest or random ones, and keep the count; "mean" zeroes
        the first moment, averages the second one over each kernel, and keeps the count.
      prune: that fraction, in (0, 1]; used by "magnitude" and "random".
      growth: length of each cycle as a multiple of the one before it, rounded to whole steps; 1 for cycles of
        one length (T_mult of SGDR, arXiv:1608.03983).
    """

    every: int = 0
    warmup: int = 50
    optimizer: Literal["reset", "magnitude", "random", "mean"] = "reset"
    prune: float = 0.9
    growth: float = 1.0

    def __post_init__(self) -> None:
        at_least("restart.every", self.every, 0)
        at_least("restart.warmup", self.warmup, 0)
        at_least("restart.growth", self.growth, 1, LARGEST_FACTOR)
        if not 0 < self.prune <= 1:
            raise InputError(f"restart.prune must lie in (0, 1], not {self.prune}")
        if 0 < self.every <= self.warmup:
            raise InputError(f"restart.warmup {self.warmup} must be shorter than restart.every {self.every}")

    def starts(self, steps: int) -> Sequence[int]:
        """Returns the steps (from 0) of a run of `steps` that a restart precedes.

        >>> [*Restart(every=100, growth=2).starts(1000)]
        [100, 300, 700]
        """
        if not self.every:
            return ()
        return range(self.every, steps, self.every) if self.growth == 1 else _growing_starts(self, steps)


@functools.lru_cache
def _growing_starts(restart: Restart, steps: int) -> tuple[int, ...]:
    found: list[int] = []
    start = cycle = float(restart.every)
    while round(start) < steps:
        found.append(round(start))
        cycle *= restart.growth
        start += cycle
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Perplexity on the validation split.

    Attributes:
      every: optimizer steps between evaluations; 0 for the end only.
      batch_size: sequences per batch.
      max_batches: most batches that an evaluation reads; 0 for the whole split.
    """

    every: int = 1000
    batch_size: int = 64
    max_batches: int = 0

    def __post_init__(self) -> None:
        at_least("eval.every", self.every, 0)
        at_least("eval.batch_size", self.batch_size, 1, MOST_SEQUENCES)
        at_least("eval.max_batches", self.max_batches, 0)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Checkpoints.

    Attributes:
      every: optimizer steps between checkpoints; 0 for the end only.
      keep: number of newest checkpoints to keep; 0 for all.
      keep_every: steps between checkpoints that are never deleted, a multiple of every; 0 for none.
    """

    every: int = 1000
    keep: int = 2
    keep_every: int = 0

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 0)
        at_least("checkpoint.keep", self.keep, 0)
        at_least("checkpoint.keep_every", self.keep_every, 0)
        if self.keep_every and (not self.every or self.keep_every % self.every):
            raise InputError(
                f"checkpoint.keep_every {self.keep_every} must be a multiple of checkpoint.every "
                f"{self.every}: no other steps are saved"
            )


@dataclasses.dataclass(frozen=True)
class Compilation:
    """Compilation.

    Attributes:
      cache: folder of compiled programs, so that a resumed run compiles nothing; "auto" for jax_cache beside
        the run's folder, or JAX_COMPILATION_CACHE_DIR; "off" for none. Whoever can write to it can run code.
        Programs for several CPUs are not kept.
    """

    cache: str = "auto"

    def __post_init__(self) -> None:
        if not self.cache:
            raise InputError("compilation.cache must be a folder, auto or off, not empty")
        spell_out(self, "compilation.", "cache")


@dataclasses.dataclass(frozen=True)
class Log:
    """Logs besides JSON lines and TensorBoard, which are always written.

    Attributes:
      wandb: Weights & Biases project; empty for none.
    """

    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The devices in three axes. One of the sizes may be -1, for all remaining devices.

    Attributes:
      data: devices that a batch is sharded over; each has a copy of the state.
      fsdp: devices that a batch and each copy of the state are sharded over.
      tensor: devices that the attention heads and the MLP's width of each token are sharded over.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size != -1:
                at_least(f"mesh.{axis}", size, 1)
        if list(sizes.values()).count(-1) > 1:
            raise InputError(f"only one of {', '.join(f'mesh.{axis}' for axis in sizes)} may be -1")


@dataclasses.dataclass(frozen=True)
class Distributed:
    """The processes of a run. Slurm, Open MPI and TPU pods are detected from the environment.

    Attributes:
      coordinator_address: host:port of process 0; empty to detect the processes.
      num_processes: number of processes; needs a coordinator_address.
      process_id: index of this process, from 0; needs a coordinator_address.
      initialization_timeout: seconds that the processes wait for each other at the start.
      heartbeat_timeout: seconds without a heartbeat after which a process counts as lost.
    """

    coordinator_address: str = ""
    num_processes: int = 1
    process_id: int = 0
    initialization_timeout: int = 300
    heartbeat_timeout: int = 10

    def __post_init__(self) -> None:
        at_least("distributed.num_processes", self.num_processes, 1)
        at_least("distributed.initialization_timeout", self.initialization_timeout, 1)
        at_least("distributed.heartbeat_timeout", self.heartbeat_timeout, 1)
        if not 0 <= self.process_id < self.num_processes:
            raise InputError(
                f"distributed.process_id {self.process_id} must lie in [0, distributed.num_processes "
                f"{self.num_processes})"
            )
        if self.num_processes > 1 and not self.coordinator_address:
            raise InputError("distributed.num_processes needs distributed.coordinator_address, host:port")
        if self.coordinator_address and not re.fullmatch(r".+:\d+", self.coordinator_address):
            raise InputError(
                f"distributed.coordinator_address is host:port, not {self.coordinator_address!r}"
            )
