from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import optuna
import pytest

from groupsearch.plan.memory import peaks
from groupsearch.search import Choice, Outcome, SearchSettings, hypervolume, run_search
from groupsearch.search.sampler import MOST_SEEN, FrontSampler, make_sampler
from groupsearch.search.settings import SAMPLERS
from groupsearch.search.space import Space
from tests.search.problem import Boundaries, Problem


def evaluated(problem: Problem, settings: SearchSettings) -> list[Boundaries]:
    return [e.boundaries for e in run_search(problem.trace, problem.evaluate, settings).evaluations]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_searches_and_equal_seeds_give_equal_groupings_in_equal_order(name: str) -> None:
    problem = Problem(12, noise=0.01)
    settings = SearchSettings(trials=13, seeds=1, sampler=name, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        first, again = (evaluated(problem, settings) for _ in range(2))
    assert first == again
    assert len(set(first)) == 13


def test_what_is_suggested_does_not_depend_on_how_often_the_study_was_resumed(tmp_path: Path) -> None:
    problem = Problem(16, noise=0.002, shape="balance")
    settings = SearchSettings(trials=28, seeds=1, storage=tmp_path / "whole.journal")
    whole = evaluated(problem, settings)
    parts = replace(settings, storage=tmp_path / "parts.journal", resume=True)
    for trials in (16, 21, 28):
        found = evaluated(problem, replace(parts, trials=trials))
    assert found == whole


def test_nothing_outside_the_limits_and_nothing_twice_is_suggested() -> None:
    problem = Problem(24, shape="mixed")
    floor = min(peak for _, peak in problem.exact_front())
    settings = SearchSettings(trials=40, seeds=1, budget_bytes=int(1.15 * floor), max_groups=7, granularity="block")
    cost = run_search(problem.trace, problem.evaluate, settings).cost
    assert (cost.rejected, cost.cached) == (0, 0)


def test_a_problem_that_is_no_sum_over_groups_is_solved_too() -> None:
    """Neighbouring groups interact: the metric falls with how unlike in size they are, and with the largest one."""
    length = 14
    trace = Problem(length).trace
    groupings = [cuts for count in range(length) for cuts in combinations(range(1, length), count)]

    def metric(boundaries: Boundaries) -> float:
        sizes = np.diff((0, *boundaries, length))
        unlike = np.abs(np.diff(np.log(sizes))).sum()
        return float(0.95 - 0.01 * len(sizes) - 0.02 * unlike - 0.1 * (sizes.max() / length) ** 3)

    def evaluate(choice: Choice, seed: int) -> Outcome:
        return Outcome(metric(choice.boundaries), 0.001, 1)

    every = [(metric(b), int(p)) for b, p in zip(groupings, peaks(trace, groupings), strict=True)]
    reference = (min(v for v, _ in every), max(p for _, p in every))
    found = {}
    for sampler in ("front", "random"):
        result = run_search(trace, evaluate, SearchSettings(trials=60, seeds=1, sampler=sampler))
        points = [(c.mean, c.peak_bytes) for c in result.candidates]
        found[sampler] = hypervolume(points, reference) / hypervolume(every, reference)
    assert found["front"] > 0.99
    assert found["front"] > found["random"]


def test_in_a_study_of_its_own_it_starts_from_nothing() -> None:
    problem = Problem(10)
    space = Space.of(problem.trace, SearchSettings())
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=FrontSampler(space, 0))
    for _ in range(12):
        trial = study.ask()
        boundaries = space.suggest(trial).boundaries
        trial.set_user_attr("boundaries", list(boundaries))
        study.tell(trial, [problem.mean(boundaries), float(space.peak_bytes(boundaries))])
    assert len({tuple(t.user_attrs["boundaries"]) for t in study.trials}) == 12


def test_eight_workers_that_ask_at_the_same_time_find_most_of_the_front_too() -> None:
    problem = Problem(24, shape="balance")
    space = Space.of(problem.trace, SearchSettings())
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=FrontSampler(space, 0))
    made: list[Boundaries] = []
    for choice in space.warm_start(20):
        study.enqueue_trial(space.parameters(choice))
    for _ in range(8):
        trials = [study.ask() for _ in range(8)]
        for trial in trials:
            made.append(space.suggest(trial).boundaries)
            trial.set_user_attr("boundaries", list(made[-1]))
        for trial, boundaries in zip(trials, made[-8:], strict=True):
            study.tell(trial, [problem.mean(boundaries), float(space.peak_bytes(boundaries))])
    assert len(set(made)) == 64
    front = problem.exact_front()
    (low, high), (small, large) = ((min(side), max(side)) for side in zip(*front, strict=True))
    reference = (low - 0.1 * (high - low), large + 0.1 * (large - small))
    found = [(problem.mean(b), space.peak_bytes(b)) for b in made]
    assert hypervolume(found, reference) > 0.95 * hypervolume(front, reference)


def test_long_studies_are_learned_from_what_is_nearest_to_the_front() -> None:
    problem = Problem(24)
    space = Space.of(problem.trace, SearchSettings())
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=make_sampler(space, SearchSettings(), existing=0)
    )
    rng = np.random.default_rng(0)
    for _ in range(MOST_SEEN + 200):
        boundaries = tuple(int(b) + 1 for b in np.flatnonzero(rng.random(23) < rng.uniform(0, 0.6)))
        study.add_trial(
            optuna.trial.create_trial(
                params=space.parameters(Choice(boundaries)),
                distributions=space.distributions(),
                values=[problem.mean(boundaries), float(space.peak_bytes(boundaries))],
                user_attrs={"boundaries": list(boundaries)},
            )
        )
    seen = [(t.values[0], t.values[1]) for t in study.trials]
    trial = study.ask()
    boundaries = space.suggest(trial).boundaries
    point = (problem.mean(boundaries), float(space.peak_bytes(boundaries)))
    reference = (min(v for v, _ in seen), max(p for _, p in seen))
    assert hypervolume([*seen, point], reference) > hypervolume(seen, reference)
