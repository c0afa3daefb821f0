"""The step by every norm method with its storages numbered and its times in arrays, for decisions to be made on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from groupsearch.joint.alternatives import Alternatives, operations
from groupsearch.lifetimes import Bytes, lifetimes
from groupsearch.trace import Instant, Site


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
