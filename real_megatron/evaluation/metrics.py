"""How well predicted scores agree with labels, with bootstrap confidence intervals over clusters of examples.

Correlations are undefined for constant predictions or labels: they are NaN then, with a note that says why.
docs/mathematics.md defines the metrics and intervals.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from real_megatron.evaluation.left_out import agreement_without
from real_megatron.evaluation.weighted import CELLS, Agreement, Array

LOWER_IS_BETTER = ("mse", "mae")
LEVEL = 0.95
ROUNDING = 1e-12
"""Difference of metrics that float64 sums in another order can make."""
FEWEST = 5
"""Fewest clusters with an interval. Of n examples even a perfect order, or its reverse, comes by chance with
probability 2/n!, of 4 in 8 % of all cases: resampling cannot show it (of 2 examples every correlation is 1 or −1), and
its interval would be of no width."""
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
    resample has no correlation, or BCa is undefined, the interval is that of the percentiles, with a note; of fewer
    than 5 clusters there is none (`FEWEST`). The same seed and clusters give the same resamples. Raises ValueError for
    unequal lengths, no examples, or NaN.
    """
    x, y = _checked(predictions, labels)
    metrics = Agreement(x, y, scale_values, _numbers(within, len(y)))
    return _estimates([metrics], clusters, len(y), resamples, seed)


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
    return _estimates([new, old], clusters, len(y), resamples, seed)


def _estimates(
    parts: Sequence[Agreement],
    clusters: Groups,
    n: int,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """parts: one judge, or the two whose difference is estimated."""
    names = parts[0].names
    numbers = _numbers(clusters, n)
    members = np.arange(n) if numbers is None else numbers
    values = _difference([part(np.ones((1, n))) for part in parts])
    whys = [next((why for part in parts if (why := part.why(name))), "") for name in names]
    notes = [next((note for part in parts if (note := part.note(name))), "") for name in names]
    if (count := int(members.max()) + 1) < FEWEST:
        unit = "example" if count == n else "cluster"
        few = f"{count} {unit}s: too few for an interval" if count > 1 else f"one {unit} only: no interval"
        return {
            name: Estimate(float(value), math.nan, math.nan, why or "; ".join(filter(None, [note, few])))
            for name, value, why, note in zip(names, values[:, 0], whys, notes, strict=True)
        }
    with np.errstate(all="ignore"):  # of degenerate data: the notes say it, metric by metric
        replicates = _near(values, _replicates(parts, members, count, resamples, seed))
        left_out = _near(values, _difference([agreement_without(part, members) for part in parts]))
    found = {}
    for i, name in enumerate(names):
        if whys[i]:
            found[name] = Estimate(math.nan, math.nan, math.nan, whys[i])
            continue
        interval, note = _interval(float(values[i, 0]), replicates[i], left_out[i])
        found[name] = Estimate(float(values[i, 0]), *interval, "; ".join(filter(None, [notes[i], note])))
    return found


def _difference(of: Sequence[Array]) -> Array:
    """What is estimated: of one judge its metrics, of two the first's less the second's."""
    return of[0] - of[1] if len(of) == 2 else of[0]


def _replicates(parts: Sequence[Agreement], members: NDArray[np.int64], count: int, resamples: int, seed: int) -> Array:
    """[names, resamples]: the estimates of the examples of `count` clusters, drawn with replacement."""
    rng, batch = np.random.default_rng(seed), max(1, CELLS // len(members))
    found = []
    for start in range(0, resamples, batch):
        drawn = rng.integers(0, count, (min(batch, resamples - start), count))
        offsets = np.arange(len(drawn))[:, None] * count
        draws = np.bincount((drawn + offsets).ravel(), minlength=drawn.size).reshape(drawn.shape)
        weights = draws[:, members].astype(np.float64)
        found.append(_difference([part(weights) for part in parts]))
    return np.concatenate(found, axis=-1)


def _near(values: Array, found: Array) -> Array:
    """`found` [names, many], in which what equals `values` [names, 1] but for rounding is equal: else the bias
    correction and the acceleration would be a matter of the last bits."""
    return np.where(np.abs(found - values) <= ROUNDING, values, found)


def _bca(value: float, replicates: Array, left_out: Array) -> tuple[float, float]:
    """The ends of the BCa interval, as of scipy.stats.bootstrap. NaN where it is undefined: where a replicate or a
    value without a cluster is NaN, all the latter are equal, or all replicates lie on one side of the value."""
    bias = special.ndtri(((replicates < value).mean() + (replicates <= value).mean()) / 2)
    if not (np.isfinite(replicates).all() and np.isfinite(left_out).all() and np.ptp(left_out) and np.isfinite(bias)):
        return math.nan, math.nan
    deviations = left_out.mean() - left_out
    acceleration = (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5)
    z = bias + special.ndtri([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = np.quantile(replicates, special.ndtr(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


def _interval(value: float, replicates: Array, left_out: Array) -> tuple[tuple[float, float], str]:
    """The BCa interval where it is defined, else that of the percentiles, and a note."""
    low, high = _bca(value, replicates, left_out)
    finite = replicates[np.isfinite(replicates)]
    if math.isfinite(low):
        return (low, high), ""
    if not len(finite):
        return (math.nan, math.nan), f"interval from 0 of {len(replicates)} resamples"
    if len(finite) < len(replicates):
        note = f"interval from {len(finite)} of {len(replicates)} resamples, of percentiles: BCa needs them all"
    elif (finite == value).all():
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
