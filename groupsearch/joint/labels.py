"""Grouping and norm methods chosen together: the fewest operations within a budget, and the least peak.

Sites are decided in the order of backward: a method for each, and whether its group closes there. What was
decided so far matters later only through its score, what the open group's book will hold at the
instants to come, and how high its close would reach. Of two partial decisions that agree in what can
still be shared, one that is nowhere larger makes the other superfluous (label setting). Without
truncation that is exact; where more than ``width`` partial decisions are left at a site the least promising
are dropped, and the least score that any of them could have led to bounds the optimum from below.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from groupsearch.joint.problem import Form, Problem
from groupsearch.lifetimes import Bytes

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
