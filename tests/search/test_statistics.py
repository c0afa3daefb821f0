from __future__ import annotations

import math

import pytest
from scipy import stats

from groupsearch.search.statistics import half_width, shortfall, student_t


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 30, 101])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_student_t_is_the_quantile_of_scipy(freedom: int, confidence: float) -> None:
    assert student_t(confidence, freedom) == pytest.approx(stats.t.ppf((1 + confidence) / 2, freedom), rel=1e-9)


def test_half_width_is_the_t_interval() -> None:
    values = [0.91, 0.93, 0.92]
    low, high = stats.t.interval(0.95, 2, loc=0.92, scale=0.01 / math.sqrt(3))
    assert half_width(values) == pytest.approx((high - low) / 2)
    assert half_width([0.9]) is None


def test_pairing_takes_out_what_a_seed_does_to_both() -> None:
    best = {0: 0.90, 1: 0.95, 2: 0.85}
    below = {seed: value - gap for (seed, value), gap in zip(best.items(), (0.010, 0.011, 0.009), strict=True)}
    gap, noise = shortfall(below, best)
    assert noise is not None
    assert gap == pytest.approx(0.01)
    assert noise == pytest.approx(stats.t.ppf(0.95, 2) * 0.001 / math.sqrt(3))
    unpaired, more_noise = shortfall({seed + 10: value for seed, value in below.items()}, best)
    assert more_noise is not None
    assert unpaired == pytest.approx(0.01)
    assert more_noise > 10 * noise


def test_one_seed_knows_no_noise() -> None:
    assert shortfall({0: 0.8}, {0: 0.9}) == (pytest.approx(0.1), None)
