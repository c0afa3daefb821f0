"""Exact optima over all 2^(L-1) groupings of L sites, from the table of what every group costs.

The peak of a grouping is the largest of its groups' costs and of what happens outside them, so the
best prefixes make the best whole and a dynamic program over positions is exact: O(L^2) per number
of groups. Nothing is assumed of the table: the peak is monotone neither in the number of groups
nor in the extension of a group.

Of all groupings with the same number of groups and the same peak the most even is given: from
the output side, each boundary is placed as near as it can be to an even split of the sites that
are left, the lower of two that are equally near.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from groupsearch.errors import BudgetError, GroupSearchError
from groupsearch.plan.memory import UNREACHABLE_BYTES, Bytes, CostTable, cost_table
from groupsearch.plan.trace import Trace
from groupsearch.units import format_bytes

Boundaries = tuple[int, ...]


def least_peak(trace: Trace, groups: int) -> Boundaries:
    """The boundaries of exactly ``groups`` groups with the least estimated peak.

    Raises:
        GroupSearchError: when there are fewer sites than groups, or no group at all.
    """
    return solve_least_peak(cost_table(trace), groups)


def fewest_groups(trace: Trace, budget_bytes: int) -> Boundaries:
    """The fewest groups with an estimated peak of at most ``budget_bytes``; of those the least peak.

    Raises:
        BudgetError: when the budget is below the floor; the message states the floor.
    """
    return solve_fewest_groups(cost_table(trace), budget_bytes)


def front(trace: Trace, max_groups: int | None = None) -> list[tuple[Boundaries, int]]:
    """(boundaries, peak bytes) of the least peak with 1, 2, ... groups, until the floor or ``max_groups``.

    Entry m is for exactly m + 1 groups, so peaks may rise on the way; only the last can be the floor.
    """
    return solve_front(cost_table(trace), max_groups)


def floor_bytes(trace: Trace) -> int:
    """The least estimated peak of any grouping."""
    return solve_floor(cost_table(trace))


def solve_least_peak(table: CostTable, groups: int) -> Boundaries:
    """:func:`least_peak` on a table."""
    length = len(table.cost_bytes)
    if not 1 <= groups <= length:
        raise GroupSearchError(
            f"Expected between 1 and {length} groups (the model has {length} sites), found {groups}."
        )
    prefixes = _prefixes(table)
    return _most_even(table, [next(prefixes) for _ in range(groups)])


def solve_fewest_groups(table: CostTable, budget_bytes: int) -> Boundaries:
    """:func:`fewest_groups` on a table."""
    floor = solve_floor(table)
    if floor > budget_bytes:
        raise BudgetError(
            f"Expected a budget of at least {format_bytes(floor)} ({floor} bytes), the least that any grouping "
            f"of this model reaches, found {format_bytes(budget_bytes)} ({budget_bytes} bytes). Raise the budget, "
            f"lower the batch size or turn activation checkpointing on."
        )
    levels: list[Bytes] = []
    for level in _prefixes(table):
        levels.append(level)
        if level[-1] <= budget_bytes:
            break
    return _most_even(table, levels)


def solve_front(table: CostTable, max_groups: int | None = None) -> list[tuple[Boundaries, int]]:
    """:func:`front` on a table."""
    floor, levels, found = solve_floor(table), list[Bytes](), list[tuple[Boundaries, int]]()
    for level in _prefixes(table):
        if len(levels) == max_groups:
            break
        levels.append(level)
        peak = max(int(level[-1]), table.outside_bytes)
        found.append((_most_even(table, levels), peak))
        if peak == floor:
            break
    return found


def solve_floor(table: CostTable) -> int:
    """:func:`floor_bytes` on a table."""
    length = len(table.cost_bytes)
    best = np.zeros(length + 1, np.int64)
    for last in range(length):
        best[last + 1] = np.maximum(best[: last + 1], table.cost_bytes[: last + 1, last]).min()
    return max(int(best[-1]), table.outside_bytes)


def _prefixes(table: CostTable) -> Iterator[Bytes]:
    """For m = 1, 2, ..., L: entry j is the least possible largest cost of m groups over the sites 0..j."""
    best, scratch = table.cost_bytes[0], np.empty_like(table.cost_bytes)
    yield best
    for _ in range(1, len(best)):
        before = np.concatenate(([UNREACHABLE_BYTES], best[:-1]))
        np.maximum(before[:, None], table.cost_bytes, out=scratch)
        best = scratch.min(axis=0)
        yield best


def _most_even(table: CostTable, levels: list[Bytes]) -> Boundaries:
    """The most even of the groupings of len(levels) groups that reach the least peak."""
    peak = max(int(levels[-1][-1]), table.outside_bytes)
    boundaries: list[int] = []
    end = len(table.cost_bytes)
    for groups in range(len(levels) - 1, 0, -1):
        fits = (table.cost_bytes[1:end, end - 1] <= peak) & (levels[groups - 1][: end - 1] <= peak)
        candidates = np.flatnonzero(fits) + 1
        end = int(candidates[np.argmin(np.abs(candidates * (groups + 1) - end * groups))])
        boundaries.append(end)
    return tuple(reversed(boundaries))
