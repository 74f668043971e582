"""The check before any timing."""

from collections.abc import Iterator

import pytest

from mora_jax.methods import LoRA, MoRA
from mora_jax.models.llama import LlamaConfig
from train.perf.bench import check as checks
from train.perf.bench import measure
from train.perf.bench.check import check, layers, paths
from train.perf.bench.jobs import CheckJob

MODEL = LlamaConfig(100, 32, 48, 1, 4, 2, 16)
METHODS = (MoRA(4, align=8), LoRA(4))


@pytest.fixture(scope="module", autouse=True)
def fewer_layers() -> Iterator[None]:
    """Checks only two of the four products: one of several kernels, and one of a single kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "layers", lambda model: {n: layers(model)[n] for n in ("q/k/v", "down")})
        yield


@pytest.fixture(scope="module")
def found(fewer_layers: None) -> list[checks.Finding]:
    return check(MODEL, METHODS, tokens=64)


@pytest.mark.slow
def test_all_paths_agree_with_the_formula(found: list[checks.Finding]):
    assert [finding.sentence() for finding in found if not finding.passes] == []


@pytest.mark.slow
def test_every_layer_path_type_and_gradient_is_compared(found: list[checks.Finding]):
    assert {f.path for f in found} == set(paths())
    assert {f.dtype for f in found} == {"bfloat16", "float32"}
    assert {f.layer for f in found} == {"q/k/v", "down"}
    assert {f.what for f in found if "LoRA" in f.method} >= {
        "output",
        "input gradient",
        "gradient of a_KR",
        "gradient of b_RD",
    }
    # Without any rounding error, float32 would have been compared with itself.
    assert all(f.error > 1e-4 for f in found if f.dtype == "bfloat16" and f.what == "output")


def test_the_products_of_a_layer():
    sides = {"q/k/v": (32, (32, 16, 16)), "o": (32, (32,)), "gate/up": (32, (48, 48)), "down": (48, (32,))}
    assert layers(MODEL) == sides


def test_a_wrong_adapter_gradient_is_found(monkeypatch: pytest.MonkeyPatch):
    right = MoRA.delta

    def wrong(self: MoRA, arrays, x, d):
        return right(self, arrays, x, d) * 1.02

    monkeypatch.setattr(MoRA, "delta", wrong)
    wrong_ones = [f for f in check(MODEL, [MoRA(3, align=8)], tokens=64) if not f.passes]
    assert {f.path for f in wrong_ones} == {"activation", "compressed"}
    assert {f.what for f in wrong_ones if f.path == "compressed"} == {"gradient of m_RR"}
    assert {f.dtype for f in wrong_ones} == {"bfloat16", "float32"}
    sentence = next(f.sentence() for f in wrong_ones if (f.path, f.dtype) == ("compressed", "float32"))
    assert "by the compressed path in float32: gradient of m_RR is off by 2.0e-02" in sentence


@pytest.mark.slow  # test_dense.py computes with a base in bfloat16
def test_a_bfloat16_base_is_checked():
    assert all(f.passes for f in check(MODEL, [MoRA(4)], tokens=64, base_dtype="bfloat16"))


@pytest.mark.slow
def test_the_largest_error_of_each_path_and_type_is_kept():
    found = measure.checked(CheckJob(MODEL, METHODS[:1], 64, "float32", deterministic=False))
    assert set(found["worst"]) == {f"{path} {dtype}" for path in paths() for dtype in checks.LIMITS}
    assert found["failures"] == []
    assert found["compared"] == 2 * 2 * len(list(paths())) * 3  # layers, types, paths, quantities
    assert 0 < found["worst"]["merged float32"] < 1e-5 < found["worst"]["merged bfloat16"] < 1e-2
