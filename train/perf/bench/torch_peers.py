"""The measuring process for PyTorch: training steps of transformers and PEFT.

It needs the extra `parity`. Peers use what is fastest for them: SDPA's causal flash attention, fused AdamW,
TensorFloat32 for float32 products, and no gradient checkpointing if memory allows.
"""

# Pyright also runs without PyTorch, which is an extra.
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

import importlib.metadata
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional

from mora_jax.errors import InputError
from mora_jax.hf.config import config_json
from train.perf.bench import children
from train.perf.bench.jobs import PeerJob
from train.perf.bench.spread import GIB, spread
from train.perf.bench.torch_mora import RotatingLinear, SharingLinear

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REST = ("embed_tokens", "norm", "lm_head")
BATCHES = 4
ATTENTION = "causal_sdpa"


def run(job: PeerJob) -> dict[str, Any]:
    """Times one program, and returns a row of the table."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(job, device)
    step = training_step(job, model, device)
    batches = random_batches(job, device)
    started = time.perf_counter()
    loss = float(step(batches[0]))
    first_seconds = time.perf_counter() - started
    for i in range(job.warmup):
        step(batches[i % BATCHES])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    milliseconds, loss = timed(step, batches, job.steps, device)
    if not np.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    median = float(np.median(milliseconds))
    return {
        **spread(milliseconds),
        "tokens_per_second": job.case.config.tokens_per_step() / median * 1e3,
        "compile_seconds": first_seconds if job.compiled else None,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None,
        "loss": loss,
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft")},
    }


def build(job: PeerJob, device: torch.device) -> nn.Module:
    """Returns the adapted model with random weights on the device; `requires_grad` marks what is trained."""
    model = adapted(job, random_model(job, device))
    rest = () if job.case.config.params.train == "" else REST
    for name, parameter in model.named_parameters():
        adapter = "lora_" in name or name.endswith(".m")
        trained = job.method == "full" or adapter or any(word in name for word in rest)
        parameter.requires_grad_(trained)
        if trained and not job.pure:
            parameter.data = parameter.data.float()
    if job.case.config.compute.remat == "full":
        recompute = getattr(model, "activation_checkpointing_enable", None)  # the newer name
        (recompute or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model.train()


def random_model(job: PeerJob, device: torch.device) -> Any:
    """Returns a model of transformers whose weights are bfloat16 from the start.

    Raises:
      InputError: if the sequences are longer than the model's sliding window, which no peer computes.
    """
    c = job.case.config.model
    if 0 < c.sliding_window < job.case.config.data.sequence_length:
        raise InputError(f"peers compute no window; choose --model.sliding-window 0, not {c.sliding_window}")
    content: dict[str, Any] = config_json(c, "bfloat16", {}) | {"use_cache": False}
    config = transformers.AutoConfig.for_model(**content)
    transformers.AttentionInterface.register(ATTENTION, causal_attention)
    transformers.AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.to(device)


def causal_attention(
    module: nn.Module, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[torch.Tensor, None]:
    """Returns SDPA's output without a mask, so that it can use flash attention.

    Under torch.compile, transformers makes a mask (with torch before 2.14), which excludes flash attention.
    """
    shared = query.shape[1] != key.shape[1]
    y = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=shared
    )
    return y.transpose(1, 2).contiguous(), None


def adapted(job: PeerJob, model: Any) -> Any:
    """Returns the model with the method's adapters in all seven linears of a layer."""
    if job.method == "full":
        return model
    if job.method == "lora":
        return with_lora(job, model)
    kind = SharingLinear if job.method == "mora" else RotatingLinear
    for module in list(model.modules()):
        for name in LINEARS:
            if isinstance(base := getattr(module, name, None), nn.Linear):
                setattr(module, name, kind(base, job.rank, base.weight.dtype))
    return model


def with_lora(job: PeerJob, model: Any) -> Any:
    """Returns the model with PEFT's LoRA, without PEFT's wrapper, which only costs time."""
    import peft

    config = peft.LoraConfig(r=job.rank, lora_alpha=job.rank, target_modules=list(LINEARS))
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).get_base_model()
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.cast_input_dtype_enabled = False  # autocast casts
    return model


def training_step(job: PeerJob, model: Any, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a step like this project's: forward, backward, clipping, AdamW."""
    config = job.case.config.optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=(config.b1, config.b2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    forward = torch.compile(model) if job.compiled else model

    def step(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=not job.pure):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(trained, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def random_batches(job: PeerJob, device: torch.device) -> list[torch.Tensor]:
    """Returns random token batches on the device."""
    shape = (job.case.config.batch_size, job.case.config.data.sequence_length)
    return [torch.randint(0, job.case.config.model.vocab_size, shape, device=device) for _ in range(BATCHES)]


def timed(
    step: Callable[[torch.Tensor], torch.Tensor],
    batches: list[torch.Tensor],
    steps: int,
    device: torch.device,
) -> tuple[np.ndarray, float]:
    """Returns the milliseconds of each step, by the GPU's clock if there is one, and the last loss."""
    marks, loss = [_mark(device)], torch.zeros(())
    for i in range(steps):
        loss = step(batches[i % len(batches)])
        marks.append(_mark(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    else:
        times = [(b - a) * 1e3 for a, b in itertools.pairwise(marks)]
    return np.array(times), float(loss)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


if __name__ == "__main__":
    children.serve(run)
