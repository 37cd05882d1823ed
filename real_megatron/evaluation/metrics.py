"""How well predicted scores agree with labels, with bootstrap confidence intervals.

Correlations are undefined for constant predictions or labels: they are NaN then, with a note that says why.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]

NAMES = ("pearson", "spearman", "kendall", "mse", "mae", "accuracy")
LOWER_IS_BETTER = ("mse", "mae")
CORRELATIONS = ("pearson", "spearman", "kendall")
LEVEL = 0.95
CELLS = 4_000_000
"""Numbers held at once by a bootstrap array: bounds memory for large test sets."""


@dataclass(frozen=True)
class Estimate:
    """A metric and its 95 % percentile-bootstrap interval over the examples."""

    value: float
    low: float
    high: float
    note: str = ""
    """Why the value or the interval is NaN, or on how many resamples it rests."""


def agreement(
    predictions: ArrayLike, labels: ArrayLike, scale_values: Sequence[float], resamples: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Every metric of `NAMES` for predictions [n] and labels [n].

    pearson, spearman (average ranks), kendall (tau-b), mse, mae, and accuracy: the share of predictions whose nearest
    value of the scale is the label's (of two equally near ones the first).

    The intervals resample examples with replacement; resamples in which a correlation is undefined are left out and
    noted. The same seed and n give the same resamples. Raises ValueError for unequal lengths, no examples, or NaN.
    """
    x, y = _checked(predictions, labels)
    point = _metrics(x, y, scale_values)
    replicates = bootstrap(x, y, scale_values, resamples, seed)
    return {name: _estimate(point[name], replicates[name], _why(name, x, y)) for name in NAMES}


def paired_difference(
    predictions: ArrayLike,
    baseline: ArrayLike,
    labels: ArrayLike,
    scale_values: Sequence[float],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """metric(predictions) − metric(baseline) on the same examples [n]; both are resampled together, so the interval
    is that of the difference."""
    x, y = _checked(predictions, labels)
    b, _ = _checked(baseline, labels)
    new, old = _metrics(x, y, scale_values), _metrics(b, y, scale_values)
    after, before = bootstrap(x, y, scale_values, resamples, seed), bootstrap(b, y, scale_values, resamples, seed)
    return {
        name: _estimate(new[name] - old[name], after[name] - before[name], _why(name, x, y) or _why(name, b, y))
        for name in NAMES
    }


def bootstrap(
    predictions: Array, labels: Array, scale_values: Sequence[float], resamples: int, seed: int
) -> dict[str, Array]:
    """The metrics of `resamples` resamples of the examples: name → [resamples], NaN where undefined."""
    n = len(labels)
    rng = np.random.default_rng(seed)
    hits = _hits(predictions, labels, scale_values)
    pairs = _KendallPairs(predictions, labels)
    parts: dict[str, list[Array]] = {name: [] for name in NAMES}
    for size in _chunks(resamples, n):
        rows = rng.integers(n, size=(size, n))
        x, y = predictions[rows], labels[rows]
        parts["pearson"].append(pearson(x, y))
        parts["spearman"].append(pearson(stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1)))
        parts["kendall"].append(pairs.tau(_counts(rows, n)))
        parts["mse"].append(((x - y) ** 2).mean(-1))
        parts["mae"].append(np.abs(x - y).mean(-1))
        parts["accuracy"].append(hits[rows].mean(-1))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def pearson(x: Array, y: Array) -> Array:
    """Correlation along the last axis; NaN where x or y is constant."""
    constant = (x == x[..., :1]).all(-1) | (y == y[..., :1]).all(-1)
    x = x - x.mean(-1, keepdims=True)
    y = y - y.mean(-1, keepdims=True)
    norm = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    # Deviations so small that their squares vanish are constant to float64, too.
    constant |= norm == 0
    return np.where(constant, math.nan, (x * y).sum(-1) / np.where(constant, 1.0, norm)).clip(-1.0, 1.0)


