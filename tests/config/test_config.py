"""Configs: refused where they are built, the same after YAML, and those in configs/ fit their models."""

import math
import re
from pathlib import Path

import jax
import pytest
import yaml

from mora_jax import trees
from mora_jax.errors import InputError
from mora_jax.methods import DoRA, LoRA, MoRA, Rotate, Share, Spectral
from mora_jax.models.llama import Compute, LlamaConfig, abstract_params
from mora_jax.models.rope import Rope
from mora_jax.on import method_of
from train.config import flags
from train.config import run as c
from train.config import sections as s
from train.config.run import RunConfig
from train.run.state import assign_methods

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PRESETS = [path for path in CONFIGS if path.stem.startswith("1_3b_remora_")]
PAPER = [path for path in CONFIGS if path.stem.startswith(("250m", "1_3b")) and path not in PRESETS]
PARAMETERS = {"250m": 247.5e6, "1_3b": 1339.5e6}
RESTARTED = {"schedule": s.Schedule("jagged-cosine", 10), "restart": s.Restart(100, 10)}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: s.Data("az://bucket/c4"),
            r"data\.directory az://bucket/c4 is no path: give one on a disk, or in",
        ),
        (
            lambda: RunConfig(run_dir="http://host/run"),
            r"run_dir http://host/run is no path: give one on a disk, or in",
        ),
        (
            lambda: RunConfig(compute=Compute(attention="splash"), data=s.Data(sequence_length=200)),
            r"compute\.attention splash needs sequences of a multiple of 128 tokens, not 200",
        ),
        (lambda: s.Data(sequence_length=1), r"data\.sequence_length must be at least 2, not 1"),
        (lambda: RunConfig(method="lora"), "method is a Method, full or frozen, not 'lora'"),  # type: ignore[arg-type]
        (lambda: s.GroupRule(lr_scale=-1.0), r"lr_scale of optimizer\.groups must be at least 0, not -1\.0"),
        (lambda: s.GroupRule(weight_decay=-1.0), r"weight_decay of optimizer\.groups must be at least 0"),
        (lambda: s.Optimizer(learning_rate=0.0), r"optimizer\.learning_rate must be above 0, not 0"),
        (
            lambda: s.Optimizer(learning_rate=math.inf),
            r"optimizer\.learning_rate must be above 0, not inf",
        ),
        (lambda: s.Optimizer(learning_rate=1e39), r"learning_rate 1e\+39 is infinite in float32"),
        (
            lambda: s.Optimizer(learning_rate=1e-45),
            r"learning_rate 1e-45 is zero in float32; choose",
        ),
        (lambda: s.Optimizer(learning_rate=1e7), r"optimizer\.learning_rate must be at most 1,000,000"),
        (lambda: s.GroupRule(lr_scale=1e7), r"lr_scale of optimizer\.groups must be at most 1,000,000"),
        (lambda: s.Optimizer(embedding_lr_scale=-1.0), r"optimizer\.embedding_lr_scale must be at least 0"),
        (lambda: s.Optimizer(eps=1e-45), r"optimizer\.eps 1e-45 is zero in float32"),
        (lambda: s.Optimizer(eps=1e39), r"optimizer\.eps 1e\+39 is infinite in float32"),
        (lambda: s.Optimizer(weight_decay=1e-39), r"optimizer\.weight_decay 1e-39 is zero in float32"),
        (lambda: s.Optimizer(clip_norm=1e-45), r"optimizer\.clip_norm 1e-45 is zero in float32"),
        (lambda: s.Optimizer(b2=1 - 1e-9), r"optimizer\.b2 0\.999999999 is 1 in float32"),
        (lambda: s.GroupRule(lr_scale=1e-45), r"lr_scale of optimizer\.groups 1e-45 is zero in float32"),
        (lambda: s.BadSteps(factor=1e39), r"bad_steps\.factor 1e\+39 is infinite in float32"),
        (lambda: LlamaConfig(rms_norm_eps=1e-45), r"model\.rms_norm_eps 1e-45 is zero in float32"),
        (lambda: LoRA(rank=2.5), r"LoRA's rank is an integer, not 2\.5"),  # pyright: ignore
        (lambda: MoRA(rank=True), r"MoRA's rank is an integer, not True"),
        (lambda: Spectral(rank="8"), r"Spectral's rank is an integer, not '8'"),  # pyright: ignore
        (lambda: LoRA(alpha=1e39), r"alpha 1e\+39 is infinite in float32"),
        (lambda: LoRA(b_lr_scale=1e39), r"b_lr_scale 1e\+39 is infinite in float32"),
        (lambda: s.Optimizer(b1=1.0), r"optimizer\.b1 must lie in \[0, 1\), not 1\.0"),
        (lambda: s.Optimizer(b2=-0.1), r"optimizer\.b2 must lie in \[0, 1\), not -0\.1"),
        (lambda: s.Optimizer(eps=0.0), r"optimizer\.eps must be above 0"),
        (
            lambda: s.Optimizer(weight_decay=-1.0),
            r"optimizer\.weight_decay must be at least 0, not -1\.0",
        ),
        (lambda: s.Optimizer(clip_norm=math.nan), r"optimizer\.clip_norm must be at least 0, not nan"),
        (lambda: s.Schedule(warmup=-1), r"schedule\.warmup must be at least 0"),
        (lambda: s.Schedule(min_ratio=1.5), r"schedule\.min_ratio must lie in \[0, 1\], not 1\.5"),
        (lambda: s.Restart(every=-1), r"restart\.every must be at least 0"),
        (lambda: s.Restart(every=5, warmup=-1), r"restart\.warmup must be at least 0"),
        (
            lambda: s.Restart(every=5, warmup=5),
            r"restart\.warmup 5 must be shorter than restart\.every 5",
        ),
        (lambda: s.Evaluation(every=-1), r"eval\.every must be at least 0"),
        (lambda: s.Evaluation(batch_size=0), r"eval\.batch_size must be at least 1"),
        (lambda: s.Evaluation(max_batches=-1), r"eval\.max_batches must be at least 0"),
        (lambda: s.Checkpoint(every=-1), r"checkpoint\.every must be at least 0"),
        (lambda: s.Checkpoint(keep=-1), r"checkpoint\.keep must be at least 0"),
        (lambda: s.Checkpoint(keep_every=-1), r"checkpoint\.keep_every must be at least 0"),
        (
            lambda: s.Checkpoint(every=10, keep_every=15),
            "keep_every 15 must be a multiple of checkpoint.every 10",
        ),
        (lambda: s.Checkpoint(every=0, keep_every=15), "keep_every 15 must be a multiple"),
        (lambda: s.Mesh(data=0), r"mesh\.data must be at least 1, not 0"),
        (lambda: s.BadSteps(window=2**31 - 1), r"bad_steps\.window must be at most 100,000"),
        (
            lambda: RunConfig(base_dtype="bfloat16", restart=s.Restart(50, 10)),
            "restart.every merges updates into the base, and .* leave base_dtype at float32",
        ),
        (
            lambda: RunConfig(base_dtype="bfloat16", method="full"),
            "base_dtype bfloat16 is for what is not trained, and everything is",
        ),
        (
            lambda: RunConfig(base_dtype="bfloat16", compute=Compute(adapter_path="merged")),
            "compute.adapter_path merged merges into the kernels, which needs base_dtype float32",
        ),
        (lambda: RunConfig(seed=-1), "seed must lie in"),
        (lambda: RunConfig(seed=2**32), "seed must lie in"),
        (lambda: RunConfig(steps=0), "steps must be at least 1"),
        (lambda: RunConfig(batch_size=0), "batch_size must be at least 1"),
        (lambda: RunConfig(microbatches=0), "microbatches must be at least 1"),
        (lambda: RunConfig(batch_size=6, microbatches=4), "batch_size 6 does not divide into 4 microbatches"),
        (lambda: RunConfig(steps=10), r"schedule\.warmup 1000 is longer than the run of 10 steps"),
        (
            lambda: RunConfig(data=s.Data(sequence_length=4096)),
            "longer than model.max_position_embeddings",
        ),
        (lambda: RunConfig(schedule=s.Schedule("jagged-cosine")), "jagged-cosine needs restart"),
        (lambda: RunConfig(restart=s.Restart(growth=2)), "restart.growth needs restart.every above 0"),
        (lambda: s.Restart(100, growth=0.5), "restart.growth must be at least 1, not 0.5"),
        (
            lambda: RunConfig(optimizer=s.Optimizer(matrices="muon"), restart=s.Restart(9, 2, "mean")),
            "restart.optimizer mean needs Adam's moments, and optimizer.matrices muon keeps none",
        ),
        (lambda: s.Optimizer(momentum=1.0), "optimizer.momentum must lie in"),
        (
            lambda: RunConfig(schedule=s.Schedule("jagged-cosine", 60), restart=s.Restart(50, 10)),
            r"schedule\.warmup 60 is longer than restart\.every 50",
        ),
        (lambda: RunConfig(method="full", **RESTARTED), r"restart\.every needs"),
        (lambda: RunConfig(method="frozen", **RESTARTED), r"restart\.every needs"),
        (
            lambda: RunConfig(rules=((".*", "train"),), method=LoRA()),
            r"either rules or method\.\*",
        ),
        (
            lambda: RunConfig(rules=((".*", "train"),), params=s.Params(train="")),
            r"either rules or method\.\* and params\.\*, not both",
        ),
    ],
)
def test_out_of_range(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_a_config_is_the_same_after_yaml(tmp_path):
    config = RunConfig(
        run_dir="some where",
        seed=7,
        method=LoRA(4, b_lr_scale=2.0),
        params=s.Params(train=""),
        optimizer=s.Optimizer(
            learning_rate=3e-4, eps=1e-9, groups=((".*norm.*", s.GroupRule(0.5)), (".*", s.GroupRule(1, 0.1)))
        ),
        log=s.Log(wandb="project"),
        mesh=s.Mesh(2),
        **RESTARTED,
    )
    assert flags.read_config(written(config, tmp_path)) == config


@pytest.mark.parametrize(
    "method",
    ["full", "frozen", DoRA(3, 6.0), MoRA(8, Share((0, 1), cycle=4)), MoRA(8, Rotate("wrap"), align=8)],
    ids=str,
)
def test_a_method_is_the_same_after_yaml(method, tmp_path):
    config = RunConfig(method=method)
    assert flags.read_config(written(config, tmp_path)) == config
    assert flags.config_from_plain(c.to_plain(config)) == config


def test_rules_are_the_same_after_yaml(tmp_path):
    rules = (
        ("layers/mlp/.*/kernel", MoRA(8, align=4)),
        ("layers/self_attn/[qv]_proj/kernel", LoRA(4, 8.0)),
        ("embed_tokens/embedding", "train"),
        (".*", "frozen"),
    )
    config = RunConfig(rules=rules, **RESTARTED)
    assert flags.read_config(written(config, tmp_path)) == config
    assert config.parameter_rules() == rules


def written(config: RunConfig, folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(c.to_plain(config), sort_keys=False))
    return str(path)


@pytest.mark.parametrize(
    "plain", [{}, "frozen", [["a"]], [["a", "b", "c"]], ["ab"], [["a", "other"]], [["a", {}]]]
)
def test_what_are_no_rules(plain):
    with pytest.raises(InputError):
        c.rules_from_plain(plain)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({}, "optimizer.groups is a list of pairs"),
        ([["a"]], "optimizer.groups is a list of pairs"),
        ([["a", 2.0]], "a has {lr_scale: NUMBER, weight_decay: NUMBER}, or one of them, not 2.0"),
        ([["a", {}]], "or one of them, not {}"),
        ([["a", {"lr": 2.0}]], "or one of them, not {'lr': 2.0}"),
        ([["a", {"lr_scale": "fast"}]], "lr_scale of optimizer.groups is a number, not 'fast'"),
        ([["a", {"lr_scale": -1}]], "lr_scale of optimizer.groups must be at least 0, not -1.0"),
    ],
)
def test_what_are_no_groups(plain, message):
    with pytest.raises(InputError, match=re.escape(message)):
        c.groups_from_plain(plain)


