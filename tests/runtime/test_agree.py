"""Processes of one run compare what they were started with."""

import dataclasses

import numpy as np
import pytest

from train.data.rows.info import content_hash, load_info
from train.runtime import agree

SAME = {"steps": 3, "rules": [[".*", "train"]], "version of jax": "0.10.2"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ""),
        ({"steps": 4}, "process 2 of this run has steps 4, but process 0 has 3; start all processes with"),
        (
            {"version of jax": "0.11"},
            "process 2 of this run has version of jax '0.11', but process 0",
        ),
        ({"new": 1}, "process 2 of this run has new 1, but process 0 has None"),
        ({"steps": 4, "rules": []}, "process 2 of this run has steps 4"),
    ],
)
def test_the_first_difference_is_named(changes, expected):
    found = agree.first_difference([SAME, dict(SAME), SAME | changes])
    assert found.startswith(expected)
    assert bool(found) == bool(changes)


def test_variables_that_change_results_are_compared():
    same = {"JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "h:1", "JAX_COMPILATION_CACHE_DIR": "/c"}
    changing = {"XLA_FLAGS": "--a", "LIBTPU_INIT_ARGS": "b", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    found = agree.variables(same | changing | {"HOME": "/h"})
    assert found == {f"environment variable {name}": changing[name] for name in sorted(changing)}


def test_a_single_process_compares_nothing(tiny_data):
    agree.check_data(load_info(str(tiny_data)))
    agree.check_equal(SAME)


def test_other_text_of_as_many_rows_has_another_hash(tiny_data, tmp_path):
    info = load_info(str(tiny_data))
    counts = dict(np.load(tiny_data / "unigram.npz"))
    np.savez_compressed(tmp_path / "unigram.npz", **counts)
    here = dataclasses.replace(info, directory=str(tmp_path))
    assert content_hash(here) == content_hash(info)
    counts["train"][[5, 6]] += [1, -1]
    np.savez_compressed(tmp_path / "unigram.npz", **counts)
    assert content_hash(here) != content_hash(info)
