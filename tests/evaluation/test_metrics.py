"""Agreement metrics against scipy and hand-computed values; bootstrap replicates against scipy on each resample."""

import math

import numpy as np
import pytest
from scipy import stats

from real_megatron.evaluation import left_out, weighted
from real_megatron.evaluation.metrics import agreement, paired_difference
from real_megatron.evaluation.weighted import CORRELATIONS, NAMES, WITHIN, Agreement

SCALE = [1.0, 2.0, 3.0, 4.0, 5.0]


def data(n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels with ties and predictions that follow them loosely, some tied."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(1, 6, n).astype(float)
    return np.round(np.clip(labels + rng.normal(0, 1.2, n), 1, 5), 1), labels


def by_scipy(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    return {
        "pearson": stats.pearsonr(x, y).statistic,
        "spearman": stats.spearmanr(x, y).statistic,
        "kendall": stats.kendalltau(x, y).statistic,
        "mse": float(np.mean((x - y) ** 2)),
        "mae": float(np.mean(np.abs(x - y))),
        # np.round would round halves to even; the nearest value of the scale is the lower one.
        "accuracy": float(np.mean(np.ceil(x - 0.5) == y)),
    }


# float64 sums of 40 numbers in another order: 1e-12.
def test_point_values_are_scipys() -> None:
    x, y = data()
    expected = by_scipy(x, y)
    found = agreement(x, y, SCALE, resamples=10)
    assert set(found) == set(NAMES)
    for name in NAMES:
        assert found[name].value == pytest.approx(expected[name], abs=1e-12), name
        assert found[name].note == ""


def test_by_hand() -> None:
    found = agreement([1.0, 2.0, 4.0], [1.0, 3.0, 2.0], SCALE, resamples=1)
    # Deviations (-4/3, -1/3, 5/3) and (-1, 1, 0): covariance sum 1, norms sqrt(42/9) and sqrt(2).
    assert found["pearson"].value == pytest.approx(1 / math.sqrt(42 / 9 * 2))
    assert found["spearman"].value == pytest.approx(0.5)
    assert found["kendall"].value == pytest.approx(1 / 3)  # two concordant pairs, one discordant
    assert found["mse"].value == pytest.approx(5 / 3) and found["mae"].value == 1.0
    assert found["accuracy"].value == pytest.approx(1 / 3)


def test_a_label_half_way_between_scores_belongs_to_the_first() -> None:
    """Also where float64 has it nearer to the second: 0.6 - 0.55 is less than 0.55 - 0.5."""
    labels, tenths = [0.15, 0.55, 0.85], [k / 10 for k in range(1, 11)]
    assert agreement([0.1, 0.5, 0.8], labels, tenths, resamples=1)["accuracy"].value == 1.0
    assert agreement([0.2, 0.6, 0.9], labels, tenths, resamples=1)["accuracy"].value == 0.0


@pytest.mark.parametrize("cells", [weighted.CELLS, 130])
def test_every_replicate_is_the_metric_of_its_resample(monkeypatch, cells) -> None:
    """Also where memory is bounded to three rows of pairs at a time, and where some resamples leave out much."""
    monkeypatch.setattr(weighted, "CELLS", cells)
    x, y = data()
    weights = np.random.default_rng(3).integers(0, 3, size=(20, 40)).astype(float)
    replicates = dict(zip(NAMES, Agreement(x, y, SCALE)(weights), strict=True))
    for b, row in enumerate(weights.astype(int)):
        expected = by_scipy(np.repeat(x, row), np.repeat(y, row))
        for name in NAMES:
            assert replicates[name][b] == pytest.approx(expected[name], abs=1e-12), (name, b)


def test_intervals_are_scipys_bca_over_clusters() -> None:
    """The statistic written as plainly as can be: the examples of the drawn clusters, one resample at a time."""
    x, y = data(60)
    clusters = [f"c{i % 23}" for i in range(60)]
    rows = [np.flatnonzero(np.array(clusters) == f"c{c}") for c in range(23)]
    within = [i % 2 for i in range(60)]

    def plain(drawn) -> list[float]:
        own = np.concatenate([rows[c] for c in drawn])
        halves = [own[own % 2 == k] for k in (0, 1)]
        each = [by_scipy(x[half], y[half]) for half in halves]
        share = [len(half) / 30 for half in halves]  # a group counts by how often its rows were drawn on average
        return [
            *by_scipy(x[own], y[own]).values(),
            *(np.average([e[m] for e in each], weights=share) for m in CORRELATIONS),
        ]

    def statistic(drawn, axis):
        return np.apply_along_axis(plain, -1, drawn).swapaxes(0, -1) if drawn.ndim > 1 else np.array(plain(drawn))

    expected = stats.bootstrap(
        (np.arange(23),), statistic, n_resamples=60, method="BCa", vectorized=True, rng=np.random.default_rng(4)
    ).confidence_interval
    found = agreement(x, y, SCALE, 60, 4, clusters, within)
    assert list(found) == [*NAMES, *WITHIN]
    # float64 sums in another order, 1e-12; an end that moves to the next of 60 resamples would show as 1e-3.
    for estimate, low, high in zip(found.values(), expected.low, expected.high, strict=True):
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-10) and not estimate.note
    assert agreement(x, y, SCALE, 60, 4, clusters, within) == found != agreement(x, y, SCALE, 60, 5, clusters, within)


def left_out_cases() -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]]:
    """Predictions, labels, clusters, groups: many ties, no ties, equal examples left, and one cluster with all the
    spread."""
    rng, (x, y) = np.random.default_rng(7), data(45)
    each, few = np.arange(45), rng.permutation(np.arange(45) % 11)
    far, flat = x.copy(), y.copy()
    far[3], flat[:] = 1e7, 4.0
    flat[5] = 1.0
    return [
        ("each", x, y, each, None),
        ("clusters", x, y, few, None),
        ("no ties", rng.normal(size=45), rng.normal(size=45), few, None),
        ("groups across clusters", x, y, few, np.arange(45) % 4),
        ("groups of clusters", x, y, few, few % 3),
        ("a group that is a cluster", x, y, few, np.where(few == 2, 1, 0)),
        ("far away", far, y, each, None),
        ("labels equal without one", x, flat, each, np.arange(45) % 2),
        ("two clusters", x, y, np.arange(45) % 2, None),
    ]


