"""How well predicted scores agree with labels, with bootstrap confidence intervals over clusters of examples.

Correlations are undefined for constant predictions or labels: they are NaN then, with a note that says why.
docs/mathematics.md defines the metrics and intervals.
"""

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from real_megatron.evaluation.weighted import CELLS, Agreement, Array

LOWER_IS_BETTER = ("mse", "mae")
LEVEL = 0.95
ROUNDING = 1e-12
"""Difference of metrics that float64 sums in another order can make."""
Groups = Sequence[Hashable] | None


@dataclass(frozen=True)
class Estimate:
    """A metric and its 95 % bootstrap interval: BCa, or percentile where the note says so."""

    value: float
    low: float
    high: float
    note: str = ""
    """Why the value or the interval is NaN, or on what the interval rests if not on BCa and all resamples."""


def agreement(
    predictions: ArrayLike,
    labels: ArrayLike,
    scale_values: Sequence[float],
    resamples: int = 1000,
    seed: int = 0,
    clusters: Groups = None,
    within: Groups = None,
) -> dict[str, Estimate]:
    """Every metric of `NAMES` for predictions [n] and labels [n]; with `within` also those of `WITHIN`.

    pearson, spearman (average ranks), kendall (tau-b), mse, mae, and accuracy: the share of predictions whose nearest
    value of the scale is the label's (of two equally near ones the first). `within` [n] names each example's group:
    pearson_within and so on are the means, over the groups where it is defined, of the correlation in the group.

    The intervals are bias-corrected and accelerated (BCa; Efron 1987, scipy.stats.bootstrap) and resample clusters with
    replacement: all examples of one value of `clusters` [n] together, by default each example by itself. Where a
    resample has no correlation, or BCa is undefined, the interval is that of the percentiles, with a note; of a single
    cluster there is none. The same seed and clusters give the same resamples. Raises ValueError for unequal lengths, no
    examples, or NaN.
    """
    x, y = _checked(predictions, labels)
    metrics = Agreement(x, y, scale_values, _numbers(within, len(y)))
    return _estimates(metrics.names, metrics, [metrics], clusters, len(y), resamples, seed)


def paired_difference(
    predictions: ArrayLike,
    baseline: ArrayLike,
    labels: ArrayLike,
    scale_values: Sequence[float],
    resamples: int = 1000,
    seed: int = 0,
    clusters: Groups = None,
    within: Groups = None,
) -> dict[str, Estimate]:
    """metric(predictions) − metric(baseline) on the same examples [n]; both are resampled together, so the interval
    is that of the difference. Otherwise as `agreement`."""
    x, y = _checked(predictions, labels)
    b, _ = _checked(baseline, labels)
    new, old = (Agreement(a, y, scale_values, _numbers(within, len(y))) for a in (x, b))
    return _estimates(new.names, lambda w: new(w) - old(w), [new, old], clusters, len(y), resamples, seed)


def _estimates(
    names: Sequence[str],
    statistic: Callable[[Array], Array],
    parts: Sequence[Agreement],
    clusters: Groups,
    n: int,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """statistic: weights [resamples, n] → [names, resamples]; parts: what it is made of, which say why it is NaN."""
    numbers = _numbers(clusters, n)
    members = np.arange(n) if numbers is None else numbers
    values = statistic(np.ones((1, n)))
    whys = [next((why for part in parts if (why := part.why(name))), "") for name in names]
    notes = [next((note for part in parts if (note := part.note(name))), "") for name in names]
    if (count := int(members.max()) + 1) < 2:
        one = "one example only" if n == 1 else "one cluster only"
        return {
            name: Estimate(float(value), math.nan, math.nan, why or f"{one}: no interval")
            for name, value, why in zip(names, values[:, 0], whys, strict=True)
        }
    replicates, low, high = _bootstrap(statistic, values, members, count, resamples, seed)
    found = {}
    for i, name in enumerate(names):
        if whys[i]:
            found[name] = Estimate(math.nan, math.nan, math.nan, whys[i])
            continue
        interval, note = _interval(float(values[i, 0]), replicates[i], float(low[i]), float(high[i]))
        found[name] = Estimate(float(values[i, 0]), *interval, "; ".join(filter(None, [notes[i], note])))
    return found


def _bootstrap(
    statistic: Callable[[Array], Array],
    values: Array,
    members: NDArray[np.int64],
    count: int,
    resamples: int,
    seed: int,
) -> tuple[Array, Array, Array]:
    """Replicates [names, resamples] and the ends of the BCa intervals [names], NaN where undefined; values [names, 1]:
    the statistic of the data."""

    def of(drawn: NDArray[np.int64], axis: int) -> Array:
        rows = drawn.reshape(-1, drawn.shape[-1])
        offsets = np.arange(len(rows))[:, None] * count
        draws = np.bincount((rows + offsets).ravel(), minlength=len(rows) * count).reshape(len(rows), count)
        result = statistic(draws[:, members].astype(np.float64))
        # Replicates that equal the value but for rounding count as equal, or the bias correction would be a matter of
        # the last bits.
        result = np.where(np.abs(result - values) <= ROUNDING, values, result)
        return result if drawn.ndim > 1 else result[:, 0]

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of degenerate data: the notes say it, metric by metric
        result = stats.bootstrap(
            (np.arange(count),),
            of,
            n_resamples=resamples,
            batch=max(1, CELLS // len(members)),
            vectorized=True,
            confidence_level=LEVEL,
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    return result.bootstrap_distribution, result.confidence_interval.low, result.confidence_interval.high


def _interval(value: float, replicates: Array, low: float, high: float) -> tuple[tuple[float, float], str]:
    """The BCa interval where it is defined, else that of the percentiles, and a note."""
    finite = replicates[np.isfinite(replicates)]
    # With all resamples on one side the bias correction is infinite, and the ends scipy gives are an extreme resample.
    sided = bool((finite > value + ROUNDING).all() or (finite < value - ROUNDING).all())
    if math.isfinite(low) and math.isfinite(high) and len(finite) == len(replicates) and not sided:
        return (low, high), ""
    if not len(finite):
        return (math.nan, math.nan), f"interval from 0 of {len(replicates)} resamples"
    if len(finite) < len(replicates):
        note = f"interval from {len(finite)} of {len(replicates)} resamples, of percentiles: BCa needs them all"
    elif np.ptp(finite) == 0 and not sided:
        note = ""  # every interval is this one value
    else:
        note = (
            "interval of percentiles: BCa is undefined, since all resamples lie on one side of the value, or leaving "
            "out one cluster leaves nothing to compute"
        )
    ends = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return (float(ends[0]), float(ends[1])), note


def _numbers(groups: Groups, n: int) -> NDArray[np.int64] | None:
    """Groups as numbers from 0, in order of appearance."""
    if groups is None:
        return None
    if len(groups) != n:
        raise ValueError(f"{len(groups)} groups for {n} examples")
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(group, len(known)) for group in groups])


def _checked(predictions: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    x, y = np.asarray(predictions, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"predictions {x.shape} and labels {y.shape} must be two lists of one length")
    if not len(x):
        raise ValueError("no predictions to compare with labels")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("predictions and labels must be finite numbers")
    return x, y
