"""Exact optima against brute force over every grouping."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsearch.errors import BudgetError, GroupSearchError
from groupsearch.plan.memory import UNREACHABLE_BYTES, CostTable, peak_memory, peaks
from groupsearch.plan.partition import (
    fewest_groups,
    floor_bytes,
    front,
    least_peak,
    solve_fewest_groups,
    solve_floor,
    solve_front,
    solve_least_peak,
)
from groupsearch.plan.trace import Trace
from groupsearch.units import format_bytes
from tests.support.strategies import cost_tables, random_trace, traces

Cut = tuple[int, ...]


def peak_of(table: CostTable, cut: Cut) -> int:
    groups = pairwise((0, *cut, len(table.cost_bytes)))
    return max(table.outside_bytes, *(int(table.cost_bytes[lo, hi - 1]) for lo, hi in groups))


def every_cut(length: int, groups: int) -> list[Cut]:
    return list(combinations(range(1, length), groups - 1))


def most_even(cuts: list[Cut], length: int) -> Cut:
    """The documented choice among equals, by trying: from the output side, nearest to an even split of what is left."""
    end = length
    for position in range(len(cuts[0]) - 1, -1, -1):
        even = end * (position + 1) / (position + 2)
        end = min({cut[position] for cut in cuts}, key=lambda boundary: (abs(boundary - even), boundary))
        cuts = [cut for cut in cuts if cut[position] == end]
    return cuts[0]


def least_by_trying(table: CostTable, groups: int) -> tuple[Cut, int]:
    length = len(table.cost_bytes)
    peak_by_cut = {cut: peak_of(table, cut) for cut in every_cut(length, groups)}
    least = min(peak_by_cut.values())
    return most_even([cut for cut, peak in peak_by_cut.items() if peak == least], length), least


class TestAgainstBruteForce:
    @settings(max_examples=60, deadline=None)
    @given(cost_tables(max_sites=12))
    def test_front_and_least_peak_of_every_number_of_groups(self, table: CostTable) -> None:
        length = len(table.cost_bytes)
        by_trying = [least_by_trying(table, groups) for groups in range(1, length + 1)]
        floor = min(peak for _, peak in by_trying)
        until_floor = [peak for _, peak in by_trying].index(floor) + 1
        assert [solve_least_peak(table, groups) for groups in range(1, length + 1)] == [cut for cut, _ in by_trying]
        assert solve_floor(table) == floor
        assert solve_front(table) == by_trying[:until_floor]
        assert solve_front(table, max_groups=2) == by_trying[: min(2, until_floor)]

    @settings(max_examples=60, deadline=None)
    @given(cost_tables(max_sites=10), st.integers(0, 35))
    def test_fewest_groups_within_any_budget(self, table: CostTable, budget: int) -> None:
        length = len(table.cost_bytes)
        by_trying = [least_by_trying(table, groups) for groups in range(1, length + 1)]
        within = [cut for cut, peak in by_trying if peak <= budget]
        if within:
            assert solve_fewest_groups(table, budget) == within[0]
        else:
            floor = min(peak for _, peak in by_trying)
            with pytest.raises(BudgetError, match=f"at least {floor} B "):
                solve_fewest_groups(table, budget)

    @pytest.mark.parametrize("length", range(1, 13))
    def test_every_length_of_trace(self, length: int) -> None:
        self.check_trace(random_trace(length, seed=length))

    @settings(max_examples=40, deadline=None)
    @given(traces(max_sites=9))
    def test_any_trace(self, trace: Trace) -> None:
        self.check_trace(trace)

    def check_trace(self, trace: Trace) -> None:
        least = [int(peaks(trace, every_cut(trace.length, m)).min()) for m in range(1, trace.length + 1)]
        assert floor_bytes(trace) == min(least)
        assert [peak_memory(trace, least_peak(trace, m)).peak_bytes for m in range(1, trace.length + 1)] == least
        assert [peak for _, peak in front(trace)] == least[: least.index(min(least)) + 1]
        assert [peak_memory(trace, cut).peak_bytes for cut, _ in front(trace)] == [peak for _, peak in front(trace)]
        for budget in {*least, max(least) + 1}:
            fewest = next(m for m, peak in enumerate(least, start=1) if peak <= budget)
            assert fewest_groups(trace, budget) == least_peak(trace, fewest)
        with pytest.raises(BudgetError, match=str(min(least))):
            fewest_groups(trace, min(least) - 1)


def test_of_equals_the_most_even_is_given() -> None:
    flat = np.full((12, 12), 5)
    flat[np.tril_indices(12, -1)] = UNREACHABLE_BYTES
    table = CostTable(flat, outside_bytes=0)
    assert solve_least_peak(table, 4) == (3, 6, 9)
    assert solve_least_peak(table, 12) == tuple(range(1, 12))


def test_what_happens_outside_the_groups_leaves_room_for_an_even_split() -> None:
    table = CostTable(np.array([[1, 2, 3, 4], [9**9, 1, 2, 3], [9**9, 9**9, 1, 3], [9**9, 9**9, 9**9, 1]]), 3)
    # (3,) costs 3 and 1; (2,) costs 2 and 3: both hide below what happens outside, and (2,) is even.
    assert solve_least_peak(table, 2) == (2,)
    assert solve_floor(table) == 3


def test_the_peak_may_rise_with_the_number_of_groups() -> None:
    cost = np.array([[5, 4, 6], [UNREACHABLE_BYTES, 9, 4], [UNREACHABLE_BYTES, UNREACHABLE_BYTES, 9]])
    table = CostTable(cost, 0)
    # One group 6; two groups max(5, 4) = 5 or max(4, 9) = 9; three groups 9.
    assert solve_front(table) == [((), 6), ((1,), 5)]
    assert peak_of(table, solve_least_peak(table, 3)) == 9
    assert solve_fewest_groups(table, 5) == (1,)


@pytest.mark.parametrize("groups", [0, -1, 6])
def test_impossible_numbers_of_groups_are_refused(groups: int) -> None:
    with pytest.raises(GroupSearchError, match="between 1 and 5"):
        least_peak(random_trace(5), groups)


def test_a_budget_below_the_floor_is_refused_with_the_floor() -> None:
    trace = random_trace(20, seed=6)
    with pytest.raises(BudgetError) as caught:
        fewest_groups(trace, 4096)
    assert format_bytes(floor_bytes(trace)) in str(caught.value)
    assert "4.00 KiB" in str(caught.value)