@pytest.mark.parametrize("block", [left_out.BLOCK, 100])
@pytest.mark.parametrize("case", left_out_cases(), ids=lambda case: case[0])
def test_metrics_without_a_cluster_are_those_of_the_rest(monkeypatch, case, block) -> None:
    """Against the same metrics with a weight of 0 for the cluster, which another test compares with scipy's."""
    monkeypatch.setattr(left_out, "BLOCK", block)
    _, x, y, members, within = case
    metrics = Agreement(x, y, SCALE, within)
    rest = np.stack([members != c for c in range(members.max() + 1)]).astype(float)
    # float64 sums of 45 numbers in another order, 1e-12; of squares to 1e14, as much of their size.
    np.testing.assert_allclose(
        left_out.agreement_without(metrics, members), metrics(rest), rtol=1e-12, atol=1e-12, equal_nan=True
    )


def test_copies_of_examples_are_no_further_evidence() -> None:
    """Four copies of each example as clusters say what the examples say; as single examples they would halve widths."""
    x, y = data(50)
    copies, names = (np.repeat(x, 4), np.repeat(y, 4)), np.repeat(np.arange(50), 4).tolist()
    single, clustered = agreement(x, y, SCALE, 200), agreement(*copies, SCALE, 200, clusters=names)
    for name in NAMES:
        a, b = single[name], clustered[name]
        assert (b.value, b.low, b.high) == pytest.approx((a.value, a.low, a.high), abs=1e-12), name
    wrong = agreement(*copies, SCALE, 200)["pearson"]
    assert wrong.high - wrong.low < 0.7 * (single["pearson"].high - single["pearson"].low)


def test_correlation_within_groups_by_hand() -> None:
    """Two groups of opposite order and one without any: pooled, their levels alone correlate."""
    x, y = [1.0, 2, 3, 11, 12, 14, 5, 6], [1.0, 2, 3, 14, 12, 11, 4, 4]
    found = agreement(x, y, SCALE, 20, within=list("aaabbbcc"))
    second = stats.pearsonr(x[3:6], y[3:6]).statistic
    assert found["pearson_within"].value == pytest.approx((1 + second) / 2, abs=1e-12)
    assert found["spearman_within"].value == found["kendall_within"].value == pytest.approx(0, abs=1e-12)
    assert found["pearson"].value > 0.9 and "mean over 2 of 3 groups" in found["pearson_within"].note
    flat = agreement([1.0, 1, 2, 2], [1.0, 2, 3, 4], SCALE, 20, within=list("aabb"))["pearson_within"]
    assert math.isnan(flat.value) and flat.note == "all predictions or all labels are equal in each group"


