"""Student's t: intervals of a mean, and whether one mean is below another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache


@lru_cache(maxsize=128)
def student_t(confidence: float, freedom: int) -> float:
    """The t with P(|T| <= t) = ``confidence`` for a whole number of degrees of freedom.

    Exact finite series (Abramowitz and Stegun 26.7.3 and 26.7.4), inverted by bisection.

    >>> round(student_t(0.95, 2), 3), round(student_t(0.90, 9), 3)
    (4.303, 1.833)
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, freedom) < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def half_width(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Half the width of the t-interval of the mean; None with fewer than two values."""
    if len(values) < 2:
        return None
    return student_t(confidence, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def pooled_deviation(samples: Iterable[Sequence[float]]) -> tuple[float, int] | None:
    """(standard deviation, degrees of freedom) of one run, from all samples of two values or more; None without any.

    The deviation is taken to be the same in all of them.
    """
    several = [values for values in samples if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    if not freedom:
        return None
    return math.sqrt(sum((len(v) - 1) * statistics.variance(v) for v in several) / freedom), freedom


def shortfall(values: Mapping[int, float], best: Mapping[int, float]) -> tuple[float, float | None]:
    """How far the mean of ``values`` is below that of ``best``, and what of it noise explains.

    Both map seeds to values. With two seeds or more in common the comparison is paired, else by the two
    variances (degrees of freedom of the smaller sample). It is one-sided at 5 %: the mean is significantly
    below where the first number is above the second, which is None where nothing is known of the noise.
    """
    common = sorted(values.keys() & best.keys())
    if len(common) >= 2:
        gaps = [best[seed] - values[seed] for seed in common]
        return statistics.fmean(gaps), half_width(gaps, 0.90)
    gap = statistics.fmean(best.values()) - statistics.fmean(values.values())
    fewest = min(len(values), len(best))
    if fewest < 2:
        return gap, None
    variance = sum(statistics.variance(v.values()) / len(v) for v in (values, best))
    return gap, student_t(0.90, fewest - 1) * math.sqrt(variance)


def _within(angle: float, freedom: int) -> float:
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= square * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
