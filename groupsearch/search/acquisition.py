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

from groupsearch.search.space import Boundaries
from groupsearch.search.surrogate import Floats

_BEYOND = 0.1  # how far the reference lies outside, in extents


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
        steps: list[tuple[float, float]] = []
        for value, size in sorted(points, key=lambda point: (point[1], -point[0])):
            if not steps or value > steps[-1][0]:
                steps.append((value, size))
        values, sizes = (np.array(side) for side in zip(*steps, strict=True))
        floor = values[0] - _BEYOND * max(values[-1] - values[0], 1e-3 * abs(values[-1]) or 1e-3)
        most = max(size for _, size in points)
        beyond = most + _BEYOND * max(most - sizes[0], 1e-3 * most)
        return cls(np.append(sizes, beyond), values, float(floor))

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
    begin = np.asarray(starts)
    ends = np.append(begin[1:], len(gains)) - 1
    gain, cost = gains[np.ix_(begin, ends)], costs[np.ix_(begin, ends)]
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


def _improvement(excess: Floats, deviation: Floats) -> Floats:
    """E[max(0, X)] of X normal with this mean and deviation."""
    safe = np.maximum(deviation, 1e-12)
    ratio = excess / safe
    density = np.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
    return np.where(deviation > 1e-12, excess * _normal(ratio) + safe * density, np.maximum(excess, 0.0))


def _normal(x: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))))
