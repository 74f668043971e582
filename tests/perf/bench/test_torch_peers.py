"""The PyTorch programs compared with this project's mathematics and with plain transformers."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# ruff: noqa: E402
for package in ("torch", "transformers", "peft"):
    pytest.importorskip(package, reason="needs the extra parity: torch, transformers and peft")

import torch
from architectures import CONFIGS

from mora_jax import transform
from mora_jax.errors import InputError
from mora_jax.methods import MoRA, Rotate, Share
from mora_jax.models.llama import STACKED, abstract_params
from train.perf.bench import torch_mora, torch_peers
from train.perf.bench.cases import SIZES, Case, with_method
from train.perf.bench.jobs import PeerJob, peer_job
from train.step.spec import spec_of
from train.step.state import init_state

CPU = torch.device("cpu")
# PEFT uses an attribute that transformers has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.slow,  # parity with large libraries
]


def job(word: str, case: Case | None = None) -> PeerJob:
    return peer_job(case or SIZES["tiny"](), word, warmup=1, steps=3)


@pytest.mark.parametrize(
    ("kind", "operator"),
    [(torch_mora.SharingLinear, Share()), (torch_mora.RotatingLinear, Rotate(surplus="drop"))],
)
@pytest.mark.parametrize(("k", "d"), [(20, 20), (20, 33), (33, 20)])
def test_torch_mora_agrees_with_this_project(kind: Any, operator: Any, k: int, d: int):
    layer = kind(torch.nn.Linear(k, d, bias=False), rank=3, dtype=torch.float32)
    method = MoRA(3, operator)
    assert layer.r_hat == method.r_hat(k, d)
    x = np.random.default_rng(0).normal(size=(2, 5, k)).astype(np.float32)
    w, m = (p.detach().numpy().T for p in (layer.base.weight, layer.m))
    ours = x @ np.asarray(method.weight({"m_RR": jnp.asarray(m)}, jnp.asarray(w)))
    np.testing.assert_allclose(layer(torch.tensor(x)).detach().numpy(), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("word", ["full", "lora", "mora", "mora-rotate:4", "lora/bf16"])
def test_a_peer_trains_and_returns_a_row(word: str):
    row = torch_peers.run(job(word))
    assert row["steps"] == 3
    assert row["p10"] <= row["milliseconds"] <= row["p90"]
    assert row["tokens_per_second"] == pytest.approx(128 / row["milliseconds"] * 1e3)
    assert 5 < row["loss"] < 7
    assert set(row["versions"]) == {"torch", "transformers", "peft"}


@pytest.mark.parametrize("word", ["full", "lora", "mora", "mora-rotate:4"])
def test_a_peer_trains_as_many_parameters_as_this_project(word: str):
    model = torch_peers.build(job(word), CPU)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = with_method(SIZES["tiny"]().config, word)
    if isinstance(config.method, MoRA):  # whose padding would count
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, align=1))
    params = abstract_params(config.model)
    methods = transform.assign(config.parameter_rules(), params, STACKED)
    state = jax.eval_shape(lambda p: init_state(spec_of(config), methods, p), params)
    ours, _ = transform.partition(state.params, state.adapters, methods)
    assert trained == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(ours))


def test_a_peer_changes_only_what_it_trains():
    asked = job("lora")
    model = torch_peers.build(asked, CPU)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = torch_peers.training_step(asked, model, CPU)
    for batch in torch_peers.random_batches(asked, CPU)[:2]:
        step(batch)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in moved)
    assert "lm_head.weight" in moved


def test_the_dtypes_of_parameters():
    mixed, pure = (torch_peers.build(job(word), CPU) for word in ("lora", "lora/bf16"))
    assert {p.dtype for p in mixed.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in mixed.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in pure.parameters()} == {torch.bfloat16}


def test_table_5_trains_only_adapters_and_recomputes_layers():
    tiny, table_5 = SIZES["tiny"](), SIZES["7b"]()
    config = dataclasses.replace(
        table_5.config,
        model=tiny.config.model,
        data=tiny.config.data,
        method=table_5.config.method,
        params=table_5.config.params,
    )
    model = torch_peers.build(job("lora", dataclasses.replace(table_5, config=config)), CPU)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_the_attention_is_that_of_transformers():
    model = torch_peers.random_model(job("full"), CPU).float()
    tokens = torch_peers.random_batches(job("full"), CPU)[0]
    ours = model(input_ids=tokens).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(input_ids=tokens).logits, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama, llama3", "qwen2", "qwen3", "olmo2"])
def test_a_peer_has_the_parameters_of_every_architecture(name: str):
    case = SIZES["tiny"]()
    model = dataclasses.replace(CONFIGS[name], max_position_embeddings=64)
    case = dataclasses.replace(case, config=dataclasses.replace(case.config, model=model))
    theirs = sum(p.numel() for p in torch_peers.random_model(job("full", case), CPU).parameters())
    assert theirs == sum(math.prod(a.shape) for a in jax.tree.leaves(abstract_params(model)))


def test_a_peer_refuses_a_window_that_it_would_not_compute():
    case = SIZES["tiny"]()
    windowed = dataclasses.replace(case.config, model=CONFIGS["mistral, window"])
    with pytest.raises(InputError, match="peers compute no window"):
        torch_peers.random_model(job("full", dataclasses.replace(case, config=windowed)), CPU)
