"""The geometry of a front: values go up, sizes, and times where they count, go down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def pareto(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """Which points no other is at least as good as in all and better in one: value up, all others down.

    >>> pareto([(0.9, 10), (0.8, 5), (0.8, 7), (0.9, 10)])
    [True, True, False, True]
    >>> pareto([(0.9, 10, 1.0), (0.8, 10, 0.5), (0.8, 10, 2.0)])
    [True, True, False]
    """
    if not points:
        return []
    costs = np.array(points, np.float64)
    costs[:, 0] *= -1
    return [not bool(((costs <= row).all(axis=1) & (costs < row).any(axis=1)).any()) for row in costs]


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area of (value up, size down) that the points dominate and that dominates the reference.

    >>> round(hypervolume([(0.9, 8), (0.7, 4), (0.6, 6)], reference=(0.5, 10)), 6)
    1.6
    """
    area, reached = 0.0, reference[0]
    for value, size in sorted(points, key=lambda point: (point[1], -point[0])):
        if size < reference[1] and value > reached:
            area += (value - reached) * (reference[1] - size)
            reached = value
    return area


def share_dominated(points: Iterable[tuple[float, float]], box: Sequence[tuple[float, float]]) -> float:
    """The hypervolume of points as a share of the least rectangle around ``box``; 0 where that has no area."""
    (low, high), (small, large) = ((min(side), max(side)) for side in zip(*box, strict=True))
    area = (high - low) * (large - small)
    return hypervolume(points, (low, large)) / area if area else 0.0


def worthiest(points: Sequence[tuple[float, ...]], count: int) -> list[int]:
    """The places of ``count`` points (value up, all others down): of the front, then of what is the front without it.

    Of a front that is too large for the room left those at both ends, and between them evenly by size.
    """
    left, chosen = list(range(len(points))), list[int]()
    while left and len(chosen) < count:
        marks = pareto([points[i] for i in left])
        layer = sorted((i for i, on in zip(left, marks, strict=True) if on), key=lambda i: (points[i][1], i))
        room = count - len(chosen)
        if len(layer) > room:
            last = len(layer) - 1
            layer = [layer[round(k * last / max(1, room - 1))] for k in range(room)]
        chosen += layer
        left = [i for i in left if i not in chosen]
    return chosen
