"""Which grouping to train next: the one expected to add most to the front.

Peaks are known before anything is trained, so only the metric is uncertain and the expected
hypervolume improvement has a closed form. Where it may be large is found by a dynamic program: under a
drawn surrogate the best grouping within any peak is exact, as the least peak is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from groupsearch.memory import UNREACHABLE_BYTES
from groupsearch.search.choice import Boundaries
from groupsearch.search.surrogate import Floats

Normal = tuple[Floats, Floats]  # mean and standard deviation of each
_BEYOND = 0.1  # how far the reference lies outside, in extents
_SLICES = 8


@dataclass(frozen=True)
class Stairs:
    """The best value that a front reaches within any size.

    Attributes:
        sizes: [K + 1] where the value changes, in increasing order, and at the end the reference size.
        values: [K] the best value between two of them; below the first size nothing is reached.
        floor: the reference value, which counts as reached everywhere.
    """

    sizes: Floats
    values: Floats
    floor: float

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Stairs:
        """The stairs of (value up, size down) points.

        The reference lies a tenth of their extent outside: in value below the front, in size above the
        largest of all points, because the front that is sought may reach further than the one that is known.
        """
        values, sizes = _steps(points)
        floor = values[0] - _BEYOND * max(values[-1] - values[0], 1e-3 * abs(values[-1]) or 1e-3)
        most = max(size for _, size in points)
        return cls(np.append(sizes, _beyond(sizes[0], most)), values, float(floor))

    def ending(self, size: float) -> Stairs:
        """The same front, with the reference a tenth of the extent beyond this size or, if larger, beyond the front.

        What is gained at the top counts from there to the reference: one that lies far beyond what can still
        be on the front lets nothing but the top be sought.
        """
        return Stairs(
            np.append(self.sizes[:-1], _beyond(self.sizes[0], max(size, self.sizes[-2]))), self.values, self.floor
        )

    def among(self, points: Sequence[tuple[float, float]]) -> Stairs:
        """The stairs of some of the points with the reference of all."""
        values, sizes = _steps(points)
        return Stairs(np.append(sizes, self.sizes[-1]), np.maximum(values, self.floor), self.floor)

    def reached(self, sizes: Floats) -> Floats:
        """The best value within these sizes; the floor where there is none."""
        levels = np.concatenate(([self.floor], self.values))
        return np.asarray(levels[np.searchsorted(self.sizes[:-1], sizes, side="right")])

    def expected_improvement(self, mean: Floats, deviation: Floats, sizes: Floats) -> Floats:
        """[P] the hypervolume that points of known size and normally distributed value are expected to add.

        The integral over all sizes s from the point's own to the reference of E[max(0, V - r(s))], with r(s)
        the value reached within s: constant between two steps, and there Jones' expected improvement.
        """
        starts = np.concatenate(([-np.inf], self.sizes[:-1]))
        widths = np.maximum(self.sizes - np.maximum(starts, sizes[:, None]), 0.0)
        levels = np.concatenate(([self.floor], self.values))
        return np.asarray((widths * _improvement(mean[:, None] - levels, deviation[:, None])).sum(axis=1))


@dataclass(frozen=True)
class Slices:
    """The stairs of what takes at most each of several times, evenly spread: three objectives, slice by slice.

    The hypervolume of (value up, size down, time down) is the integral over times of the hypervolume of what
    takes no longer. Where the best is slow, a fast point adds to the slices that it is too slow for.

    Attributes:
        times: [S] the times, the slowest of all points and a tenth of their extent more at the end.
        stairs: what is reached within each of them.
    """

    times: Floats
    stairs: tuple[Stairs, ...]

    @classmethod
    def of(cls, points: Sequence[tuple[float, float, float]], count: int = _SLICES) -> Slices:
        """The slices of (value, size, time) points, with the reference of the stairs of all of them."""
        fastest, slowest = (end(time for *_, time in points) for end in (min, max))
        whole = Stairs.of([(value, size) for value, size, _ in points])
        extent = max(slowest - fastest, 1e-3 * slowest)
        times = fastest + (1 + _BEYOND) * extent * (np.arange(count) + 0.5) / count
        within = [[(value, size) for value, size, time in points if time <= most] for most in times]
        return cls(times, tuple(whole.among(some) for some in within))

    def expected_improvement(self, value: Normal, sizes: Floats, time: Normal) -> Floats:
        """[P] the mean over slices of what points are expected to add to a slice, if they are fast enough for it."""
        gains = [
            stairs.expected_improvement(*value, sizes) * _normal((most - time[0]) / np.maximum(time[1], 1e-12))
            for most, stairs in zip(self.times, self.stairs, strict=True)
        ]
        return np.asarray(np.mean(gains, axis=0))


def best_within(
    gains: Floats, costs: npt.NDArray[np.int64], starts: Sequence[int], limits: Floats, prices: Floats
) -> list[Boundaries]:
    """For each limit and price the grouping with the largest sum of gains less a price per group.

    Exact, by a dynamic program over the ends of groups for all limits at once: O(L^2) for each.

    Args:
        gains: [L, L] what a group from a site to a last site adds.
        costs: [L, L] bytes of that group, none of which may exceed the limit.
        starts: the sites at which a group may begin, 0 among them.
        limits: [K] bytes.
        prices: [K] per group.

    Returns:
        Those of the K groupings that exist: under a limit below the floor there is none.
    """
    begin, gain, cost = _between(gains, costs, starts)
    count, places = len(limits), len(begin)
    best = np.full((count, places + 1), -np.inf)
    best[:, 0] = 0.0
    choice = np.zeros((count, places), np.int64)
    for place in range(places):
        sums = best[:, : place + 1] + gain[: place + 1, place]
        sums[cost[: place + 1, place] > limits[:, None]] = -np.inf
        choice[:, place] = sums.argmax(axis=1)
        best[:, place + 1] = sums[np.arange(count), choice[:, place]] - prices
    found = []
    for row in np.flatnonzero(np.isfinite(best[:, -1])):
        boundaries, end = [], places
        while (end := int(choice[row, end - 1])) > 0:
            boundaries.append(int(begin[end]))
        found.append(tuple(reversed(boundaries)))
    return found


def best_with(
    gains: Floats, costs: npt.NDArray[np.int64], starts: Sequence[int], limits: Floats, groups: int
) -> list[Boundaries]:
    """:func:`best_within` of the groupings with so many groups, which makes a price pointless: O(M L^2) for each."""
    begin, gain, cost = _between(gains, costs, starts)
    allowed = np.where(cost <= limits[:, None, None], gain, -np.inf)
    best, choices = allowed[:, 0], []
    for _ in range(groups - 1):
        before = np.concatenate((np.full((len(limits), 1), -np.inf), best[:, :-1]), axis=1)
        sums = before[:, :, None] + allowed
        choices.append(sums.argmax(axis=1))
        best = sums.max(axis=1)
    found = []
    for row in np.flatnonzero(np.isfinite(best[:, -1])):
        boundaries, end = [], len(begin)
        for choice in reversed(choices):
            end = int(choice[row, end - 1])
            boundaries.append(int(begin[end]))
        found.append(tuple(reversed(boundaries)))
    return found


def _between(
    gains: Floats, costs: npt.NDArray[np.int64], starts: Sequence[int]
) -> tuple[npt.NDArray[np.int64], Floats, npt.NDArray[np.int64]]:
    """Where groups may begin, and [begin, end] of gains and costs; of no meaning where a group ends before it begins.

    A cost there is above any limit.
    """
    begin = np.asarray(starts)
    ends = np.append(begin[1:], len(gains)) - 1
    cost = np.where(ends >= begin[:, None], costs[np.ix_(begin, ends)], UNREACHABLE_BYTES)
    return begin, gains[np.ix_(begin, ends)], cost


def _steps(points: Sequence[tuple[float, float]]) -> tuple[Floats, Floats]:
    """Values and sizes of the points on the front, both increasing."""
    steps: list[tuple[float, float]] = []
    for value, size in sorted(points, key=lambda point: (point[1], -point[0])):
        if not steps or value > steps[-1][0]:
            steps.append((value, size))
    values, sizes = (np.array(side) for side in zip(*steps, strict=True))
    return values, sizes


def _beyond(least: float, most: float) -> float:
    """A tenth of the extent further than the largest size."""
    return most + _BEYOND * max(most - least, 1e-3 * most)


def _improvement(excess: Floats, deviation: Floats) -> Floats:
    """E[max(0, X)] of X normal with this mean and deviation."""
    safe = np.maximum(deviation, 1e-12)
    ratio = excess / safe
    density = np.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
    return np.where(deviation > 1e-12, excess * _normal(ratio) + safe * density, np.maximum(excess, 0.0))


def _normal(x: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))))
