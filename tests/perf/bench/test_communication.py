"""Where the time of a step goes, from kernels of made-up profiles."""

import pytest

from train.perf.bench import communication
from train.perf.bench.communication import timeline
from train.perf.plan.hlo import Collective

REDUCE, GATHER = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(args)", "ncclDevKernel_AllGather_RING_LL(args)"
MS = 1_000_000


def test_communication_is_exposed_where_nothing_else_runs():
    device = [
        ("gemm", (0, 10 * MS)),
        (REDUCE, (6 * MS, 14 * MS)),  # 4 of 8 hidden
        (GATHER, (13 * MS, 16 * MS)),  # overlaps the other: exposed until 16
        ("fusion", (20 * MS, 30 * MS)),
        ("gemm", (22 * MS, 24 * MS)),
    ]
    found = timeline([device], steps=2)
    assert found is not None
    assert (found.computing, found.exposed, found.idle) == (10.0, 3.0, 2.0)
    assert found.communicating == 5.0
    assert found.by_kind == {"all-gather": 1.5, "all-reduce": 4.0}


def test_figures_are_the_mean_over_devices_that_ran_something():
    found = timeline([[("gemm", (0, 4 * MS))], [(REDUCE, (0, 2 * MS))], []], steps=1)
    assert found is not None
    assert (found.computing, found.exposed, found.by_kind) == (2.0, 1.0, {"all-reduce": 1.0})
    assert timeline([[], []], steps=1) is None


@pytest.mark.parametrize(
    ("name", "kind"), [("all-gather-start.3", "all-gather"), ("reduce-scatter.1", "reduce-scatter")]
)
def test_operations_of_a_tpu_go_by_their_hlo_names(name: str, kind: str):
    found = timeline([[(name, (0, MS)), ("fusion.all-gathered", (0, MS))]], steps=1)
    assert found is not None
    assert (found.by_kind, found.exposed) == ({kind: 1.0}, 0.0)


def test_bytes_are_summed_over_axes():
    found = [Collective("all-gather", "fsdp", 1, 4, 3), Collective("all-reduce", "data", 1, 4, 6)]
    found += [Collective("all-gather", "tensor", 1, 8, 7)]
    assert list(communication.by_kind(found).items()) == [("all-gather", 10), ("all-reduce", 6)]


def test_hlo_in_an_unknown_notation_gives_no_figures():
    assert communication.sent("HloModule m\n", {"data": 2}) is None
