"""Grouping and norm methods chosen together."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from groupsearch.errors import BudgetError, GroupSearchError
from groupsearch.options import SITE_METHODS
from groupsearch.plan.memory import Bytes, lifetimes, peak_memory
from groupsearch.plan.trace import Booked, CrossTerm, Instant, Site, Trace
from groupsearch.units import format_bytes

# -- One step by every norm method: the trace of any choice of methods, composed of one trace per method
#
# A site's method changes what happens in the site's own hook and what it books, nothing else: input
# and output gradient (``ghost``, ``recompute``), or the per-example gradients, which live from its hook
# to the close of its group (``instantiate``). Everything between hooks is autograd's doing and the same.


def operations(site: Site, examples: int) -> int:
    """Multiply-accumulates of a matrix site's norm and clipped sum: operations of a step, not seconds.

    With B examples, T positions, d inputs and p outputs (of G channel groups: G d inputs, p outputs in all)
    ``ghost`` takes B T^2 (G d + p) for the norm and B T d p for the clipped sum, ``instantiate`` B T d p for the
    per-example gradients and B d p for their clipped sum, ``recompute`` B T d p twice. Inner products of sites that
    share a weight, biases and passes over single tensors are not counted.
    """
    B, T, d, p, G = examples, site.positions, site.inputs, site.outputs, site.groups
    product = B * T * d * p
    norm_and_sum = {
        "ghost": (B * T * T * (G * d + p), product),
        "instantiate": (product, B * d * p),
        "recompute": (product, product),
    }
    return sum(norm_and_sum[site.method])


@dataclass(frozen=True, eq=False)
class Alternatives:
    """Traces of one step, each with one norm method for all sites that have the choice.

    :func:`groupsearch.tracer.trace_methods` takes them.

    Attributes:
        traces: by method; ``ghost`` is among them.

    Raises:
        GroupSearchError: when the traces are not of one and the same step.
    """

    traces: Mapping[str, Trace]

    def __post_init__(self) -> None:
        if "ghost" not in self.traces or set(self.traces) - set(SITE_METHODS):
            raise GroupSearchError(
                f"Expected traces by norm method, ghost and any of {', '.join(SITE_METHODS)}, found "
                f"{', '.join(self.traces) or 'none'}. Take them with tracer.trace_methods."
            )
        same = {method: _between_hooks(trace) == _between_hooks(self.base) for method, trace in self.traces.items()}
        strange = [method for method, alike in same.items() if not alike]
        strange = strange or [method for method, trace in self.traces.items() if not self._goes_by(trace, method)]
        if strange:
            raise GroupSearchError(
                f"The trace with norm method {strange[0]} is of another step than the one with ghost: between the "
                "hooks of the sites something else is alive, or other sites have a choice. Take both with the same "
                "model, batch and settings."
            )

    @property
    def base(self) -> Trace:
        """The trace in which every site with a choice takes the ghost norm."""
        return self.traces["ghost"]

    @cached_property
    def choosing(self) -> tuple[bool, ...]:
        """Which sites have a choice."""
        by_site = zip(*(trace.sites for trace in self.traces.values()), strict=True)
        return tuple(
            sites[0].kind != "embedding" and {site.method for site in sites} == set(self.traces) for sites in by_site
        )

    @cached_property
    def weights(self) -> tuple[str | None, ...]:
        """The weight by whose name a site's method is given; None where there is no choice."""
        return tuple(
            site.parameters[0] if chooses else None
            for site, chooses in zip(self.base.sites, self.choosing, strict=True)
        )

    def site_methods(self, methods: Mapping[str, str] | str) -> tuple[str, ...]:
        """The method of every site, from one for all or one per weight; ghost for weights that are not named.

        Raises:
            GroupSearchError: for a weight without a choice or a method without a trace.
        """
        named = dict.fromkeys(filter(None, self.weights), methods) if isinstance(methods, str) else methods
        unknown = sorted({*named} - {*self.weights}) + sorted({*named.values()} - {*self.traces})
        if unknown:
            raise GroupSearchError(
                f"Expected weights with a choice of norm method and one of {', '.join(self.traces)} for each, found "
                f"{', '.join(unknown)}."
            )
        return tuple(
            named.get(weight, "ghost") if weight else site.method
            for weight, site in zip(self.weights, self.base.sites, strict=True)
        )

    def trace(self, methods: Mapping[str, str] | str) -> Trace:
        """The trace of a step in which weights go by these methods; see :meth:`site_methods`.

        Raises:
            GroupSearchError: as :meth:`site_methods`; when sites that share a parameter but not their weight
                go by different methods, whose inner product was never traced; or when hooks cannot be exchanged.
        """
        chosen = self.site_methods(methods)
        taken = [self._taken(index, method) for index, method in enumerate(chosen)]
        named = {weight: method for weight, method in zip(self.weights, chosen, strict=True) if weight}
        return replace(
            self.base,
            sites=tuple(trace.sites[index] for index, trace in enumerate(taken)),
            instants=tuple(self._instants(taken)),
            booked=tuple(self._booked(chosen)),
            cross_terms=tuple(self._cross_terms(chosen)),
            settings={**self.base.settings, "methods": named},
            events=None,  # those of the base are of one method for all
        )

    def operations(self, methods: Mapping[str, str] | str) -> int:
        """Multiply-accumulates of the norms and clipped sums of all sites with a choice, see :func:`operations`."""
        chosen = self.site_methods(methods)
        return self.operations_of([replace(s, method=m) for s, m in zip(self.base.sites, chosen, strict=True)])

    def operations_of(self, sites: Sequence[Site]) -> int:
        """As :meth:`operations`, of these sites by their own methods: of a trace that is not among the alternatives."""
        by_choice = zip(sites, self.choosing, strict=True)
        return sum(operations(site, self.base.batch_size) for site, chooses in by_choice if chooses)

    def hook(self, index: int, method: str) -> tuple[Instant, ...]:
        """The instants in a site's hook by a method.

        Raises:
            GroupSearchError: when there are not as many as by the ghost norm.
        """
        found = [self._in_hook(trace, index) for trace in (self.base, self._taken(index, method))]
        if len(found[0]) != len(found[1]):
            raise GroupSearchError(
                f"In the hook of site {self.base.sites[index].name} autograd lets go of something that is booked, at "
                f"other times by {method} than by ghost: their traces cannot be composed. Trace the choice itself, "
                "with EngineOptions(methods=...)."
            )
        return found[1]

    def instances(self, index: int) -> tuple[Booked, ...]:
        """What a site books by instantiate, in the instants of :attr:`base`."""
        after = int(lifetimes(self.base).close_at[index]) + 1
        return tuple(
            Booked(storage.size_bytes, index, index, after)
            for storage in self.traces["instantiate"].booked
            if index in storage.sites
        )

    def pair(self, number: int, early: str, late: str) -> CrossTerm | None:
        """Cross term ``number`` of :attr:`base` when its sites go by these methods; None where it was not traced."""
        term = self.base.cross_terms[number]
        found = {method for site, method in ((term.early, early), (term.late, late)) if self.choosing[site]}
        return self.traces[found.pop() if found else "ghost"].cross_terms[number] if len(found) < 2 else None

    def _goes_by(self, trace: Trace, method: str) -> bool:
        expected = (
            method if chooses else site.method for site, chooses in zip(self.base.sites, self.choosing, strict=True)
        )
        return [site.method for site in trace.sites] == list(expected)

    def _taken(self, index: int, method: str) -> Trace:
        return self.traces[method] if self.choosing[index] else self.base

    def _in_hook(self, trace: Trace, index: int) -> tuple[Instant, ...]:
        times = lifetimes(trace)
        return trace.instants[int(times.hook_at[index]) : int(times.close_at[index]) + 1]

    def _instants(self, taken: Sequence[Trace]) -> Iterator[Instant]:
        times, instants = lifetimes(self.base), self.base.instants
        yield from instants[: int(times.hook_at[-1])]
        for index in reversed(range(self.base.length)):
            yield from self.hook(index, taken[index].sites[index].method)
            yield from instants[int(times.close_at[index]) + 1 : int(times.end_at[index])]

    def _booked(self, chosen: Sequence[str]) -> Iterator[Booked]:
        kept = {i for i, chooses in enumerate(self.choosing) if chooses and chosen[i] == "instantiate"}
        for storage in self.base.booked:
            sites = [i for i in storage.sites if i not in kept]
            if sites:
                yield Booked(storage.size_bytes, sites[0], sites[-1], storage.released, tuple(sites[1:-1]))
        for index in sorted(kept):
            yield from self.instances(index)

    def _cross_terms(self, chosen: Sequence[str]) -> Iterator[CrossTerm]:
        for number, term in enumerate(self.base.cross_terms):
            found = self.pair(number, chosen[term.early], chosen[term.late])
            if found is None:
                names = [self.base.sites[i].name for i in (term.early, term.late)]
                raise GroupSearchError(
                    f"Sites {' and '.join(names)} share a parameter and were given different norm methods, whose inner "
                    "product no trace tells. Give both the same method."
                )
            yield found


