"""What may be searched: where cuts are allowed, which limits hold, and how a grouping becomes parameters.

One integer 0 or 1 per allowed boundary, so that every grouping has exactly one set of parameters and
what was evaluated is known again. The exact front of least peaks is enqueued first: with every sampler that
is worth more than the choice of the sampler (``tests/benchmarks/bench_search.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import optuna

from groupsearch.errors import BudgetError
from groupsearch.grouping import named_groupings
from groupsearch.lifetimes import Bytes
from groupsearch.memory import CostTable, cost_table, peaks
from groupsearch.partition import solve_front
from groupsearch.search.settings import SearchSettings
from groupsearch.trace import Trace
from groupsearch.units import format_bytes

Boundaries = tuple[int, ...]
REFERENCES = ("all-layer", "layer-wise", "uniform:4")


@dataclass(frozen=True, eq=False)
class Space:
    """The groupings of one trace within the limits of one search.

    Attributes:
        trace: the traced step.
        cuts: the boundaries that the search may cut at, in increasing order.
        budget_bytes: the largest estimated peak, or None.
        max_groups: the most groups, or None.
    """

    trace: Trace
    cuts: Boundaries
    budget_bytes: int | None = None
    max_groups: int | None = None

    @classmethod
    def of(cls, trace: Trace, settings: SearchSettings) -> Space:
        """The space that settings ask for.

        Raises:
            BudgetError: when no grouping of this granularity is within the budget; the message states the floor.
        """
        cuts = {
            "site": tuple(range(1, trace.length)),
            "layer": trace.layer_boundaries,
            "block": trace.block_boundaries,
        }[settings.granularity]
        space = cls(trace, cuts, settings.budget_bytes, settings.max_groups)
        floor, budget = min(peak for _, peak in space.exact_front), settings.budget_bytes
        if budget is not None and budget < floor:
            most = "" if settings.max_groups is None else f" and at most {settings.max_groups} groups"
            raise BudgetError(
                f"Expected a budget of at least {format_bytes(floor)} ({floor} bytes), the least peak of any grouping "
                f"with cuts between {settings.granularity}s{most}, found {format_bytes(budget)} ({budget} bytes). "
                f"Raise the budget or the number of groups, lower the batch size or turn activation checkpointing on."
            )
        return space

    @cached_property
    def exact_front(self) -> list[tuple[Boundaries, int]]:
        """(boundaries, peak bytes) of the least peak with 1, 2, ... groups, cut only where cuts are allowed."""
        starts = np.array([0, *self.cuts])
        table = cost_table(self.trace)
        spans = CostTable(
            table.cost_bytes[np.ix_(starts, np.append(starts[1:], self.trace.length) - 1)], table.outside_bytes
        )
        front = solve_front(spans, self.max_groups)
        return [(tuple(int(starts[b]) for b in boundaries), peak) for boundaries, peak in front]

    @cached_property
    def named(self) -> dict[str, Boundaries]:
        """The fixed styles, each distinct grouping under one name."""
        return {name: g.boundaries for name, g in named_groupings(self.trace, (4, 2, 8)).items()}

    def references(self) -> tuple[Boundaries, ...]:
        """The reference styles that are within the limits; they may cut where the search may not."""
        return tuple(b for name, b in self.named.items() if name in REFERENCES and self.feasible(b))

    def source(self, boundaries: Boundaries) -> str:
        """The name of a style, ``exact front``, or ``search``."""
        for name, style in self.named.items():
            if style == boundaries:
                return name
        return "exact front" if any(b == boundaries for b, _ in self.exact_front) else "search"

    def warm_start(self, trials: int) -> list[Boundaries]:
        """What is worth evaluating before anything is sampled: references, exact front, other styles.

        Of the exact front those that lower the peak, and of these at most half of ``trials``,
        thinned out where there are many groups.
        """
        lowering, least = [], None
        for boundaries, peak in self.exact_front:
            if self.feasible(boundaries) and (least is None or peak < least):
                lowering.append(boundaries)
                least = peak
        most = max(1, trials // 2)
        if len(lowering) > most:
            lowering = [lowering[round(i) - 1] for i in np.geomspace(1, len(lowering), most)]
        styles = [b for b in self.named.values() if self.feasible(b)]
        wanted = [*self.references(), *lowering, *styles]
        return [b for b in dict.fromkeys(wanted) if set(b) <= set(self.cuts)]

    def peak_bytes(self, boundaries: Boundaries) -> int:
        """The estimated peak of a grouping."""
        return int(self.peaks([boundaries])[0])

    def peaks(self, many: Sequence[Boundaries]) -> Bytes:
        """int64 [N] the estimated peaks of groupings."""
        return peaks(self.trace, many)

    def limits(self, boundaries: Boundaries) -> dict[str, float]:
        """By how much of itself every limit is exceeded; a grouping is feasible where none is above 0."""
        limits = {}
        if self.budget_bytes is not None:
            limits["memory"] = self.peak_bytes(boundaries) / self.budget_bytes - 1
        if self.max_groups is not None:
            limits["groups"] = (len(boundaries) + 1) / self.max_groups - 1
        return limits

    def feasible(self, boundaries: Boundaries) -> bool:
        """Whether a grouping is within the budget and has few enough groups."""
        return all(excess <= 0 for excess in self.limits(boundaries).values())

    def suggest(self, trial: optuna.Trial) -> Boundaries:
        """The grouping that a trial stands for."""
        return tuple(b for b in self.cuts if trial.suggest_int(_name(b), 0, 1))

    def parameters(self, boundaries: Boundaries) -> dict[str, int]:
        """The parameters that :meth:`suggest` turns into these boundaries, which must be among ``cuts``."""
        return {_name(b): int(b in boundaries) for b in self.cuts}

    def neighbours(self, boundaries: Boundaries) -> list[Boundaries]:
        """Every grouping with one cut more, one less, or one moved to the nearest place on either side."""
        here, found = set(boundaries), []
        for left, right in zip(self.cuts, self.cuts[1:], strict=False):
            if (left in here) != (right in here):
                found.append(here ^ {left, right})
        found += [here ^ {b} for b in self.cuts]
        return [tuple(sorted(cuts)) for cuts in found]

    def unseen_near(self, seen: Sequence[Boundaries], rng: np.random.Generator) -> Boundaries | None:
        """A feasible neighbour, not in ``seen``, of one of these; None when there is none."""
        known = set(seen)
        for index in rng.permutation(len(seen)):
            fresh = [b for b in self.neighbours(seen[index]) if b not in known and self.feasible(b)]
            if fresh:
                return fresh[rng.integers(len(fresh))]
        return None


def _name(boundary: int) -> str:
    return f"cut{boundary:05d}"
