"""`mora checkpoints`: what is listed of a run, what is found, and the status it exits with."""

import datetime
import shutil
from pathlib import Path

import pytest
from etils import epath

from mora_jax.errors import InputError
from train import cli, exits, manifest
from train.inventory import inventory


@pytest.fixture
def run(tiny_run, tmp_path: Path) -> Path:
    """A copy of the finished tiny run with its last three checkpoints."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(tiny_run.folder / "config.yaml", run)
    for step in (18, 21, 22):
        shutil.copytree(tiny_run.folder / "checkpoints" / str(step), run / "checkpoints" / str(step))
    return run


def test_a_good_run(run: Path, capsys: pytest.CaptureFixture):
    entries = inventory(str(run))
    assert [(e.step, e.restarts, e.group_type, e.state) for e in entries] == [
        (18, "8", "0", "good"),
        (21, "10", "0", "good"),
        (22, "10", "0", "good"),
    ]
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


def test_an_unfinished_one_alone_is_no_damage(run: Path):
    (run / "checkpoints" / "21" / manifest.MANIFEST).unlink()
    cli.main(["checkpoints", str(run)])


def test_listing_alone_reads_only_the_manifests(run: Path):
    array = next(p for p in (run / "checkpoints" / "22").rglob("d/*"))
    array.write_bytes(b"x" * array.stat().st_size)
    (run / "checkpoints" / "18" / manifest.MANIFEST).write_text("{}")
    entries = inventory(str(run), verify=False)
    assert [e.state for e in entries] == ["damaged", "not verified", "not verified"]
    assert [e.state for e in inventory(str(run))] == ["damaged", "good", "damaged"]
    assert entries[0].restarts == entries[0].group_type == ""


def test_a_run_without_checkpoints_and_no_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    shutil.rmtree(run / "checkpoints")
    cli.main(["checkpoints", str(run)])
    assert "has no checkpoints yet" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds no run"):
        inventory(str(tmp_path))


def test_what_a_manifest_and_a_folder_are_called_is_no_markup(run: Path, capsys: pytest.CaptureFixture):
    """However well it is sealed."""
    place = run / "checkpoints" / "22"
    content = manifest.read(epath.Path(place), 22)
    content["meta"]["restarts"] = "[/x]"
    (place / manifest.MANIFEST).write_text(manifest.render(content))
    run = run.rename(run.parent / "N[")
    (run / "x]").mkdir()
    for path in (run / "config.yaml", run / "checkpoints"):
        path.rename(run / "x]" / path.name)
    cli.main(["checkpoints", str(run / "x]"), "--no-verify"])
    out = capsys.readouterr().out
    assert "N[/x]" in out.replace("\n", "")  # a long title is wrapped
    assert "│ [/x]" in out
    shutil.rmtree(run / "x]" / "checkpoints")
    cli.main(["checkpoints", str(run / "x]")])
    assert "N[/x] has no checkpoints yet" in capsys.readouterr().out