def _between_hooks(trace: Trace) -> tuple[object, ...]:
    times = lifetimes(trace)
    largest: list[Bytes] = [
        times.live[int(close) + 1 : int(end)].max() for close, end in zip(times.close_at, times.end_at, strict=True)
    ]
    forward = tuple(i for i in trace.instants if i.site < 0)
    sites = tuple((site.name, site.parameters, site.gradient_bytes) for site in trace.sites)
    pairs = tuple((term.early, term.late) for term in trace.cross_terms)
    return sites, forward, pairs, tuple(int(x) for x in largest), trace.step_bytes, trace.static, trace.carried_bytes


# -- The step by every norm method with its storages numbered and its times in arrays, for decisions to be made on


@dataclass(frozen=True, eq=False)
class Form:
    """A site by one method: its operations, its hook, what it books (numbers of storages)."""

    method: str
    site: Site
    hook: tuple[Instant, ...]
    books: tuple[int, ...]
    operations: int


@dataclass(eq=False)
class Problem:
    """The step by every method, with its storages numbered and its times in arrays."""

    alternatives: Alternatives

    def __post_init__(self) -> None:
        base = self.alternatives.base
        self.length, self.times = base.length, lifetimes(base)
        self.instants = len(base.instants)
        self.sizes = [(b.size_bytes, b.released) for b in base.booked]
        self.bookers = [b.sites for b in base.booked]
        self.forms = [self._forms(index) for index in range(self.length)]
        live = max((i.live_bytes for i in base.instants if i.site < 0), default=0)
        self.outside_bytes = max(live + base.carried_bytes, base.step_bytes)

    def _forms(self, index: int) -> dict[str, Form]:
        known, base = self.alternatives, self.alternatives.base
        methods = tuple(known.traces) if known.choosing[index] else (base.sites[index].method,)
        by_autograd = tuple(number for number, b in enumerate(base.booked) if index in b.sites)
        forms = {}
        for method in methods:
            books, site = by_autograd, base.sites[index]
            if known.choosing[index]:
                site = known.traces[method].sites[index]
                if method == "instantiate":
                    own = known.instances(index)
                    books = tuple(range(len(self.sizes), len(self.sizes) + len(own)))
                    self.sizes += [(b.size_bytes, b.released) for b in own]
                    self.bookers += [b.sites for b in own]
            cost = operations(site, base.batch_size) if known.choosing[index] else 0
            forms[method] = Form(method, site, known.hook(index, method), books, cost)
        return forms

    @cached_property
    def ties(self) -> list[int | None]:
        """For every site with a choice the one to be decided first of those that must go by its method."""
        known = self.alternatives
        first: list[int | None] = [i if chooses else None for i, chooses in enumerate(known.choosing)]
        same_weight = [
            (max(i, k), min(i, k)) for i, w in enumerate(known.weights) if w for k in [known.weights.index(w)]
        ]
        for early, late in same_weight + [(term.early, term.late) for term in known.base.cross_terms]:
            tied = {first[early], first[late]}
            if None not in tied:
                first = [max(x for x in tied if x is not None) if f in tied else f for f in first]
        return first

    @cached_property
    def last_of_tie(self) -> dict[int, int]:
        """The site to be decided last of those that are tied, by the first."""
        return {tie: index for index, tie in reversed(list(enumerate(self.ties))) if tie is not None}

    def held(self, number: int) -> Bytes:
        """[n] bytes of a storage from when autograd lets go of it."""
        size, released = self.sizes[number]
        held = np.zeros(self.instants, np.int64)
        held[released:] = size
        return held

    def moments_to_tell(self, site: int) -> list[int]:
        """Instants after a site at which what its group holds changes, for labels to be compared at."""
        end = int(self.times.end_at[site])
        later = {released for (_, released), sites in zip(self.sizes, self.bookers, strict=True) if max(sites) >= site}
        return sorted({min(end, self.instants - 1), *(t for t in later if end < t < self.instants)})


