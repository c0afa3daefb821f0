"""Choices that were evaluated, with the mean over their seeds and its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from groupsearch.search.choice import Boundaries, Choice, Evaluation
from groupsearch.search.front import pareto
from groupsearch.search.intervals import half_width, pooled_deviation, student_t
from groupsearch.search.space import Space


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
