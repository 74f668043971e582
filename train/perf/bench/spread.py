"""Sums up the times of steps."""

from typing import Any

import numpy as np

GIB = 2**30


def spread(milliseconds: np.ndarray) -> dict[str, Any]:
    """Returns the median and the 10th and 90th percentiles of the times, and the number of steps."""
    p10, median, p90 = np.percentile(milliseconds, (10, 50, 90))
    return {"milliseconds": median, "p10": p10, "p90": p90, "steps": len(milliseconds)}
