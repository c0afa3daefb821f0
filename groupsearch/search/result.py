"""What a search gives back, and its part of the search document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import optuna

from groupsearch.errors import GroupSearchError
from groupsearch.search.candidates import Candidate, gather
from groupsearch.search.evaluations import Evaluation
from groupsearch.search.front import share_dominated
from groupsearch.search.recommendation import Recommendation, recommend
from groupsearch.search.space import Space


@dataclass(frozen=True)
class Cost:
    """What a search cost, earlier runs of a resumed study included.

    Attributes:
        seconds: time in evaluations.
        trials: suggestions answered: trained, failed, rejected or cached.
        trained: evaluations that gave a value.
        steps: steps trained.
        full_trainings: steps in units of the longest evaluation.
        rejected: suggestions outside the limits, answered without training.
        cached: suggestions evaluated before, answered without training.
        failed: evaluations that raised, or whose value was not finite.
    """

    seconds: float
    trials: int
    trained: int
    steps: int
    full_trainings: float
    rejected: int
    cached: int
    failed: int


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        candidates: all of them, by falling peak.
        recommendation: which to use and why; None when nothing was evaluated before an interrupt.
        cost: what it cost.
        interrupted: whether it was stopped by the user; the study can then be resumed.
        evaluations: every evaluation with its curve or its error.
        metric_name: what the values are.
    """

    candidates: tuple[Candidate, ...]
    recommendation: Recommendation | None
    cost: Cost
    interrupted: bool
    evaluations: tuple[Evaluation, ...]
    metric_name: str

    @property
    def front(self) -> tuple[Candidate, ...]:
        """The candidates on the front, by falling peak."""
        return tuple(c for c in self.candidates if c.on_front)

    @cached_property
    def recommended(self) -> Candidate | None:
        """The recommended candidate."""
        if self.recommendation is None:
            return None
        return next(c for c in self.candidates if c.boundaries == self.recommendation.boundaries)

    @property
    def reason(self) -> str:
        """Why it is recommended."""
        return self.recommendation.reason if self.recommendation else "Nothing was evaluated."

    @property
    def hypervolume(self) -> dict[str, float]:
        """Share of the rectangle around all candidates that is dominated: by all, and by those not from sampling."""
        points = [(c.mean, float(c.peak_bytes)) for c in self.candidates]
        if not points:
            return {"all": 0.0, "without_sampling": 0.0}
        given = [point for point, c in zip(points, self.candidates, strict=True) if c.source != "search"]
        return {"all": share_dominated(points, points), "without_sampling": share_dominated(given, points)}

    def to_json(self) -> dict[str, Any]:
        """The search's parts of the search document; ``training.curves`` is all that is known of the training here."""
        failures = [e for e in self.evaluations if e.error is not None]
        return {
            "candidates": [c.to_json(self.metric_name) for c in self.candidates],
            "recommended": self.recommended.to_json(self.metric_name) if self.recommended else None,
            "reason": self.reason,
            "cost": asdict(self.cost),
            "hypervolume": self.hypervolume,
            "interrupted": self.interrupted,
            "failures": [{"boundaries": list(e.boundaries), "seed": e.seed, "error": e.error} for e in failures],
            "training": {
                "curves": [
                    {"boundaries": list(e.boundaries), "seed": e.seed, "points": [list(p) for p in e.points]}
                    for e in self.evaluations
                    if e.error is None
                ]
            },
        }


def conclude(
    space: Space, study: optuna.Study, evaluations: Sequence[Evaluation], metric_name: str, *, interrupted: bool
) -> SearchResult:
    """The result of what has been evaluated so far.

    Raises:
        GroupSearchError: when every evaluation failed and nobody interrupted.
    """
    candidates = gather(space, evaluations)
    if not candidates and not interrupted:
        last = next(e.error for e in reversed(evaluations) if e.error)
        raise GroupSearchError(
            f"Expected at least one grouping that can be evaluated, found that all {len(evaluations)} evaluations "
            f"failed, the last with: {last}. Mend that, then begin anew with --force."
        )
    return SearchResult(
        candidates=candidates,
        recommendation=recommend(candidates, metric_name) if candidates else None,
        cost=_cost(study, evaluations),
        interrupted=interrupted,
        evaluations=tuple(evaluations),
        metric_name=metric_name,
    )


def _cost(study: optuna.Study, evaluations: Sequence[Evaluation]) -> Cost:
    answers = Counter(trial.user_attrs.get("answer") for trial in study.get_trials(deepcopy=False))
    steps, longest = sum(e.steps for e in evaluations), max((e.steps for e in evaluations), default=0)
    failed = sum(e.error is not None for e in evaluations)
    return Cost(
        seconds=sum(e.seconds for e in evaluations),
        trials=sum(count for answer, count in answers.items() if answer is not None),
        trained=len(evaluations) - failed,
        steps=steps,
        full_trainings=steps / longest if longest else 0.0,
        rejected=answers["rejected"],
        cached=answers["cached"],
        failed=failed,
    )
