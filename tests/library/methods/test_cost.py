"""The cost of a byte follows the devices compiled for."""

import jax
import pytest

from mora_jax import sharding
from mora_jax.methods.cost import flops_per_byte


@pytest.mark.parametrize(
    ("kind", "cost"),
    [
        ("NVIDIA H100 80GB HBM3", 250),
        ("NVIDIA H200", 175),
        ("TPU v5 lite", 205),
        ("TPU v5", 141),
        ("TPU v6 lite", 476),
        ("cpu", 250),
        ("a device of tomorrow", 250),
    ],
)
def test_the_kind_of_device_gives_the_cost(kind, cost, monkeypatch):
    monkeypatch.setattr(sharding, "device_kind", lambda: kind)
    assert flops_per_byte() == cost


def test_the_ambient_mesh_gives_the_kind():
    assert sharding.device_kind() == ""
    with jax.set_mesh(sharding.make_mesh(1)):
        assert sharding.device_kind() == jax.devices()[0].device_kind
