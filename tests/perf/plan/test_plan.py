"""Plans: bytes of the state, the formula, the command line, and the TPU compiler."""

import ast
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from slow import slow

from mora_jax import sharding, trees
from mora_jax.errors import InputError
from mora_jax.methods import Decouple, DoRA, LoRA, MoRA, mora
from mora_jax.models.batch import Batch
from mora_jax.models.config import LlamaConfig
from train.cli import main as cli
from train.config import flags
from train.config.sections import REST, GroupRule, Optimizer, Params, Restart, Schedule
from train.perf.hlo import option
from train.perf.plan import targets
from train.perf.plan.formula import expected
from train.perf.plan.plan import held, make_plan
from train.run.state import abstract_state, assign_methods
from train.runtime import backend
from train.step.optim import adapter_labels, array_options
from train.step.spec import spec_of
from train.step.step import train_step

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def config(tiny_yaml):
    return flags.read_config(str(tiny_yaml))


@pytest.fixture
def abstract(config):
    """Returns a function from sizes of a mesh to the abstract state, methods and mesh."""

    def state(**sizes: int):
        mesh = sharding.make_mesh(**sizes)
        methods = assign_methods(config)
        return abstract_state(config, methods, mesh), methods, mesh

    return state


# Sizes


def labels(config, methods):
    return adapter_labels(array_options(config.optimizer, methods))


def test_the_state_on_one_device(abstract, config):
    state, methods, _ = abstract(data=2)
    found = held(state, labels(config, methods))
    assert found.parameters == sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    assert found.adapters == sum(leaf.size * 4 for leaf in jax.tree.leaves(state.adapters)) > 0
    assert found.adapter_optimizer == 2 * found.adapters + 4  # two moments and a count
    assert found.total() == sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((state.params, state.adapters, state.opt_state))
    )


def in_bfloat16(config):
    compute = dataclasses.replace(config.compute, dtype="bfloat16")
    changes = {"base_dtype": "bfloat16", "restart": Restart(), "schedule": Schedule(warmup=2)}
    return dataclasses.replace(config, compute=compute, params=Params(train=".*norm/scale"), **changes)


def test_a_bfloat16_base_takes_two_bytes_an_entry(config):
    """Llama-7B under MoRA of rank 8 so fits on a GPU of 24 GB."""
    config = in_bfloat16(config)
    methods, mesh = assign_methods(config), sharding.make_mesh(1)
    state = abstract_state(config, methods, mesh)
    trained = sum(leaf.size for path, leaf in trees.flatten(state.params).items() if "norm" in path)
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    found = held(state, labels(config, methods))
    assert found.parameters == 4 * trained + 2 * (whole - trained)
    assert found.base_optimizer == 2 * 4 * trained + 4


@pytest.mark.slow
def test_a_plan_makes_no_float32_copy_of_a_bfloat16_base(config):
    """The CPU compiler has no products of bfloat16, and would convert the kernels of all layers at once."""
    model = dataclasses.replace(config.model, num_hidden_layers=32, hidden_size=64, intermediate_size=512)
    config = dataclasses.replace(in_bfloat16(config), model=model, batch_size=1)
    made = make_plan(config, targets.simulated(1, 1))
    copy = 4 * 32 * 3 * 64 * 512
    assert made.programs[0].temporary < copy


@pytest.mark.parametrize("name", [slow("250m_remora"), slow("1_3b_remora"), "7b_remora"])
def test_the_state_on_a_device_falls_with_the_number_of_devices(name):
    """To 1 / N within a tenth: only vectors are replicated."""
    config = flags.read_config(str(CONFIGS / f"{name}.yaml"))
    methods = assign_methods(config)
    adapters = labels(config, methods)
    whole = held(abstract_state(config, methods, divided(1)), adapters)
    for count in (8, 64, 256):
        part = held(abstract_state(config, methods, divided(count)), adapters)
        assert whole.total() / count < part.total() < 1.1 * whole.total() / count
        assert part.adapters == whole.adapters / count


