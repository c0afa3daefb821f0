"""Statistics of few runs: intervals of means and differences, and rank correlations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from groupsearch.errors import GroupSearchError

# -- Student's t: intervals of a mean, and whether one mean is below another -----------------------


def student_t(confidence: float, freedom: int) -> float:
    """The t with P(|T| <= t) = ``confidence`` for a number of degrees of freedom.

    >>> round(student_t(0.95, 2), 3), round(student_t(0.90, 9), 3)
    (4.303, 1.833)
    """
    return float(stdtrit(freedom, (1 + confidence) / 2))


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


# -- Whether a cheap score puts candidates in the order that a dear one does -----------------------

FEWEST = 4  # pairs that an interval can be given for


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of two scores of the same candidates.

    Attributes:
        value: Spearman's rho, ties sharing their mean rank; 0 where all candidates tie in one of the scores.
        low: lower end of its interval; -1 where nothing is known.
        high: upper end; 1 where nothing is known.
        count: how many candidates have both scores.
        kendall: Kendall's tau-b of the same, 0 where that is 0 over 0.
    """

    value: float
    low: float
    high: float
    count: int
    kendall: float

    @property
    def predicts(self) -> bool:
        """Whether the interval is above zero: whether the one score is known to say something of the other."""
        return self.low > 0

    def to_json(self) -> dict[str, Any]:
        """For the search document."""
        return {**asdict(self), "predicts": self.predicts}


def rank_correlation(pairs: Sequence[tuple[float, float]], confidence: float = 0.95) -> RankCorrelation:
    """The rank correlation of the first numbers with the second ones, and its interval.

    The interval is Fisher's, with the variance (1 + rho^2 / 2) / (n - 3) of Bonett and Wright (2000), and is
    widened at both ends by half of the least difference between two values of rho, which makes it hold for few
    candidates: of 4 to 7 in random order, ``predicts`` is true of at most 2.5 % of the orders at 95 %. Fewer than
    four candidates, or ties throughout, leave everything open. Noise in the scores makes them correlate less
    than what they measure does.

    Args:
        pairs: (one score, the other score) of each candidate; infinite ones are ranked too.
        confidence: of the interval, between 0 and 1.

    Raises:
        GroupSearchError: for a score that is no number, or a confidence outside its range.

    >>> found = rank_correlation([(1, 10), (2, 30), (3, 20), (4, 40), (5, 50), (6, 60)])
    >>> round(found.value, 3), round(found.kendall, 3), found.predicts
    (0.943, 0.867, True)
    """
    if not 0 < confidence < 1:
        raise GroupSearchError(f"Expected a confidence between 0 and 1, found {confidence}.")
    scores = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    if np.isnan(scores).any():
        raise GroupSearchError(
            "Expected scores that are numbers, found nan. Leave out the candidates that have no score."
        )
    count = len(scores)
    one, other = _ranks(scores[:, 0]), _ranks(scores[:, 1])
    value, kendall = _correlation(one, other), _tau_b(one, other)
    if count < FEWEST or not (one.any() and other.any()):
        return RankCorrelation(value, -1.0, 1.0, count, kendall)
    reach = NormalDist().inv_cdf((1 + confidence) / 2) / math.sqrt(count - 3)
    half_step = 6 / (count * (count**2 - 1))
    low, high = (_moved(value + side * half_step, side * reach) for side in (-1, 1))
    return RankCorrelation(value, low, high, count, kendall)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks less their mean, ties sharing theirs."""
    below = (values[None, :] < values[:, None]).sum(1)
    above = (values[None, :] > values[:, None]).sum(1)
    return (below - above) / 2


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    scale = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / scale if scale else 0.0


def _tau_b(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    signs = [np.sign(ranks[:, None] - ranks[None, :]).ravel() for ranks in (one, other)]
    return _correlation(*signs)


def _moved(value: float, by: float) -> float:
    """A correlation moved by ``by`` standard deviations of its Fisher transform, per sqrt(n - 3)."""
    if abs(value) >= 1:
        return math.copysign(1.0, value)
    return math.tanh(math.atanh(value) + by * math.sqrt(1 + value**2 / 2))
