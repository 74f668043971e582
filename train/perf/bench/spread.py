"""How times are summed up."""

from typing import Any

import numpy as np

GIB = 2**30


def spread(milliseconds: np.ndarray) -> dict[str, Any]:
    """Median, and the times that a tenth of the steps stay under and over."""
    p10, median, p90 = np.percentile(milliseconds, (10, 50, 90))
    return {"milliseconds": median, "p10": p10, "p90": p90, "steps": len(milliseconds)}