def divided(count: int) -> AbstractMesh:
    return AbstractMesh((1, count, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def test_gradients_are_summed_over_data(abstract, config):
    """By hand: embedding, head, norms and adapters are trained, and replicated on both devices."""
    state, methods, mesh = abstract(data=2)
    (line,) = expected(config, methods, state, mesh)
    d, v, layers = 32, 384, 2
    trained = 2 * v * d + d + layers * 2 * d
    adapters = sum(leaf.size for leaf in jax.tree.leaves(state.adapters))
    assert (line.kind, line.axes) == ("all-reduce", "data")
    assert (line.base, line.adapters) == (trained * 4, adapters * 4)  # 2 (n - 1) / n is 1
    twice = dataclasses.replace(config, microbatches=2)
    assert expected(twice, methods, state, mesh)[0].base == 2 * line.base


def test_biases_and_norms_of_heads_are_counted(config):
    """By hand: 2 layers train biases of q, k, v and o, and norms of heads 20 wide, beside the rest."""
    sizes = LlamaConfig(384, 32, 48, 2, 2, 2, 32, model_type="qwen3", head_dim=20, attention_bias=True)
    config = dataclasses.replace(config, model=sizes, params=Params(train=f"{REST}|.*/bias"))
    methods, mesh = assign_methods(config), sharding.make_mesh(data=2)
    (line,) = expected(config, methods, abstract_state(config, methods, mesh), mesh)
    biases = 2 * (3 * 40 + 32)
    assert line.base == 4 * (2 * 384 * 32 + 32 + 2 * 2 * 32 + biases + 2 * 2 * 20)


def test_gradients_of_adapters_are_sent_in_the_dtype_of_their_sums(abstract, config):
    """In that of `gradient_sums` if MoRA sums part by part of the batch, otherwise that of products."""
    state, methods, mesh = abstract(data=2)
    adapters = sum(leaf.size for leaf in jax.tree.leaves(state.adapters))

    def sent(rows: int, sums: str = "float32", base: bool = False, **method: object) -> int:
        compute = dataclasses.replace(config.compute, dtype="bfloat16", gradient_sums=sums)
        large = dataclasses.replace(config, compute=compute, batch_size=rows)
        other = methods
        if method:
            choices = [(p, dataclasses.replace(m, **method)) for p, m in methods.adapted()]
            trained = [(p, "train") for p in methods.trained()]
            other = dataclasses.replace(methods, choices=(*choices, *trained))
        (line,) = expected(large, other, state, mesh)
        return line.base if base else line.adapters

    assert sent(32) == adapters * 4  # 1024 tokens: the merged path
    assert sent(31) == adapters * 2
    assert sent(32, operator=Decouple()) == adapters * 4
    assert sent(32, dropout=0.1) == adapters * 2
    assert sent(32, "bfloat16") == adapters * 2
    embeddings = 2 * 384 * 32
    assert sent(32, base=True) - sent(32, "bfloat16", base=True) == 2 * embeddings


def test_sharded_arrays_are_all_gathered_and_their_gradients_reduce_scattered(abstract, config):
    """By hand, over two devices that share one copy of the state: half of everything is sent."""
    state, methods, mesh = abstract(data=1, fsdp=2)
    lines = {(line.kind, line.axes): line for line in expected(config, methods, state, mesh)}
    d, v, layers = 32, 384, 2
    adapters = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.adapters))
    kernels = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params["layers"]) if leaf.ndim == 3)
    gathers = lines["all-gather", "fsdp"]
    assert gathers.adapters == 2 * adapters / 2
    assert gathers.base == (2 * kernels + 2 * v * d * 4) / 2  # embedding and head once
    scatters = lines["reduce-scatter", "fsdp"]
    assert (scatters.base, scatters.adapters) == (2 * v * d * 4 / 2, adapters / 2)
    assert lines["all-reduce", "fsdp"].base == (2 * layers + 1) * d * 4  # scales of norms are replicated
    assert len(lines) == 3


def sent_over_tensor(config, methods, state, mesh) -> dict[str, int]:
    lines = expected(config, methods, state, mesh)
    return {line.kind: line.base for line in lines if line.axes == "tensor" and line.base}


