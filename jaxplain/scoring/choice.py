"""Which of several explanations is the best one."""

import math
from collections.abc import Sequence


def best(values: Sequence[float]) -> int | None:
    """The place of the highest value, the first among equals; None where all are NaN, which never wins."""
    computed = (place for place, value in enumerate(values) if not math.isnan(value))
    return max(computed, key=values.__getitem__, default=None)
