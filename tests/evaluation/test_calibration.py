"""Calibration against cases worked out by hand, and CRPS against its integral."""

import math

import numpy as np
import pytest

from real_megatron.evaluation.calibration import calibration, ranges, shares
from real_megatron.evaluation.result import Prediction


def predictions(rail: list[float], labels: list[float], p: list[list[float]]) -> list[Prediction]:
    rows = enumerate(zip(rail, labels, p, strict=True))
    return [Prediction(str(i), label, x, x, distribution, []) for i, (x, label, distribution) in rows]


def test_by_hand() -> None:
    found = calibration(predictions([2, 2, 4, 4], [1, 2, 4, 5], [[0.5, 0.5]] * 4), [0, 10])
    # Ten parts of four examples: each example is one.
    assert (found.bias, found.error) == (0, 0.5)
    assert found.spread == pytest.approx(1 / np.std([1, 2, 4, 5]))
    assert math.isnan(calibration(predictions([1, 2], [3, 3], [[1, 0]] * 2), [0, 10]).spread)


def test_an_average_that_is_right_everywhere_has_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat(rng.random(10), 200)
    y = x + np.tile([-0.3, 0.3], 1000)
    found = calibration(predictions(x.tolist(), y.tolist(), [[1.0, 0.0]] * 2000), [-1, 2])
    assert found.error < 1e-12 and abs(found.bias) < 1e-12
    shifted = calibration(predictions((x + 0.2).tolist(), y.tolist(), [[1.0, 0.0]] * 2000), [-1, 2])
    assert shifted.error == pytest.approx(0.2) and shifted.bias == pytest.approx(0.2)


@pytest.mark.parametrize("values", [[1, 2, 3, 4, 5], [5, 1, 2.5], [0, 0.5, 10]])
def test_crps_is_its_integral(values: list[float]) -> None:
    """Of distributions over unordered values, labels on and between scores, masses below one. The grid's step bounds
    the error: F jumps at few places."""
    rng = np.random.default_rng(1)
    low, high, steps = min(values), max(values), 200_000
    grid = low + (np.arange(steps) + 0.5) * (high - low) / steps
    for label in (low, high, values[0], 2.2):
        p = rng.random(len(values)) * 0.2
        q = p / p.sum()
        below = (np.asarray(values)[:, None] <= grid) * q[:, None]
        integral = ((below.sum(0) - (grid >= label)) ** 2).mean() * (high - low)
        found = calibration(predictions([low], [label], [p.tolist()]), values).crps
        assert found == pytest.approx(integral, abs=3 * (high - low) / steps * len(values))


def test_a_point_has_the_absolute_error_as_crps() -> None:
    assert calibration(predictions([4], [1.5], [[0, 0, 0, 1]]), [1, 2, 3, 4]).crps == pytest.approx(2.5)


def test_shares_of_scores_and_of_ranges() -> None:
    assert [name for name, _ in ranges([1, 3, 2])] == ["1", "2", "3"]
    assert shares([0.2, 1.4, 1.6, 2.4, 9], [1, 2, 3]) == [0.4, 0.4, 0.2]
    hundred = [float(k) for k in range(101)]
    assert [name for name, _ in ranges(hundred)] == ["0 to 20", "20 to 40", "40 to 60", "60 to 80", "80 to 100"]
    assert shares([-1, 20, 20.1, 100], hundred) == [0.5, 0.25, 0, 0, 0.25]
    assert shares([], hundred) == [0, 0, 0, 0, 0]
