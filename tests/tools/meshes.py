"""Runs the meshes of `test_meshes.py` on real devices: `python tests/tools/meshes.py`.

Compares each mesh over all devices with the first device alone: the largest relative difference of losses and
gradient norms over 20 updates with a restart in the middle. Products are in full float32.
"""

import sys
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "step")]

from test_meshes import MIXTURES, STEPS, configured, trained  # noqa: E402

LARGEST = 1e-4


def main() -> None:
    """Prints a line for each mesh, and exits with status 1 if a difference is too large."""
    jax.config.update("jax_default_matmul_precision", "highest")
    count, worst = jax.device_count(), 0.0
    print(f"{count} devices: {jax.devices()[0].device_kind}")
    for mixture in MIXTURES:
        for path in ("merged", "activation"):
            config = configured(mixture, STEPS, path)
            one = trained(config, (1, 1, 1))
            for shape in [(count, 1, 1), (1, count, 1), (1, 1, count)]:
                many = trained(config, shape, one)
                worst = max(worst, difference := float(np.max(np.abs(many.scalars / one.scalars - 1))))
                print(
                    f"{mixture}, {path}, {shape}: {difference:.1e}, loss {many.scalars[-1, 0]:.6f}",
                    flush=True,
                )
    sys.exit(worst > LARGEST)


if __name__ == "__main__":
    main()
