"""A run's folder: whose it is, what its checkpoints must hold, and the model it gives to others."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from slow import quick, slow

from mora_jax import hf, sharding, transform, trees
from mora_jax.errors import InputError
from mora_jax.methods import MoRA, Share
from mora_jax.models.llama import LAYOUTS
from mora_jax.transform import Methods
from train.config.run import DEFAULT_METHOD
from train.config.sections import Checkpoint, Data, Restart, Schedule
from train.data.rows.info import load_info
from train.jobs.export import export
from train.run import manifest
from train.run.checkpoint import Checkpoints
from train.run.folder import CONFIG, check_free, claim, open_checkpoints, read_config
from train.run.meta import build_meta, check_data, read_meta
from train.run.model import READS, load_initial, load_model, read_newest, widest_mesh
from train.run.state import assign_methods, fresh_state, methods_at, restore_state


@pytest.fixture
def copy(tiny_run, tmp_path) -> Path:
    """A copy of the finished tiny run."""
    return Path(shutil.copytree(tiny_run.folder, tmp_path / "copy"))


def here(tiny_run, folder: Path):
    return dataclasses.replace(tiny_run.config, run_dir=str(folder))


def test_a_folder_is_claimed_once(tiny_run, tmp_path):
    config = here(tiny_run, tmp_path / "a" / "run")
    check_free(config, resume=False)
    check_free(config, resume=False)  # nothing was written yet
    claim(config)
    assert read_config(config.run_dir) == config
    with pytest.raises(InputError, match="already holds a run; remove --no-resume"):
        check_free(config, resume=False)
    check_free(config, resume=True)


def test_a_config_that_is_the_same_is_not_written_again(tiny_run, tmp_path):
    config = here(tiny_run, tmp_path / "run")
    check_free(config, resume=True)
    claim(config)
    before = (tmp_path / "run" / CONFIG).stat()
    claim(config)
    assert (tmp_path / "run" / CONFIG).stat().st_ino == before.st_ino
    claim(dataclasses.replace(config, checkpoint=Checkpoint(every=17)))
    assert read_config(config.run_dir).checkpoint.every == 17


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_folder_of_a_run_that_is_a_link_is_refused(tiny_run, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    config = here(tiny_run, tmp_path / "run")
    if name == "checkpoints":
        claim(config)
    with pytest.raises(InputError, match=rf"run/{name} is a link, .* put a folder there"):
        check_free(config, resume=True)


def test_a_run_of_another_config_is_not_resumed(tiny_run, copy):
    config = here(tiny_run, copy)
    before = (copy / "config.yaml").read_bytes()
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.5))
    with pytest.raises(InputError, match=r"holds a run with optimizer\.learning_rate 0\.01, not 0\.5"):
        check_free(other, resume=True)
    assert (copy / "config.yaml").read_bytes() == before


def test_operational_settings_may_change(tiny_run, copy):
    config = here(tiny_run, copy)
    keep = dataclasses.replace(config.checkpoint, keep=7, every=5)
    often = dataclasses.replace(config.eval, every=1, batch_size=2)
    check_free(dataclasses.replace(config, checkpoint=keep, eval=often), resume=True)


@pytest.mark.parametrize("name", ["summary.json", "loss.png"])
def test_a_folder_in_the_place_of_a_file_that_is_written_last(tiny_run, tmp_path, name):
    config = dataclasses.replace(tiny_run.config, run_dir=str(tmp_path))
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"{name} is a folder, and a run writes a file of this name"):
        check_free(config, resume=True)


def test_a_folder_that_cannot_be_made(tiny_run, tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("file", "file/run"):
        with pytest.raises(InputError, match="cannot be made"):
            check_free(here(tiny_run, tmp_path / name), resume=False)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        read_config(str(tmp_path))


@pytest.mark.parametrize(("step", "switches"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (22, 10)])
def test_the_methods_of_a_step(tiny_run, step, switches):
    path = "layers/mlp/up_proj/kernel"
    assert methods_at(tiny_run.config, step)[path].method.operator.group == switches % 2


@pytest.mark.slow
def test_other_methods_than_the_steps_are_refused(tiny_run, tmp_path):
    config = here(tiny_run, tmp_path)
    mesh = sharding.make_mesh(1)
    with Checkpoints(str(tiny_run.folder / "checkpoints")) as original:
        state, methods = restore_state(config, original, 6, mesh)
        meta = original.read_meta(6)
    assert Methods.from_json(meta["methods"]) == methods
    with open_checkpoints(config) as saved:
        saved.save(6, state, meta)
        saved.wait()
        restore_state(config, saved, 6, mesh)
        saved.save(6, state, meta | {"methods": methods.after_restart().to_json()})
        saved.wait()
        with pytest.raises(InputError, match="methods saved at step 6 are not those"):
            restore_state(config, saved, 6, mesh)


@pytest.mark.slow
def test_a_checkpoint_of_another_run_with_the_same_shapes_is_refused(tiny_run, copy):
    config, mesh = here(tiny_run, copy), sharding.make_mesh(1)
    rate = dataclasses.replace(config.optimizer, learning_rate=3e-3)
    message = (
        r"22 was saved by a run with optimizer\.learning_rate 0\.01, not 0\.003; choose another --run-dir"
    )
    with open_checkpoints(config) as saved:
        with pytest.raises(InputError, match=message):
            restore_state(dataclasses.replace(config, optimizer=rate), saved, 22, mesh)
        often = dataclasses.replace(config.eval, every=1, batch_size=2)
        restore_state(dataclasses.replace(config, eval=often), saved, 22, mesh)


def test_a_difference_names_what_to_do(tiny_run):
    config = here(tiny_run, tiny_run.folder)
    for change, remedy in (
        ({"steps": 40}, f"with steps 22, not 40; .* --init-from {tiny_run.folder} --run-dir NEW"),
        ({"data": Data("moved", 32)}, rf"if the data set moved, change it in {tiny_run.folder}/config\.yaml"),
        ({"seed": 5}, "with seed 0, not 5; choose another --run-dir"),
    ):
        with pytest.raises(InputError, match=remedy):
            check_free(dataclasses.replace(config, **change), resume=True)


@pytest.mark.slow
def test_a_checkpoint_of_rules_is_of_the_same_config(tiny_run, tmp_path):
    """In JSON a pair of groups is a list, and fields that a version did not have yet are missing."""
    rules = ((".*_proj/kernel", MoRA(4, Share(group=(0, 1)))), (".*", "frozen"))
    config = dataclasses.replace(here(tiny_run, tmp_path), method=DEFAULT_METHOD, rules=rules)
    methods, mesh = assign_methods(config), sharding.make_mesh(1)
    meta = build_meta(config, methods, load_info(config.data.directory), 0)
    del meta["config"]["deterministic"]
    with open_checkpoints(config) as saved:
        saved.save(0, fresh_state(config, methods, mesh), meta)
        saved.wait()
        restore_state(config, saved, 0, mesh)
        other = dataclasses.replace(config, deterministic=True)
        with pytest.raises(InputError, match="with deterministic False, not True"):
            restore_state(other, saved, 0, mesh)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("restarts", 3),
        slow("data.step", 7),
        slow("data.seed", 1),
        slow("data.next_rows", [0, 1, 2, 3]),
        slow("random.dropout", [0, 0, 0, 0]),
        slow("step", 5),
    ],
)
def test_a_checkpoint_that_differs_from_what_its_step_implies_is_refused(tiny_run, tmp_path, key, value):
    config, mesh = here(tiny_run, tmp_path), sharding.make_mesh(1)
    with Checkpoints(str(tiny_run.folder / "checkpoints")) as original:
        state, _ = restore_state(config, original, 6, mesh)
        meta = original.read_meta(6)
    section, _, name = key.rpartition(".")
    if key == "step":
        state = state.replace(step=state.step - 1)
    else:
        (meta[section] if section else meta)[name] = value
    with open_checkpoints(config) as saved:
        saved.save(6, state, meta)
        saved.wait()
        expected = "holds the state of 5 updates" if key == "step" else rf"saved with {key}"
        with pytest.raises(InputError, match=expected):
            restore_state(config, saved, 6, mesh)


@pytest.mark.slow  # an evaluation of it gives the loss that its training had
def test_the_model_of_a_run_is_merged(tiny_run):
    with Checkpoints(str(tiny_run.folder / "checkpoints")) as saved:
        state, methods = restore_state(tiny_run.config, saved, 22, sharding.make_mesh(1))
    params, model = load_model(str(tiny_run.folder))
    expected = trees.flatten(transform.merge(state.params, state.adapters, methods))
    unmerged = trees.flatten(state.params)
    for path, leaf in trees.flatten(params).items():
        np.testing.assert_array_equal(leaf, expected[path])
        adapted = path.endswith("_proj/kernel")
        assert adapted == (not np.array_equal(leaf, unmerged[path]))
    assert model == tiny_run.config.model


@pytest.mark.slow  # the finished run of all tests was
def test_a_run_may_be_moved(tiny_run, copy, capsys):
    """Its config names the folder that it was written to; what counts is the folder that it is in."""
    for step in (12, 15, 18, 21, 22):
        shutil.rmtree(copy / "checkpoints" / str(step))
    moved, _ = load_model(str(copy))
    last, _ = load_model(str(tiny_run.folder))
    assert not np.array_equal(moved["norm"]["scale"], last["norm"]["scale"])
    assert "warning" not in capsys.readouterr().err


@pytest.mark.slow  # tests/jobs/test_resume.py resumes from an older one
def test_a_damaged_checkpoint_is_reported_and_an_older_one_is_used(copy, capsys):
    next((copy / "checkpoints" / "22").rglob("_METADATA")).unlink()
    model, _ = load_model(str(copy))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mora: warning: ")
    assert line.endswith("_METADATA is missing; using an older checkpoint")
    shutil.rmtree(copy / "checkpoints" / "22")
    older, _ = load_model(str(copy))
    np.testing.assert_array_equal(model["norm"]["scale"], older["norm"]["scale"])


@pytest.mark.slow
@pytest.mark.parametrize("at", ["damage", "restore"])
@pytest.mark.parametrize("older", [True, False])
def test_a_checkpoint_removed_while_it_is_read_is_replaced_by_a_newer_one(
    tiny_run, copy, monkeypatch, capsys, at, older
):
    """A newer one is there, as it is whenever one is removed; so is an old one that is kept for good."""
    kept, steps = copy / "checkpoints", [15, 18, 21, 22]
    newer = [Path(shutil.move(kept / str(step), copy / f"newer_{step}")) for step in steps[1:]]
    for path in kept.iterdir():
        if path.name.isdigit() and path.name not in ("15", *(["12"] if older else [])):
            shutil.rmtree(path)
    original = getattr(Checkpoints, at)

    def overtaken(self, step, *args, **kwargs):
        if newer:
            shutil.rmtree(kept / str(step))
            path = newer.pop(0)
            path.rename(kept / path.name.removeprefix("newer_"))
        return original(self, step, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, at, overtaken)
    model, _ = load_model(str(copy))
    last, _ = load_model(str(tiny_run.folder))
    np.testing.assert_array_equal(model["norm"]["scale"], last["norm"]["scale"])
    assert "warning" not in capsys.readouterr().err


def test_a_reader_that_is_always_too_slow_gives_up(tiny_run, copy):
    seen = []

    def read(step):
        seen.append(step)
        shutil.copytree(copy / "checkpoints" / "22", copy / "checkpoints" / str(22 + len(seen)))
        raise InputError("gone")

    with open_checkpoints(here(tiny_run, copy)) as saved, pytest.raises(InputError, match="gone"):
        read_newest(saved, str(copy), read)
    assert len(seen) == READS


def test_a_run_without_a_checkpoint_has_no_model(copy):
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        load_model(str(copy))


@pytest.mark.slow  # test_checkpoint.py and tests/library/hf/test_weights.py do that alone
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("kind", ["run", "Hugging Face"])
def test_a_model_is_read_onto_a_mesh(tiny_run, hf_folder, kind, sizes):
    mesh = sharding.make_mesh(*sizes)
    params, model = load_model(str(tiny_run.folder if kind == "run" else hf_folder), mesh=mesh)
    expected, _ = load_model(str(tiny_run.folder))
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == sharding.shardings(params, mesh, LAYOUTS)
    assert model == tiny_run.config.model


@pytest.mark.parametrize(
    ("batch_size", "mlp", "devices"),
    quick([(12, 48, 4)], [(0, 48, 8), (64, 48, 8), (12, 48, 4), (3, 48, 1), (64, 50, 8)]),
    ids=str,
)
def test_the_widest_mesh_for_a_model(tiny_run, hf_folder, batch_size, mlp, devices):
    """The widths of the MLP need not divide, the hidden size does."""
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(config | {"intermediate_size": mlp}))
    assert dict(widest_mesh(str(hf_folder), batch_size).shape) == {
        "data": 1,
        "fsdp": devices,
        "tensor": 1,
    }
    assert widest_mesh(str(tiny_run.folder), batch_size).size == devices


def test_a_run_that_few_devices_divide_has_a_mesh(tiny_run, tmp_path):
    """Its M are 16 x 16 or 17 x 17, and have no padding."""
    sizes = dataclasses.replace(tiny_run.config.model, intermediate_size=42)
    method = dataclasses.replace(tiny_run.config.method, align=1)
    config = dataclasses.replace(here(tiny_run, tmp_path), model=sizes, method=method)
    check_free(config, resume=False)
    claim(config)
    assert widest_mesh(str(tmp_path)).size == 1


@pytest.fixture
def hf_folder(hf_model, tmp_path) -> Path:
    """The finished tiny run as a Hugging Face folder."""
    return Path(shutil.copytree(hf_model, tmp_path / "hf"))


@pytest.mark.parametrize("kind", quick(["run"], ["run", "Hugging Face"]))
def test_a_warm_start_takes_the_merged_weights(tiny_run, tmp_path, kind):
    params, model = load_model(str(tiny_run.folder))
    path = tiny_run.folder
    if kind == "Hugging Face":
        path = tmp_path / "hf"
        hf.save_hf(path, params, model)
    config = dataclasses.replace(tiny_run.config, init_from=str(path))
    mesh = sharding.make_mesh(1)
    state = fresh_state(
        config, assign_methods(config), mesh, load_initial(config, load_info(config.data.directory), mesh)
    )
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.adapters))  # M starts at zero
    assert int(state.step) == 0


@pytest.mark.parametrize("kind", quick(["Hugging Face"], ["run", "Hugging Face"]))
def test_a_warm_start_rounds_a_bfloat16_base_and_nothing_else(tiny_run, hf_folder, kind):
    path = tiny_run.folder if kind == "run" else hf_folder
    changes = {"base_dtype": "bfloat16", "restart": Restart(), "schedule": Schedule(warmup=2)}
    config = dataclasses.replace(tiny_run.config, init_from=str(path), **changes)
    mesh, methods = sharding.make_mesh(1), assign_methods(config)
    state = fresh_state(config, methods, mesh, load_initial(config, load_info(config.data.directory), mesh))
    merged, ours = trees.flatten(load_model(str(path))[0]), trees.flatten(state.params)
    for name, leaf in ours.items():
        dtype = jnp.float32 if methods[name] == "train" else jnp.bfloat16
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(leaf, np.asarray(merged[name]).astype(dtype))


def test_a_warm_start_from_another_model_is_refused(tiny_run):
    model = dataclasses.replace(tiny_run.config.model, intermediate_size=64)
    config = dataclasses.replace(tiny_run.config, init_from=str(tiny_run.folder), model=model)
    with pytest.raises(InputError, match=r"of intermediate_size 48, not model\.intermediate_size 64"):
        load_initial(config, load_info(config.data.directory), sharding.make_mesh(1))


def test_the_length_of_positions_may_grow_at_a_warm_start(tiny_run):
    model = dataclasses.replace(tiny_run.config.model, max_position_embeddings=64)
    config = dataclasses.replace(tiny_run.config, init_from=str(tiny_run.folder), model=model)
    load_initial(config, load_info(config.data.directory), sharding.make_mesh(1))


def test_another_data_set_is_refused(tiny_run, copy):
    info = load_info(tiny_run.config.data.directory)
    other_tokenizer = dataclasses.replace(info, tokenizer_sha256="0" * 64)
    more_text = dataclasses.replace(info, rows=info.rows | {"train": info.rows["train"] + 1})
    fewer = dataclasses.replace(info.counts["train"], loss_tokens=7)
    other_loss = dataclasses.replace(info, counts=info.counts | {"train": fewer})
    with open_checkpoints(here(tiny_run, copy)) as saved:
        check_data(saved, 22, info, resume=True)
        check_data(saved, 22, more_text)
        with pytest.raises(InputError, match="another tokenizer"):
            check_data(saved, 22, other_tokenizer)
        with pytest.raises(InputError, match="training rows, not the run's"):
            check_data(saved, 22, more_text, resume=True)
        with pytest.raises(InputError, match="training tokens that count, not the run's"):
            check_data(saved, 22, other_loss, resume=True)
    with pytest.raises(InputError, match="another tokenizer"):
        load_model(str(copy), other_tokenizer)


@pytest.mark.parametrize("kind", quick(["run"], ["run", "Hugging Face"]))
def test_a_warm_start_from_another_tokenizer_is_refused(tiny_run, tmp_path, kind):
    """Of as many pieces: only the content tells them apart."""
    path, info = tiny_run.folder, load_info(tiny_run.config.data.directory)
    if kind == "Hugging Face":
        path = tmp_path / "exported"
        export(str(tiny_run.folder), str(path))
    config = dataclasses.replace(tiny_run.config, init_from=str(path))
    assert load_initial(config, info, sharding.make_mesh(1))
    other = dataclasses.replace(info, tokenizer_sha256="0" * 64)
    message = r"^--init-from.*: .* was made with another tokenizer than "
    with pytest.raises(InputError, match=message):
        load_initial(config, other, sharding.make_mesh(1))


def test_a_model_without_a_tokenizer_is_warned_of(tiny_run, hf_folder, capsys):
    load_model(str(hf_folder), load_info(tiny_run.config.data.directory))
    assert "hf has no tokenizer: whether " in " ".join(capsys.readouterr().err.split())


def test_checkpoints_of_an_unknown_run_are_refused(tiny_run, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    config = dataclasses.replace(tiny_run.config, run_dir=str(tmp_path / "run"))
    with pytest.raises(InputError, match="checkpoints of an unknown run"):
        check_free(config, resume=True)
    (tmp_path / "run" / "checkpoints").rmdir()
    (tmp_path / "run" / "checkpoints").touch()
    check_free(config, resume=True)  # it holds nothing
    with pytest.raises(InputError, match="checkpoints is not a folder; remove it"):
        open_checkpoints(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": []},
        {"methods": {"a": {"name": "os.system"}}},
        {"data": None},
        {"data": {"rows": 10**30, "tokenizer_sha256": "x"}},
        {"evaluation": {"loss": "0", "predictions": 1}},
        {"evaluation": [1]},
        {"config": None},
    ],
)
def test_meta_that_no_run_has_saved_is_refused(tiny_run, tmp_path, changes):
    """However well it is sealed."""
    shutil.copytree(tiny_run.folder / "checkpoints" / "6", tmp_path / "6")
    found = manifest.read(epath.Path(tmp_path / "6"), 6)
    (tmp_path / "6" / manifest.MANIFEST).unlink()
    content = {"step": 6, "meta": found["meta"] | changes, "arrays": found["arrays"]}
    manifest.seal(epath.Path(tmp_path / "6"), content)
    with Checkpoints(str(tmp_path)) as saved:
        assert saved.latest_good() == (6, [])
        with pytest.raises(InputError, match="was not saved by a run of this version"):
            read_meta(saved, 6)


def test_the_number_of_restarts_is_not_looped_over(tiny_run):
    path = "layers/mlp/up_proj/kernel"
    config = dataclasses.replace(tiny_run.config, steps=2**31 - 1)
    for step in (2**31 - 3, 2**31 - 5):
        expected = config.restarts_before(step) % 2
        assert methods_at(config, step)[path].method.operator.group == expected
