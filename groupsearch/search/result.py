"""What a search gives back, and its part of the search document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import optuna

from groupsearch.errors import GroupSearchError
from groupsearch.search.candidates import Candidate, gather, share_dominated
from groupsearch.search.choice import Evaluation
from groupsearch.search.proxied import Agreement, Evidence
from groupsearch.search.selection import adaptive_selection_cost
from groupsearch.search.settings import SearchSettings
from groupsearch.search.space import Space
from groupsearch.search.study import count_answers
from groupsearch.search.verdict import Comparison, Recommendation, answer, compare, recommend


@dataclass(frozen=True)
class Rung:
    """What one kind of evidence cost.

    Attributes:
        name: ``exploration``, one run for every grouping, or ``replication``, further seeds of the front; of a
            search in rungs ``proxy``, ``short`` and ``full`` in place of the first.
        runs: evaluations, failed ones included.
        seconds: time in them.
        steps: steps trained.
        full_trainings: steps in units of the longest evaluation; of the proxy, which is more than its steps, seconds
            in units of a full evaluation's.
        passes: forward and backward passes of the proxy.
    """

    name: str
    runs: int
    seconds: float
    steps: int
    full_trainings: float
    passes: int = 0

    @classmethod
    def of(cls, name: str, evaluations: Sequence[Evaluation], longest: float) -> Rung:
        """What evaluations cost, in units of one of ``longest`` steps."""
        steps = sum(e.steps for e in evaluations)
        seconds = sum(e.seconds for e in evaluations)
        return cls(name, len(evaluations), seconds, steps, steps / longest if longest else 0.0)


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
        rungs: what of it went where.
    """

    seconds: float
    trials: int
    trained: int
    steps: int
    full_trainings: float
    rejected: int
    cached: int
    failed: int
    rungs: tuple[Rung, ...] = ()

    @property
    def before_replication(self) -> float:
        """Full trainings that finding the front took, before it was given further seeds."""
        return sum(rung.full_trainings for rung in self.rungs if rung.name != "replication")


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
        comparisons: the front against the best grouping on it.
        confidence: of all that is declared in them together.
        selection_data: whether groupings were compared on ``public`` or ``private`` data.
        rung: what candidates were evaluated by: ``full`` runs, or, where an interrupt left no others, ``short`` ones.
        evidence: of every rung, what it found of every choice; none of a search without rungs.
        agreements: whether a rung said what the one above it found.
    """

    candidates: tuple[Candidate, ...]
    recommendation: Recommendation | None
    cost: Cost
    interrupted: bool
    evaluations: tuple[Evaluation, ...]
    metric_name: str
    comparisons: tuple[Comparison, ...] = ()
    confidence: float = 0.95
    selection_data: str = "private"
    rung: str = "full"
    evidence: tuple[Evidence, ...] = ()
    agreements: tuple[Agreement, ...] = ()

    @property
    def front(self) -> tuple[Candidate, ...]:
        """The candidates on the front, by falling peak."""
        return tuple(c for c in self.candidates if c.on_front)

    @cached_property
    def recommended(self) -> Candidate | None:
        """The recommended candidate."""
        if self.recommendation is None:
            return None
        return next(c for c in self.candidates if c.choice == self.recommendation.choice)

    @property
    def reason(self) -> str:
        """Why it is recommended, and what is known of the difference to others."""
        if self.recommendation is None:
            return "Nothing was evaluated."
        lead = "" if self.rung == "full" else f"By {self.rung} runs alone: "
        return f"{lead}{self.recommendation.reason} {self.answer}"

    @property
    def answer(self) -> str:
        """What the comparisons say together; that no difference was found is an answer."""
        return answer(self.comparisons, self.confidence)

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
            "answer": self.answer,
            "confidence": self.confidence,
            "comparisons": [c.to_json() for c in self.comparisons],
            "rung": self.rung,
            "evidence": [e.to_json() for e in self.evidence],
            "correlations": [a.to_json() for a in self.agreements],
            "cost": {**asdict(self.cost), "selection": asdict(adaptive_selection_cost(self.selection_data))},
            "hypervolume": self.hypervolume,
            "interrupted": self.interrupted,
            "failures": [{**e.choice.to_json(), "seed": e.seed, "error": e.error} for e in failures],
            "training": {
                "curves": [
                    {**e.choice.to_json(), "seed": e.seed, "points": [list(p) for p in e.points]}
                    for e in self.evaluations
                    if e.error is None
                ]
            },
        }


def conclude(
    space: Space, study: optuna.Study, evaluations: Sequence[Evaluation], settings: SearchSettings, *, interrupted: bool
) -> SearchResult:
    """The result of what has been evaluated so far.

    Raises:
        GroupSearchError: when every evaluation failed and nobody interrupted.
    """
    candidates = gather(space, evaluations, timed=settings.timed)
    if evaluations and not candidates and not interrupted:
        last = next(e.error for e in reversed(evaluations) if e.error)
        raise GroupSearchError(
            f"Expected at least one grouping that can be evaluated, found that all {len(evaluations)} evaluations "
            f"failed, the last with: {last}. Mend that, then begin anew with --force."
        )
    return SearchResult(
        candidates=candidates,
        recommendation=recommend(candidates, settings.metric_name) if candidates else None,
        cost=_cost(study, evaluations, settings.seed),
        interrupted=interrupted,
        evaluations=tuple(evaluations),
        metric_name=settings.metric_name,
        comparisons=compare(candidates, settings.seed, settings.confidence),
        confidence=settings.confidence,
        selection_data=settings.selection_data,
    )


def _cost(study: optuna.Study, evaluations: Sequence[Evaluation], first_seed: int) -> Cost:
    answers = count_answers(study)
    longest = max((e.steps for e in evaluations), default=0)
    failed = sum(e.error is not None for e in evaluations)
    explored = [e for e in evaluations if e.seed == first_seed]
    replicated = [e for e in evaluations if e.seed != first_seed]
    whole = Rung.of("all", evaluations, longest)
    return Cost(
        seconds=whole.seconds,
        trials=answers.total(),
        trained=len(evaluations) - failed,
        steps=whole.steps,
        full_trainings=whole.full_trainings,
        rejected=answers["rejected"],
        cached=answers["cached"],
        failed=failed,
        rungs=(Rung.of("exploration", explored, longest), Rung.of("replication", replicated, longest)),
    )
