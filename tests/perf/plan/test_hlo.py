"""Collectives found in HLO: in programs compiled here, and in text in the TPU compiler's style."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from train.perf.plan import hlo
from train.perf.plan.hlo import Collective, collectives


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def compiled(function, mesh, *arguments: tuple[tuple[int, ...], P]) -> list[Collective]:
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, p)) for s, p in arguments]
    text = jax.jit(function, out_shardings=NamedSharding(mesh, P())).lower(*shapes).compile().as_text()
    return collectives(text, mesh.shape)


def test_a_sum_over_one_axis(mesh):
    found = compiled(lambda x: x.sum(0), mesh, ((8, 96), P("fsdp")))
    assert found == [Collective("all-reduce", "fsdp", 1, 96 * 4, 96 * 4)]  # 2 (n - 1) / n is 1 for two


def test_a_sum_over_both_axes(mesh):
    found = compiled(lambda x: x.sum(0), mesh, ((8, 96), P(("data", "fsdp"))))
    assert found == [Collective("all-reduce", "data+fsdp", 1, 96 * 4, 96 * 4 * 3 // 2)]


def test_a_gathered_array(mesh):
    found = compiled(lambda x: x * 2, mesh, ((8, 96), P(None, "data")))
    assert found == [Collective("all-gather", "data", 1, 8 * 96 * 4, 8 * 96 * 2)]


def test_a_collective_in_a_loop_counts_once_for_each_run(mesh):
    def repeated(x, w):
        return jax.lax.scan(lambda x, w: (jax.lax.with_sharding_constraint(x @ w, P()), None), x, w)[0]

    x, w = ((4, 16), P()), ((5, 16, 16), P(None, "fsdp", None))
    with jax.set_mesh(mesh):
        found = compiled(
            lambda x, w: jax.lax.scan(lambda x, _: (repeated(x, w), None), x, length=3)[0], mesh, x, w
        )
    assert Collective("all-reduce", "fsdp", 15, 15 * 4 * 16 * 4, 15 * 4 * 16 * 4) in found


def test_a_program_that_sends_nothing(mesh):
    assert compiled(lambda x: x * 2, mesh, ((8, 96), P())) == []


# In the TPU compiler's style

HEAD = "HloModule jit_f, is_scheduled=true\n\n"


def entry(*lines: str) -> str:
    return HEAD + "ENTRY %main.1 (param.0: f32[4]) -> f32[4] {\n" + "".join(f"  {x}\n" for x in lines) + "}\n"


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)  # fmt: skip
def test_notations_of_groups(groups, expected):
    text = f"all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true"
    assert hlo._groups(text, 8) == expected


def test_an_unknown_notation_of_groups_is_refused():
    with pytest.raises(ValueError, match="replica groups"):
        hlo._groups("all-reduce(%x), replica_groups=<0,1>", 2)


def test_tuples_layouts_and_widths():
    text = entry(
        "%a = (bf16[1,384,384]{2,1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[10]{0:T(128)}, pred[3], f32[]{:T(8)})"
        " all-reduce(%p, %q, %r, %s), channel_id=5, replica_groups=[1,4]<=[4], to_apply=%add",
    )
    whole = 384 * 384 * 2 + 10 * 4 + 3 + 4
    assert collectives(text, {"data": 4}) == [
        Collective("all-reduce", "data", 1, whole, round(whole * 2 * 3 / 4))
    ]


@pytest.mark.parametrize(
    ("kind", "outputs", "share"),
    [
        ("reduce-scatter", "(f32[16,8]{1,0}, f32[8]{0})", 3 / 4),
        ("all-reduce", "(f32[64,8]{1,0}, f32[32]{0})", 3 / 2),
        ("all-to-all", "(f32[64,8]{1,0}, f32[32]{0})", 3 / 4),
    ],
)
def test_a_collective_that_a_gpu_starts_counts_its_inputs(kind, outputs, share):
    text = (
        HEAD + "ENTRY %m () -> f32[] {\n"
        f"  %s = ((f32[64,8]{{1,0}}, f32[32]{{0}}), {outputs}) {kind}-start(%x, %y), "
        "channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add\n"
        f"  %d = {outputs} {kind}-done(%s)\n}}\n"
    )
    size = (64 * 8 + 32) * 4
    expected = Collective(kind, "data+fsdp", 1, size, round(size * share))
    assert collectives(text, {"data": 2, "fsdp": 2}) == [expected]


def test_an_all_reduce_in_a_fusion_that_a_gpu_starts():
    """As XLA makes of small sums."""
    fused = (
        "%fused (p: f32[8,4]) -> f32[8,4] {\n  ROOT %r = f32[8,4]{1,0} all-reduce(%p), channel_id=1, "
        "replica_groups=[1,4]<=[4], to_apply=%add\n}\n\n"
    )
    start = "%f = ((f32[8,4]{1,0}), f32[8,4]{1,0}) fusion-start(%x), kind=kCustom, calls=%fused"
    text = entry(start, "%d = f32[8,4]{1,0} fusion-done(%f)").replace(HEAD, HEAD + fused)
    assert collectives(text, {"data": 4}) == [Collective("all-reduce", "data", 1, 128, 192)]


def test_a_collective_that_is_started_and_finished_counts_once():
    text = entry(
        "%s = (f32[32,256]{1,0}, f32[32,256]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=6, "
        "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}",
        "%d = f32[32,256]{1,0} collective-permute-done(%s)",
        "%g = (bf16[8,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%y), channel_id=7, dimensions={0}, "
        "replica_groups={{0,2},{1,3}}",
        "%h = bf16[16,4]{1,0} all-gather-done(%g)",
    )
    assert collectives(text, {"data": 2, "fsdp": 2}) == [
        Collective("collective-permute", "fsdp", 1, 32 * 256 * 4, 32 * 256 * 4),
        Collective("all-gather", "data", 1, 128, 64),
    ]


def test_a_collective_spread_over_fusions_counts_once():
    gather = "f32[8,4]{1,0} all-gather(%p), channel_id=9, dimensions={0}, replica_groups=[1,4]<=[4]"
    fusions = "".join(
        f"%part.{i} (p: f32[2,4]) -> f32[8,4] {{\n  ROOT %g.{i} = {gather}\n}}\n\n" for i in range(3)
    )
    calls = [
        f"%f.{i} = f32[8,4]{{1,0}} fusion(%x), kind=kCustom, calls=%part.{i}, metadata={{}}" for i in range(3)
    ]
    text = entry(*calls).replace(HEAD, HEAD + fusions)
    assert collectives(text, {"fsdp": 4}) == [Collective("all-gather", "fsdp", 1, 128, 96)]


def test_a_fusion_of_all_reduce_and_slice_is_a_reduce_scatter():
    inner = (
        "%all-reduce-scatter.2 (input: f32[512,320]) -> f32[64,320] {\n"
        "  %all-reduce.1 = f32[512,320]{1,0:T(8,128)} all-reduce(%input), channel_id=46, "
        "replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add.clone\n"
        "  ROOT %slice = f32[64,320]{1,0} dynamic-slice(%all-reduce.1, %i, %c)\n}\n\n"
    )
    text = entry("%f = f32[64,320] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2").replace(
        HEAD, HEAD + inner
    )
    whole = 512 * 320 * 4
    assert collectives(text, {"fsdp": 8}) == [Collective("reduce-scatter", "fsdp", 1, whole, whole * 7 // 8)]
    plain = entry(
        "%r = f32[64,320] reduce-scatter(%x), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add"
    )
    assert collectives(plain, {"fsdp": 8}) == collectives(text, {"fsdp": 8})
    # Those of several layers may have one channel.
    layers = entry(
        "%f = f32[64,320] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2\n"
        "  %g = f32[64,320] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3"
    ).replace(HEAD, HEAD + inner + inner.replace("scatter.2", "scatter.3"))
    found = collectives(layers, {"fsdp": 8})
    assert found == [Collective("reduce-scatter", "fsdp", 2, 2 * whole, 2 * whole * 7 // 8)]


LOOP = """%cond (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(24)
  %other = s32[]{:T(128)} constant(7)
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT, metadata={op_name="while/cond/lt"}
}

%body (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = f32[4]{0} all-reduce(%q), channel_id=1, replica_groups=[1,2]<=[2], to_apply=%add
}

"""


def test_the_length_of_a_loop_is_found_in_its_condition():
    loop = "%w = (s32[], f32[4]) while(%t), condition=%cond, body=%body, metadata={}"
    text = entry(loop).replace(HEAD, HEAD + LOOP)
    assert collectives(text, {"data": 2}) == [Collective("all-reduce", "data", 24, 24 * 16, 24 * 16)]
    with pytest.raises(ValueError, match="a loop of unknown length"):
        collectives(re.sub("constant.24.", "parameter(1)", text), {"data": 2})
    silent = re.sub("constant.24.", "parameter(1)", text).replace("all-reduce(%q)", "negate(%q)")
    assert collectives(silent, {"data": 2}) == []


def test_groups_of_one_device_send_nothing():
    text = entry("%a = f32[4]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add")
    assert collectives(text, {"data": 2}) == []


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("nothing", {"data": 2})


def test_axes_follow_the_order_of_the_mesh():
    groups = np.arange(8).reshape(4, 2).T.tolist()
    assert hlo._axes(groups, {"data": 2, "fsdp": 2, "tensor": 2}) == "data+fsdp"