def test_restarts():
    config = RunConfig(steps=30, schedule=s.Schedule("linear", 5), restart=s.Restart(10, 2))
    assert [step for step in range(40) if config.restarts_at(step)] == [10, 20]
    # Counted by the updates done: the restart at 10 is part of update 10.
    assert [config.restarts_before(step) for step in (0, 1, 10, 11, 20, 21, 30)] == [0, 0, 0, 1, 1, 2, 2]
    never = RunConfig()
    assert not any(never.restarts_at(step) for step in range(20_000))
    assert never.restarts_before(10_000) == 0


def test_cycles_grow():
    config = RunConfig(steps=150, schedule=s.Schedule("linear", 5), restart=s.Restart(10, 2, growth=1.5))
    # Cycles of 10, 15, 22.5, 33.75 and 50.625 steps.
    restarts = [10, 25, 48, 81, 132]
    assert [step for step in range(200) if config.restarts_at(step)] == restarts
    for step in range(151):
        assert config.restarts_before(step) == sum(at < step for at in restarts), step
    assert s.Restart(5, 0, growth=1e6).starts(2**31 - 1) == (5, 5_000_005)


def test_the_configs_are_those_of_the_paper():
    kinds = ("full", "lora", "mora", "relora", "remora")
    assert {path.stem for path in PAPER} == {f"{size}_{kind}" for size in PARAMETERS for kind in kinds}
    assert "demo" in {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_fits_its_model(path):
    """Raises where a parameter is not covered or a rule decides nothing; the last one may."""
    config = flags.read_config(str(path))
    params = abstract_params(config.model)
    methods = assign_methods(config)
    assert {name for name, _ in methods.choices} == trees.flatten(params).keys()
    decided = {method_of(choice) or choice for _, choice in methods.choices}
    for _, choice in config.parameter_rules():
        assert choice in decided or choice == "frozen"
    assert path.stem.startswith(Path(config.run_dir).name)
    if path in PAPER:
        entries = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        assert abs(entries - PARAMETERS[path.stem[:4]]) < 0.1e6
        assert not config.model.tie_word_embeddings


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_trains_what_its_run_trains(path):
    """Only how it is computed differs."""
    preset, run = (
        dict(flags.flatten(c.to_plain(flags.read_config(str(p)))))
        for p in (path, path.parent / "1_3b_remora.yaml")
    )
    differs = {name for name in run if preset[name] != run[name]}
    assert differs
    how = re.compile(r"microbatches|mesh\..*|compute\.(attention|layers|remat)|eval\.batch_size")
    assert all(how.fullmatch(name) for name in differs), differs
    shards = preset["mesh.data"] * preset["mesh.fsdp"]
    assert preset["batch_size"] % (preset["microbatches"] * shards) == preset["eval.batch_size"] % shards == 0


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_values(path):
    config = flags.read_config(str(path))
    kind = path.stem[5:]
    assert (config.steps, config.batch_size, config.data.sequence_length) == (10_000, 1024, 512)
    assert config.model.vocab_size == 32_100
    assert config.restart.every == (2000 if kind.startswith("re") else 0)
    assert config.restart.warmup == 50
    method = config.method if isinstance(config.method, str) else config.method.name
    assert method == kind.removeprefix("re")
    assert getattr(config.method, "rank", 128) == 128
    assert getattr(config.method, "alpha", 64.0) == 64.0


def adapter_entries(path: Path) -> int:
    config = flags.read_config(str(path))
    flat = trees.flatten(abstract_params(config.model))
    adapted = list(assign_methods(config).adapted())
    assert len(adapted) == 7
    return sum(m.count(*flat[n].shape[-2:]) * flat[n].shape[0] for n, m in adapted)


@pytest.mark.parametrize("size", PARAMETERS)
def test_mora_trains_no_more_than_lora(size):
    folder = CONFIGS[0].parent
    entries = {kind: adapter_entries(folder / f"{size}_{kind}.yaml") for kind in ("mora", "lora")}
    assert 0.99 * entries["lora"] < entries["mora"] <= entries["lora"]


def test_what_is_trained_beside_the_adapters():
    rest = (s.REST, "train"), (".*", "frozen")
    assert RunConfig(method="full").parameter_rules() == ((".*", "train"),)
    assert RunConfig(method="frozen").parameter_rules() == rest
    assert RunConfig(method=LoRA(4)).parameter_rules() == ((s.LINEARS, LoRA(4)), *rest)
    alone = RunConfig(params=s.Params("a", ""))
    assert alone.parameter_rules() == (("a", MoRA(align=128)), (".*", "frozen"))


@pytest.mark.parametrize(("window", "warned"), [(99, False), (100, True), (101, True), (0, False)])
def test_a_window_that_is_never_full_is_warned_of(window, warned):
    config = RunConfig(**RESTARTED, bad_steps=s.BadSteps(window=window))
    assert any("no spike of the gradient can be detected" in s for s in config.warnings()) == warned


def test_a_deterministic_run_has_no_attention_of_cudnn():
    cudnn = Compute(attention="cudnn")
    RunConfig(compute=cudnn)
    RunConfig(deterministic=True)
    with pytest.raises(InputError, match=r"deterministic excludes compute\.attention cudnn"):
        RunConfig(compute=cudnn, deterministic=True)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_here_warn_of_nothing(path):
    assert flags.read_config(str(path)).warnings() == []


def test_a_scan_that_recomputes_nothing_warns():
    config = RunConfig(compute=Compute(layers="scan"))
    assert any("compute.remat dots keeps the products only" in s for s in config.warnings())
    assert RunConfig(compute=Compute(layers="scan", remat="dots")).warnings() == []


def test_dynamic_positions_take_longer_sequences_than_the_context():
    model = LlamaConfig(rope=Rope("dynamic", factor=2.0), max_position_embeddings=512)
    assert RunConfig(data=s.Data(sequence_length=4096), model=model).model == model


def test_a_scaling_of_positions_by_flags_and_in_yaml(tmp_path):
    model = {
        "model_type": "qwen3",
        "head_dim": 64,
        "rope": {"type": "yarn", "factor": 4.0, "truncate": False},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": model}))
    config = flags.read_config(str(tmp_path / "c.yaml"), ["--model.rope.beta-fast", "16"])
    assert config.model == LlamaConfig(
        model_type="qwen3", head_dim=64, rope=Rope("yarn", 4.0, beta_fast=16.0, truncate=False)
    )
    assert flags.config_from_plain(c.to_plain(config)) == config
    with pytest.raises(InputError, match=r"model.rope.factor has no effect with model.rope.type default"):
        flags.read_config(str(tmp_path / "c.yaml"), ["--model.rope.type", "default"])
