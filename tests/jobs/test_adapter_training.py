"""Runs that train an adapter further: their rules, what they start from, and what they export."""

import dataclasses
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from hf_folders import assert_same
from peft_folders import FROZEN, random_adapted, read_folder, write_folder
from slow import slow
from tiny import TINY

from mora_jax import DoRA, LoRA, MoRA, Share, hf, save_adapter, sharding, trees
from mora_jax.errors import InputError
from mora_jax.hf.weights import fingerprint, read_weights
from mora_jax.models.llama import Compute, Llama
from train.cli import main as cli
from train.config import flags
from train.config.adapter import with_adapter
from train.jobs.adapter import AdapterOptions, export_adapter
from train.jobs.pretrain import pretrain
from train.run.model import load_initial_adapter, load_model, load_state
from train.run.state import assign_methods, fresh_state

MODEL = flags.config_from_plain(yaml.safe_load(TINY) | {"data": {"sequence_length": 32}}).model
K, UP = "layers/self_attn/k_proj/kernel", "layers/mlp/up_proj/kernel"
LORA = LoRA(4, alpha=8, rslora=True, dropout=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, adapters of it, a run, and a config without a method."""
    folder = tmp_path_factory.mktemp("adapters")
    plain = yaml.safe_load(TINY) | {"data": {"sequence_length": 32}, "init_from": str(folder / "base")}
    plain["schedule"] = {"kind": "cosine", "warmup": 1}
    del plain["method"], plain["restart"]
    (folder / "c.yaml").write_text(yaml.safe_dump(plain))
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text("steps: 1")
    for name, rules in {
        "lora": [(K, LORA), (UP, dataclasses.replace(LORA, rank=2)), (".*norm/scale", "train")],
        "mora": [(K, MoRA(4, Share((0, 1), "wrap")))],
        "dora": [(K, DoRA(2, alpha=6))],
    }.items():
        adapted = random_adapted([*rules, FROZEN], MODEL)
        if name == "lora":
            hf.save_hf(folder / "base", adapted.base, MODEL)
        form = "mora" if name == "mora" else "peft"
        print_ = fingerprint(read_weights(folder / "base", MODEL))
        save_adapter(folder / name, *adapted[1:], MODEL, base="base", form=form, base_hash=print_)
    return folder


def config_of(folder: Path, name: str, *words: str):
    return flags.read_config(str(folder / "c.yaml"), ["--adapter", str(folder / name), *words])


def test_the_rules_are_the_files(folder):
    methods = assign_methods(config_of(folder, "lora"))
    assert dict(methods.adapted()) == {K: LORA, UP: dataclasses.replace(LORA, rank=2)}
    assert methods.trained() == {path for path in dict(methods.choices) if path.endswith("norm/scale")}
    ((path, read),) = assign_methods(config_of(folder, "mora")).adapted()
    assert (path, read) == (K, MoRA(4, Share((0, 1), "wrap", cycle=4), r_hat_from="rounded"))
    assert dict(assign_methods(config_of(folder, "dora")).adapted()) == {K: DoRA(2, alpha=6.0)}


def test_flags_add_what_the_file_does_not_say(folder):
    words = [
        "--method.name",
        "lora",
        "--method.b-lr-scale",
        "4",
        "--method.alpha",
        "8",
        "--method.dropout",
        "0",
    ]
    methods = assign_methods(config_of(folder, "lora", *words))
    assert methods[K].method == dataclasses.replace(LORA, b_lr_scale=4.0, dropout=0.0)  # pyright: ignore[reportAttributeAccessIssue]
    words = ["--method.name", "mora", "--method.align", "16"]
    assert methods_of(folder, "mora", *words) == MoRA(
        4, Share((0, 1), "wrap", 4), align=16, r_hat_from="rounded"
    )


def methods_of(folder, name, *words):
    return next(method for _, method in assign_methods(config_of(folder, name, *words)).adapted())


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("lora", ["--method.name", "mora"], "method.name is mora, and the adapter in the file has lora"),
        ("lora", ["--method.rank", "128"], "method.rank is 128, and the adapter in the file has 4"),
        ("lora", ["--method.name", "full"], "method.name is full, and the adapter in the file has lora"),
        (
            "dora",
            ["--method.name", "dora", "--method.rank", "4"],
            "method.rank is 4, and the adapter in the file",
        ),
        ("mora", ["--method.group", "1"], r"method.group is 1, and the adapter in the file has (0, 1)"),
        ("lora", ["--params.train", ""], "--adapter says what is adapted and trained: leave out params"),
        ("lora", ["--init-from", ""], "adapter needs init_from, the model that the adapter belongs to"),
        ("base", [], "adapter_config.json is missing"),
        ("run", [], "run is a run; export it first: mora export RUN OUT --adapter"),
        ("lora", ["--model.intermediate-size", "64"], "do not fit the base or their config"),
    ],
)
def test_what_contradicts_the_file_is_refused(folder, capfd, name, words, message):
    adapter = ["--adapter", str(folder / name)]
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", str(folder / "c.yaml"), *adapter, *words, "--dry-run"])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line


def test_a_saved_config_needs_no_adapter(folder, tmp_path):
    """A run's config.yaml has the rules; the adapter may be away by then."""
    from train.config.run import to_plain

    config = config_of(folder, "lora")
    plain = to_plain(dataclasses.replace(config, adapter=str(tmp_path / "away")))
    assert flags.config_from_plain(plain).rules == config.rules
    bare = dataclasses.replace(config, rules=())
    assert with_adapter(bare) == config
    with pytest.raises(InputError, match=r"method.name is lora, and the adapter in the file has mora"):
        with_adapter(dataclasses.replace(bare, adapter=str(folder / "mora"), method=LoRA(4)))


@pytest.mark.parametrize("name", ["lora", slow("mora")])
def test_the_state_starts_with_the_files_arrays(folder, name):
    words = ["--method.name", "mora", "--method.align", "16"] if name == "mora" else []
    config = config_of(folder, name, *words)
    methods, (params, model) = assign_methods(config), hf.load_hf(config.init_from)
    expected = hf.load_adapter(folder / name, params, model)
    params, adapters = load_initial_adapter(config, methods, params)
    state = fresh_state(
        config, methods, sharding.make_mesh(1), jax.tree.map(jax.numpy.asarray, params), adapters
    )
    assert_same(state.params, expected[0])
    ours = trees.flatten(state.adapters)
    for path, array in trees.flatten(expected[1]).items():
        assert np.abs(array).max() > 0.1
        held = np.asarray(ours[path])[tuple(slice(0, n) for n in array.shape)]  # without its padding
        np.testing.assert_array_equal(held, array)


def test_an_adapter_of_another_base_is_not_trained(folder, tmp_path):
    config = config_of(folder, "lora")
    methods, (params, _) = assign_methods(config), hf.load_hf(config.init_from)
    other = jax.tree.map(lambda a: a + 1, params)
    hf.save_hf(tmp_path / "other", other, MODEL)
    moved = dataclasses.replace(config, init_from=str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"^--adapter: .*was trained beside another base"):
        load_initial_adapter(moved, methods, other)
    (tmp_path / "other" / "config.yaml").write_text("")  # a run has one
    with pytest.raises(InputError, match=r"belongs to a folder of weights, and .*other is a run"):
        load_initial_adapter(moved, methods, other)
    said, tensors = read_folder(folder / "lora")
    write_folder(tmp_path / "r", said | {"lora_alpha": 9}, tensors)
    changed = dataclasses.replace(config, adapter=str(tmp_path / "r"))
    with pytest.raises(InputError, match=r"method.alpha is 8.0, and the adapter in the file has 9.0"):
        load_initial_adapter(changed, methods, params)


@pytest.mark.slow  # those above have the same promise without training
@pytest.mark.parametrize("name", ["lora", "mora", "dora"])
def test_an_adapter_is_trained_further_and_peft_reads_it(folder, tiny_data, tmp_path, name):
    peft = pytest.importorskip("peft", reason="needs the extra `parity`")
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
    config = config_of(folder, name)
    data = dataclasses.replace(config.data, directory=str(tiny_data))
    config = dataclasses.replace(config, data=data, steps=3, run_dir=str(tmp_path / "run"))
    pretrain(config)
    _, state, methods = load_state(config.run_dir)
    start, _ = load_initial_adapter(config, methods, hf.load_hf(config.init_from)[0])
    before = trees.flatten(hf.load_adapter(config.adapter, start, MODEL)[1])
    moved = {p: np.abs(np.asarray(a) - before[p]).max() for p, a in trees.flatten(state.adapters).items()}
    assert all(0 < change < 0.1 for change in moved.values())
    form = "mora" if name == "mora" else "peft"
    export_adapter(config.run_dir, str(tmp_path / "a"), AdapterOptions(form=form))
    params, model = load_model(config.run_dir)
    hf.merge_adapters(config.init_from, [(tmp_path / "a", 1)], tmp_path / "merged")
    merged = trees.flatten(hf.load_hf(tmp_path / "merged")[0])
    for path, leaf in trees.flatten(params).items():
        np.testing.assert_allclose(merged[path], leaf, atol=2e-6, err_msg=path)
    if name == "mora":  # PEFT itself reads it as LoRA
        export_adapter(config.run_dir, str(tmp_path / "b"), AdapterOptions(pad_rank=True))
    tokens = np.random.default_rng(0).integers(0, 384, (2, 32))
    ours = np.asarray(Llama(model, Compute(dtype="float32")).apply({"params": params}, tokens))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        base = transformers.LlamaForCausalLM.from_pretrained(config.init_from, dtype=torch.float32)
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / ("b" if name == "mora" else "a"))
        theirs = adapted.eval()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max())