# -- Grouping and norm methods chosen together: the fewest operations within a budget, and the least peak
#
# Sites are decided in the order of backward: a method for each, and whether its group closes there. What was
# decided so far matters later only through its score, what the open group's book will hold at the
# instants to come, and how high its close would reach. Of two partial decisions that agree in what can
# still be shared, one that is nowhere larger makes the other superfluous (label setting). Without
# truncation that is exact; where more than ``width`` partial decisions are left at a site the least promising
# are dropped, and the least score that any of them could have led to bounds the optimum from below.

Score = Callable[[int, Form, int, bool], int | None]
"""score(of the decisions before, form of the site, largest bytes, whether its group closes); None where refused."""


@dataclass(frozen=True, eq=False)
class Decision:
    """A site's method, whether its group closes there, and the decision of the site before."""

    method: str
    closes: bool
    before: Decision | None


@dataclass(frozen=True, eq=False)
class Label:
    """What was decided from the last site down to one, as far as it matters.

    Attributes:
        score: what is minimised.
        decided: the last decision; None before the first.
        open: [n] bytes that the open group adds at every instant: its book, and sums formed before it; None
            when no group is open.
        closes: by the number of shared storages whose last booker is a later site, [n] the highest that
            forming sums of one of the group's sites reaches on top of what is alive.
        shared: storages that the group books and that sites to come may book: (number, last site to book it).
        crossing: inner products to come with a site of the group: (number of the cross term, its method).
        methods: of sites that sites to come are tied to, by the first of them.
    """

    score: int
    open: Bytes | None = None
    closes: Mapping[int, Bytes] = field(default_factory=dict)
    shared: tuple[tuple[int, int], ...] = ()
    crossing: tuple[tuple[int, str], ...] = ()
    methods: tuple[tuple[int, str], ...] = ()
    decided: Decision | None = None

    def decisions(self) -> Iterator[Decision]:
        """Of the sites 0, 1, ..."""
        decision = self.decided
        while decision is not None:
            yield decision
            decision = decision.before


