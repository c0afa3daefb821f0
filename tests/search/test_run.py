from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import optuna
import pytest

from groupsearch.errors import BudgetError, GroupSearchError, TruthError
from groupsearch.plan.memory import peaks
from groupsearch.search import Choice, Event, Outcome, SearchResult, SearchSettings, hypervolume, run_search
from tests.search.problem import Problem


class Counted:
    """A problem's evaluate that remembers what it was asked."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.calls: list[tuple[Choice, int]] = []

    def __call__(self, choice: Choice, seed: int) -> Outcome:
        self.calls.append((choice, seed))
        return self.problem.evaluate(choice, seed)


def share(problem: Problem, points: list[tuple[float, float]]) -> float:
    """Of the exact front's hypervolume, from a reference a tenth of its extent outside."""
    front = problem.exact_front()
    (low, high), (small, large) = ((min(side), max(side)) for side in zip(*front, strict=True))
    reference = (low - 0.1 * (high - low), large + 0.1 * (large - small))
    return hypervolume(points, reference) / hypervolume(front, reference)


def points(result: SearchResult, *, sampled: bool = True) -> list[tuple[float, float]]:
    return [(c.mean, c.peak_bytes) for c in result.candidates if sampled or c.source != "search"]


@pytest.mark.parametrize("shape", ["places", "balance", "layers", "mixed"])
def test_sixty_trials_come_close_to_the_exact_front_and_beat_other_samplers(shape: str) -> None:
    problem = Problem(24, trace_seed=5, shape=shape)
    found = {
        sampler: run_search(problem.trace, problem.evaluate, SearchSettings(trials=60, seeds=1, sampler=sampler))
        for sampler in ("front", "tpe", "random")
    }
    masks = np.random.default_rng(5).random((60, 23)) < 0.5
    groupings = [tuple(int(b) + 1 for b in np.flatnonzero(mask)) for mask in masks]
    blind = [(problem.mean(b), float(p)) for b, p in zip(groupings, peaks(problem.trace, masks), strict=True)]
    front = share(problem, points(found["front"]))
    assert front > 0.95
    assert front > share(problem, points(found["tpe"])) > share(problem, blind)
    assert front > share(problem, points(found["random"]))
    assert front > share(problem, points(found["front"], sampled=False)) + 0.05
    assert found["front"].hypervolume["all"] > found["front"].hypervolume["without_sampling"]


@pytest.mark.parametrize("sampler", ["front", "tpe", "random", "nsga2"])
def test_no_evaluation_is_made_twice_and_trials_are_all_spent(sampler: str) -> None:
    evaluate = Counted(Problem(24, noise=0.01))
    result = run_search(evaluate.problem.trace, evaluate, SearchSettings(trials=40, sampler=sampler, seed=3))
    assert max(Counter(evaluate.calls).values()) == 1
    assert len({choice for choice, seed in evaluate.calls if seed == 3}) == 40
    assert result.cost.trained == len(evaluate.calls)
    assert result.cost.steps == 100 * len(evaluate.calls)
    assert result.cost.full_trainings == len(evaluate.calls)
    exploration, replication = result.cost.rungs
    assert (exploration.name, exploration.runs, exploration.steps) == ("exploration", 40, 4000)
    assert replication.runs == len(evaluate.calls) - 40
    assert exploration.seconds + replication.seconds == pytest.approx(result.cost.seconds)
    assert result.cost.trials == 40 + result.cost.cached
    assert result.cost.trials <= 40 * 11


@pytest.mark.parametrize("sampler", ["front", "tpe"])
@pytest.mark.parametrize("slack", [1.0, 1.02, 1.2])
def test_a_budget_is_never_exceeded_and_rejections_cost_nothing(slack: float, sampler: str) -> None:
    problem = Problem(24)
    floor = min(peak for _, peak in problem.exact_front())
    evaluate = Counted(problem)
    settings = SearchSettings(trials=30, seeds=1, budget_bytes=int(slack * floor), sampler=sampler)
    result = run_search(problem.trace, evaluate, settings)
    assert max(peaks(problem.trace, [choice.boundaries for choice, _ in evaluate.calls])) <= slack * floor
    assert all(c.peak_bytes <= slack * floor for c in result.candidates)
    assert (result.cost.rejected > 0) == (sampler == "tpe")  # ours suggests nothing outside the limits
    assert result.cost.trained == len(evaluate.calls) == 30


