from __future__ import annotations

from itertools import combinations

import pytest

from groupsearch.plan.memory import peaks
from groupsearch.search.candidates import hypervolume, pareto
from groupsearch.search.space import Space, Variants
from tests.search.problem import SHAPES, Problem


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_exact_front_is_that_of_all_groupings(shape: str, seed: int) -> None:
    problem = Problem(10, trace_seed=seed, shape=shape)
    groupings = [cuts for count in range(10) for cuts in combinations(range(1, 10), count)]
    points = [(problem.mean(b), int(p)) for b, p in zip(groupings, peaks(problem.trace, groupings), strict=True)]
    expected = sorted({point for point, on in zip(points, pareto(points), strict=True) if on})
    found = sorted(set(problem.exact_front()))
    assert [peak for _, peak in found] == [peak for _, peak in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_least_peaks_alone_do_not_solve_any_problem_but_the_count(shape: str) -> None:
    problem = Problem(24, shape=shape)
    front = problem.exact_front()
    (low, high), (small, large) = ((min(side), max(side)) for side in zip(*front, strict=True))
    reference = (low - 0.1 * (high - low), large + 0.1 * (large - small))
    least = [(problem.mean(b), peak) for b, peak in Space(Variants.of(problem.trace), tuple(range(1, 24))).exact_front]
    share = hypervolume(least, reference) / hypervolume(front, reference)
    assert share == pytest.approx(1) if shape == "count" else share < 0.9
