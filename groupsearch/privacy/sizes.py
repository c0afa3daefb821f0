"""Whether the sizes of the batches that are seen fit the way of drawing them that is named.

Apart from the accounting, whose libraries an engine does without until it counts.
"""

from __future__ import annotations

import math
from collections import Counter

FALSE_ALARM = 1e-9


class SizesSeen:
    """Tells batches that are visibly not drawn as it is said.

    Under Poisson sampling sizes are private and vary. A refusal because they do not, or because there are far too
    many or too few examples in all, happens to a run of true Poisson samples with a probability below 1e-9, whatever
    its length: that is what it may tell of the data. The sizes of the other ways of drawing are public.

    * The most frequent of k sizes came m times. With p the largest probability of any size, which is that of one
      Binomial(n, rate), this has at most probability C(k, m) p^(m - 1).
    * All k batches together have s examples, one Binomial(k n, rate): Chernoff's bound.

    Both are held to FALSE_ALARM / (2 k (k + 1)) after the k-th batch, which adds up to FALSE_ALARM over all k.

    Args:
        sampling: ``poisson``, ``fixed-size`` or ``shuffled``.
        examples: n.
        rate: sampling rate, 0 < rate <= 1.
    """

    def __init__(self, sampling: str, examples: int, rate: float) -> None:
        self._sampling = sampling
        self._examples = examples
        self._rate = rate
        self._counts: Counter[int] = Counter()
        self._log_most_likely = _log_most_likely(examples, rate)

    def add(self, size: int) -> str | None:
        """One more batch; what is visibly wrong with all of them, in words without a private number, or None."""
        if self._sampling == "fixed-size":
            return None if size == round(self._rate * self._examples) else "a batch of another size"
        if self._sampling == "shuffled":
            return None if size <= math.ceil(self._rate * self._examples - 1e-6) else "a larger batch"
        self._counts[size] += 1
        batches = self._counts.total()
        level = math.log(FALSE_ALARM / (2 * batches * (batches + 1)))
        most = max(self._counts.values())
        if _log_choose(batches, most) + (most - 1) * self._log_most_likely < level:
            return "batches of the same size again and again"
        if self._log_total() < level:
            return "another number of examples in the batches altogether"
        return None

    def _log_total(self) -> float:
        """Log of a bound on the probability of as many examples as were seen, or of more (fewer, where it is few)."""
        trials = self._counts.total() * self._examples
        share = sum(size * count for size, count in self._counts.items()) / trials
        if share > 1 or (self._rate == 1 and share < 1):
            return -math.inf
        divergence = _times_log_ratio(share, self._rate) + _times_log_ratio(1 - share, 1 - self._rate)
        return math.log(2) - trials * divergence


def _log_most_likely(examples: int, rate: float) -> float:
    """Log of the probability of the most likely size."""
    if rate == 1:
        return 0.0
    size = min(examples, math.floor((examples + 1) * rate))
    odds = size * math.log(rate) + (examples - size) * math.log1p(-rate)
    return _log_choose(examples, size) + odds


def _log_choose(many: int, few: int) -> float:
    return math.lgamma(many + 1) - math.lgamma(few + 1) - math.lgamma(many - few + 1)


def _times_log_ratio(share: float, other: float) -> float:
    return share * math.log(share / other) if share > 0 else 0.0
