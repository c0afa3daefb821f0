"""The ways of taking one step that differ in memory and time alone, of which every grouping takes the cheapest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from groupsearch.errors import GroupSearchError
from groupsearch.lifetimes import Bytes
from groupsearch.memory import CostTable, cost_table, peaks
from groupsearch.partition import solve_front, solve_least_peak
from groupsearch.search.choice import Boundaries
from groupsearch.trace import Trace

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
