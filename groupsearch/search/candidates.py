"""Groupings that were evaluated, with the mean over their seeds and its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from groupsearch.search.evaluations import Evaluation
from groupsearch.search.front import pareto
from groupsearch.search.intervals import half_width, pooled_deviation, student_t
from groupsearch.search.space import Space


@dataclass(frozen=True)
class Candidate:
    """A grouping that was evaluated at least once, and never failed.

    Attributes:
        boundaries: the grouping.
        peak_bytes: its estimated peak.
        source: ``all-layer``, ``layer-wise``, ``block-wise``, ``uniform:k``, ``exact front`` or ``search``.
        values: the metric by seed.
        step_seconds: median time of one step.
        on_front: whether no other candidate has both a mean and a peak that are as good, and one better.
        noise: (standard deviation, degrees of freedom) of a run over seeds, pooled over all candidates with
            several; None where there are none.
    """

    boundaries: tuple[int, ...]
    peak_bytes: int
    source: str
    values: dict[int, float]
    step_seconds: float
    on_front: bool = False
    noise: tuple[float, int] | None = None

    @property
    def groups(self) -> int:
        """M, the number of groups."""
        return len(self.boundaries) + 1

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
            "boundaries": list(self.boundaries),
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


def gather(space: Space, evaluations: Sequence[Evaluation]) -> tuple[Candidate, ...]:
    """The candidates that evaluations make, by falling peak, the front marked.

    A grouping that failed with any seed is left out: its mean would be over the seeds it survived.
    """
    by_boundaries: dict[tuple[int, ...], list[Evaluation]] = {}
    for evaluation in evaluations:
        by_boundaries.setdefault(evaluation.boundaries, []).append(evaluation)
    found = [
        Candidate(
            boundaries=boundaries,
            peak_bytes=space.peak_bytes(boundaries),
            source=space.source(boundaries),
            values={e.seed: e.value for e in sorted(group, key=lambda e: e.seed) if e.value is not None},
            step_seconds=statistics.median(e.step_seconds for e in group),
        )
        for boundaries, group in by_boundaries.items()
        if all(e.error is None for e in group)
    ]
    found.sort(key=lambda c: (-c.peak_bytes, c.groups, c.boundaries))
    marks = pareto([(c.mean, c.peak_bytes) for c in found])
    noise = pooled_deviation([list(c.values.values()) for c in found])
    return tuple(replace(c, on_front=mark, noise=noise) for c, mark in zip(found, marks, strict=True))