def test_where_bca_is_undefined_the_interval_is_of_percentiles_and_says_so() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    perfect = agreement(x, y, SCALE, 50)["mse"]
    assert (perfect.value, perfect.low, perfect.high, perfect.note) == (0.0, 0.0, 0.0, "")  # no other is possible
    one_sided = agreement(*data(), SCALE, 1)["mse"]
    assert "interval of percentiles: BCa is undefined" in one_sided.note and math.isfinite(one_sided.low)
    single = agreement([1.0, 2.0, 3.0], [1.0, 2.0, 4.0], SCALE, clusters=["a"] * 3)
    assert all(e.note == "one cluster only: no interval" and math.isnan(e.low) for e in single.values())
    assert single["mse"].value == pytest.approx(1 / 3)


def test_the_interval_of_pearson_is_fishers() -> None:
    """For bivariate normal data the bootstrap agrees with Fisher's z interval (n = 2000, 2000 resamples: ends are known
    to about 5 % of the width)."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=2000)
    x = 0.6 * y + 0.8 * rng.normal(size=2000)
    found = agreement(x, y, SCALE, 300)["pearson"]
    z, half = math.atanh(found.value), 1.96 / math.sqrt(1997)
    width = math.tanh(z + half) - math.tanh(z - half)
    assert found.low == pytest.approx(math.tanh(z - half), abs=0.2 * width)
    assert found.high == pytest.approx(math.tanh(z + half), abs=0.2 * width)


@pytest.mark.parametrize(
    ("x", "y", "note"),
    [
        ([3.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], "all predictions are equal"),
        ([0.1 + 0.2] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], "all predictions are equal"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], [2.0] * 5, "all labels are equal"),
        ([1.0], [1.0], "one example only"),
    ],
)
def test_constants_have_no_correlation(x, y, note) -> None:
    found = agreement(x, y, SCALE, 50)
    for name in NAMES:
        if name in CORRELATIONS:
            assert math.isnan(found[name].value) and math.isnan(found[name].low) and found[name].note == note
        else:
            assert math.isfinite(found[name].value)
            assert found[name].note == ("one example only: no interval" if len(x) == 1 else "")


def test_resamples_without_correlation_are_counted() -> None:
    found = agreement([1.0, 1.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0, 2.0], SCALE, 1000)
    # All five draws equal, from the four or the one: 4^5 + 1 of 5^5. Three standard errors.
    kept = int(found["pearson"].note.removeprefix("interval from ").split()[0])
    assert kept / 1000 == pytest.approx(1 - (4**5 + 1) / 5**5, abs=0.045)
    assert found["pearson"].value == pytest.approx(1.0) and found["pearson"].low == pytest.approx(1.0)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_of_few_examples_or_clusters_there_is_no_interval(n: int) -> None:
    """A perfect order of 4 is chance in 2 of 4! cases, more than 5 %: an interval without width would deny it."""
    labels = [float(i + 1) for i in range(n)]
    found = agreement(labels, labels, SCALE, 50)
    assert all(math.isnan(e.low) and math.isnan(e.high) for e in found.values())
    assert {e.note for e in found.values()} == {f"{n} examples: too few for an interval"}
    assert found["pearson"].value == pytest.approx(1.0) and found["mse"].value == 0.0
    x, y = data(20)
    clustered = agreement(x, y, SCALE, 50, clusters=[i % n for i in range(20)])
    assert all(math.isnan(e.low) and e.note == f"{n} clusters: too few for an interval" for e in clustered.values())
    assert not any(math.isnan(e.low) for e in agreement(x, y, SCALE, 50, clusters=[i % 5 for i in range(20)]).values())
    assert all(math.isnan(e.low) for e in paired_difference(labels, labels[::-1], labels, SCALE, 50).values())


def test_paired_differences_use_the_same_resamples() -> None:
    x, y = data(100)
    worse = np.clip(x + np.random.default_rng(5).normal(0, 2, 100), 1, 5)
    found = paired_difference(x, worse, y, SCALE, 300)
    a, b = agreement(x, y, SCALE, 300), agreement(worse, y, SCALE, 300)
    for name in NAMES:
        assert found[name].value == a[name].value - b[name].value
    assert found["pearson"].low > 0 and found["mse"].high < 0
    same = paired_difference(x, x, y, SCALE, 300)
    assert all((e.value, e.low, e.high) == (0.0, 0.0, 0.0) for e in same.values())


def test_what_cannot_be_compared_is_refused() -> None:
    for x, y, message in (
        ([1.0], [1.0, 2.0], "one length"),
        ([], [], "no predictions"),
        ([math.nan, 1.0], [1.0, 2.0], "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            agreement(x, y, SCALE)
