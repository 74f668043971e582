"""A folder appears complete or not at all."""

import pytest
from hf_folders import CONFIG, random_params

from mora_jax.errors import InputError
from mora_jax.hf import load_hf, save_hf, whole_folder


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
