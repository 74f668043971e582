"""The manifest of a folder: what it seals, what it finds, and that no content crashes its reader."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_jax.errors import InputError
from train.run import manifest
from train.run.manifest import MANIFEST

CONTENT = {"step": 7, "meta": {"name": "ü"}, "arrays": {"w": "float32[2]"}}


@pytest.fixture
def folder(tmp_path: Path) -> epath.Path:
    """A sealed folder of three files."""
    folder = epath.Path(tmp_path / "7")
    (folder / "inner").mkdir(parents=True)
    for name in ("a", "inner/b", "inner/c"):
        (folder / name).write_text(f"what {name} holds")
    manifest.seal(folder, CONTENT)
    return folder


def damage(folder: epath.Path, step: int = 7) -> list[str]:
    return manifest.damage(folder, step, lambda _: None)


def test_a_sealed_folder_is_read(folder: epath.Path):
    found = manifest.read(folder, 7)
    assert {name: found[name] for name in CONTENT} == CONTENT
    assert found["files"].keys() == {"a", "inner/b", "inner/c"}
    assert damage(folder) == []
    with pytest.raises(InputError, match="it holds what was saved as 7"):
        manifest.read(folder, 8)


def test_every_byte_read_is_counted(folder: epath.Path):
    counted: list[float] = []
    manifest.damage(folder, 7, counted.append)
    assert sum(counted) == sum(size or 0 for size in manifest.sizes(folder).values()) > 0


def test_a_link_is_found_whatever_its_target(folder: epath.Path, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_bytes((folder / "a").read_bytes())
    (folder / "a").unlink()
    Path(folder / "a").symlink_to(outside)
    assert damage(folder) == [f"{folder / 'a'} is damaged: it is not a regular file"]
    (folder / "a").unlink()
    Path(folder / "a").write_bytes(outside.read_bytes())
    assert damage(folder) == []
    Path(folder / "more").symlink_to(tmp_path)
    assert damage(folder) == [f"{folder / 'more'} does not belong to the checkpoint; remove it"]


def test_a_link_to_a_folder_is_found(folder: epath.Path, tmp_path: Path):
    Path(folder / "inner").rename(tmp_path / "moved")
    Path(folder / "inner").symlink_to(tmp_path / "moved")
    assert [line.partition(" ")[2] for line in damage(folder)] == [
        "does not belong to the checkpoint; remove it",
        "is missing",
        "is missing",
    ]
    (tmp_path / "linked").symlink_to(folder)
    assert manifest.sizes(epath.Path(tmp_path / "linked")) == {}  # it may lead anywhere
    with pytest.raises(InputError, match="linked is a link, not a folder"):
        manifest.read(epath.Path(tmp_path / "linked"), 7)


@pytest.mark.parametrize("name", ["a", MANIFEST])
def test_a_pipe_does_not_block(folder: epath.Path, name: str):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert [line for line in damage(folder) if "not a regular file" in line and name in line]


def test_a_file_of_another_size_is_not_read(folder: epath.Path):
    with Path(folder / "a").open("r+b") as file:
        file.truncate(1 << 42)  # takes no room, and weeks to read
    assert damage(folder) == [
        f"{folder / 'a'} is damaged: it has {1 << 42} bytes and was saved with {len('what a holds')}"
    ]


def test_a_disk_that_cannot_read_is_damage(folder: epath.Path, monkeypatch: pytest.MonkeyPatch):
    def unreadable(*_: Any) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(manifest, "sha256", unreadable)
    assert damage(folder) == [
        f"{folder / n} cannot be read: Input/output error" for n in ("a", "inner/b", "inner/c")
    ]


def test_names_in_a_manifest_are_only_compared(folder: epath.Path, tmp_path: Path):
    (tmp_path / "secret").write_text("what a holds")
    content = manifest.read(folder, 7)
    content["files"] = {"../secret": content["files"]["a"], str(tmp_path / "secret"): content["files"]["a"]}
    (folder / MANIFEST).write_text(manifest.render(content))
    assert sum("is missing" in line for line in damage(folder)) == 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
manifests = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("step", "meta", "arrays", "files", "other"), json_values)
)


@pytest.mark.slow  # tests/tools/test_fuzz.py reads changed manifests
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=50) | manifests.map(lambda m: manifest.render(m).encode()))
def test_no_manifest_crashes_its_reader(content: bytes):
    parsed = manifest.parse(content)
    assert parsed is None or parsed.keys() == {"step", "meta", "arrays", "files"}


def test_a_manifest_of_endless_nesting_or_size_is_refused(
    folder: epath.Path, monkeypatch: pytest.MonkeyPatch
):
    (folder / MANIFEST).write_text("[" * 100_000)
    assert damage(folder) == [f"{folder / MANIFEST} is damaged: its content is not what was saved"]
    monkeypatch.setattr(manifest, "_LIMIT", 100)
    (folder / MANIFEST).write_text(json.dumps({"step": "2" * 100}))
    with pytest.raises(InputError, match="not a regular file of at most 100 bytes"):
        manifest.read(folder, 7)
