"""The metrics without each cluster of examples in turn, for the acceleration of BCa intervals, in O(n²)."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from real_megatron.evaluation.weighted import Agreement, Array, Correlations, mean_over_groups, moments, ratio

BLOCK = 500_000
"""Pairs of examples held at once: few enough for a processor's cache."""
CANCELLED = 1e-6
"""Share of a sum of squares that is left, below which a difference of sums is too inaccurate."""

Members = NDArray[np.int64]
"""[n]: the number of each example's cluster, from 0, none left out."""


def agreement_without(metrics: Agreement, members: Members) -> Array:
    """[names, clusters]: `metrics` of the examples that are not in each cluster; NaN where undefined."""
    errors = np.stack([_rest(row, members) for row in metrics.errors]) / (len(members) - np.bincount(members))
    parts = [correlations_without(metrics.x, metrics.y, members), errors]
    if metrics.groups:
        parts.append(mean_over_groups(_group_without(metrics, *group, members) for group in metrics.groups))
    return np.concatenate(parts)


def correlations_without(x: Array, y: Array, members: Members) -> Array:
    """[3, clusters]: Pearson, Spearman (average ranks) and Kendall (tau-b) of x [n] and y [n] without each cluster; NaN
    where one x or one y is left, or none.

    With s_ij = sign(x_i − x_j), an average rank less the mean rank is ½ Σ_j s_ij, also where j runs over what is left:
    the ranks lose the cluster's columns of s. Kendall's sum over pairs, of C_ij = sign(x_i − x_j)·sign(y_i − y_j),
    loses the cluster's rows and columns of C.
    """
    order = np.argsort(members, kind="stable")
    x, y, members = x[order], y[order], members[order]
    sizes = np.bincount(members)
    columns = _cluster_sums(sizes)
    ranks = [stats.rankdata(values) - (len(x) + 1) / 2 for values in (x, y)]
    squares, rows_of, both_of = np.zeros((3, len(sizes))), np.zeros(len(sizes)), np.zeros(len(sizes))
    step = max(1, BLOCK // len(x))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        own = members[rows]
        inside = np.arange(len(own)), own
        signs = [np.sign(values[rows, None] - values) for values in (x, y)]
        concordance = columns(signs[0] * signs[1])
        rows_of += np.bincount(own, concordance.sum(-1), len(sizes))
        both_of += np.bincount(own, concordance[inside], len(sizes))
        a, b = (rank[rows, None] - columns(sign) / 2 for rank, sign in zip(ranks, signs, strict=True))
        a[inside] = b[inside] = 0
        squares += [np.einsum("ic,ic->c", *pair) for pair in ((a, b), (a, a), (b, b))]
    pairs = rows_of.sum() - 2 * rows_of + both_of
    (untied_x, values_x), (untied_y, values_y) = (_ties_without(values, members, sizes) for values in (x, y))
    found = [ratio(*_moments_without(x, y, members, sizes)), ratio(*squares), ratio(pairs, untied_x, untied_y)]
    return np.where((values_x < 2) | (values_y < 2), np.nan, np.stack(found))


def _group_without(
    metrics: Agreement, rows: NDArray[np.int64], correlations: Correlations, members: Members
) -> tuple[Array, Array]:
    """The correlations [3, clusters] of one group, and the share [clusters] of it that is left."""
    count = int(members.max()) + 1
    touched, own = np.unique(members[rows], return_inverse=True)
    values, left = np.repeat(correlations(np.ones((1, len(rows)))), count, axis=-1), np.ones(count)
    values[:, touched] = correlations_without(metrics.x[rows], metrics.y[rows], own)
    left[touched] -= np.bincount(own) / len(rows)
    return values, left


def _cluster_sums(sizes: NDArray[np.int64]) -> Callable[[Array], Array]:
    """[rows, n], columns in the order of their clusters → [rows, clusters]: sums over each cluster's columns."""
    if (sizes == 1).all():
        return lambda values: values
    starts = np.cumsum(sizes) - sizes
    return lambda values: np.add.reduceat(values, starts, axis=-1)


def _moments_without(x: Array, y: Array, members: Members, sizes: NDArray[np.int64]) -> tuple[Array, Array, Array]:
    """Sums of xy, xx and yy about the means of what is left: [clusters] each."""
    x, y = x - x.mean(), y - y.mean()
    products, left = ((x, y), (x, x), (y, y)), np.maximum(len(x) - sizes, 1)
    xy, xx, yy = (_rest(a * b, members) - _rest(a, members) * _rest(b, members) / left for a, b in products)
    # Few clusters can hold nearly all of a sum of squares: their rest is summed about its own mean.
    for c in np.flatnonzero((xx < CANCELLED * (x @ x)) | (yy < CANCELLED * (y @ y))):
        (xy[c],), (xx[c],), (yy[c],) = moments(x, y, (members != c).astype(np.float64)[None])
    return xy, xx, yy


def _rest(values: Array, members: Members) -> Array:
    """Sums of values [n] without each cluster's: [clusters]. No differences, since one may hold nearly all."""
    sums = np.bincount(members, values)
    before, after = sums.cumsum()[:-1], sums[::-1].cumsum()[-2::-1]
    return np.concatenate([[0.0], before]) + np.concatenate([after, [0.0]])


def _ties_without(values: Array, members: Members, sizes: NDArray[np.int64]) -> tuple[Array, Array]:
    """Ordered pairs that are not tied, and different values, of what is left: [clusters] each."""
    _, kinds = np.unique(values, return_inverse=True)
    of_kind = np.bincount(kinds).astype(np.float64)
    cells, inside = np.unique(members * len(of_kind) + kinds, return_counts=True)
    cluster, before = cells // len(of_kind), of_kind[cells % len(of_kind)]
    after = before - inside
    tied = (of_kind**2).sum() + np.bincount(cluster, after**2 - before**2)
    gone = np.bincount(cluster, after == 0).astype(np.float64)
    return (len(values) - sizes) ** 2 - tied, len(of_kind) - gone
