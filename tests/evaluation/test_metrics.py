"""Agreement metrics against scipy and hand-computed values; bootstrap replicates against scipy on each resample."""

import math

import numpy as np
import pytest
from scipy import stats

from real_megatron.evaluation import metrics
from real_megatron.evaluation.metrics import NAMES, agreement, bootstrap, paired_difference

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


@pytest.mark.parametrize("cells", [metrics.CELLS, 130])
def test_every_replicate_is_the_metric_of_its_resample(monkeypatch, cells) -> None:
    """Also where memory is bounded to three resamples and three rows of pairs at a time."""
    monkeypatch.setattr(metrics, "CELLS", cells)
    x, y = data()
    replicates = bootstrap(x, y, SCALE, resamples=20, seed=3)
    rng = np.random.default_rng(3)
    rows = np.concatenate([rng.integers(40, size=(size, 40)) for size in metrics._chunks(20, 40)])
    for b, row in enumerate(rows):
        expected = by_scipy(x[row], y[row])
        for name in NAMES:
            assert replicates[name][b] == pytest.approx(expected[name], abs=1e-12), (name, b)


def test_intervals_are_percentiles_and_seeded() -> None:
    x, y = data(200)
    first, again, other = (agreement(x, y, SCALE, 500, seed) for seed in (1, 1, 2))
    assert first == again and first != other
    replicates = bootstrap(x, y, SCALE, 500, 1)
    for name, estimate in first.items():
        low, high = np.quantile(replicates[name], [0.025, 0.975])
        assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=1e-12) and low < estimate.value < high


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
        ([3.0] * 4, [1.0, 2.0, 3.0, 4.0], "all predictions are equal"),
        ([0.1 + 0.2] * 4, [1.0, 2.0, 3.0, 4.0], "all predictions are equal"),
        ([1.0, 2.0, 3.0, 4.0], [2.0] * 4, "all labels are equal"),
        ([1.0], [1.0], "one example only"),
    ],
)
def test_constants_have_no_correlation(x, y, note) -> None:
    found = agreement(x, y, SCALE, 50)
    for name in NAMES:
        if name in metrics.CORRELATIONS:
            assert math.isnan(found[name].value) and math.isnan(found[name].low) and found[name].note == note
        else:
            assert math.isfinite(found[name].value) and found[name].note == ""


def test_resamples_without_correlation_are_counted() -> None:
    found = agreement([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], SCALE, 400)
    # All three draws equal: 3 of 27.
    kept = int(found["pearson"].note.removeprefix("interval from ").split()[0])
    assert kept / 400 == pytest.approx(24 / 27, abs=0.05)
    assert found["pearson"].value == pytest.approx(1.0) and found["pearson"].low == pytest.approx(1.0)


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
