"""Choices that were evaluated, with the mean over their seeds and its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from groupsearch.search.choice import Boundaries, Choice, Evaluation
from groupsearch.search.space import Space
from groupsearch.search.statistics import half_width, pooled_deviation, student_t

# -- The geometry of a front: values go up, sizes, and times where they count, go down -------------


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


# -- candidates ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A choice that was evaluated at least once, and never failed.

    Attributes:
        choice: the grouping, and what else is searched.
        peak_bytes: its estimated peak.
        source: ``all-layer``, ``layer-wise``, ``block-wise``, ``uniform:k``, ``exact front`` or ``search``.
        values: the metric by seed.
        step_seconds: median time of one step.
        on_front: whether no other candidate is as good in all objectives, and better in one.
        noise: (standard deviation, degrees of freedom) of a run over seeds, pooled over all candidates with
            several; None where there are none.
        variant: which way of taking the step the peak and the step's time are those of; None where there is one.
    """

    choice: Choice
    peak_bytes: int
    source: str
    values: dict[int, float]
    step_seconds: float
    on_front: bool = False
    noise: tuple[float, int] | None = None
    variant: str | None = None

    @property
    def boundaries(self) -> Boundaries:
        """The grouping alone."""
        return self.choice.boundaries

    @property
    def groups(self) -> int:
        """M, the number of groups."""
        return self.choice.groups

    @property
    def mean(self) -> float:
        """The mean metric over seeds."""
        return statistics.fmean(self.values.values())

    @property
    def half_width(self) -> float | None:
        """Half the width of the 95 % t-interval of the mean; None with one seed."""
        return half_width(list(self.values.values()))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % t-interval of the mean: from its own seeds, with one seed from the pooled noise; None without any.

        For one grouping, chosen beforehand: of many with one seed each the best is likely to lie above its own.
        """
        width = self.half_width
        if width is None and self.noise is not None:
            deviation, freedom = self.noise
            width = student_t(0.95, freedom) * deviation / math.sqrt(len(self.values))
        return None if width is None else (self.mean - width, self.mean + width)

    def to_json(self, metric_name: str) -> dict[str, Any]:
        """One entry of the search document's ``candidates``."""
        return {
            **self.choice.to_json(),
            **({} if self.variant is None else {"variant": self.variant}),
            "groups": self.groups,
            "peak_bytes": self.peak_bytes,
            "metric": {
                "name": metric_name,
                "mean": self.mean,
                "half_width": self.half_width,
                "interval": None if self.interval is None else list(self.interval),
                "interval_from": "its seeds" if self.half_width is not None else "noise of other groupings",
                "seeds": len(self.values),
                "seed_numbers": list(self.values),
                "values": list(self.values.values()),
            },
            "on_front": self.on_front,
            "source": self.source,
            "step_seconds": self.step_seconds,
        }


def gather(space: Space, evaluations: Sequence[Evaluation], *, timed: bool = False) -> tuple[Candidate, ...]:
    """The candidates that evaluations make, by falling peak, the front marked; ``timed`` with step time to judge by.

    A choice that failed with any seed is left out: its mean would be over the seeds it survived.
    """
    by_choice: dict[Choice, list[Evaluation]] = {}
    for evaluation in evaluations:
        by_choice.setdefault(evaluation.choice, []).append(evaluation)
    found = [
        Candidate(
            choice=choice,
            peak_bytes=space.peak_bytes(choice.boundaries),
            source=space.source(choice.boundaries),
            values={e.seed: e.value for e in sorted(group, key=lambda e: e.seed) if e.value is not None},
            step_seconds=statistics.median(e.step_seconds for e in group),
            variant=space.variants.cheapest(choice.boundaries) if space.variants.free else None,
        )
        for choice, group in by_choice.items()
        if all(e.error is None for e in group)
    ]
    found.sort(key=lambda c: (-c.peak_bytes, c.groups, c.choice))
    marks = pareto([(c.mean, c.peak_bytes, *([c.step_seconds] if timed else [])) for c in found])
    noise = pooled_deviation([list(c.values.values()) for c in found])
    return tuple(replace(c, on_front=mark, noise=noise) for c, mark in zip(found, marks, strict=True))