def test_a_limit_on_groups_holds_for_references_too() -> None:
    evaluate = Counted(Problem(24))
    run_search(evaluate.problem.trace, evaluate, SearchSettings(trials=25, max_groups=5))
    assert max(choice.groups for choice, _ in evaluate.calls) == 5


def test_a_budget_below_the_floor_evaluates_nothing() -> None:
    evaluate = Counted(Problem(24))
    with pytest.raises(BudgetError):
        run_search(evaluate.problem.trace, evaluate, SearchSettings(budget_bytes=1000))
    assert evaluate.calls == []


@pytest.mark.parametrize(("length", "sampler"), [(1, "front"), (2, "front"), (6, "front"), (6, "tpe"), (6, "nsga2")])
def test_a_space_smaller_than_the_trials_is_searched_to_its_end(length: int, sampler: str) -> None:
    evaluate = Counted(Problem(length))
    result = run_search(evaluate.problem.trace, evaluate, SearchSettings(trials=50, seeds=1, sampler=sampler))
    assert len(evaluate.calls) == len(result.candidates) == 2 ** (length - 1)


def test_the_front_and_the_references_have_the_same_seeds() -> None:
    problem = Problem(24, noise=0.02)
    result = run_search(problem.trace, problem.evaluate, SearchSettings(trials=30, seeds=4, seed=10))
    for candidate in result.candidates:
        if candidate.on_front or candidate.source in ("all-layer", "layer-wise", "uniform:4"):
            assert list(candidate.values) == [10, 11, 12, 13]
            assert candidate.half_width is not None
        assert candidate.on_front == (candidate in result.front)
    single = [c for c in result.candidates if len(c.values) == 1]
    assert single
    assert all(c.half_width is None for c in single)
    assert all(c.interval is not None and c.interval[0] < c.mean < c.interval[1] for c in result.candidates)
    assert result.recommended is not None
    assert len(result.recommended.values) == 4


def test_what_has_the_peak_of_the_front_with_fewest_groups_is_replicated_too() -> None:
    problem = Problem(12)

    def evaluate(choice: Choice, seed: int) -> Outcome:
        return Outcome(value=-abs(choice.groups - 8), step_seconds=0.01, steps=10)

    result = run_search(problem.trace, evaluate, SearchSettings(trials=40))
    ties = [[c for c in result.candidates if c.peak_bytes == on.peak_bytes] for on in result.front]
    assert any(min(tied, key=lambda c: c.groups) not in result.front for tied in ties)
    assert all(len(on.values) == 3 for on in result.front)
    for tied in ties:
        assert len(min(tied, key=lambda c: c.groups).values) == 3


def test_references_are_replicated_where_the_search_may_not_cut() -> None:
    problem = Problem(12)
    result = run_search(problem.trace, problem.evaluate, SearchSettings(trials=4, granularity="block"))
    seeds = {c.source: len(c.values) for c in result.candidates}
    assert seeds["layer-wise"] == seeds["all-layer"] == 3
    assert all(set(c.boundaries) <= {3, 6, 9} for c in result.candidates if c.source == "search")


@pytest.mark.slow
def test_failures_are_recorded_and_the_search_goes_on() -> None:
    problem = Problem(24)

    def evaluate(choice: Choice, seed: int) -> Outcome:
        if choice.groups == 3:
            raise RuntimeError(f"diverged at {choice.boundaries}")
        outcome = problem.evaluate(choice, seed)
        return replace(outcome, value=math.nan) if choice.groups == 4 else outcome

    events: list[Event] = []
    result = run_search(problem.trace, evaluate, SearchSettings(trials=30), events.append)
    document = result.to_json()
    assert result.cost.failed == len(document["failures"]) == sum(e.kind == "failed" for e in events) > 1
    assert {len(f["boundaries"]) for f in document["failures"]} == {2, 3}
    assert any(f["error"].startswith("RuntimeError: diverged at") for f in document["failures"])
    assert any(f["error"] == "the metric is nan" for f in document["failures"])
    assert not any(c.groups in (3, 4) for c in result.candidates)


def test_a_candidate_that_fails_with_a_later_seed_leaves_the_front() -> None:
    problem = Problem(12)

    def evaluate(choice: Choice, seed: int) -> Outcome:
        if choice.boundaries == () and seed == 1:
            raise ValueError("out of memory")
        return problem.evaluate(choice, seed)

    result = run_search(problem.trace, evaluate, SearchSettings(trials=10))
    assert () not in [c.boundaries for c in result.candidates]
    assert result.cost.failed == 1


