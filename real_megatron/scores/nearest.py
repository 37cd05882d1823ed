"""The score of a label that lies between two."""

import itertools
from collections.abc import Sequence

TIE = 1e-3
"""Two scores are equally near to a label where their distances differ by at most this part of the smallest step between
scores. So 0.15 is half-way between 0.1 and 0.2 in float32 and float64, though none of the three is a binary number."""


def nearest_score(values: Sequence[float], number: float) -> int:
    """Index of the value nearest to `number`; the first of two equally near ones (see `TIE`)."""
    distances = [abs(value - number) for value in values]
    steps = (upper - lower for lower, upper in itertools.pairwise(sorted(values)))
    farthest = min(distances) + TIE * min(steps, default=0.0)
    return next(k for k, distance in enumerate(distances) if distance <= farthest)
