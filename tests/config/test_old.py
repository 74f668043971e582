"""Configs and methods of format 1."""

import pytest
import yaml

from mora_jax.errors import InputError
from mora_jax.methods import LoRA, MoRA, Rotate, Share, from_json
from mora_jax.on import On, choice_from_json
from train.config import flags, old
from train.config.run import RunConfig, to_plain
from train.config.sections import Params
from train.run.folder import check_same_config
from train.storage.format import FORMAT

# `method` of a config of format 1 held the fields of every method.
METHOD = {
    "name": "mora", "rank": 4, "alpha": 128.0, "rslora": False, "b_lr_scale": 1.0, "train_factors": "ab",
    "a_init": "uniform", "operator": "share", "group": 1, "cycle": 2, "pad": "zero", "surplus": "fold",
    "align": 8, "dropout": 0.0, "adapt": "a", "train": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, MoRA(4, Share(1), align=8)),
        ({"operator": "rotate"}, MoRA(4, Rotate(), align=8)),
        ({"name": "lora", "train_factors": "b"}, LoRA(4, 128.0, train_factors="b")),
        ({"name": "full"}, "full"),
    ],
)
def test_a_method(changes, expected):
    upgraded = old.upgrade_config({"method": METHOD | changes})
    assert flags.config_from_plain(upgraded) == RunConfig(method=expected, params=Params("a", ""))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("unrolled", ("unrolled", "none")), ("scan", ("scan", "dots")), ("remat", ("scan", "full"))],
)
def test_layers(layers, expected):
    compute = flags.config_from_plain(old.upgrade_config({"compute": {"layers": layers}})).compute
    assert (compute.layers, compute.remat) == expected


def test_rules_and_saved_methods():
    choice = {"name": "lora", "rank": 4, "alpha": 8.0, "train": "b"}
    config = flags.config_from_plain(old.upgrade_config({"rules": [["a", choice], [".*", "frozen"]]}))
    assert config.rules == (("a", LoRA(4, 8.0, train_factors="b")), (".*", "frozen"))
    methods = old.upgrade_methods({"a": choice, "b": "train"})
    assert from_json(methods["a"]) == LoRA(4, 8.0, train_factors="b")
    assert methods["b"] == "train"


def test_bare_methods_of_stacked_kernels_get_their_stack():
    lora = {"name": "lora", "rank": 4, "alpha": 8.0}
    methods = old.upgrade_methods({"layers/mlp/up_proj/kernel": lora, "lm_head/kernel": lora})
    assert choice_from_json(methods["layers/mlp/up_proj/kernel"]) == On(LoRA(4, 8.0), stack=(0,))
    assert choice_from_json(methods["lm_head/kernel"]) == LoRA(4, 8.0)
    assert old.upgrade_methods(methods) == methods


def test_the_config_of_a_run_is_read_whatever_its_format(tmp_path):
    """Only there: a user's own file with an old key is refused, with the new one."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"method": METHOD}))
    with pytest.raises(InputError, match=r"method\.adapt is now params\.adapt"):
        flags.read_config(str(path))
    (tmp_path / "checkpoints").mkdir()
    expected = RunConfig(method=MoRA(4, Share(1), align=8), params=Params("a", ""))
    assert flags.read_config(str(path)) == expected
    path.write_text(yaml.safe_dump({"format": FORMAT} | to_plain(expected)))
    assert flags.read_config(str(path)) == expected
    path.write_text(yaml.safe_dump({"format": FORMAT + 1}))
    with pytest.raises(InputError, match=f"has format {FORMAT + 1}"):
        flags.read_config(str(path))


@pytest.mark.parametrize("plain", [{}, {"method": 3, "compute": [], "rules": {}}, {"rules": [1, ["a"]]}])
def test_what_is_of_no_known_form_stays_as_it_is(plain):
    assert old.upgrade_config(plain) == plain


def test_the_default_of_what_is_trained_matches_more_today():
    """Norms of queries and keys: a run of a model without them resumes."""
    before = "embed_tokens/embedding|(layers/)?[a-z_]*norm/scale|lm_head/kernel"
    saved = to_plain(RunConfig(params=Params(train=before)))
    check_same_config(saved, RunConfig(), "FOLDER holds a run")
    other = to_plain(RunConfig(params=Params(train="norm/scale")))
    with pytest.raises(InputError, match=r"with params\.train 'norm/scale', not"):
        check_same_config(other, RunConfig(), "FOLDER holds a run")
