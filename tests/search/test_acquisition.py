from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from groupsearch.memory import cost_table, peaks
from groupsearch.search.acquisition import Stairs, best_within
from groupsearch.search.front import hypervolume
from tests.search.problem import make_trace

POINTS = [(0.9, 100.0), (0.7, 60.0), (0.8, 60.0), (0.5, 40.0), (0.6, 90.0)]


def test_what_is_reached_within_a_size() -> None:
    stairs = Stairs.of(POINTS)
    assert stairs.reached(np.array([39.0, 40.0, 59.0, 60.0, 99.0, 1e9])).tolist() == [
        pytest.approx(stairs.floor),
        *(0.5, 0.5, 0.8, 0.8, 0.9),
    ]
    assert stairs.floor == pytest.approx(0.5 - 0.1 * 0.4)
    assert stairs.sizes[-1] == pytest.approx(100 + 0.1 * 60)


@pytest.mark.parametrize("size", [30.0, 40.0, 55.0, 60.0, 100.0, 105.0, 200.0])
@pytest.mark.parametrize("mean", [0.3, 0.7, 0.95])
def test_the_expected_improvement_is_the_mean_of_what_draws_add_to_the_hypervolume(size: float, mean: float) -> None:
    stairs = Stairs.of(POINTS)
    reference = (stairs.floor, float(stairs.sizes[-1]))
    draws = np.random.default_rng(0).normal(mean, 0.1, 4000)
    before = hypervolume(POINTS, reference)
    added = [hypervolume([*POINTS, (float(value), size)], reference) - before for value in draws]
    found = stairs.expected_improvement(np.array([mean]), np.array([0.1]), np.array([size]))
    assert found[0] == pytest.approx(np.mean(added), abs=5 * np.std(added) / 4000**0.5 + 1e-5)


def test_without_uncertainty_it_is_the_improvement_itself() -> None:
    stairs = Stairs.of(POINTS)
    reference = (stairs.floor, float(stairs.sizes[-1]))
    added = hypervolume([*POINTS, (0.85, 50.0)], reference) - hypervolume(POINTS, reference)
    assert stairs.expected_improvement(np.array([0.85]), np.zeros(1), np.array([50.0]))[0] == pytest.approx(added)


@pytest.mark.parametrize("starts", [tuple(range(9)), (0, 3, 4, 7)])
def test_the_best_within_a_limit_is_that_of_all_groupings(starts: tuple[int, ...]) -> None:
    trace = make_trace(9)
    table = cost_table(trace)
    gains = np.random.default_rng(2).normal(size=(9, 9))
    cuts = starts[1:]
    groupings = [chosen for count in range(len(cuts) + 1) for chosen in combinations(cuts, count)]
    costs = peaks(trace, groupings)
    ends = [(0, *b, 9) for b in groupings]
    sums = np.array([sum(gains[lo, end - 1] for lo, end in pairwise(e)) for e in ends])
    groups = np.array([len(e) - 1 for e in ends])
    limits = np.quantile(costs, [0.0, 0.1, 0.5, 1.0])
    prices = np.array([0.0, 0.5, -0.5, 1.0])
    found = best_within(gains, table.cost_bytes, starts, limits, prices)
    assert len(found) == 4
    for boundaries, limit, price in zip(found, limits, prices, strict=True):
        allowed = np.flatnonzero(costs <= limit)
        assert boundaries == groupings[allowed[np.argmax((sums - price * groups)[allowed])]]


def test_below_the_floor_nothing_is_found() -> None:
    table = cost_table(make_trace(6))
    assert best_within(np.zeros((6, 6)), table.cost_bytes, range(6), np.array([1.0]), np.zeros(1)) == []
