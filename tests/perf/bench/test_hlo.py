"""Operations of compiled programs: their kinds, parts and source lines."""

import jax
import jax.numpy as jnp

from train.perf.bench.hlo import Op, kind_by_name, operations

# ruff: noqa: E501
TEXT = """
HloModule jit_step, is_scheduled=true

FileNames
1 "/home/x/site-packages/flax/scan.py"
2 "/home/x/mora_jax/llama.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=157 end_line=157 column=29 end_column=53}
2 {file_name_id=2 function_name_id=1 line=42 end_line=42 column=29 end_column=53}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=1}

%inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %t = f32[8]{0} transpose(%p), dimensions={0}
}

%fused (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %f = f32[8]{0} fusion(%p.1), kind=kLoop, calls=%inner
}

%adds (p.2: f32[8]) -> f32[8] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %a = f32[8]{0} add(%p.2, %p.2)
}

ENTRY %main (a.1: f32[8]) -> (f32[8], /*index=1*/f32[8]) {
  %a.1 = f32[8]{0} parameter(0)
  %copies = f32[8]{0} fusion(%a.1), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/transpose(jvp(Llama.loss))/Llama.hidden/layers/mlp/slice" stack_frame_id=2}
  %sums = f32[8]{0} fusion(%a.1), kind=kLoop, calls=%adds, metadata={op_name="jit(step)/add" source_file="/home/x/train/step.py" source_line=7}
  %gemm.3 = (f32[8]{0}, s8[4]{0}) custom-call(%sums, %sums), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/jvp(Llama.loss)/Llama.hidden/layers/self_attn/dot_general"}
  %fmha.1 = (f32[8]{0}, /*index=1*/s8[4]{0}) custom-call(%sums), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %while.2 = (s32[], f32[8]{0}) while(%gemm.3), condition=%c, body=%b
  %triton.1 = bf16[8]{0} fusion(%a.1), kind=kCustom, calls=%adds, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  ROOT %out = (f32[8], f32[8]) tuple(%copies, %sums)
}
"""


def test_kinds_parts_and_source_lines_are_found():
    ops = operations(TEXT)
    kinds = {name: ops[name].kind for name in ("copies", "sums", "gemm.3", "fmha.1", "while.2", "triton.1")}
    assert kinds == {
        "copies": "copy",
        "sums": "elementwise",
        "gemm.3": "matmul",
        "fmha.1": "attention",
        "while.2": "control",
        "triton.1": "matmul",
    }
    assert (ops["copies"].part, ops["copies"].direction) == ("mlp", "backward")
    assert (ops["gemm.3"].part, ops["gemm.3"].direction) == ("attention", "forward")
    assert (ops["sums"].part, ops["sums"].direction) == ("optimizer", "update")
    assert ops["sums"].source == "/home/x/train/step.py:7"


def test_a_frame_in_a_library_is_replaced_by_its_caller():
    assert operations(TEXT)["copies"].source == "/home/x/mora_jax/llama.py:42"


def test_the_text_of_a_real_program_is_parsed():
    compiled = jax.jit(lambda x: jnp.tanh(x @ x.T)).lower(jnp.ones((64, 64))).compile()
    ops = operations(compiled.as_text())
    matmuls = [op for op in ops.values() if op.kind == "matmul"]
    assert any(op.op_name.endswith("dot_general") for op in matmuls)
    assert any(op.source.partition(":")[0] == __file__ for op in ops.values())
    assert Op("matmul").part == "unnamed"


def test_a_kernel_of_an_unknown_operation_is_classified_by_its_name():
    kinds = {
        name: kind_by_name(name) for name in ("nvjet_hsh_128x256", "MemcpyD2D", "fmha_fprop_sm90", "loop_add")
    }
    assert list(kinds.values()) == ["matmul", "copy", "attention", "elementwise"]