class _KendallPairs:
    """Kendall's tau-b of many resamples at once.

    With w_i = how often example i was drawn, the sum over drawn pairs of C = sign(Δx)·sign(Δy) is ½ wᵀCw: one matrix
    product, in blocks of rows of C, instead of a sort per resample. The pairs not tied in x are ½ (n² − Σ_g w_g²), with
    w_g the draws among the examples of one x.
    """

    def __init__(self, x: Array, y: Array) -> None:
        self._x, self._y = x, y

    def tau(self, counts: Array) -> Array:
        """counts [resamples, n] → [resamples]; NaN where x or y is constant."""
        n = len(self._x)
        both = np.zeros(len(counts))
        step = max(1, CELLS // n)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            signs = np.sign(self._x[rows, None] - self._x) * np.sign(self._y[rows, None] - self._y)
            both += ((counts[:, rows] @ signs) * counts).sum(-1)
        in_x, in_y = (n**2 - _same(counts, values) for values in (self._x, self._y))
        norm = np.sqrt(in_x * in_y)
        return np.where(norm == 0, math.nan, both / np.where(norm == 0, 1.0, norm))


def _same(counts: Array, values: Array) -> Array:
    """[resamples]: ordered pairs of draws with equal values, each draw with itself included."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=math.nan) != 0)
    return (np.add.reduceat(counts[:, order], starts, axis=-1) ** 2).sum(-1)


def _metrics(x: Array, y: Array, scale_values: Sequence[float]) -> dict[str, float]:
    defined = not _why("pearson", x, y)
    correlate: dict[str, Callable[[], float]] = {
        "pearson": lambda: float(pearson(x, y)),
        "spearman": lambda: float(pearson(stats.rankdata(x), stats.rankdata(y))),
        "kendall": lambda: float(stats.kendalltau(x, y).statistic),
    }
    return {name: compute() if defined else math.nan for name, compute in correlate.items()} | {
        "mse": float(((x - y) ** 2).mean()),
        "mae": float(np.abs(x - y).mean()),
        "accuracy": float(_hits(x, y, scale_values).mean()),
    }


def _hits(x: Array, y: Array, scale_values: Sequence[float]) -> Array:
    values = np.asarray(scale_values, dtype=np.float64)
    nearest = [np.abs(values - a[:, None]).argmin(-1) for a in (x, y)]
    return (nearest[0] == nearest[1]).astype(np.float64)


def _why(name: str, x: Array, y: Array) -> str:
    """Why the metric is undefined; empty when it is defined."""
    if name not in CORRELATIONS:
        return ""
    if len(x) < 2:
        return "one example only"
    return "all predictions are equal" if np.ptp(x) == 0 else "all labels are equal" if np.ptp(y) == 0 else ""


def _estimate(value: float, replicates: Array, why: str) -> Estimate:
    if why:
        return Estimate(math.nan, math.nan, math.nan, why)
    finite = replicates[np.isfinite(replicates)]
    note = "" if len(finite) == len(replicates) else f"interval from {len(finite)} of {len(replicates)} resamples"
    if not len(finite):
        return Estimate(value, math.nan, math.nan, note)
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), note)


def _checked(predictions: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    x, y = np.asarray(predictions, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"predictions {x.shape} and labels {y.shape} must be two lists of one length")
    if not len(x):
        raise ValueError("no predictions to compare with labels")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("predictions and labels must be finite numbers")
    return x, y


def _counts(rows: NDArray[np.int64], n: int) -> Array:
    """[resamples, n]: how often each example occurs in each row of indices."""
    offsets = np.arange(len(rows))[:, None] * n
    return np.bincount((rows + offsets).ravel(), minlength=len(rows) * n).reshape(len(rows), n).astype(np.float64)


def _chunks(resamples: int, n: int) -> Iterator[int]:
    size = max(1, CELLS // n)
    for start in range(0, resamples, size):
        yield min(size, resamples - start)
