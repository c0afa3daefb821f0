"""The geometry of a front: values go up, sizes go down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (value up, size down) points no other is at least as good as in both and better in one.

    >>> pareto([(0.9, 10), (0.8, 5), (0.8, 7), (0.9, 10)])
    [True, True, False, True]
    """
    return [not any(v >= value and s <= size and (v > value or s < size) for v, s in points) for value, size in points]


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