def test_activations_are_joined_and_summed_in_parts_over_tensor(abstract, config):
    state, methods, mesh = abstract(data=2, tensor=2)
    tokens, d, layers = 4 * 32 // 2, 32, 2
    once = layers * tokens * d * 4 // 2
    found = sent_over_tensor(config, methods, state, mesh)
    assert found == {"all-gather": 4 * once, "reduce-scatter": 4 * once}
    recomputed = dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat="full"))
    found = sent_over_tensor(recomputed, methods, state, mesh)
    assert found == {"all-gather": 6 * once, "reduce-scatter": 4 * once}


def test_activations_that_do_not_divide_are_all_reduced_over_tensor(abstract, config):
    state, methods, mesh = abstract(data=2, tensor=2)
    odd = dataclasses.replace(config.data, sequence_length=31)
    by_rows = sent_over_tensor(dataclasses.replace(config, data=odd), methods, state, mesh)
    assert set(by_rows) == {"all-gather", "reduce-scatter"}
    few = dataclasses.replace(config, batch_size=2)
    assert set(sent_over_tensor(few, methods, state, mesh)) == {"all-gather", "reduce-scatter"}
    neither = dataclasses.replace(few, data=odd)
    assert sent_over_tensor(neither, methods, state, mesh) == {"all-reduce": 4 * 2 * 31 * 32 * 4}


def test_mora_all_gathers_activations_over_tensor(abstract, config):
    """By hand: outputs of q, k, v, gate and up, inputs of o and down; and M for both passes."""
    state, methods, mesh = abstract(data=2, tensor=2)
    lines = {(line.kind, line.axes): line for line in expected(config, methods, state, mesh)}
    tokens, d, f, layers = 4 * 32 // 2, 32, 48, 2
    m = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.adapters))
    widths = 3 * d + 2 * f + d + f
    assert lines["all-gather", "tensor"].adapters == layers * tokens * widths * 4 / 2 + 2 * m / 2
    assert lines["all-reduce", "data"].adapters == m  # replicated


def test_mora_sums_its_gradients_over_tensor_on_the_merged_path(abstract, config):
    """By hand: devices have parts of M's gradients, of which each keeps one, and gather M for both passes."""
    state, methods, mesh = abstract(data=2, tensor=2)
    large = dataclasses.replace(config, batch_size=64)  # 2048 tokens
    lines = {(line.kind, line.axes): line for line in expected(large, methods, state, mesh)}
    m = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.adapters))
    assert lines["all-gather", "tensor"].adapters == 2 * m / 2
    assert lines["reduce-scatter", "tensor"].adapters == m / 2
    assert lines["all-reduce", "data"].adapters == m / 2


def planned(config, data: int, fsdp: int, tensor: int):
    """The plan of a training step on simulated devices."""
    mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor)
    evaluation = dataclasses.replace(config.eval, batch_size=8)
    config = dataclasses.replace(config, mesh=mesh, eval=evaluation)
    return make_plan(config, targets.simulated(8, 0.0), ("train",))


def totals(found: Any) -> Counter[tuple[str, str]]:
    """Returns the bytes of the formula's lines or of collectives, by kind and axes.

    The CPU compiler makes no reduce-scatter: an all-reduce sends twice as much.
    """
    sent: Counter[tuple[str, str]] = Counter()
    for line in found:
        scatters = line.kind == "reduce-scatter"
        size = line.sent if hasattr(line, "sent") else line.base + line.adapters
        sent["all-reduce" if scatters else line.kind, line.axes] += size * (2 if scatters else 1)
    return sent


def trained_whole(config, **model: object):
    """The config, with every parameter trained and an MLP of full tiles."""
    sizes: Any = {"intermediate_size": 128} | model
    sizes = dataclasses.replace(config.model, **sizes)
    changes: Any = {"method": "full", "restart": Restart(), "schedule": Schedule(warmup=2)}
    return dataclasses.replace(config, model=sizes, batch_size=8, **changes)


