"""Whether predictions are right on average, and how they and the score distributions are spread over the scale."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from real_megatron.evaluation.result import Prediction
from real_megatron.evaluation.weighted import Array

BINS = 10
"""Parts of the predictions, of equal size by rank, in which their mean is compared with that of the labels."""
RANGES = 5
MOST_SCORES = 10
"""A scale of more scores is shown as `RANGES` ranges of equal width."""


@dataclass(frozen=True)
class Calibration:
    """How far the predictions of answered examples are from labels on average, in units of the score."""

    bias: float
    """Mean of prediction − label."""
    spread: float
    """Standard deviation of the predictions over that of the labels; NaN for equal labels."""
    error: float
    """Mean over `BINS` parts of the predictions, in order, of |mean prediction − mean label| in the part, weighted by
    its size: the expected calibration error."""
    crps: float
    """Mean over the examples of ∫ (F(s) − 1[s ≥ label])² ds, F the cumulative score distribution, renormalised over the
    scale (continuous ranked probability score). A proper score; of a distribution that is one point |point − label|.
    NaN where the predictions have no distribution."""


def calibration(predictions: Sequence[Prediction], values: Sequence[float]) -> Calibration:
    """Of predictions that have a score, one or more, on a scale with `values`."""
    x, y = _numbers(predictions)
    order = np.argsort(x, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    gaps = [abs(x[part].mean() - y[part].mean()) * len(part) for part in parts]
    deviation = y.std()
    return Calibration(
        bias=float((x - y).mean()),
        spread=float(x.std() / deviation) if deviation else float("nan"),
        error=float(sum(gaps) / len(x)),
        crps=_mean_crps(predictions, y, np.asarray(values)),
    )


def ranges(values: Sequence[float]) -> list[tuple[str, float]]:
    """Names and upper bounds of the parts of a scale that distributions are shown in: each score up to half-way to the
    next, or of more than `MOST_SCORES` scores `RANGES` ranges of equal width."""
    ordered = np.sort(np.asarray(values, float))
    if len(ordered) <= MOST_SCORES:
        bounds = [*(ordered[:-1] + ordered[1:]) / 2, np.inf]
        return [(f"{value:g}", float(bound)) for value, bound in zip(ordered, bounds, strict=True)]
    edges = np.linspace(ordered[0], ordered[-1], RANGES + 1)
    return [
        (f"{low:g} to {high:g}", np.inf if k == RANGES - 1 else float(high))
        for k, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True))
    ]


def shares(numbers: ArrayLike, values: Sequence[float]) -> list[float]:
    """The share of the numbers in each of `ranges(values)`; one on a bound counts to the lower part."""
    bounds = np.array([bound for _, bound in ranges(values)])
    found = np.asarray(numbers, float)
    counts = np.bincount(np.searchsorted(bounds, found, side="left"), minlength=len(bounds))
    return [float(count / max(1, len(found))) for count in counts]


def _numbers(predictions: Sequence[Prediction]) -> tuple[Array, Array]:
    return np.array([p.rail for p in predictions], float), np.array([p.label for p in predictions], float)


def _mean_crps(predictions: Sequence[Prediction], labels: Array, values: Array) -> float:
    distributions = [p.probabilities for p in predictions if p.probabilities is not None]
    if len(distributions) < len(predictions):
        return float("nan")
    return float(_crps(np.array(distributions, float), labels, values).mean())


def _crps(probabilities: Array, labels: Array, values: Array) -> Array:
    """[n] of score distributions [n, S] and labels [n] within the scale."""
    order = np.argsort(values)
    points, p = values[order], probabilities[:, order]
    below = np.cumsum(p / p.sum(1, keepdims=True), axis=1)[:, :-1]
    low, high = points[:-1], points[1:]
    # Of each interval between neighbouring scores the part under the label, and the rest.
    under = np.clip(labels[:, None], low, high) - low
    result: Array = (below**2 * under + (1 - below) ** 2 * (high - low - under)).sum(1)
    return result