def test_when_everything_fails_the_last_error_is_told() -> None:
    def evaluate(choice: Choice, seed: int) -> Outcome:
        raise RuntimeError("no such data")

    with pytest.raises(GroupSearchError, match="all 5 evaluations failed, the last with: RuntimeError: no such data"):
        run_search(Problem(24).trace, evaluate, SearchSettings(trials=5))


def test_a_model_that_cannot_be_made_private_ends_the_search() -> None:
    problem = Problem(12)

    def evaluate(choice: Choice, seed: int) -> Outcome:
        if choice.groups == 2:
            raise TruthError("The watch in training found that examples mix.")
        return problem.evaluate(choice, seed)

    with pytest.raises(TruthError, match="examples mix"):
        run_search(problem.trace, evaluate, SearchSettings(trials=10))


def test_equal_settings_give_equal_evaluations_in_equal_order() -> None:
    def calls(seed: int) -> tuple[list[tuple[Choice, int]], str]:
        evaluate = Counted(Problem(24, noise=0.01))
        result = run_search(evaluate.problem.trace, evaluate, SearchSettings(trials=35, seed=seed))
        return evaluate.calls, json.dumps(result.to_json()["candidates"])

    assert calls(0) == calls(0)
    assert {choice for choice, _ in calls(0)[0]} != {choice for choice, _ in calls(1)[0]}


@pytest.mark.parametrize("after", [0, 7, 45])
def test_an_interrupt_keeps_what_is_done(after: int) -> None:
    problem = Problem(24)
    calls = 0

    def evaluate(choice: Choice, seed: int) -> Outcome:
        nonlocal calls
        if calls == after:
            raise KeyboardInterrupt
        calls += 1
        return problem.evaluate(choice, seed)

    result = run_search(problem.trace, evaluate, SearchSettings(trials=40))
    assert result.interrupted
    assert result.cost.trained == after
    assert (result.recommended is None) == (after == 0)
    assert json.loads(json.dumps(result.to_json()))["interrupted"] is True


def test_events_count_up_to_their_total() -> None:
    problem = Problem(24)
    events: list[Event] = []
    run_search(problem.trace, problem.evaluate, SearchSettings(trials=20), events.append)
    for phase in ("search", "replication"):
        made = [e for e in events if e.phase == phase and e.kind == "trained"]
        assert [e.done for e in made] == list(range(1, len(made) + 1))
        assert made[-1].done == made[-1].total
        assert all(e.value == problem.mean(e.boundaries) for e in made)
    assert sum(e.kind == "started" for e in events) == sum(e.kind == "trained" for e in events)


def test_the_document_has_what_a_report_needs() -> None:
    problem = Problem(24, noise=0.01)
    result = run_search(problem.trace, problem.evaluate, SearchSettings(trials=20, metric_name="accuracy"))
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["recommended"] in document["candidates"]
    assert {c["source"] for c in document["candidates"]} >= {"all-layer", "layer-wise", "exact front"}
    for candidate in document["candidates"]:
        metric = candidate["metric"]
        assert candidate["groups"] == len(candidate["boundaries"]) + 1
        assert metric["name"] == "accuracy"
        assert metric["seeds"] == len(metric["values"])
        assert metric["mean"] == pytest.approx(np.mean(metric["values"]))
    assert len(document["training"]["curves"]) == document["cost"]["trained"]
    assert document["training"]["curves"][0]["points"][0] == [0, 0.1]
    assert document["reason"]
    assert document["cost"]["selection"]["epsilon"] is None
    assert [rung["name"] for rung in document["cost"]["rungs"]] == ["exploration", "replication"]
    public = run_search(problem.trace, problem.evaluate, SearchSettings(trials=5, selection_data="public"))
    assert public.to_json()["cost"]["selection"]["epsilon"] == 0


def test_optunas_verbosity_is_what_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        run_search(Problem(5).trace, Problem(5).evaluate, SearchSettings(trials=5))
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    finally:
        optuna.logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "wrong",
    [
        {"trials": 0},
        {"seeds": 0},
        {"seed": -1},
        {"sampler": "cmaes"},
        {"trials": 10, "max_runs": 9},
        {"confidence": 1.0},
        {"selection_data": "secret"},
        {"granularity": "head"},
        {"resume": True, "force": True},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(GroupSearchError):
        SearchSettings(**wrong)  # type: ignore[arg-type]
