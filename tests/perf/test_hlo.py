"""The parser of compiled programs' text."""

import re

import jax
import jax.numpy as jnp
import pytest

from train.perf.hlo import parse

TEXT = """
HloModule jit_step

%inner (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

ENTRY %main (a.1: f32[8]) -> (f32[8], /*index=1*/s8[4]) {
  %a.1 = f32[8]{0:T(8)S(1)} parameter(0), metadata={op_name="a (b c(d))"}
  ROOT %both-1 = (f32[8]{0}, /*index=1*/s8[4]{0}) custom-call(%a.1), calls=%inner
}
"""


def test_instructions_by_name_with_their_types():
    program = parse(TEXT)
    assert list(program.computations) == ["inner", "main"]
    assert program.entry == "main"
    parameter, both = program.computations["main"].values()
    assert list(program.computations["main"]) == ["a.1", "both-1"]
    assert (parameter.opcode, parameter.type) == ("parameter", "f32[8]{0:T(8)S(1)}")
    assert (both.opcode, both.type) == ("custom-call", "(f32[8]{0}, /*index=1*/s8[4]{0})")
    assert both.text == " custom-call(%a.1), calls=%inner"
    assert (both.called("calls"), both.called("body"), parameter.called("calls")) == ("inner", "", "")


def test_every_instruction_of_a_real_program_is_found():
    def looped(x):
        return jax.lax.fori_loop(0, 5, lambda i, y: jnp.sin(y @ y) + i, x)

    text = jax.jit(looped).lower(jnp.ones((4, 4))).compile().as_text()
    program = parse(text)
    assert sum(map(len, program.computations.values())) == len(re.findall(r"^ +\S.* = ", text, re.MULTILINE))
    assert "while" in {i.opcode for inside in program.computations.values() for i in inside.values()}


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing\n")