@pytest.mark.parametrize(
    ("sizes", "kind", "axes"),
    [
        ((8, 1, 1), "all-reduce", "data"),
        slow((1, 8, 1), "all-reduce", "fsdp"),
        slow((1, 8, 1), "all-gather", "fsdp"),
        slow((2, 4, 1), "all-gather", "fsdp"),
        slow((4, 1, 2), "all-reduce", "data"),
    ],
    ids=str,
)
def test_a_tied_embedding_is_sent_as_embedding_and_as_head(config, sizes, kind, axes):
    made = planned(trained_whole(config, tie_word_embeddings=True), *sizes)
    formula, sent = totals(made.expected), totals(made.programs[0].collectives)
    assert sent[kind, axes] == pytest.approx(formula[kind, axes], rel=0.001)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "axes"), [((1, 2, 4), "fsdp+tensor"), ((2, 2, 2), "data+fsdp+tensor")])
def test_mora_sends_parts_of_its_gradients_over_all_axes_at_once(config, sizes, axes):
    config = dataclasses.replace(trained_whole(config), batch_size=64, method=MoRA(4, align=8))
    heads = dataclasses.replace(config.model, num_attention_heads=8, num_key_value_heads=8)
    made = planned(dataclasses.replace(config, model=heads), *sizes)
    formula, sent = totals(made.expected), totals(made.programs[0].collectives)
    assert sent["all-reduce", axes] == pytest.approx(formula["all-reduce", axes], rel=0.001)
    (line,) = (line for line in made.expected if line.axes == axes)
    assert line.adapters > 40 * line.base  # the scales of norms


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 1, 2)], ids=str)
def test_dora_sends_the_gradient_of_the_kernel_in_place_of_its_own(config, sizes):
    made = planned(dataclasses.replace(trained_whole(config), method=DoRA(4)), *sizes)
    formula, sent = totals(made.expected), totals(made.programs[0].collectives)
    assert sent["all-reduce", "data"] == pytest.approx(formula["all-reduce", "data"], rel=0.001)
    (line,) = (line for line in made.expected if line.axes == "data")
    kernels = 2 * (4 * 32 * 32 + 3 * 32 * 128) * 4
    assert line.adapters == 2 * (sizes[0] - 1) / sizes[0] * kernels / sizes[2]


def test_gradients_of_kernels_under_dora_are_reduce_scattered(config):
    """By hand: half of the kernels, in the type of the sums."""
    compute = dataclasses.replace(config.compute, gradient_sums="bfloat16")
    config = dataclasses.replace(trained_whole(config), method=DoRA(4), compute=compute)
    methods, mesh = assign_methods(config), sharding.make_mesh(data=1, fsdp=2)
    lines = expected(config, methods, abstract_state(config, methods, mesh), mesh)
    (scatters,) = (line for line in lines if line.kind == "reduce-scatter")
    kernels = 2 * (4 * 32 * 32 + 3 * 32 * 128)
    assert scatters.adapters == kernels * 2 / 2
    (gathers,) = (line for line in lines if line.kind == "all-gather")
    assert gathers.base > kernels * 4 / 2 > gathers.adapters  # the kernels themselves are the model's own
    assert [line.adapters for line in lines if line.kind == "all-reduce"] == [0]


def sent_for_muon(config: Any, mesh: Any, groups: Any = ()) -> Counter[tuple[str, str]]:
    """What the formula has with Muon beyond what it has with AdamW."""
    methods = assign_methods(config)

    def sent(matrices: Any) -> Counter[tuple[str, str]]:
        other = dataclasses.replace(config, optimizer=Optimizer(matrices=matrices, groups=groups))
        return totals(expected(other, methods, abstract_state(other, methods, mesh), mesh))

    return sent("muon") - sent("adamw")


def test_muon_exchanges_parts_of_matrices_for_whole_ones_and_back(config):
    """By hand: of 6 q, k and v each of four devices takes 2, some of them zeros, and of all others 1."""
    more = sent_for_muon(trained_whole(config), sharding.make_mesh(data=1, fsdp=4))
    taken = 2 * 32 * 32 + 32 * 32 + 2 * 32 * 128
    assert more == {("all-to-all", "fsdp"): 2 * taken * 4 * 3 / 4}


