"""Agreement metrics of many weightings of the same examples at once: a resample is how often each example was drawn."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from real_megatron.scores import nearest_score

Array = NDArray[np.float64]

CORRELATIONS = ("pearson", "spearman", "kendall")
NAMES = (*CORRELATIONS, "mse", "mae", "accuracy")
WITHIN = tuple(f"{name}_within" for name in CORRELATIONS)
CELLS = 4_000_000
"""Numbers held at once, of the matrix of pairs or of resamples: bounds memory for large test sets."""


class Agreement:
    """The metrics `names` of predictions x [n] and labels y [n], as a function of weights.

    within: number of each example's group, from 0; with it the metrics `WITHIN` are added

    `errors` [3, n]: what mse, mae and accuracy are the means of; `groups`: the examples of each group, and their
    correlations.
    """

    def __init__(
        self, x: Array, y: Array, scale_values: Sequence[float], within: NDArray[np.int64] | None = None
    ) -> None:
        self.names = NAMES if within is None else (*NAMES, *WITHIN)
        self.x, self.y = x, y
        nearest = [np.array([nearest_score(scale_values, number) for number in a.tolist()]) for a in (x, y)]
        self.errors = np.stack([(x - y) ** 2, np.abs(x - y), nearest[0] == nearest[1]])
        self._pooled = Correlations(x, y)
        rows = [] if within is None else [np.flatnonzero(within == g) for g in range(int(within.max()) + 1)]
        self.groups = [(own, Correlations(x[own], y[own])) for own in rows]
        self._defined = sum(not _constant(x[own], y[own]) for own in rows)

    def __call__(self, weights: Array) -> Array:
        """weights [resamples, n], whole numbers → [names, resamples]; NaN where undefined."""
        errors = self.errors @ weights.T / weights.sum(-1)
        parts = [self._pooled(weights), errors]
        return np.concatenate([*parts, self._within(weights)] if self.groups else parts)

    def why(self, name: str) -> str:
        """Why the metric is undefined; empty when it is defined."""
        if name in WITHIN:
            return "" if self._defined else "all predictions or all labels are equal in each group"
        return _constant(self.x, self.y) if name in CORRELATIONS else ""

    def note(self, name: str) -> str:
        """How many groups a mean over groups is of, where it is not of all."""
        if name not in WITHIN or self._defined == len(self.groups):
            return ""
        return f"mean over {self._defined} of {len(self.groups)} groups; it is undefined in the others"

    def _within(self, weights: Array) -> Array:
        """The mean over groups. A group counts by how often its examples were drawn on average: once in the data, and
        twice where it is itself a cluster that was drawn twice."""
        return mean_over_groups(
            (correlations(weights[:, rows]), weights[:, rows].mean(-1)) for rows, correlations in self.groups
        )


def mean_over_groups(groups: Iterable[tuple[Array, Array]]) -> Array:
    """The mean of each group's correlations [3, resamples] with weights [resamples], where it has them; NaN of none."""
    total, shares = np.zeros(()), np.zeros(())
    for values, weight in groups:
        share = np.where(np.isnan(values), 0.0, weight)
        total, shares = total + share * np.nan_to_num(values), shares + share
    return np.where(shares > 0, total / np.where(shares > 0, shares, 1.0), math.nan)


class Correlations:
    """Pearson, Spearman (average ranks) and Kendall (tau-b).

    Kendall: with w_i the weights, the sum over drawn pairs of C = sign(Δx)·sign(Δy) is ½ wᵀCw: one matrix product, in
    blocks of rows of C, instead of a sort per resample. The pairs not tied in x are ½ (N² − Σ_g w_g²), with N the sum
    of all weights and w_g that of the examples of one x.
    """

    def __init__(self, x: Array, y: Array) -> None:
        self._x, self._y = x, y
        self._ties = _Ties(x), _Ties(y)

    def __call__(self, weights: Array) -> Array:
        """weights [resamples, n] → [3, resamples]; NaN where only one x or one y has a weight."""
        draws = [ties.draws(weights) for ties in self._ties]
        constant = np.any([(own > 0).sum(-1) < 2 for own in draws], axis=0)
        rank_x, rank_y = (ties.ranks(own) for ties, own in zip(self._ties, draws, strict=True))
        n = weights.sum(-1)
        untied = [n**2 - (own**2).sum(-1) for own in draws]
        found = [
            ratio(*moments(self._x, self._y, weights)),
            ratio(*moments(rank_x, rank_y, weights)),
            ratio(self._pairs(weights), *untied),
        ]
        return np.where(constant, math.nan, np.stack(found))

    def _pairs(self, weights: Array) -> Array:
        total = np.zeros(len(weights))
        step = max(1, CELLS // len(self._x))
        for start in range(0, len(self._x), step):
            rows = slice(start, start + step)
            signs = np.sign(self._x[rows, None] - self._x) * np.sign(self._y[rows, None] - self._y)
            total += ((weights[:, rows] @ signs) * weights).sum(-1)
        return total


class _Ties:
    """The examples of each different value."""

    def __init__(self, values: Array) -> None:
        _, self._inverse = np.unique(values, return_inverse=True)
        self._order = np.argsort(values, kind="stable")
        self._starts = np.flatnonzero(np.diff(values[self._order], prepend=math.nan) != 0)

    def draws(self, weights: Array) -> Array:
        """[resamples, values]: the weight of each different value, in rising order."""
        return np.add.reduceat(weights[:, self._order], self._starts, axis=-1)

    def ranks(self, draws: Array) -> Array:
        """[resamples, n]: each example's average rank among what was drawn."""
        return (draws.cumsum(-1) - (draws - 1) / 2)[:, self._inverse]


def moments(x: Array, y: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Weighted sums of xy, xx and yy about the means: [resamples] each."""
    n = np.maximum(weights.sum(-1, keepdims=True), 1.0)
    x = x - (weights * x).sum(-1, keepdims=True) / n
    y = y - (weights * y).sum(-1, keepdims=True) / n
    weighted = weights * x
    return (weighted * y).sum(-1), (weighted * x).sum(-1), (weights * y * y).sum(-1)


def ratio(both: Array, own: Array, other: Array) -> Array:
    norm = np.sqrt(own * other)
    # Deviations so small that their squares vanish are constant to float64, too.
    return np.where(norm == 0, math.nan, both / np.where(norm == 0, 1.0, norm)).clip(-1.0, 1.0)


def _constant(x: Array, y: Array) -> str:
    """Why there is no correlation; empty when there is."""
    if len(x) < 2:
        return "one example only"
    return "all predictions are equal" if np.ptp(x) == 0 else "all labels are equal" if np.ptp(y) == 0 else ""
