"""What runs of a study train on."""

import pytest

from mora_jax.errors import InputError
from train.jobs.study.devices import Device, devices, works


def test_a_run_may_take_several_gpus_and_runs_may_share_one():
    found = devices(2, 3, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4"})
    assert [device.name for device in found] == ["GPU 0+1", "GPU 2+3"]
    assert found[1].environment == {
        "CUDA_VISIBLE_DEVICES": "2,3",
        "JAX_PLATFORMS": "cuda,cpu",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3000",
    }
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in devices(1, 1, {"CUDA_VISIBLE_DEVICES": "0"})[0].environment


def test_without_gpus_the_machine_is_the_device():
    assert devices(1, 4, {"JAX_PLATFORMS": "cpu"}) == [Device("this machine")]


@pytest.mark.parametrize("environment", [{"JAX_PLATFORMS": "cpu"}, {"CUDA_VISIBLE_DEVICES": "0"}])
def test_too_few_gpus_are_refused(environment):
    with pytest.raises(InputError, match="--gpus-per-run 2: this machine has"):
        devices(2, 1, environment)


@pytest.mark.slow
def test_a_device_is_probed_by_starting_jax():
    assert works(Device("cpu", {"JAX_PLATFORMS": "cpu"}))
    assert not works(Device("gone", {"JAX_PLATFORMS": "none_such"}))