def test_muon_sends_no_more_where_matrices_are_not_divided(config):
    config = dataclasses.replace(trained_whole(config), optimizer=Optimizer(matrices="muon"))
    for data in (1, 8):
        methods, mesh = assign_methods(config), sharding.make_mesh(data=data)
        lines = expected(config, methods, abstract_state(config, methods, mesh), mesh)
        assert {line.axes for line in lines} == ({"data"} if data > 1 else set())


def test_muon_exchanges_over_both_axes_that_divide_a_matrix(config):
    """By hand: each of eight devices takes one matrix of each kind, and one of q if its rate differs."""
    rules = ((".*q_proj/kernel", GroupRule(2.0)),)
    taken = 2 * 32 * 32 + 2 * 32 * 128
    for groups, more in ((), 0), (rules, 32 * 32):
        sent = sent_for_muon(trained_whole(config), sharding.make_mesh(data=1, fsdp=2, tensor=4), groups)
        assert sent["all-to-all", "fsdp"] == 2 * (taken + more) * 4 / 2
        assert sent["all-to-all", "tensor"] == 2 * (taken + more) * 4 * 3 / 4
        assert len(sent) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("method", "sizes"), [("full", (1, 2, 4)), (LoRA(8), (2, 4, 1))], ids=str)
def test_muon_sends_what_the_formula_expects_and_no_more(config, method, sizes):
    """It adds exchanges alone to what AdamW sends, for the model's own parameters or for adapters."""
    config = trained_whole(config, num_attention_heads=4, num_key_value_heads=4)
    config = dataclasses.replace(config, method=method)
    muon = dataclasses.replace(config, optimizer=Optimizer(matrices="muon"))
    plan, plain = planned(muon, *sizes), planned(config, *sizes)
    exchanges = [line for line in plan.expected if line.kind == "all-to-all"]
    assert {(line.base > 0, line.adapters > 0) for line in exchanges} == {
        (method == "full", method != "full")
    }
    sent, before = (totals(found.programs[0].collectives) for found in (plan, plain))
    assert sent - before == totals(exchanges)


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_kernels_that_are_kept_are_all_gathered_once(abstract, config, axis):
    state, methods, mesh = abstract(data=1, **{axis: 2})

    def sent(**compute: object) -> tuple[int, int]:
        computed = dataclasses.replace(config.compute, **compute)
        other = dataclasses.replace(config, batch_size=64, compute=computed)
        lines = {(line.kind, line.axes): line for line in expected(other, methods, state, mesh)}
        return lines["all-gather", axis].base, lines["all-gather", axis].adapters

    base, adapters = sent(layers="unrolled", remat="full")
    once = 2 * 384 * 32 * 4 // 2  # embedding and head
    m = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.adapters)) // 2
    activations = 2 * 2 * 64 * 32 * 32 * 4 // 2  # inputs of attention and MLP, joined again
    kept = ((base - once) / 2 + once, adapters / 2) if axis == "fsdp" else (base - activations, adapters - m)
    assert sent(layers="unrolled", remat="none") == kept


# The command


def test_simulated_devices(capsys, monkeypatch, tiny_yaml, tmp_path):
    costs, cost = set(), mora.flops_per_byte
    monkeypatch.setattr(mora, "flops_per_byte", lambda: costs.add((sharding.device_kind(), cost())) or cost())
    out = tmp_path / "plan.json"
    words = ["--devices", "2", "--mesh.data", "2", "--every-program", "--out", str(out)]
    # A seed of its own: the step is traced here, and not found in a cache.
    words += ["--compute.adapter-path", "merged", "--seed", "7"]
    cli.main(["plan", str(tiny_yaml), *words])
    shown = " ".join(capsys.readouterr().out.split())  # where lines break depends on the path
    assert "2 simulated devices" in shown
    assert "the CPU compiler's" in shown
    assert shown.endswith("It fits.")
    figures = json.loads(out.read_text())
    assert figures["fits"] is True
    assert figures["mesh"]["data"] == 2
    assert figures["sequences"] == 2
    assert [program["name"] for program in figures["programs"]] == ["train_step", "restart_step", "eval_step"]
    train = figures["programs"][0]
    assert train["peak"] >= sum(figures["held"].values())
    assert {c["axes"] for c in train["collectives"]} == {"data"}
    assert costs == {("cpu", 250)}


