"""The largest size whose peak is within a budget, with few questions asked of a dear function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

_GROWTH = 8
_PATIENCE = 3


@dataclass
class Bracket:
    """The largest size known to fit (0: none) and the smallest known not to (the limit + 1: none)."""

    budget: float
    high: int
    low: int = 0
    seen: dict[int, float] = field(default_factory=dict)
    _fits: bool = False
    _repeats: int = 0

    def note(self, size: int, peak: float) -> None:
        """Take in one answer."""
        fits = peak <= self.budget
        self.seen[size] = peak
        self._repeats = self._repeats + 1 if fits is self._fits else 1
        self._fits = fits
        self.low, self.high = (size, self.high) if fits else (self.low, size)

    def guess(self) -> int:
        """Where to look next: where a straight line through two answers meets the budget, else half way.

        The chord across the bracket moves one end only where peaks bend: after two moves of the same end
        the line through two answers on that side is taken, after three the middle.
        """
        below = sorted(size for size, peak in self.seen.items() if size <= self.low and math.isfinite(peak))
        above = sorted(size for size, peak in self.seen.items() if size >= self.high and math.isfinite(peak))
        if self.low and self.high not in self.seen:
            size = self._further(self._meets(below[-2:], 2 * self.low))
        elif not (below and above):
            size = (self.low + self.high) // 2 if self._repeats > 2 else self._meets(above[:2], self.high // 2)
        elif self._repeats > 2:
            size = (self.low + self.high) // 2
        else:
            side = below[-2:] if self._fits else above[:2]
            size = self._meets(side if self._repeats == 2 else below[-1:] + above[:1], (self.low + self.high) // 2)
        return min(max(size, self.low + 1), self.high - 1)

    def _further(self, size: int) -> int:
        """Upwards into the unknown: at most 8 times as far, at least twice where lines fell short again and again."""
        short = self._repeats > _PATIENCE and (size > self.low + 1 or self._repeats > 2 * _PATIENCE)
        return min(max(size, 2 * self.low) if short else size, _GROWTH * self.low)

    def _meets(self, line: list[int], otherwise: int) -> int:
        if len(line) < 2:
            return otherwise
        one, other = line
        slope = (self.seen[other] - self.seen[one]) / (other - one)
        if slope <= 0:
            return otherwise
        return math.floor(min(one + (self.budget - self.seen[one]) / slope, self.high))


def largest_within(peak: Callable[[int], float], budget: float, limit: int, known: Iterable[int] = (1,)) -> int:
    """The largest size from 1 to ``limit`` whose peak is within the budget; 0 where 1 is not.

    The size that is named was asked for and is within; one more was asked for and is not, unless
    it is beyond the limit. For peaks that never fall as the size grows that is the largest; nothing
    else is assumed of them.

    Args:
        peak: of a size; infinite where the size cannot be had.
        budget: in the unit of the peak.
        limit: the largest size to ask for.
        known: sizes to ask for first, at least one.
    """
    bracket = Bracket(budget, limit + 1)
    first = sorted({min(max(size, 1), limit) for size in known})
    while bracket.high - bracket.low > 1:
        size = first.pop() if first else bracket.guess()
        if bracket.low < size < bracket.high:
            bracket.note(size, peak(size))
    return bracket.low
