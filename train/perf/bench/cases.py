"""Cases to measure: the named sizes, and the words that choose a method."""

import dataclasses
import re
from typing import Literal, get_args

from mora_jax.errors import InputError
from mora_jax.methods import METHODS, OPERATORS, MoRA, Path
from mora_jax.methods.registry import changed, fitting, flat_fields, from_json, named
from mora_jax.models.llama import Compute, LlamaConfig
from mora_jax.models.rope import Rope
from train.config.method import WITHOUT_ADAPTERS, MethodChoice
from train.config.run import DEFAULT_METHOD, RunConfig
from train.config.sections import Data, Mesh, Params, Restart, Schedule

ONE_DEVICE = Mesh(data=1)
DType = Literal["float32", "bfloat16"]
WORD = re.compile(r"(?P<name>\w+)(-(?P<operator>\w+))?(:(?P<rank>\d+))?(/(?P<path>[a-z]+))?")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch, and what is compared on them.

    Attributes:
      name: name of the case.
      config: model, batch, sequence length, how it is computed, what is trained besides the adapters.
      methods: rows of the table by default, as `with_method` parses them.
      peers: PyTorch programs beside them, as `jobs.peer_job` parses them.
    """

    name: str
    config: RunConfig
    methods: tuple[str, ...] = (
        "full",
        "frozen",
        "lora/activation",
        "lora/merged",
        "mora",
        "lora:8/activation",
        "lora:8/merged",
        "mora-rotate:8",
        "lora:256/activation",
        "lora:256/merged",
        "mora:256",
    )
    peers: tuple[str, ...] = (
        "full/compiled",
        "full/compiled-bf16",
        "lora",
        "lora/compiled",
        "lora/compiled-bf16",
        "mora",
        "mora/compiled",
        "mora/compiled-bf16",
    )


def pretraining(name: str, model: LlamaConfig, batch_size: int, align: int = 128) -> Case:
    """Returns the paper's pretraining on one GPU, where embedding, head and norms are trained, too."""
    config = RunConfig(
        mesh=ONE_DEVICE,
        batch_size=batch_size,
        model=model,
        compute=Compute(attention="cudnn"),
        data=Data(sequence_length=512),
        method=MoRA(align=align),
    )
    return Case(name, config)


def table_5() -> Case:
    """Returns the paper's Table 5: LLaMA-7B on one GPU, batch 1, layers recomputed, only adapters trained."""
    model = LlamaConfig(32_000, 4096, 11_008, 32, 32, 32)
    config = RunConfig(
        mesh=ONE_DEVICE,
        batch_size=1,
        base_dtype="bfloat16",
        model=model,
        compute=Compute(attention="cudnn", layers="scan", remat="full"),
        data=Data(sequence_length=1024),
        # Without padding M takes no more memory than LoRA's factors; padded to 128, up to an eighth more.
        method=MoRA(rank=8),
        params=Params(train=""),
    )
    methods = ("lora:8", "mora-rotate:8", "lora:256", "mora:256")
    return Case("7b", config, methods, ("lora:8", "lora:256"))


def adapting(name: str, model: LlamaConfig, batch_size: int) -> Case:
    """Returns the fine-tuning of a model that people have: a bfloat16 base, only adapters trained."""
    config = RunConfig(
        mesh=ONE_DEVICE,
        batch_size=batch_size,
        base_dtype="bfloat16",
        model=model,
        compute=Compute(attention="cudnn"),
        data=Data(sequence_length=1024),
        method=MoRA(rank=8),
        params=Params(train=""),
    )
    return Case(name, config, ("lora:8", "mora:8", "mora-rotate:8"), ("lora:8", "lora:8/compiled"))


# The sizes and options of their config.json.
LLAMA_3_2_1B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    rope_theta=500_000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    rope=Rope("llama3", factor=32.0),
)
QWEN_2_5_HALF_B = LlamaConfig(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=32_768,
    rope_theta=1_000_000.0,
    tie_word_embeddings=True,
    model_type="qwen2",
)


def tiny() -> Case:
    """Returns a case that runs on a CPU in seconds, to see that everything works."""
    config = RunConfig(
        mesh=ONE_DEVICE,
        batch_size=4,
        model=LlamaConfig(384, 64, 96, 2, 2, 2, 64),
        compute=Compute(dtype="float32", loss_chunk=64),
        data=Data(sequence_length=32),
        method=MoRA(rank=8, align=8),
    )
    methods = ("full", "frozen", "lora/activation", "lora/merged", "mora", "mora-rotate:4")
    return Case("tiny", config, methods=methods)


SIZES = {
    # M's sides are 443 and 652. Padded to 448 and 704 they take 1% less of a step than padded to 512 and 768.
    "250m": lambda: pretraining("250m", LlamaConfig(), 64, align=64),
    "1.3b": lambda: pretraining("1.3b", LlamaConfig(32_100, 2048, 5461, 24, 32, 32), 32),
    "7b": table_5,
    "llama-3.2-1b": lambda: adapting("llama-3.2-1b", LLAMA_3_2_1B, 4),
    "qwen-2.5-0.5b": lambda: adapting("qwen-2.5-0.5b", QWEN_2_5_HALF_B, 4),
    "tiny": tiny,
}


def with_method(config: RunConfig, text: str) -> RunConfig:
    """Returns the config with one method for all seven linears, chosen by a word such as `mora-rotate:8`.

    Args:
      config: model, batch and the rest. Fields of its method that the new one has as well, the rank among
        them, are kept unless the word gives others.
      text: NAME[-OPERATOR][:RANK][/PATH]; "config" is the config's own method or rules.

    Raises:
      InputError: for a word of another form, or a value that the config refuses.
    """
    match, names = WORD.fullmatch(text), ("config", *WITHOUT_ADAPTERS, *METHODS)
    if not match or match["name"] not in names:
        raise InputError(
            f"{text!r} is not a method: give NAME[-OPERATOR][:RANK][/PATH], NAME one of {', '.join(names)}"
        )
    config = dataclasses.replace(config, restart=Restart(), schedule=Schedule(warmup=0))
    if match["path"]:
        if match["path"] not in get_args(Path):
            raise InputError(f"unknown path {match['path']!r}; known are {', '.join(get_args(Path))}")
        compute = dataclasses.replace(config.compute, adapter_path=match["path"])
        config = dataclasses.replace(config, compute=compute)
    if match["name"] == "config":
        return config
    method = _method(config.method, match["name"], match["operator"], match["rank"])
    return dataclasses.replace(config, rules=(), method=method)


def _method(like: MethodChoice, name: str, operator: str | None, rank: str | None) -> MethodChoice:
    """The method of a word, with the fields of another one where it has them."""
    if name in WITHOUT_ADAPTERS:
        return "full" if name == "full" else "frozen"
    known = flat_fields(METHODS[name])
    for key, value in (("operator", operator), ("rank", rank)):
        if value and key not in known:
            raise InputError(f"method {name} has no {key}")
    if operator:
        named("operator", operator, OPERATORS)
    given = changed(DEFAULT_METHOD) | ({} if isinstance(like, str) else changed(like))
    given.pop("operator", None)
    return from_json(fitting(given, name, operator) | ({"rank": int(rank)} if rank else {}))