def test_a_config_that_does_not_fit_exits_with_status_1(capsys, tiny_yaml):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(tiny_yaml), "--devices", "1", "--memory", "0.0001"])
    assert stop.value.code == 1
    assert "It does not fit." in capsys.readouterr().out


def test_unknown_memory_leaves_it_open_whether_a_program_fits(config):
    made = make_plan(config, targets.simulated(1, 0.0))
    assert made.fits() is None
    peak, state = made.programs[0].peak, made.held.total()
    assert peak > state
    by_size = {
        size: dataclasses.replace(made, usable=size).fits() for size in (peak, peak - 1, state, state - 1)
    }
    assert list(by_size.values()) == [True, None, None, False]
    tpu = dataclasses.replace(made, compiler="TPU compiler (libtpu)", usable=peak - 1)
    assert tpu.fits() is False


GPUS = ["--topology", "h100:2", "--data.sequence-length", "128", "--model.max-position-embeddings", "128"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "needs either --topology, such as v5e:16x16, or --devices"),
        (["--devices", "2", "--topology", "v5e:2x2"], "needs either"),
        (["--devices", "-1"], "--devices must be at least 1, not -1"),
        (["--devices", "100000"], "--devices must be at most 4,096, not 100000"),
        (["--devices", "1", "--memory", "nan"], "--memory must be at least 0, not nan"),
        (["--devices", "400"], "--devices 400 is too many: JAX has started with 8 CPU devices"),
        (["--devices", "2", "--mesh.data", "4"], "mesh.data"),
        (
            ["--devices", "3", "--mesh.data", "3"],
            "batch_size / microbatches 4 does not divide among 3 devices",
        ),
        (["--topology", "v9:2x2"], "unknown --topology v9:2x2; known are v5e:1x1 2x2"),
        (["--topology", "v5p:2x2"], "unknown --topology v5p:2x2"),
        (["--topology", "v5e:2x2", "--compute.attention", "cudnn"], "cudnn needs"),
        (["--topology", "h100:0"], "unknown --topology h100:0"),
        (["--topology", "h100:9999x8"], "the number of GPUs of --topology must be at most 4,096"),
        (["--topology", "h100:2x2x2"], "h100:GPUS and h100:MACHINESxGPUS"),
        ([*GPUS, "--compute.attention", "splash"], "splash needs TPUs"),
        (["--topologie", "v5e:2x2"], "did you mean --topology?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(capsys, tiny_yaml, args, expected):
    assert len(jax.devices()) < 400  # JAX has started
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(tiny_yaml), *args])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert expected in line


@pytest.mark.parametrize(("topology", "count", "extra"), [("v5e:2x2", 4, "tpu"), ("h200:2x8", 16, "cuda13")])
def test_the_missing_compiler_is_named(monkeypatch, topology, count, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"pip install 'mora_jax\[{extra}\]'"):
        targets.topology(topology)
    assert targets.chips(topology) == count


# The GPU compiler

needs_gpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the GPU compiler: the extra `cuda13`"
)


