from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from groupsearch.plan.memory import cost_table, peaks
from groupsearch.search.candidates import hypervolume
from groupsearch.search.sampler import Slices, Stairs, best_with, best_within
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


@pytest.mark.parametrize(("size", "end"), [(200.0, 216.0), (100.0, 106.0), (70.0, 106.0), (0.0, 106.0)])
def test_a_reference_beyond_a_size_lies_no_nearer_than_beyond_the_front(size: float, end: float) -> None:
    stairs = Stairs.of([*POINTS, (0.2, 5000.0)])
    assert stairs.sizes[-1] == pytest.approx(5000 + 0.1 * 4960)
    nearer = stairs.ending(size)
    assert nearer.sizes[-1] == pytest.approx(end)
    assert nearer.reached(np.arange(200.0)).tolist() == stairs.reached(np.arange(200.0)).tolist()


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


@pytest.mark.parametrize("starts", [tuple(range(9)), (0, 3, 4, 7)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_best_with_a_number_of_groups_is_that_of_all_groupings(starts: tuple[int, ...], groups: int) -> None:
    trace = make_trace(9)
    gains = np.random.default_rng(2).normal(size=(9, 9))
    groupings = list(combinations(starts[1:], groups - 1))
    costs = peaks(trace, groupings)
    sums = np.array([sum(gains[lo, end - 1] for lo, end in pairwise((0, *b, 9))) for b in groupings])
    limits = np.quantile(costs, [0.0, 0.1, 0.5, 1.0])
    found = best_with(gains, cost_table(trace).cost_bytes, starts, limits, groups)
    assert len(found) == 4
    for boundaries, limit in zip(found, limits, strict=True):
        allowed = np.flatnonzero(costs <= limit)
        assert boundaries == groupings[allowed[np.argmax(sums[allowed])]]
    assert best_with(gains, cost_table(trace).cost_bytes, starts, limits[:1] - 1, groups) == []


@pytest.mark.parametrize(
    ("value", "size", "time"), [(0.95, 50.0, 1.5), (0.7, 30.0, 2.9), (0.6, 95.0, 1.0), (0.4, 99.0, 3)]
)
def test_slices_add_up_to_the_volume_that_a_point_adds(value: float, size: float, time: float) -> None:
    timed = [(*point, seconds) for point, seconds in zip(POINTS, (3.0, 2.0, 1.0, 2.5, 1.2), strict=True)]
    slices = Slices.of(timed, count=400)
    reference = (slices.stairs[0].floor, float(slices.stairs[0].sizes[-1]))
    last = slices.times[-1] + (slices.times[-1] - slices.times[-2]) / 2

    def volume(points: list[tuple[float, float, float]]) -> float:
        moments = [*sorted(t for *_, t in points), last]
        areas = [hypervolume([(v, s) for v, s, t in points if t <= moment], reference) for moment in moments[:-1]]
        return sum(area * (after - now) for area, (now, after) in zip(areas, pairwise(moments), strict=True))

    still = np.zeros(1)
    found = slices.expected_improvement((np.array([value]), still), np.array([size]), (np.array([time]), still))
    added = volume([*timed, (value, size, time)]) - volume(timed)
    assert found[0] * (last - 1.0) == pytest.approx(added, abs=0.01 * volume(timed))
    late = (np.array([last + 1]), still)
    assert slices.expected_improvement((np.array([value]), still), np.array([size]), late)[0] == 0
