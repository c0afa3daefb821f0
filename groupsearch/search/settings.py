"""What a search is asked to do, and what it says while it does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groupsearch.errors import GroupSearchError
from groupsearch.search.selection import adaptive_selection_cost

GRANULARITIES = ("site", "layer", "block")
SAMPLERS = ("front", "tpe", "nsga2", "gp", "random")


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
        confidence: of everything that is declared together, see :func:`groupsearch.search.comparison.compare`.
        sampler: ``front``, ours (see :class:`groupsearch.search.samplers.FrontSampler`), or one of Optuna's:
            ``tpe`` (multivariate), ``nsga2``, ``gp`` or ``random``.
        storage: a file for Optuna's journal, a database URL (``sqlite:///study.db``), or None to
            keep the study in memory, where nothing can be resumed.
        study_name: the study's name in the storage.
        resume: go on with the study where there is one, else begin it.
        force: throw an existing study of this name away.
        granularity: where the search may cut: between ``site``, ``layer`` or ``block``.
        max_groups: the most groups; None for no limit.
        metric_name: what the values are; larger is better.
        selection_data: whether the metric is of ``public`` (or synthetic) or of ``private`` examples, which
            changes nothing but what is said of the privacy that comparing has cost.
        fingerprint: everything else that defines the problem (model, data, epsilon, ...), as JSON.

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
    metric_name: str = "metric"
    selection_data: str = "private"
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("trials", "seeds", "max_groups", "budget_bytes", "max_runs"):
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
        adaptive_selection_cost(self.selection_data)  # refuses another word
        if self.resume and self.force:
            raise GroupSearchError(
                "Found both resume and force: the one keeps the study, the other throws it away. Choose one."
            )

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds that the front is evaluated with at least."""
        return tuple(range(self.seed, self.seed + self.seeds))


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        kind: ``started``, ``trained`` or ``failed`` for an evaluation; ``rejected`` (outside the
            limits) or ``cached`` (evaluated before) for a suggestion that costs nothing.
        phase: ``search`` or ``replication``.
        boundaries: the grouping.
        seed: the evaluation's seed; None where nothing is evaluated.
        value: the metric, where there is one.
        peak_bytes: the estimated peak.
        done: evaluations done in this phase.
        total: evaluations this phase will have made when it ends; in the replication it may
            still grow or shrink, because means move the front.
    """

    kind: str
    phase: str
    boundaries: tuple[int, ...]
    seed: int | None
    value: float | None
    peak_bytes: int
    done: int
    total: int


Notify = Callable[[Event], None]


def ignore(event: Event) -> None:
    """What is told when nobody listens."""