@pytest.mark.slow
@needs_gpu_compiler
@pytest.mark.parametrize("topology", ["h100:4", "h200:2x2"])
def test_a_plan_by_the_gpu_compiler(tiny_yaml, tmp_path, topology):
    out = tmp_path / "plan.json"
    words = ["--topology", topology, "--mesh.data", "2", "--mesh.fsdp", "2", "--compute.attention", "cudnn"]
    words += ["--compute.dtype", "bfloat16", "--batch-size", "64", "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    command = [sys.executable, "-m", "train.cli", "plan", str(tiny_yaml), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "by the GPU compiler (jax-cuda13-plugin " in done.stdout
    plan = json.loads(out.read_text())
    assert (plan["devices"], plan["fits"]) == (4, True)
    (train,) = plan["programs"]
    assert train["peak"] > sum(plan["held"].values())
    found = {(c["kind"], c["axes"]) for c in train["collectives"]}
    assert {("all-gather", "fsdp"), ("all-reduce", "data")} <= found


@pytest.mark.slow
@needs_gpu_compiler
@pytest.mark.parametrize(("topology", "data"), [("h100:1", 1), ("h100:2", 2)])
def test_products_add_the_residual_stream_without_a_copy(config, topology, data):
    """cuBLAS writes elsewhere than it reads, unless XLA has to reshape what is added."""
    compute: Any = {"dtype": "bfloat16", "layers": "unrolled", "remat": "none", "adapter_path": "merged"}
    compute = dataclasses.replace(config.compute, **compute)
    config = dataclasses.replace(config, compute=compute, batch_size=8 * data)
    mesh = sharding.make_mesh(data, devices=targets.topology(topology).devices)
    methods = assign_methods(config)
    state = abstract_state(config, methods, mesh)
    shape = (8 * data, config.data.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch(mesh))
    options = {"xla_gpu_autotune_level": "0"} | dict(map(option, backend.flags(deterministic=False)))
    with jax.set_mesh(mesh):
        lowered = train_step.lower(spec_of(config), methods, state, Batch(tokens))
    text = lowered.compile(compiler_options=options).as_text()
    stream = rf"bf16\[{8 * shape[1]},{config.model.hidden_size}\]"
    assert re.search(rf"= \({stream}.* custom-call\(.*__cublas.*matmul", text)
    assert not re.search(rf"= {stream}\S* copy\(", text)


# The TPU compiler

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: the extra `tpu`"
)


PLAN = """
import sys
from mora_jax import sharding
from mora_jax.methods import mora
from train.cli import main
costs, cost = set(), mora.flops_per_byte
mora.flops_per_byte = lambda: costs.add((sharding.device_kind(), cost())) or cost()
main.main(["plan", *sys.argv[1:]])
print("costs:", sorted(costs))
"""


def planned_for_tpus(*words: str, folder: Path) -> dict:
    """Returns the figures of `mora plan` from a process of its own, with XLA's optimizations.

    Under "costs" are the kinds of device that MoRA computed a cost for, and the costs.
    """
    out = folder / "plan.json"
    environment = {
        k: v for k, v in os.environ.items() if k not in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_PLATFORMS")
    }
    command = [sys.executable, "-c", PLAN, *words, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "by the TPU compiler (libtpu " in done.stdout
    costs = ast.literal_eval(done.stdout.rpartition("costs:")[2].strip())
    return json.loads(out.read_text()) | {"costs": costs}


@needs_libtpu
@pytest.mark.parametrize(
    "rows",
    [
        slow(4, id="activation path"),
        slow(64, id="merged path"),
    ],
)
def test_a_plan_by_the_tpu_compiler(tiny_yaml, tmp_path, rows):
    """The formula agrees with the compiler about what is sent in float32 and what in bfloat16.

    MoRA's costs are those of the topology's devices, not of the CPU that compiles.
    """
    words = ["--topology", "v5e:2x2", "--mesh.data", "4"]
    words += ["--compute.dtype", "bfloat16", "--batch-size", str(rows)]
    figures = planned_for_tpus(str(tiny_yaml), *words, folder=tmp_path)
    assert (figures["devices"], figures["fits"]) == (4, True)
    assert figures["costs"] == ([] if rows == 4 else [("TPU v5 lite", 205)])
    (train,) = figures["programs"]
    assert train["peak"] > sum(figures["held"].values())
    assert train["flops"] > 0
    sent = sum(c["sent"] for c in train["collectives"])
    assert sent == pytest.approx(sum(e["base"] + e["adapters"] for e in figures["expected"]), rel=0.001)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("method", "axis"), [("full", "fsdp"), ("full", "tensor"), ("mora", "fsdp")])
def test_what_muon_exchanges_by_the_tpu_compiler(tiny_yaml, tmp_path, method, axis):
    words = ["--topology", "v5e:2x2", f"--mesh.{axis}", "4", "--method.name", method]
    words += ["--compute.dtype", "bfloat16", "--batch-size", "64", "--restart.every", "0"]
    words += ["--schedule.kind", "cosine", "--optimizer.matrices", "muon", "--model.intermediate-size", "128"]
    words += ["--model.num-attention-heads", "4", "--model.num-key-value-heads", "4"]
    figures = planned_for_tpus(str(tiny_yaml), *words, folder=tmp_path)
    (train,) = figures["programs"]
    (sent,) = (c["sent"] for c in train["collectives"] if (c["kind"], c["axes"]) == ("all-to-all", axis))
    formula = {(e["kind"], e["axes"]): e["base"] + e["adapters"] for e in figures["expected"]}
    assert sent == pytest.approx(formula["all-to-all", axis], rel=0.001)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        ["--method.name", "full", "--model.tie-word-embeddings", "True"],
        ["--method.name", "dora", "--method.rank", "4"],
    ],
    ids=["a tied embedding", "DoRA"],
)
def test_gradients_by_the_tpu_compiler(tiny_yaml, tmp_path, case):
    words = ["--topology", "v5e:2x2", "--mesh.data", "4", "--compute.dtype", "bfloat16", "--batch-size", "64"]
    words += ["--restart.every", "0", "--schedule.kind", "cosine", "--compute.gradient-sums", "bfloat16"]
    figures = planned_for_tpus(str(tiny_yaml), *words, *case, folder=tmp_path)
    (train,) = figures["programs"]
    sent = sum(c["sent"] for c in train["collectives"])
    assert sent == pytest.approx(sum(e["base"] + e["adapters"] for e in figures["expected"]), rel=0.001)