def decide(problem: Problem, start: int, score: Score, rest: list[int], width: int) -> tuple[Label | None, int | None]:
    """The best label of the whole step, and the least that a dropped one could have come to (None if none was)."""
    labels, bound = [Label(start)], None
    for site in reversed(range(problem.length)):
        forms = problem.forms[site].values()
        found = (x for label in labels for form in forms for x in _extend(problem, label, site, form, score))
        labels = _undominated(found, problem.moments_to_tell(site))
        if len(labels) > width:
            labels, dropped = _most_promising(labels, width)
            least = min(label.score for label in dropped) + rest[site]
            bound = least if bound is None else min(bound, least)
    return min(labels, key=lambda label: label.score, default=None), bound


def _extend(problem: Problem, label: Label, site: int, form: Form, score: Score) -> Iterator[Label]:
    """The labels that a site by one method makes of a label: its group closed there, and left open."""
    chosen, tie = dict(label.methods), problem.ties[site]
    if tie is not None and chosen.setdefault(tie, form.method) != form.method:
        return
    times = problem.times
    begun = np.full(problem.instants, times.sums_before[site]) if label.open is None else label.open
    hook_at, close_at, end = (int(at[site]) for at in (times.hook_at, times.close_at, times.end_at))
    hook = max(i.live_bytes + int(begun[hook_at + k]) for k, i in enumerate(form.hook))
    pairs = _pair_bytes(problem, label, site, form)
    before = max([hook, *(form.site.close_live_bytes + int(begun[close_at]) + pair for pair in pairs)])
    methods = tuple(sorted((t, m) for t, m in chosen.items() if problem.last_of_tie[t] < site))
    after, closes = times.live[close_at + 1 : end], _closes(problem, label, site, form)
    close = form.site.close_live_bytes + max(int(high[close_at]) for high in closes.values())
    closed = int(after.max() + times.sums_before[site] + times.gradient[site])
    total = score(label.score, form, max(before, close, closed), True)
    if total is not None:
        yield Label(total, methods=methods, decided=Decision(form.method, True, label.decided))
    added = [problem.held(number) for number in form.books if number not in dict(label.shared)]
    opened = np.sum([begun, *added], axis=0)
    total = score(label.score, form, max(before, int((after + opened[close_at + 1 : end]).max())), False)
    if site and total is not None:
        shared, merged = _shared(problem, label, site, form), _merged(problem, label, site, form, closes)
        crossing = _crossing(problem, label, site, form)
        decided = Decision(form.method, False, label.decided)
        yield Label(total, opened, merged, shared, crossing, methods, decided)


