"""The check that comes before any timing."""

import pytest

from mora_jax.llama import LlamaConfig
from mora_jax.methods import LoRA, MoRA, Rotate
from train.bench import check as checks
from train.bench.check import check, layers, paths

MODEL = LlamaConfig(100, 32, 48, 1, 4, 2, 16)
METHODS = (MoRA(4, align=8), MoRA(2, Rotate(), align=8), LoRA(4))


@pytest.fixture(scope="module")
def found() -> list[checks.Finding]:
    return check(MODEL, METHODS, tokens=64)


def test_all_paths_agree_with_the_formula(found: list[checks.Finding]):
    assert [finding.sentence() for finding in found if not finding.passes] == []


def test_every_layer_path_type_and_gradient_is_compared(found: list[checks.Finding]):
    assert {f.path for f in found} == set(paths())
    assert {f.dtype for f in found} == {"bfloat16", "float32"}
    assert {f.layer for f in found} == {"q/k/v", "o", "gate/up", "down"}
    assert {f.what for f in found if "LoRA" in f.method} >= {
        "output",
        "input gradient",
        "gradient of a_KR",
        "gradient of b_RD",
    }
    # rounding to bfloat16 must show, or float32 was compared with itself
    assert all(f.error > 1e-4 for f in found if f.dtype == "bfloat16")


def test_queries_share_their_product_with_narrower_keys_and_values():
    assert layers(MODEL)["q/k/v"] == (32, (32, 16, 16))


def test_a_wrong_adapter_gradient_is_found(monkeypatch: pytest.MonkeyPatch):
    right = MoRA.delta

    def wrong(self: MoRA, arrays, x, d):
        return right(self, arrays, x, d) * 1.02

    monkeypatch.setattr(MoRA, "delta", wrong)
    wrong_ones = [f for f in check(MODEL, [MoRA(3, align=8)], tokens=64) if not f.passes]
    assert {f.what for f in wrong_ones if f.path == "merged"} == {"gradient of m_RR"}
    assert "gradient of m_RR is off by 2.0e-02" in wrong_ones[-1].sentence()


def test_a_bfloat16_base_is_checked_too():
    assert all(f.passes for f in check(MODEL, [MoRA(4), LoRA(4)], tokens=64, base_dtype="bfloat16"))