@needs_libtpu
@pytest.mark.slow
def test_activations_by_the_tpu_compiler(tiny_yaml, tmp_path):
    words = ["--topology", "v5e:2x2", "--mesh.data", "2", "--mesh.tensor", "2"]
    words += ["--compute.dtype", "bfloat16", "--batch-size", "64"]
    figures = planned_for_tpus(str(tiny_yaml), *words, folder=tmp_path)
    (train,) = figures["programs"]
    sent = {c["kind"]: c["sent"] for c in train["collectives"] if c["axes"] == "tensor"}
    formula = {e["kind"]: e for e in figures["expected"] if e["axes"] == "tensor"}
    # This compiler all-reduces M's gradients over both axes at once.
    assert sent["reduce-scatter"] == pytest.approx(formula["reduce-scatter"]["base"], rel=0.001)
    (both,) = (c["sent"] for c in train["collectives"] if c["axes"] == "data+tensor")
    norms = next(e["base"] for e in figures["expected"] if e["axes"] == "data+tensor")
    m = 2 * formula["reduce-scatter"]["adapters"]  # of two devices each reduce-scatters a half
    assert both == pytest.approx(2 * 3 / 4 * m + norms, rel=0.02)
    # The formula leaves out the last norm's output, the gradient of the embedding's, and its rows.
    left_out = (2 * 64 * 32 // 2 + 384) * 32 * 2 // 2
    gathered = formula["all-gather"]["base"] + formula["all-gather"]["adapters"]
    assert sent["all-gather"] == pytest.approx(gathered + left_out, rel=0.001)


@needs_libtpu
@pytest.mark.slow
def test_splash_attention_by_the_tpu_compiler(tiny_yaml, tmp_path):
    """Heads of 48, as in 250M, are sharded over `tensor`, rows over `data`."""
    words = ["--topology", "v5e:2x2", "--mesh.data", "2", "--mesh.tensor", "2", "--compute.dtype", "bfloat16"]
    words += ["--data.sequence-length", "128", "--model.max-position-embeddings", "128"]
    words += ["--model.hidden-size", "96", "--model.intermediate-size", "128"]
    kernels = {"splash": ["splash"], "xla": ["xla"], "documents": ["splash", "--data.document-mask", "True"]}
    figures = {
        name: planned_for_tpus(str(tiny_yaml), *words, "--compute.attention", *kernel, folder=tmp_path / name)
        for name, kernel in kernels.items()
    }
    assert figures["splash"]["fits"]
    assert figures["documents"]["fits"]
    assert figures["splash"]["held"] == figures["xla"]["held"]
    axes = {c["axes"] for c in figures["splash"]["programs"][0]["collectives"]}
    assert axes == {c["axes"] for c in figures["xla"]["programs"][0]["collectives"]}