def _closes(problem: Problem, label: Label, site: int, form: Form) -> dict[int, Bytes]:
    """How high closing reaches once a site has joined, by the classes of the label before it."""
    last = dict(label.shared)
    closes = dict(label.closes)
    for number in form.books:
        # a storage that a site before has booked is dropped later now: it is there for the sites in between, too
        rank = sum(k > last[number] for k in last.values()) if number in last else -1
        closes = {c: high + problem.held(number) if c > rank else high for c, high in closes.items()}
    own = np.full(problem.instants, form.site.close_bytes + problem.times.sums_before[site])
    own = np.sum([own, *(problem.held(number) for number in form.books)], axis=0)
    closes[len(last)] = np.maximum(closes[len(last)], own) if len(last) in closes else own
    return closes


def _shared(problem: Problem, label: Label, site: int, form: Form) -> tuple[tuple[int, int], ...]:
    last = {**dict(label.shared), **dict.fromkeys(form.books, site)}
    return tuple(sorted((number, k) for number, k in last.items() if min(problem.bookers[number]) < site))


def _merged(problem: Problem, label: Label, site: int, form: Form, closes: Mapping[int, Bytes]) -> dict[int, Bytes]:
    """``closes`` by the classes of the label after the site: classes that nothing to come can part are one."""
    last = dict(label.shared)
    ranks = [
        sum(k > last[number] for k in last.values())
        for number in last
        if number not in form.books and min(problem.bookers[number]) < site
    ]
    merged: dict[int, Bytes] = {}
    for c, high in closes.items():
        kind = sum(rank < c for rank in ranks)
        merged[kind] = np.maximum(merged[kind], high) if kind in merged else high
    return merged


def _pair_bytes(problem: Problem, label: Label, site: int, form: Form) -> list[int]:
    """Transients of the inner products that are due at a site."""
    found = []
    for number, method in label.crossing:
        term = problem.alternatives.pair(number, method, form.method)
        if term is not None and term.late == site:
            found.append(term.transient_bytes)
    return found


def _crossing(problem: Problem, label: Label, site: int, form: Form) -> tuple[tuple[int, str], ...]:
    """Inner products to come once a site has joined a label's group."""
    terms = problem.alternatives.base.cross_terms
    begun = ((number, form.method) for number, term in enumerate(terms) if term.early == site)
    return (*(x for x in label.crossing if terms[x[0]].late < site), *begun)


def _undominated(found: Iterable[Label], moments: list[int]) -> list[Label]:
    """The labels of which no other is nowhere larger, among those that agree in all that is not a number."""
    alike: dict[Hashable, list[Label]] = {}
    for label in found:
        alike.setdefault((label.open is None, label.shared, label.crossing, label.methods), []).append(label)
    kept: list[Label] = []
    for labels in alike.values():
        labels.sort(key=lambda label: label.score)
        rows = np.array([_sizes(label, moments) for label in labels])
        good: list[int] = []
        for i, row in enumerate(rows):
            if not (rows[good] <= row).all(axis=1).any():
                good.append(i)
        kept += [labels[i] for i in good]
    return kept


def _sizes(label: Label, moments: list[int]) -> list[int]:
    if label.open is None:
        return [label.score]
    sizes = [label.score, *label.open[moments].tolist()]
    for c in range(len(label.shared) + 1):
        sizes += label.closes[c][moments].tolist() if c in label.closes else [-1] * len(moments)
    return sizes


