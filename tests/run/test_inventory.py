"""`mora checkpoints`: what is listed of a run, what is found, and the status it exits with."""

import datetime
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from slow import quick

from mora_jax.errors import InputError
from train.cli import main as cli
from train.console import exits
from train.run import manifest
from train.run.checkpoint import Checkpoints
from train.run.folder import open_checkpoints, read_config
from train.run.inventory import inventory
from train.run.model import load_model


@pytest.fixture
def run(tiny_run, tmp_path: Path) -> Path:
    """A copy of the finished tiny run with its last three checkpoints."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(tiny_run.folder / "config.yaml", run)
    for name in ("18", "21", "22", "base-8", "base-10"):
        shutil.copytree(tiny_run.folder / "checkpoints" / name, run / "checkpoints" / name)
    return run


def seal_again(run: Path, step: int, **meta: Any) -> None:
    """Changes the content of a manifest, and its own hash with it."""
    place = run / "checkpoints" / str(step)
    content = manifest.read(epath.Path(place), step)
    content["meta"] |= meta
    (place / manifest.MANIFEST).write_text(manifest.render(content))


def listed(run: Path) -> int:
    """The status of `mora checkpoints` where it is not 0."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["checkpoints", str(run)])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_a_good_run(run: Path, capsys: pytest.CaptureFixture):
    entries = inventory(str(run))
    assert [(e.step, e.restarts, e.group_type, e.state) for e in entries] == [
        (18, "8", "0", "good"),
        (21, "10", "0", "good"),
        (22, "10", "0", "good"),
    ]
    assert [e.base.split(", ")[0] for e in entries] == ["base-8", "base-10", "base-10"]
    files = [path for path in (run / "checkpoints" / "21").rglob("*") if path.is_file()]
    assert entries[1].bytes == sum(p.stat().st_size for p in files if p.name != manifest.MANIFEST)
    now = datetime.datetime.now().astimezone()
    assert all(e.saved and abs((now - e.saved).total_seconds()) < 3600 for e in entries)
    cli.main(["checkpoints", str(run)])
    assert capsys.readouterr().out.count("│ good") == 3


def test_damaged_and_unfinished_ones(run: Path, capsys: pytest.CaptureFixture):
    damaged = run / "checkpoints" / "18" / "state" / "_METADATA"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (run / "checkpoints" / "21" / manifest.MANIFEST).unlink()
    entries = inventory(str(run))
    assert [e.state for e in entries] == ["damaged", "unfinished", "good"]
    assert [e.saved is None for e in entries] == [False, True, False]
    with pytest.raises(SystemExit) as stop:
        cli.main(["checkpoints", str(run)])
    assert stop.value.code == exits.DAMAGED == 4
    assert f"{damaged} is damaged: it has" in capsys.readouterr().out


@pytest.mark.slow  # test_base.py damages one without a run
def test_a_damaged_base_damages_what_refers_to_it(run: Path, capsys: pytest.CaptureFixture):
    array = next(p for p in (run / "checkpoints" / "base-10").rglob("d/*"))
    array.write_bytes(b"x" * array.stat().st_size)
    assert [e.state for e in inventory(str(run))] == ["good", "damaged", "damaged"]
    with open_checkpoints(read_config(str(run))) as saved:
        step, problems = saved.latest_good()
    assert (step, len(problems)) == (18, 1)  # one line, though 22 and 21 share it
    assert listed(run) == exits.DAMAGED
    assert capsys.readouterr().out.count(f"{array} is damaged") == 1
    shutil.rmtree(run / "checkpoints/base-8")
    shutil.copytree(run / "checkpoints/base-10", run / "checkpoints/base-8")
    assert [e.state for e in inventory(str(run))] == ["damaged"] * 3
    assert listed(run) == exits.DAMAGED
    assert "base-8 is damaged: it holds what was saved as 10, not 8" in capsys.readouterr().out


@pytest.mark.slow
def test_an_unfinished_checkpoint_is_not_damage(run: Path):
    (run / "checkpoints" / "21" / manifest.MANIFEST).unlink()
    cli.main(["checkpoints", str(run)])


@pytest.mark.slow
def test_listing_alone_reads_only_the_manifests(run: Path):
    array = next(p for p in (run / "checkpoints" / "22").rglob("d/*"))
    array.write_bytes(b"x" * array.stat().st_size)
    (run / "checkpoints" / "18" / manifest.MANIFEST).write_text("{}")
    entries = inventory(str(run), verify=False)
    assert [e.state for e in entries] == ["damaged", "not verified", "not verified"]
    assert [e.state for e in inventory(str(run))] == ["damaged", "good", "damaged"]
    assert entries[0].restarts == entries[0].group_type == ""


def test_a_run_without_checkpoints_and_a_folder_without_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    shutil.rmtree(run / "checkpoints")
    cli.main(["checkpoints", str(run)])
    assert "has no checkpoints yet" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds no run"):
        inventory(str(tmp_path))


