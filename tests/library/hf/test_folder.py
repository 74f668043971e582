"""A folder appears complete or not at all."""

import pytest
from hf_folders import CONFIG, random_params

from mora_jax.errors import InputError
from mora_jax.hf import load_hf, remove_leftovers, save_hf, whole_folder


def test_an_existing_folder_is_left_as_it_is(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        save_hf(folder, random_params(CONFIG), CONFIG)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_failed_write_leaves_no_folder_of_that_name(tmp_path):
    def fail_half_way():
        with whole_folder(tmp_path / "hf") as folder:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert not (tmp_path / "hf").exists()
    (tmp_path / "hf").mkdir()  # neither an empty folder nor the leftovers prevent the next attempt
    save_hf(tmp_path / "hf", random_params(CONFIG), CONFIG)
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]
    assert load_hf(tmp_path / "hf")[1] == CONFIG


def test_an_empty_folder_is_filled_where_it_is(tmp_path, monkeypatch):
    """The working folder, a link to a folder."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (tmp_path / "link").symlink_to(there)
    monkeypatch.chdir(here)
    for path, folder in ((".", here), (tmp_path / "link", there)):
        before = folder.stat().st_ino
        save_hf(path, random_params(CONFIG), CONFIG)
        assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
        assert folder.stat().st_ino == before
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "there"]


def test_leftovers_in_an_empty_folder_are_removed(tmp_path):
    (tmp_path / "out.0123abcd.mora-partial").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/out.0123abcd.mora-partial").mkdir()
    remove_leftovers(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]