def _most_promising(labels: list[Label], width: int) -> tuple[list[Label], list[Label]]:
    """Half of the places go to the best scores, half to those that leave the most room."""
    by_score = sorted(range(len(labels)), key=lambda i: labels[i].score)
    by_room = sorted(range(len(labels)), key=lambda i: -1 if (held := labels[i].open) is None else int(held[-1]))
    kept = list(dict.fromkeys((*by_score[: (width + 1) // 2], *by_room)))[:width]
    return [labels[i] for i in kept], [labels[i] for i in set(range(len(labels))) - set(kept)]


# -- The fewest operations within a budget, and the least peak, of any grouping with any norm methods

JOINT = "joint"
"""What documents and the command line call norm methods that were chosen together with the grouping."""
WIDTH = 256
Boundaries = tuple[int, ...]


@dataclass(frozen=True)
class JointChoice:
    """A grouping and a norm method per weight.

    Attributes:
        boundaries: of the groups.
        methods: for :class:`groupsearch.options.EngineOptions`, by weight.
        operations: multiply-accumulates of the norms and clipped sums, see
            :func:`groupsearch.plan.joint.operations`.
        peak_bytes: the estimated peak.
        bound: no choice within the budget takes fewer operations; equal to ``operations`` where the choice is exact.
    """

    boundaries: Boundaries
    methods: Mapping[str, str]
    operations: int
    peak_bytes: int
    bound: int

    @property
    def gap(self) -> float:
        """How far above the bound the choice is, relative to it: 0 where exact, infinite where nothing is known."""
        if self.operations == self.bound:
            return 0.0
        return self.operations / self.bound - 1 if self.bound else math.inf


def fewest_operations(alternatives: Alternatives, budget_bytes: int, width: int = WIDTH) -> JointChoice:
    """The grouping and the methods with the fewest operations, and of those the fewest groups, within a budget.

    Sites that share a parameter go by one method.

    Args:
        alternatives: the step by every method.
        budget_bytes: largest estimated peak.
        width: how many partial decisions are kept at a site.

    Raises:
        BudgetError: when nothing within the budget was found; the message says whether there is nothing, and
            the least peak that was found.
    """
    problem = Problem(alternatives)
    # one number for both: operations count more than any number of groups
    unit = problem.length + 1
    least = [min(unit * form.operations for form in forms.values()) for forms in problem.forms]
    rest = [sum(least[:site]) for site in range(problem.length)]

    def score(before: int, form: Form, moment: int, closes: bool) -> int | None:
        return before + unit * form.operations + closes if moment <= budget_bytes else None

    best, bound = None, None
    if problem.outside_bytes <= budget_bytes:
        best, bound = decide(problem, 0, score, rest, width)
    if best is None:
        raise _refusal(problem, budget_bytes, width, cut_short=bound is not None)
    return _choice(alternatives, best, (best.score if bound is None else min(bound, best.score)) // unit)


def least_peak_choice(alternatives: Alternatives, width: int = WIDTH) -> tuple[JointChoice, int]:
    """The grouping and the methods with the least peak, of those the fewest operations; and a bound on the peak.

    Returns:
        The choice, and the bytes that no choice goes below: its peak where it is exact.
    """
    best, bound_bytes = _least(Problem(alternatives), width)
    choice = _choice(alternatives, best, 0)
    with suppress(BudgetError):  # where that is cut short what was found stands
        choice = fewest_operations(alternatives, best.score, width)
    return choice, bound_bytes


def _least(problem: Problem, width: int) -> tuple[Label, int]:
    """The decisions with the least peak, and the bytes that none go below."""

    def score(before: int, form: Form, moment: int, closes: bool) -> int | None:
        return max(before, moment)

    best, bound = decide(problem, problem.outside_bytes, score, [0] * problem.length, width)
    assert best is not None  # nothing is refused
    return best, best.score if bound is None else min(bound, best.score)


def _refusal(problem: Problem, budget_bytes: int, width: int, *, cut_short: bool) -> BudgetError:
    least, bound_bytes = _least(problem, width)
    known = "the search was cut short" if cut_short else "no grouping and choice of norm methods reaches it"
    exact = least.score == bound_bytes
    reach = "which is the least there is" if exact else f"and none goes below {format_bytes(bound_bytes)}"
    return BudgetError(
        f"Expected a budget that a grouping of this model keeps to with some choice of norm methods, found "
        f"{format_bytes(budget_bytes)} ({budget_bytes} bytes): {known}. One with {format_bytes(least.score)} "
        f"({least.score} bytes) was found, {reach}. Raise the budget, lower the batch size or turn activation "
        f"checkpointing on."
    )


def _choice(alternatives: Alternatives, label: Label, bound: int) -> JointChoice:
    decided = list(label.decisions())
    boundaries = tuple(site for site, decision in enumerate(decided) if decision.closes and site)
    methods = {w: made.method for w, made in zip(alternatives.weights, decided, strict=True) if w is not None}
    trace = alternatives.trace(methods)
    peak_bytes = peak_memory(trace, boundaries).peak_bytes
    return JointChoice(boundaries, methods, alternatives.operations(methods), peak_bytes, bound)