@pytest.mark.slow
def test_names_of_files_and_folders_are_not_markup(run: Path, capsys: pytest.CaptureFixture):
    (run / "checkpoints" / "22" / "[y]").touch()
    run = run.rename(run.parent / "N[")
    (run / "x]").mkdir()
    for path in (run / "config.yaml", run / "checkpoints"):
        path.rename(run / "x]" / path.name)
    assert listed(run / "x]") == exits.DAMAGED
    out = capsys.readouterr().out
    assert "N[/x]" in out.replace("\n", "")  # a long title is wrapped
    assert "22/[y] does not belong to the checkpoint" in out
    shutil.rmtree(run / "x]" / "checkpoints")
    cli.main(["checkpoints", str(run / "x]")])
    assert "N[/x] has no checkpoints yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    "restarts", quick(["\x1b[31mEVIL"], ["\x1b[31mEVIL", "10", True, -1, 10**30, 1.0, None])
)
@pytest.mark.parametrize("verify", quick([False], [True, False]))
def test_a_sealed_checkpoint_that_no_run_has_saved_is_damaged(run: Path, restarts: Any, verify: bool):
    seal_again(run, 22, restarts=restarts)
    *_, last = inventory(str(run), verify)
    assert (last.state, last.restarts, last.group_type) == ("damaged", "", "")
    assert "22 was not saved by a run of this version" in last.problems[0]


def seal_files_again(run: Path, step: int) -> None:
    """Seals what lies in a checkpoint's folder, as its files are now."""
    place = epath.Path(run / "checkpoints" / str(step))
    content = manifest.read(place, step)
    del content["files"]
    manifest.seal(place, content)


@pytest.mark.slow
def test_a_sealed_checkpoint_without_its_merged_index_is_damaged(run: Path):
    (run / "checkpoints/22/state/manifest.ocdbt").unlink()
    seal_files_again(run, 22)
    *_, last = inventory(str(run))
    assert last.state == "damaged"
    assert "22 cannot be restored: in its merged index of arrays," in last.problems[0]
    with open_checkpoints(read_config(str(run))) as saved:
        assert saved.latest_good() == (21, list(last.problems))


def changed(run: Path, name: str) -> None:
    """Changes what is sealed of a checkpoint, as no run with this config would save it."""
    place = run / "checkpoints" / "22"
    content = manifest.read(epath.Path(place), 22)
    meta, arrays = content["meta"], content["arrays"]
    if name == "config":
        meta["config"]["seed"] += 1
    elif name == "restarts":
        meta["restarts"] -= 1
    elif name == "random":
        meta["random"] = {stream: [n + 1 for n in numbers] for stream, numbers in meta["random"].items()}
    else:
        arrays[min(arrays)] = "float32[1]"
    (place / manifest.MANIFEST).write_text(manifest.render(content))


@pytest.mark.parametrize("verify", quick([False], [True, False]))
@pytest.mark.parametrize("name", quick(["arrays"], ["config", "restarts", "random", "arrays"]))
def test_what_training_and_export_refuse_is_not_called_good(run: Path, name: str, verify: bool):
    changed(run, name)
    *_, last = inventory(str(run), verify)
    assert last.state == "damaged"
    with pytest.raises(InputError) as refused:
        load_model(str(run))
    assert last.problems == (str(refused.value),)


@pytest.mark.slow
def test_control_characters_in_names_of_files_are_escaped(run: Path, capsys: pytest.CaptureFixture):
    names = (b"a\x1b[31m", b"a\nmora: fine", b"a\xff", "a\u202e".encode())
    for name in names:
        Path(os.fsdecode(bytes(run / "checkpoints" / "22") + b"/" + name)).touch()
    assert listed(run) == exits.DAMAGED
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    for name in (r"a\x1b[31m", r"a\nmora: fine", r"a\udcff", r"a\u202e"):
        assert f"22/{name} does not belong to the checkpoint; remove it\n" in out


@pytest.mark.slow
def test_a_folder_that_orbax_has_not_moved_into_place_is_unfinished(run: Path):
    for name in ("9.orbax-checkpoint-tmp-171", "20.orbax-checkpoint-tmp", "x.orbax-checkpoint-tmp-1"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "array").write_bytes(bytes(1000))
    entries = inventory(str(run))
    assert [e.step for e in entries] == [9, 18, 20, 21, 22]
    assert [e.step for e in entries if e.state == "unfinished"] == [9, 20]
    assert entries[0].bytes == 1000
    cli.main(["checkpoints", str(run)])


@pytest.mark.slow
def test_a_save_that_is_finished_meanwhile_is_not_damaged(run: Path, monkeypatch: pytest.MonkeyPatch):
    place = run / "checkpoints" / "22" / manifest.MANIFEST
    content = place.read_bytes()
    place.unlink()
    real = Checkpoints.damage

    def damage(self: Checkpoints, step: int, *args: Any) -> list[str]:
        found = real(self, step, *args)
        if step == 22:
            place.write_bytes(content)
        return found

    monkeypatch.setattr(Checkpoints, "damage", damage)
    assert [e.state for e in inventory(str(run))][-1] == "unfinished"


def test_a_file_in_the_place_of_the_checkpoints(run: Path, capsys: pytest.CaptureFixture):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").touch()
    assert listed(run) == exits.BAD_INPUT
    assert capsys.readouterr().err == f"mora: {run}/checkpoints is not a folder; remove it\n"
