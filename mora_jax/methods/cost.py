"""How products and memory traffic compare on the devices that are compiled for."""

from mora_jax import sharding

# Floating-point operations that take as long as moving one byte, by the beginning of the device's kind. The
# H100's was measured: products at about 650 TFLOP/s, sums over groups at about 3 TB/s, and a share for
# launching kernels; any value from 210 to 275 makes the same, fastest choices for the layers of the 250M and
# 1.3B models (docs/performance.md). The others are peak bfloat16 FLOP/s over memory bandwidth of the vendor's
# data sheet, times 0.85, the factor between data sheet and measurement of the H100.
_FLOPS_PER_BYTE = {
    "NVIDIA H100": 250.0,
    "NVIDIA H200": 175.0,  # 989 TFLOP/s, 4.8 TB/s
    "NVIDIA A100": 130.0,  # 312 TFLOP/s, 2.0 TB/s
    "TPU v4": 190.0,  # 275 TFLOP/s, 1.2 TB/s
    "TPU v5 lite": 205.0,  # v5e: 197 TFLOP/s, 0.82 TB/s
    "TPU v5e": 205.0,
    "TPU v5": 141.0,  # v5p: 459 TFLOP/s, 2.77 TB/s
    "TPU v6": 476.0,  # v6e: 918 TFLOP/s, 1.64 TB/s
}
_ELSEWHERE = 250.0


def flops_per_byte() -> float:
    """Returns the operations that take as long as moving one byte, for the devices compiled for.

    The ambient mesh says which they are. Unknown kinds and CPUs get the value measured on an H100.
    """
    kind = sharding.device_kind()
    known = (cost for name, cost in _FLOPS_PER_BYTE.items() if kind.startswith(name))
    return next(known, _ELSEWHERE)
