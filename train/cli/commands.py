"""The commands of `mora`: each a frozen dataclass of flags, whose docstrings are the help."""

import dataclasses
from typing import Annotated, Literal

import tyro

from mora_jax.methods import MoRA
from mora_jax.models.llama import LlamaConfig
from train.config.run import RunConfig

Config = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
Folder = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
Out = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]


@dataclasses.dataclass(frozen=True)
class PrepareData:
    """C4-format shards into a data set of token rows.

    Attributes:
      source: training text: a glob or folder of .json.gz shards (any etils.epath path), or tfds:NAME for a
        data set that TFDS has prepared (tfds:c4/en, or tfds:/path/to/it).
      validation: validation text, likewise; not used with tfds:, whose own validation split is taken.
      tokenizer: SentencePiece model file.
      out: folder of the data set; one of gs:// or s3:// is prepared on this machine's disk, in MORA_CACHE or
        ~/.cache/mora_jax, and copied there in the end.
      sequence_length: tokens of a row.
      skip_lines: bad lines (not JSON, no text) to skip before giving up.
      workers: processes; 0 for one a core.
      tfds_data_dir: where TFDS keeps its data sets; empty for its default.
    """

    source: str
    tokenizer: str
    out: str
    validation: str = ""
    sequence_length: int = 512
    skip_lines: int = 0
    workers: int = 0
    tfds_data_dir: str = ""


@dataclasses.dataclass(frozen=True)
class TrainTokenizer:
    """Trains a SentencePiece BPE model with byte fallback.

    Attributes:
      source: text: a glob or folder of C4-format shards.
      out: the model file to write, ending in .model.
      vocab_size: pieces.
      max_documents: documents to train on, at most.
    """

    source: str
    out: str
    vocab_size: int = 32_000
    max_documents: int = 1_000_000


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Pretrains a model as a config file says, or goes on with it; every scalar of it is also a flag.

    Attributes:
      config: YAML file, such as configs/demo.yaml.
      resume: go on with the run that the folder holds, if it holds one; with --no-resume it is refused.
      dry_run: show shapes, trainable and frozen parameters, tokens and steps, and stop.
    """

    config: Config
    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    resume: bool = True
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config needs of each TPU or GPU, found by compiling its training step here, without any of them.

    Every scalar of the config is also a flag. Exits with status 1 where it does not fit.

    Attributes:
      config: YAML file, such as configs/1_3b_remora.yaml.
      topology: slice of TPUs to compile for with the TPU compiler, such as v5e:16x16; empty for none.
      devices: GPUs to plan for instead, simulated by as many CPU devices; 0 for none.
      memory: GiB of one such GPU.
      every_program: compile the restart and the evaluation too, not only the training step.
      out: JSON file for all figures, in bytes; empty for none.
    """

    config: Config
    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    topology: str = ""
    devices: int = 0
    memory: float = 80.0
    every_program: tyro.conf.FlagCreatePairsOff[bool] = False
    out: str = ""


@dataclasses.dataclass(frozen=True)
class PlanTable:
    """Plans of several configs on several slices of TPUs as one table in Markdown.

    Each config is divided over all chips of a slice, with layers recomputed and splash attention.

    Attributes:
      configs: YAML files.
      topologies: slices of TPUs, such as v5e:2x4 v5e:16x16.
      sequences: of a microbatch on one chip, at most.
      out: JSON file that keeps every plan: what is in it is not compiled again.
      state_only: compile nothing: of what is not in the file, show the sizes of the state and the formula.
    """

    configs: tuple[str, ...]
    topologies: tuple[str, ...]
    sequences: int = 4
    out: str = "plans.json"
    state_only: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Validation perplexity of a run or of an exported model.

    Attributes:
      path: folder of a run, or Hugging Face folder.
      data: data set to evaluate on; empty for the run's own.
      batch_size: sequences a batch.
      max_batches: batches to read; 0 for the whole split.
      dtype: type of products.
    """

    path: Folder
    data: str = ""
    batch_size: int = 64
    max_batches: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Export:
    """A run's merged weights and tokenizer as a Hugging Face folder.

    Attributes:
      run_dir: folder of the run.
      out: folder to write.
      dtype: type of the stored weights.
    """

    run_dir: Folder
    out: Out
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class ListCheckpoints:
    """A run's checkpoints, each verified against its manifest; exits with status 4 if one is damaged.

    Attributes:
      run_dir: folder of the run, which may be training.
      no_verify: only list them; reading every file takes a while where they are large.
    """

    run_dir: Folder
    no_verify: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclasses.dataclass(frozen=True)
class SurveyMethods:
    """A table of methods and operators for a model: trainable parameters, r_hat, attainable rank.

    Attributes:
      rank: LoRA's rank, and the one whose parameter count MoRA matches.
      model: the model whose seven linears are adapted.
    """

    rank: int = 128
    model: Annotated[LlamaConfig, tyro.conf.FlagConversionOff] = dataclasses.field(
        default_factory=LlamaConfig
    )

    def __post_init__(self) -> None:
        MoRA(self.rank)  # refuses a rank that is none


@dataclasses.dataclass(frozen=True)
class Demo:
    """The whole path on text of this Python installation: gather, tokenize, prepare, pretrain, export.

    Attributes:
      config: the run's config.
      folder: where its data and its run are written; what is there is replaced.
    """

    config: str = "configs/demo.yaml"
    folder: str = "runs/demo"
