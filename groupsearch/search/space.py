"""What may be searched: where cuts are allowed, which limits hold, and how a choice becomes parameters.

One integer 0 or 1 per allowed boundary, so that every grouping has exactly one set of parameters and
what was evaluated is known again; one categorical parameter for the clip rule and one for the allocation of
thresholds, where they are searched. The exact front of least peaks is enqueued first: with every sampler that
is worth more than the choice of the sampler (``benchmarks/bench_search.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from groupsearch.errors import BudgetError, GroupSearchError
from groupsearch.plan.grouping import named_groupings
from groupsearch.plan.memory import Bytes, CostTable, cost_table, peaks
from groupsearch.plan.partition import solve_front, solve_least_peak
from groupsearch.plan.trace import Trace
from groupsearch.search.choice import Boundaries, Choice
from groupsearch.search.settings import SearchSettings
from groupsearch.units import format_bytes

# -- The ways of taking one step that differ in memory and time alone, of which every grouping takes the cheapest

Traces = Trace | Mapping[str, Trace]  # one way of taking the step, or several by name


@dataclass(frozen=True, eq=False)
class Variants:
    """Traces of the same sites, such as with and without checkpointing.

    The accuracy of a grouping is the same under all of them, so its peak is the least of theirs.

    Attributes:
        traces: by name, at least one.

    Raises:
        GroupSearchError: when there is none, or one has other sites, layers or blocks than the first.
    """

    traces: Mapping[str, Trace]

    def __post_init__(self) -> None:
        if not self.traces:
            raise GroupSearchError("Expected at least one traced step to estimate peaks from, found none.")
        first = next(iter(self.traces))
        for name, trace in self.traces.items():
            if _sites(trace) != _sites(self.traces[first]):
                raise GroupSearchError(
                    f"Expected every variant to have the same sites, so that a grouping means the same in all, found "
                    f"{self.traces[first].length} sites of {first!r} and {trace.length} of {name!r}, or other names or "
                    f"blocks. Search them one after the other."
                )

    @classmethod
    def of(cls, traces: Traces) -> Variants:
        """One trace, or several by name."""
        return cls({"": traces} if isinstance(traces, Trace) else dict(traces))

    @property
    def first(self) -> Trace:
        """The first trace, for what is the same in all."""
        return next(iter(self.traces.values()))

    @property
    def free(self) -> bool:
        """Whether there is more than one."""
        return len(self.traces) > 1

    def peaks(self, many: Sequence[Boundaries]) -> Bytes:
        """int64 [N] the least estimated peaks of groupings."""
        return np.asarray(np.min([peaks(trace, many) for trace in self.traces.values()], axis=0))

    def cheapest(self, boundaries: Boundaries) -> str:
        """The name of the variant with the least peak of a grouping, the first of equal ones."""
        found = {name: int(peaks(trace, [boundaries])[0]) for name, trace in self.traces.items()}
        return min(found, key=found.__getitem__)

    @cached_property
    def tables(self) -> tuple[CostTable, ...]:
        """What groups cost under every variant."""
        return tuple(cost_table(trace) for trace in self.traces.values())

    def exact_front(
        self, cuts: Boundaries, max_groups: int | None = None, groups: int | None = None
    ) -> list[tuple[Boundaries, int]]:
        """(boundaries, peak bytes) of the least peak with 1, 2, ... groups, or with ``groups`` alone.

        It ends at the floor of all variants, or at ``max_groups``; there are no other boundaries than ``cuts``.
        """
        starts = np.array([0, *cuts])
        ends = np.append(starts[1:], self.first.length) - 1
        spans = [CostTable(t.cost_bytes[np.ix_(starts, ends)], t.outside_bytes) for t in self.tables]

        def best(count: int) -> tuple[Boundaries, int]:
            found = [tuple(int(starts[b]) for b in solve_least_peak(span, count)) for span in spans]
            sizes = self.peaks(found)
            return found[int(np.argmin(sizes))], int(sizes.min())

        if groups is not None:
            return [best(groups)]
        fronts = [solve_front(span, max_groups) for span in spans]
        floor = min(front[-1][1] for front in fronts)
        length = min(len(front) for front in fronts if front[-1][1] == floor)
        return [best(count) for count in range(1, length + 1)]

    def fingerprint(self) -> dict[str, str]:
        """A digest of every trace, by name."""
        return {name: digest(trace) for name, trace in self.traces.items()}


def digest(trace: Trace) -> str:
    """What changes with anything in a trace."""
    return hashlib.sha256(json.dumps(trace.to_json(), sort_keys=True).encode()).hexdigest()


def _sites(trace: Trace) -> Any:
    return [(site.name, site.layer, site.block, site.parameters) for site in trace.sites]


# -- space -----------------------------------------------------------------------------------------

REFERENCES = ("all-layer", "layer-wise", "uniform:4")
_WHOLE = ("uniform", "dimension")  # with one group both give it all of R


@dataclass(frozen=True, eq=False)
class Space:
    """The choices within the limits of one search.

    Attributes:
        variants: the traced step, once for every way of taking it.
        cuts: the boundaries that the search may cut at, in increasing order.
        budget_bytes: the largest estimated peak, or None.
        max_groups: the most groups, or None.
        groups: the number of groups where it is fixed, or None.
        rules: the clip rules that are searched; None alone where the training fixes it.
        allocations: the allocations of thresholds, likewise.
    """

    variants: Variants
    cuts: Boundaries
    budget_bytes: int | None = None
    max_groups: int | None = None
    groups: int | None = None
    rules: tuple[str | None, ...] = (None,)
    allocations: tuple[str | None, ...] = (None,)

    @classmethod
    def of(cls, traces: Traces, settings: SearchSettings) -> Space:
        """The space that settings ask for.

        Raises:
            BudgetError: when no grouping of this granularity is within the budget; the message states the floor.
            GroupSearchError: when variants have different sites, or there are too few for the number of groups.
        """
        variants, granularity = Variants.of(traces), settings.granularity
        trace = variants.first
        cuts = {
            "site": tuple(range(1, trace.length)),
            "layer": trace.layer_boundaries,
            "block": trace.block_boundaries,
        }[granularity]
        if settings.groups is not None and settings.groups > len(cuts) + 1:
            raise GroupSearchError(
                f"Expected at most {len(cuts) + 1} groups with cuts between {granularity}s, found {settings.groups}. "
                f"Ask for fewer groups, or for cuts between sites."
            )
        rules, allocations = settings.rules or (None,), settings.allocations or (None,)
        space = cls(variants, cuts, settings.budget_bytes, settings.max_groups, settings.groups, rules, allocations)
        space._check_budget(granularity)
        return space

    @property
    def trace(self) -> Trace:
        """The first of the traces, for what all of them have in common."""
        return self.variants.first

    @cached_property
    def exact_front(self) -> list[tuple[Boundaries, int]]:
        """(boundaries, peak bytes) of the least peak with 1, 2, ... groups, cut only where cuts are allowed."""
        return self.variants.exact_front(self.cuts, self.max_groups, self.groups)

    @cached_property
    def named(self) -> dict[str, Boundaries]:
        """The fixed styles, each distinct grouping under one name."""
        return {name: g.boundaries for name, g in named_groupings(self.trace, (4, 2, 8)).items()}

    @cached_property
    def options(self) -> tuple[Choice, ...]:
        """Every combination of a rule and an allocation, each as the choice of one group; the first is the default."""
        return tuple(Choice((), rule, allocation) for rule, allocation in product(self.rules, self.allocations))

    def with_option(self, boundaries: Boundaries, option: Choice | None = None) -> Choice:
        """A grouping with the rule and allocation of an option, or the first where those are not searched.

        With one group ``uniform`` and ``dimension`` are one mechanism and kept under the first of the two names.
        """
        option = self.options[0] if option is None else option
        rule = option.rule if option.rule in self.rules else self.rules[0]
        allocation = option.allocation if option.allocation in self.allocations else self.allocations[0]
        if not boundaries and allocation in _WHOLE:
            allocation = next(each for each in self.allocations if each in _WHOLE)
        return Choice(boundaries, rule, allocation)

    def references(self) -> tuple[Choice, ...]:
        """The reference styles that are within the limits; they may cut where the search may not."""
        return tuple(self.with_option(b) for name, b in self.named.items() if name in REFERENCES and self.feasible(b))

    def source(self, boundaries: Boundaries) -> str:
        """The name of a style, ``exact front``, or ``search``."""
        for name, style in self.named.items():
            if style == boundaries:
                return name
        return "exact front" if any(b == boundaries for b, _ in self.exact_front) else "search"

    def warm_start(self, trials: int) -> list[Choice]:
        """What is worth evaluating before anything is sampled: references, exact front, other styles.

        Of the exact front those that lower the peak, and of these at most half of ``trials``,
        thinned out where there are many groups. All with the first rule and allocation; then every other rule
        and every other allocation once, with the last of the references.
        """
        lowering, least = [], None
        for boundaries, peak in self.exact_front:
            if self.feasible(boundaries) and (least is None or peak < least):
                lowering.append(boundaries)
                least = peak
        most = max(1, trials // 2)
        if len(lowering) > most:
            lowering = [lowering[round(i) - 1] for i in np.geomspace(1, len(lowering), most)]
        references = [r for r in self.references() if set(r.boundaries) <= set(self.cuts)]
        others = self._flipped((references or [self.with_option(lowering[-1])])[-1])
        styles = [b for b in self.named.values() if self.feasible(b) and set(b) <= set(self.cuts)]
        return list(dict.fromkeys([*references, *others, *map(self.with_option, [*lowering, *styles])]))

    def fixed_choices(self) -> list[Choice]:
        """All that is worth evaluating and known without any evaluation: exact front and styles, with every option."""
        found = [choice.boundaries for choice in self.warm_start(2 * len(self.exact_front))]
        return list(dict.fromkeys(self.with_option(b, option) for b in found for option in self.options))

    def peak_bytes(self, boundaries: Boundaries) -> int:
        """The estimated peak of a grouping, under the variant where it is least."""
        return int(self.peaks([boundaries])[0])

    def peaks(self, many: Sequence[Boundaries]) -> Bytes:
        """int64 [N] the estimated peaks of groupings."""
        return self.variants.peaks(many)

    def limits(self, boundaries: Boundaries) -> dict[str, float]:
        """By how much of itself every limit is exceeded; a grouping is feasible where none is above 0."""
        limits, groups = {}, len(boundaries) + 1
        if self.budget_bytes is not None:
            limits["memory"] = self.peak_bytes(boundaries) / self.budget_bytes - 1
        if self.max_groups is not None:
            limits["groups"] = groups / self.max_groups - 1
        if self.groups is not None:
            limits["number of groups"] = abs(groups / self.groups - 1)
        return limits

    def feasible(self, boundaries: Boundaries) -> bool:
        """Whether a grouping is within the budget and has a number of groups that is allowed."""
        return all(excess <= 0 for excess in self.limits(boundaries).values())

    def suggest(self, trial: optuna.Trial) -> Choice:
        """The choice that a trial stands for."""
        boundaries = tuple(b for b in self.cuts if trial.suggest_int(_name(b), 0, 1))
        given = {name: trial.suggest_categorical(name, values) for name, values in self._categories.items()}
        first = self.options[0]
        option = Choice((), _word(given.get("rule", first.rule)), _word(given.get("allocation", first.allocation)))
        return self.with_option(boundaries, option)

    def parameters(self, choice: Choice) -> dict[str, int | str | None]:
        """The parameters that :meth:`suggest` turns into this choice, whose boundaries must be among ``cuts``."""
        cuts = {_name(b): int(b in choice.boundaries) for b in self.cuts}
        return {**cuts, **{name: getattr(choice, name) for name in self._categories}}

    def distributions(self) -> dict[str, BaseDistribution]:
        """What every parameter is taken from."""
        cuts = {_name(b): IntDistribution(0, 1) for b in self.cuts}
        return {**cuts, **{name: CategoricalDistribution(values) for name, values in self._categories.items()}}

    def neighbours(self, choice: Choice) -> list[Choice]:
        """Every choice with one cut more, one less, one moved to the nearest place, another rule or allocation."""
        here, found = set(choice.boundaries), []
        for left, right in zip(self.cuts, self.cuts[1:], strict=False):
            if (left in here) != (right in here):
                found.append(here ^ {left, right})
        found += [here ^ {b} for b in self.cuts]
        return [*(self.with_option(tuple(sorted(cuts)), choice) for cuts in found), *self._flipped(choice)]

    def unseen_near(self, seen: Sequence[Choice], rng: np.random.Generator) -> Choice | None:
        """A feasible neighbour, not in ``seen``, of one of these; None when there is none."""
        known = set(seen)
        for index in rng.permutation(len(seen)):
            fresh = [c for c in self.neighbours(seen[index]) if c not in known and self.feasible(c.boundaries)]
            if fresh:
                return fresh[rng.integers(len(fresh))]
        return None

    @cached_property
    def _categories(self) -> dict[str, tuple[str | None, ...]]:
        """What is searched besides the cuts, and among which values."""
        return {n: v for n, v in (("rule", self.rules), ("allocation", self.allocations)) if len(v) > 1}

    def _flipped(self, choice: Choice) -> list[Choice]:
        """The same grouping with another rule, or with another allocation."""
        others = [Choice((), rule, choice.allocation) for rule in self.rules]
        others += [Choice((), choice.rule, allocation) for allocation in self.allocations]
        kept = dict.fromkeys(self.with_option(choice.boundaries, other) for other in others)
        return [other for other in kept if other != choice]

    def _check_budget(self, granularity: str) -> None:
        floor, budget = min(peak for _, peak in self.exact_front), self.budget_bytes
        if budget is None or budget >= floor:
            return
        limits = {f"at most {self.max_groups} groups": self.max_groups, f"{self.groups} groups": self.groups}
        most = "".join(f" and {words}" for words, limit in limits.items() if limit is not None)
        raise BudgetError(
            f"Expected a budget of at least {format_bytes(floor)} ({floor} bytes), the least peak of any grouping "
            f"with cuts between {granularity}s{most}, found {format_bytes(budget)} ({budget} bytes). "
            f"Raise the budget or the number of groups, lower the batch size or turn activation checkpointing on."
        )


def _name(boundary: int) -> str:
    return f"cut{boundary:05d}"


def _word(value: Any) -> str | None:
    return None if value is None else str(value)
