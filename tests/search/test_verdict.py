"""What is declared of groupings, on noise whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from groupsearch.search import Candidate, Choice, Evaluate, Outcome, SearchSettings, run_search
from groupsearch.search.candidates import gather
from groupsearch.search.choice import Evaluation
from groupsearch.search.space import Space
from groupsearch.search.verdict import answer, compare
from tests.search.problem import Boundaries, Problem, make_trace


def candidates(values: Sequence[Sequence[float]] | np.ndarray) -> list[Candidate]:
    """All on the front, the first one all-layer."""
    cuts = [tuple(range(1, index + 1)) for index in range(len(values))]
    return [
        Candidate(Choice(b), 1000 - len(b), "search", dict(enumerate(map(float, row))), 0.01, on_front=True)
        for b, row in zip(cuts, values, strict=True)
    ]


def paired(rng: np.random.Generator, means: Sequence[float], seeds: int) -> np.ndarray:
    """Values [groupings, seeds] with what a seed does to all of them, and unit noise of their own."""
    return np.asarray(means)[:, None] + 3 * rng.normal(size=seeds) + rng.normal(size=(len(means), seeds))


def test_equals_are_rarely_declared_different_however_often_one_looks() -> None:
    rng, wrong, repeats = np.random.default_rng(0), 0, 600
    for _ in range(repeats):
        explored = 3 * rng.normal() + rng.normal(size=40)
        luckiest = np.sort(explored)[-5:]  # what came to be on the front, by the luck of its first seed
        values = np.column_stack((np.append(explored[0], luckiest), paired(rng, [0.0] * 6, 11)))
        looks = (compare(candidates(values[:, :seeds]), chosen_by=0, confidence=0.8) for seeds in range(3, 13))
        wrong += any(c.below for look in looks for c in look)
    assert wrong / repeats < 0.2


def test_a_difference_that_is_there_is_found_and_has_the_right_sign() -> None:
    rng, found, repeats = np.random.default_rng(1), 0, 100
    for _ in range(repeats):
        told = {c.boundaries: c for c in compare(candidates(paired(rng, [0, -6, 0], 10)), chosen_by=0)}
        found += told[1,].below
        assert told[1,].gap > 0
    assert found > 0.95 * repeats


def test_unpaired_noise_that_seeds_share_does_not_hide_it() -> None:
    rng = np.random.default_rng(2)
    values = 1000 * rng.normal(size=8) + np.array([[0.0], [-6.0]]) + rng.normal(size=(2, 8))
    (told,) = compare(candidates(values), chosen_by=0)
    assert told.below
    assert told.seeds == 7
    assert told.gap == pytest.approx(6, abs=2)


def test_the_seed_that_chose_says_nothing_and_two_others_are_needed() -> None:
    values = [[0.9, 0.5, 0.6], [0.1, 0.5, 0.6]]
    (told,) = compare(candidates(values), chosen_by=0)
    assert (told.seeds, told.gap, told.below) == (2, 0.0, False)
    assert compare(candidates([row[:2] for row in values]), chosen_by=0) == ()


@pytest.mark.parametrize("seeds", [3, 6])
def test_intervals_of_the_mean_cover_it_as_often_as_they_say(seeds: int) -> None:
    rng, trace, repeats = np.random.default_rng(3), make_trace(6), 400
    space = Space.of(trace, SearchSettings())
    own = pooled = 0
    for _ in range(repeats):
        cuts: list[Boundaries] = [(), (1,), (1, 2), (1, 2, 3)]
        counts = [seeds, seeds, seeds, 1]
        made = [
            Evaluation(Choice(b), seed, rng.normal(0.9, 0.01), 0.1, 1, (), 0.1, None)
            for b, count in zip(cuts, counts, strict=True)
            for seed in range(count)
        ]
        intervals = {c.boundaries: c.interval for c in gather(space, made)}
        for boundaries in ((), (1, 2, 3)):
            interval = intervals[boundaries]
            assert interval is not None
            covered = interval[0] <= 0.9 <= interval[1]
            own, pooled = own + (covered and not boundaries), pooled + (covered and bool(boundaries))
    # Four standard errors of a share of 0.95 are 0.044.
    assert abs(own / repeats - 0.95) < 0.044
    assert abs(pooled / repeats - 0.95) < 0.044


def noisy(mean: dict[int, float], noise: float) -> Evaluate:
    """A metric that depends on the number of boundaries alone, 0.5 where it is not given."""

    def evaluate(choice: Choice, seed: int) -> Outcome:
        boundaries = choice.boundaries
        own = np.random.default_rng([seed, len(boundaries), *boundaries]).normal()
        return Outcome(mean.get(len(boundaries), 0.5) + noise * own, 0.01, 10)

    return evaluate


def test_replication_goes_on_until_everything_is_told_apart_and_gives_up_what_is() -> None:
    problem = Problem(8)
    evaluate = noisy({0: 0.90, 1: 0.85, 2: 0.80}, noise=0.002)
    settings = SearchSettings(trials=20, max_runs=400)
    result = run_search(problem.trace, evaluate, settings)
    assert result.cost.trained < 400
    assert result.comparisons
    assert all(c.below for c in result.comparisons)
    assert "every other grouping on the front is below the best one" in result.answer
    assert result.answer in result.reason
    alone = run_search(problem.trace, evaluate, replace(settings, max_runs=None))
    assert not all(c.below for c in alone.comparisons)
    assert result.cost.trained > alone.cost.trained


def test_where_there_is_no_difference_the_runs_are_used_up_and_none_is_declared() -> None:
    problem = Problem(8)
    evaluate = noisy(dict.fromkeys(range(8), 0.9), noise=0.01)
    result = run_search(problem.trace, evaluate, SearchSettings(trials=16, max_runs=80))
    assert result.cost.trained == 80
    assert not any(c.below for c in result.comparisons)
    assert result.answer.startswith("No difference was found at this budget between the best grouping and ")
    document = result.to_json()
    assert document["answer"] == result.answer
    assert {c["verdict"] for c in document["comparisons"]} == {"no difference found"}


@pytest.mark.parametrize("most", [16, 20])
def test_no_run_is_made_beyond_the_budget_of_runs(most: int) -> None:
    problem = Problem(12, noise=0.01)
    result = run_search(problem.trace, problem.evaluate, SearchSettings(trials=16, max_runs=most))
    assert result.cost.trained == most


def test_without_repetitions_the_answer_says_so() -> None:
    assert answer((), 0.95) == "No grouping was repeated often enough to tell it from another one."
