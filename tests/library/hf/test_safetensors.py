"""safetensors files: damaged ones are refused before memory is taken; nothing outside the folder is read."""

import json
import os

import pytest
from etils import epath

from mora_jax.errors import InputError
from mora_jax.hf import load_hf
from mora_jax.hf.safetensors import read_headers


def with_header(folder, header, data=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64]}}, "header describes"),
        ({"w": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 0]}}, "do not fit its shape"),
        ({"w": {"dtype": "F32", "shape": [0], "data_offsets": [0]}}, "no valid data_offsets for 'w'"),
        ({"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, None]}}, "no valid data_offsets for 'w'"),
        ({"w": {"dtype": "F32", "shape": [2**80], "data_offsets": [0, 0]}}, "no valid shape for 'w'"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}, "no valid shape for 'w'"),
        ({"w": {"dtype": "F32", "shape": "x"}}, "no valid shape for 'w'"),
        ({"w": []}, "no valid shape for 'w'"),
        ({"w": {"dtype": ["F32"], "shape": [0]}}, r"is of type \['F32'\]; only F32"),
        ([], "its header is not a JSON object"),
        (b"{" * 50_000, "is not JSON"),
        (b"[" * 50_000, "is not JSON"),
    ],
)
def test_headers_are_refused_before_memory_is_taken(folder, header, message):
    with_header(folder, header)
    with pytest.raises(InputError, match=message):
        load_hf(folder)


@pytest.mark.parametrize("offsets", [(0, 0), (1, 5), (-4, 8), (2**70, 4)], ids=str)
def test_gaps_and_overlaps_are_refused(folder, offsets):
    """The sizes fit, but a tensor would be read from the bytes of another one or from outside the file."""
    places = {
        f"w{i}": {"dtype": "F32", "shape": [1], "data_offsets": [o, o + 4]} for i, o in enumerate(offsets)
    }
    with_header(folder, places, bytes(8))
    with pytest.raises(InputError, match="does not begin where the tensor before it ends"):
        load_hf(folder)


def test_a_header_of_absurd_length_is_refused(folder):
    (folder / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="its header cannot be that long"):
        load_hf(folder)


def test_damaged_weights_are_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        load_hf(folder)
    file.unlink()
    with pytest.raises(
        InputError, match=r"neither .* Pickles \(.bin, .pt\) can run code .*; to convert them: "
    ):
        load_hf(folder)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n")
    with pytest.raises(InputError, match="is a Git LFS pointer: run git lfs pull"):
        load_hf(folder)


def test_a_file_that_shrinks_while_it_is_read_is_refused(folder):
    file = epath.Path(folder / "model.safetensors")
    tensor = read_headers(epath.Path(folder))["model.norm.weight"]
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(tensor.start + 4)
    with pytest.raises(InputError, match=f"{file} is damaged: it ends within a tensor"):
        tensor.rows(0, 32)


def test_a_pipe_is_refused_without_waiting(folder):
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(InputError, match=name):
            load_hf(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hosts", "a/b", "..", ""])
def test_an_index_that_leaves_the_folder_is_refused(sharded, name):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(InputError, match="not a file of this folder"):
        load_hf(sharded)


@pytest.mark.parametrize("name", ["a\0.safetensors", "x" * 300, "model.safetensors\n", "модель"])
def test_an_index_with_an_odd_file_name_is_refused(sharded, name):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(InputError, match="not a file of this folder"):
        load_hf(sharded)


def test_an_index_without_a_map_is_refused(sharded):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {"x": 1}}')
    with pytest.raises(InputError, match="weight_map"):
        load_hf(sharded)


def test_missing_and_repeated_shards_are_refused(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    content = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(InputError, match="which another file of the folder holds too"):
        load_hf(sharded)
    second.write_bytes(content)
    first.unlink()
    with pytest.raises(InputError, match=f"{first.name} is missing"):
        load_hf(sharded)
