"""What a search is asked to do, and what it says while it does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import RULES
from groupsearch.search.choice import Boundaries, Choice, Evaluation
from groupsearch.search.selection import adaptive_selection_cost

GRANULARITIES = ("site", "layer", "block")
SAMPLERS = ("front", "tpe", "nsga2", "gp", "random")
ALLOCATIONS = ("uniform", "dimension", "adaptive")
OBJECTIVES = ("metric", "peak", "time")


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Attributes:
        trials: how many groupings are evaluated before the front is replicated, a failed one
            included; rejected and repeated suggestions are not counted. On resume those of before count.
        budget_bytes: groupings with a larger estimated peak are never evaluated; None for no limit.
        seeds: evaluations of every grouping on the final front and of the reference styles.
        seed: seeds the sampler; evaluations get seed, seed + 1, ... , the same for all groupings.
        max_runs: evaluations in all. With None the front gets ``seeds`` seeds and no more; with a number those
            that are not yet told from the best get further ones until they are, or until it is reached.
        confidence: of everything that is declared together, see :func:`groupsearch.search.verdict.compare`.
        sampler: ``front``, ours (see :class:`groupsearch.search.sampler.FrontSampler`), or one of Optuna's:
            ``tpe`` (multivariate), ``nsga2``, ``gp`` or ``random``.
        storage: a file for Optuna's journal, a database URL (``sqlite:///study.db``), or None to
            keep the study in memory, where nothing can be resumed.
        study_name: the study's name in the storage.
        resume: go on with the study where there is one, else begin it.
        force: throw an existing study of this name away.
        granularity: where the search may cut: between ``site``, ``layer`` or ``block``.
        max_groups: the most groups; None for no limit.
        groups: exactly so many groups; None for any number.
        rules: the clip rules to search, of :data:`groupsearch.plan.clipping.RULES`; none where training fixes it.
        allocations: the allocations of thresholds to search, of :data:`ALLOCATIONS`; likewise.
        objectives: ``metric`` and ``peak``, and with ``time`` the step time that evaluations measure, down.
        metric_name: what the values are; larger is better.
        selection_data: whether the metric is of ``public`` (or synthetic) or of ``private`` examples, which
            changes nothing but what is said of the privacy that comparing has cost.
        fingerprint: everything else that defines the problem (model, data, epsilon, ...), as JSON.
        first: evaluated before anything else, as far as the search may cut there.
        further: asked when those and the warm start have been evaluated, with every evaluation there is, for what
            is to be evaluated next; asked again as long as it gives None. None for nothing. Like ``first`` no part of
            the problem.

    Raises:
        GroupSearchError: when a value is out of its range.
    """

    trials: int = 40
    budget_bytes: int | None = None
    seeds: int = 3
    seed: int = 0
    max_runs: int | None = None
    confidence: float = 0.95
    sampler: str = "front"
    storage: str | Path | None = None
    study_name: str = "groupsearch"
    resume: bool = False
    force: bool = False
    granularity: str = "site"
    max_groups: int | None = None
    groups: int | None = None
    rules: tuple[str, ...] = ()
    allocations: tuple[str, ...] = ()
    objectives: tuple[str, ...] = OBJECTIVES[:2]
    metric_name: str = "metric"
    selection_data: str = "private"
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    first: tuple[Choice, ...] = ()
    further: Callable[[Sequence[Evaluation]], Sequence[Choice] | None] | None = None

    def __post_init__(self) -> None:
        for name in ("trials", "seeds", "max_groups", "groups", "budget_bytes", "max_runs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise GroupSearchError(f"Expected {name} of at least 1, found {value}.")
        if self.seed < 0:
            raise GroupSearchError(f"Expected seed of at least 0, found {self.seed}.")
        if self.max_runs is not None and self.max_runs < self.trials:
            raise GroupSearchError(
                f"Expected max_runs of at least the {self.trials} trials, found {self.max_runs}. Ask for fewer trials, "
                f"or allow more runs."
            )
        if not 0 < self.confidence < 1:
            raise GroupSearchError(f"Expected a confidence between 0 and 1, found {self.confidence}.")
        for name, known in (("granularity", GRANULARITIES), ("sampler", SAMPLERS)):
            if getattr(self, name) not in known:
                raise GroupSearchError(
                    f"Expected {name} to be one of {', '.join(known)}, found {getattr(self, name)!r}."
                )
        self._check_searched()
        adaptive_selection_cost(self.selection_data)  # refuses another word
        if self.resume and self.force:
            raise GroupSearchError(
                "Found both resume and force: the one keeps the study, the other throws it away. Choose one."
            )

    @property
    def timed(self) -> bool:
        """Whether step time is an objective."""
        return "time" in self.objectives

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds that the front is evaluated with at least."""
        return tuple(range(self.seed, self.seed + self.seeds))

    def _check_searched(self) -> None:
        for name, known in (("rules", RULES), ("allocations", ALLOCATIONS)):
            values = getattr(self, name)
            if len(set(values)) < len(values) or not set(values) <= set(known):
                raise GroupSearchError(f"Expected {name} of {', '.join(known)}, each once, found {', '.join(values)}.")
        if self.objectives not in (OBJECTIVES[:2], OBJECTIVES):
            raise GroupSearchError(
                f"Expected the objectives metric and peak, with or without time, found {', '.join(self.objectives)}."
            )
        if self.groups is not None and self.max_groups is not None:
            raise GroupSearchError(
                f"Found both a number of groups, {self.groups}, and a limit on it, {self.max_groups}. Give one of them."
            )


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        kind: ``started``, ``trained`` or ``failed`` for an evaluation; ``rejected`` (outside the
            limits) or ``cached`` (evaluated before) for a suggestion that costs nothing.
        phase: ``search`` or ``replication``.
        choice: the grouping, and what else is searched.
        seed: the evaluation's seed; None where nothing is evaluated.
        value: the metric, where there is one.
        peak_bytes: the estimated peak.
        done: evaluations done in this phase.
        total: evaluations this phase will have made when it ends; in the replication it may
            still grow or shrink, because means move the front.
        reason: why an evaluation failed.
    """

    kind: str
    phase: str
    choice: Choice
    seed: int | None
    value: float | None
    peak_bytes: int
    done: int
    total: int
    reason: str | None = None

    @property
    def boundaries(self) -> Boundaries:
        """The grouping alone."""
        return self.choice.boundaries


Notify = Callable[[Event], None]


def ignore(event: Event) -> None:
    """What is told when nobody listens."""
