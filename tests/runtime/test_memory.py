"""Memory that ran out is one line with what was asked for, what there is and what helps."""

import errno
import re
import types

import jax
import numpy as np
import pytest

from train.cli.explain import explain
from train.console import exits
from train.run.checkpoint import Checkpoints
from train.runtime import memory

ASKED = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes."


def of_xla(words: str = ASKED) -> Exception:
    return jax.errors.JaxRuntimeError(words)


def nested() -> Exception:
    error = ValueError("while evaluating")
    error.__cause__ = of_xla()
    return error


def of_numpy() -> Exception:
    try:
        np.zeros(1 << 50)
    except MemoryError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (of_xla(), "Out of memory while trying to allocate 68.7 GB"),
        (nested(), "Out of memory while trying to allocate 68.7 GB"),
        (of_numpy(), "Unable to allocate 8.00 PiB"),
        (MemoryError(), "no size is known"),
        (OSError(errno.ENOMEM, "Cannot allocate memory", "/x"), "Cannot allocate memory: '/x'"),
        (ValueError(f"opening [os_error_code='{errno.ENOMEM}']"), "opening"),
    ],
    ids=["xla", "nested", "numpy", "bare", "system", "tensorstore"],
)
def test_one_line_and_a_status_of_its_own(error, asked, capsys):
    assert explain(error) == exits.MEMORY
    line = capsys.readouterr().err
    assert re.fullmatch(r"mora: memory ran out: .*; this machine has [0-9.]+ GB; what helps: .*\n", line)
    for part in (asked, "--microbatches", "--compute.remat full", "--eval.batch-size", "--mesh.fsdp"):
        assert part in line


def test_what_a_device_has(monkeypatch):
    stats = {"bytes_limit": 80 * 10**9, "bytes_in_use": 7 * 10**9}
    device = types.SimpleNamespace(device_kind="H100", memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert "; H100 has 80.0 GB, of which 7.0 GB are in use; " in memory.describe(of_xla())


def test_other_things_that_run_out_are_no_memory():
    assert memory.exhausted(of_xla("RESOURCE_EXHAUSTED: too many requests")) is None
    assert memory.exhausted(of_xla("INTERNAL: allocator")) is None
    assert memory.exhausted(OSError(28, "No space left on device")) is None


def test_a_checkpoint_that_memory_cannot_hold_is_not_damaged(tmp_path, monkeypatch):
    def fail(*_):
        raise of_xla()

    with Checkpoints(str(tmp_path)) as saved:
        saved.save(1, {"a": jax.numpy.ones(3)}, {})
        saved.wait()
        monkeypatch.setattr("train.run.checkpoint.ocp.load", fail)
        with pytest.raises(jax.errors.JaxRuntimeError):
            saved.restore(1, {"a": jax.ShapeDtypeStruct((3,), "float32")})


@pytest.mark.parametrize("error", [of_xla(), MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_a_save_that_memory_does_not_suffice_for_is_no_full_disk(error, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("train.run.manifest.seal", fail)
    saved = Checkpoints(str(tmp_path))
    saved.save(1, {"a": jax.numpy.ones(3)}, {})
    with pytest.raises(MemoryError) as caught:
        saved.close()
    assert explain(caught.value) == exits.MEMORY
    line = capsys.readouterr().err
    assert line.startswith(f"mora: memory ran out: {tmp_path}/1 could not be saved: ")
