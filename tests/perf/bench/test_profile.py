"""The profile of a training step, on a model small enough for a CPU."""

import json

import pytest

from train.perf.bench import profile
from train.perf.bench.cases import SIZES
from train.perf.bench.profile import Profile

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, dict]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XLA_FLAGS", "")  # the profile adds to it
        out = tmp_path_factory.mktemp("profile") / "profile.json"
        found = profile.bench(SIZES["tiny"](), "mora/merged", steps=2, out=str(out))
    return found, json.loads(out.read_text())


def test_the_most_expensive_kernels_come_first_and_their_sums_agree(seen: tuple[Profile, dict]):
    found, written = seen
    times = [kernel.milliseconds for kernel in found.kernels]
    assert times == sorted(times, reverse=True)
    assert times[-1] >= 0
    for what in ("kind", "part", "direction"):
        assert sum(written[what].values()) == pytest.approx(found.busy_milliseconds)
    assert [kernel["milliseconds"] for kernel in written["kernels"]] == times
    # The time of a loop or a call is that of what runs inside.
    assert not any(kernel.op.kind == "control" for kernel in found.kernels)


def test_kernels_are_traced_to_their_source_lines(seen: tuple[Profile, dict]):
    found, _ = seen
    matmuls = [kernel.op for kernel in found.kernels if kernel.op.kind == "matmul"]
    assert {"attention", "mlp", "loss"} <= {op.part for op in matmuls}
    assert {"forward", "backward"} <= {op.direction for op in matmuls}
    assert any(op.source.partition(":")[0].endswith("mora_jax/methods/linear.py") for op in matmuls)
    assert "optimizer" in {kernel.op.part for kernel in found.kernels}


def test_every_layer_counts_in_every_step(seen: tuple[Profile, dict]):
    found, _ = seen
    model = SIZES["tiny"]().config.model
    products = [
        kernel.count
        for kernel in found.kernels
        if kernel.op.kind == "matmul" and kernel.op.part == "mlp" and kernel.op.direction == "forward"
    ]
    # gate, up and down; in float32 no two of them are one product
    assert sum(products) == 3 * model.num_hidden_layers


def test_the_table_has_the_given_number_of_kernels(
    seen: tuple[Profile, dict], capsys: pytest.CaptureFixture[str]
):
    found, _ = seen
    profile.show(found, "mora", top=3)
    shown = capsys.readouterr().out
    assert shown.count("│") == 3 * 9
    assert "ms by part: " in shown
