"""AdaptiveQuantile: thresholds that follow a quantile of the norms, and what counting them costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from groupsearch.errors import GroupSearchError

COUNT_NOISE_SHARE = 1 / 20


@dataclass(frozen=True)
class AdaptiveQuantile:
    """Every group's threshold follows a quantile of its gradient norms, privately.

    A step counts for each group m how many of its examples have a norm within R_m, as the sum of
    b - 1/2 with b in {0, 1}, adds Gaussian noise of standard deviation ``count_noise`` to each
    count, and sets, with E the expected batch size (arXiv 1905.03871, geometric update;
    arXiv 2212.01539, one threshold per group),

        R_m <- R_m exp(-learning_rate (share_m - quantile)),   share_m = noisy count / E + 1/2.

    Attributes:
        quantile: share of the examples that a threshold should leave unclipped, between 0 and 1.
        learning_rate: of the logarithm of the thresholds.
        count_noise: standard deviation of the noise on each count, in examples; None for a
            twentieth of the expected batch size (arXiv 1905.03871).
        initial: the thresholds of the first step: ``uniform``, ``dimension`` or given, as a fixed
            allocation would be.
        least: no threshold falls below.
        most: no threshold rises above.

    Raises:
        GroupSearchError: for a value outside its range.
    """

    quantile: float = 0.5
    learning_rate: float = 0.3
    count_noise: float | None = None
    initial: str | Sequence[float] = "uniform"
    least: float = 1e-6
    most: float = 1e6

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise GroupSearchError(f"Expected a quantile between 0 and 1, found {self.quantile}.")
        noise = 1.0 if self.count_noise is None else self.count_noise
        for name, value in (("learning_rate", self.learning_rate), ("count_noise", noise)):
            if not 0 < value < math.inf:
                raise GroupSearchError(f"Expected a finite {name} > 0 of adaptive thresholds, found {value}.")
        if not 0 < self.least < self.most < math.inf:
            raise GroupSearchError(
                f"Expected 0 < least < most of adaptive thresholds, both finite, found {self.least} and {self.most}."
            )
        if not isinstance(self.initial, str):
            object.__setattr__(self, "initial", tuple(float(r) for r in self.initial))

    def count_noise_for(self, expected_batch_size: float) -> float:
        """Standard deviation of the noise on each count, in examples."""
        return COUNT_NOISE_SHARE * expected_batch_size if self.count_noise is None else self.count_noise

    def updated(self, thresholds: Sequence[float], shares: Sequence[float]) -> tuple[float, ...]:
        """The next step's thresholds, from each group's noisy share of examples within the present ones.

        Whatever finite shares are, the thresholds stay between ``least`` and ``most``.
        """
        low, high = math.log(self.least), math.log(self.most)
        steps = (self.learning_rate * (share - self.quantile) for share in shares)
        moved = (math.log(r) - step for r, step in zip(thresholds, steps, strict=True))
        return tuple(min(max(math.exp(min(max(x, low), high)), self.least), self.most) for x in moved)


def gradient_noise_multiplier(noise_multiplier: float, groups: int, count_noise: float) -> float:
    """What the gradients' noise must be so that gradients and counts together cost ``noise_multiplier``.

    One example changes every one of the M counts by 1/2 up or down, so the vector of counts by
    sqrt(M) / 2, and the gradients, over the scales of their noise, by at most 1. Divided by their
    standard deviations both are one Gaussian release of sensitivity

        sqrt(1 / sigma_gradient^2 + M / (2 count_noise)^2) = 1 / sigma,

    which is solved for sigma_gradient (arXiv 1905.03871, theorem 1, is M = 1; 2212.01539 has M).
    Without noise (0) it stays 0.

    Raises:
        GroupSearchError: when the counts alone cost more than ``noise_multiplier`` allows.

    >>> round(gradient_noise_multiplier(1.0, groups=4, count_noise=10.0), 4)
    1.005
    """
    if noise_multiplier == 0:
        return 0.0
    least = noise_multiplier * math.sqrt(groups) / 2
    if count_noise <= least:
        raise GroupSearchError(
            f"Expected a count_noise above {least:.3g} for {groups} adaptive thresholds at noise multiplier "
            f"{noise_multiplier:.3g}, found {count_noise:.3g}: the counts alone would spend the whole budget. Raise "
            f"count_noise (at {2.4 * least:.3g} the gradients' noise grows by a tenth), expect larger batches, or take "
            f"fewer groups."
        )
    return noise_multiplier / math.sqrt(1 - (least / count_noise) ** 2)
