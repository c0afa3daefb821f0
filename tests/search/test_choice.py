"""Searching more than the grouping: clip rule, thresholds, ways of taking a step, step time, the number of groups."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groupsearch.errors import BudgetError, GroupSearchError
from groupsearch.plan.memory import peaks
from groupsearch.search import Choice, Evaluation, Outcome, SearchSettings, hypervolume, run_search, study
from groupsearch.search.space import Space, Variants
from tests.search.problem import RULES, Boundaries, Mechanisms, frugal, make_trace

ALLOCATIONS = ("uniform", "dimension")
FREE: dict[str, Any] = {"rules": tuple(RULES), "allocations": ALLOCATIONS}


class Counted:
    """A problem's evaluate that remembers what it was asked."""

    def __init__(self, problem: Mechanisms) -> None:
        self.problem = problem
        self.calls: list[tuple[Choice, int]] = []

    def __call__(self, choice: Choice, seed: int) -> Outcome:
        self.calls.append((choice, seed))
        return self.problem.evaluate(choice, seed)


def groupings(length: int) -> list[Boundaries]:
    return [cuts for count in range(length) for cuts in combinations(range(1, length), count)]


def every_choice(length: int) -> list[Choice]:
    """All that differ: with one group both allocations are one."""
    found = [Choice(*parts) for parts in product(groupings(length), RULES, ALLOCATIONS)]
    return [c for c in found if c.boundaries or c.allocation == "uniform"]


def test_a_choice_is_canonical_ordered_and_read_back() -> None:
    assert Choice((3, 1, 3)) == Choice((1, 3))
    assert hash(Choice((3, 1))) == hash(Choice((1, 3)))
    assert Choice((np.int64(2),)).to_json() == {"boundaries": [2]}  # type: ignore[arg-type]
    every = [Choice((1,), "auto-s"), Choice(()), Choice((1,), "abadi", "uniform"), Choice((1,))]
    assert sorted(every) == [Choice(()), Choice((1,)), Choice((1,), "abadi", "uniform"), Choice((1,), "auto-s")]
    for choice in every:
        assert Choice.from_json(json.loads(json.dumps(choice.to_json()))) == choice


def test_the_best_rule_and_allocation_are_found_with_the_best_groupings() -> None:
    problem = Mechanisms(10, shape="balance")
    every = every_choice(10)
    best = [(problem.mean_of(c), float(p)) for c, p in zip(every, _peaks(problem, every), strict=True)]
    reference = (min(v for v, _ in best), max(p for _, p in best))
    found = {}
    for sampler in ("front", "random"):
        result = run_search(
            problem.trace, problem.evaluate, SearchSettings(trials=60, seeds=1, sampler=sampler, **FREE)
        )
        points = [(c.mean, float(c.peak_bytes)) for c in result.candidates]
        found[sampler] = hypervolume(points, reference) / hypervolume(best, reference)
        if sampler == "front":
            top = max(result.candidates, key=lambda c: c.mean)
            assert top.mean == max(value for value, _ in best)
            assert {c.choice.rule for c in result.front} == {"auto-s"}
            assert {c.choice.allocation for c in result.front if c.groups > 4} == {"dimension"}
    assert found["front"] > 0.99
    assert found["front"] > found["random"]


def _peaks(problem: Mechanisms, choices: list[Choice]) -> Any:
    return peaks(problem.trace, [c.boundaries for c in choices])


@pytest.mark.parametrize("sampler", ["front", "tpe", "nsga2", "random"])
def test_a_small_space_is_searched_to_its_end_each_choice_once(sampler: str) -> None:
    evaluate = Counted(Mechanisms(3))
    settings = SearchSettings(trials=60, seeds=1, sampler=sampler, **FREE)
    result = run_search(evaluate.problem.trace, evaluate, settings)
    assert max(Counter(evaluate.calls).values()) == 1
    assert sorted(choice for choice, _ in evaluate.calls) == sorted(every_choice(3))
    rows = json.loads(json.dumps(result.to_json()))["candidates"]
    assert {(row["rule"], row["allocation"]) for row in rows} == {(r, a) for r in RULES for a in ALLOCATIONS}
    assert len({json.dumps([row["boundaries"], row["rule"], row["allocation"]]) for row in rows}) == len(rows)


def test_equal_settings_give_equal_choices_and_resuming_changes_nothing(tmp_path: Path) -> None:
    problem = Mechanisms(10, noise=0.002)
    settings = SearchSettings(trials=30, seeds=2, storage=tmp_path / "whole.journal", **FREE)
    whole, again = Counted(problem), Counted(problem)
    first = run_search(problem.trace, whole, settings)
    run_search(problem.trace, again, replace(settings, storage=None))
    assert again.calls == whole.calls
    parts = Counted(problem)
    for trials in (16, 23, 30):
        # Seeds are added at the end alone: those of an earlier front would be known in the later search.
        seeds = 2 if trials == 30 else 1
        shorter = replace(settings, trials=trials, seeds=seeds, storage=tmp_path / "parts.journal", resume=True)
        last = run_search(problem.trace, parts, shorter)
    assert len(set(parts.calls)) == len(parts.calls)
    assert last.to_json()["candidates"] == first.to_json()["candidates"]


def test_a_trial_that_was_interrupted_is_made_again_with_its_rule_and_allocation(tmp_path: Path) -> None:
    problem, asked = Mechanisms(10), []
    settings = SearchSettings(trials=20, seeds=1, storage=tmp_path / "study.journal", resume=True, **FREE)

    def evaluate(choice: Choice, seed: int) -> Outcome:
        asked.append(choice)
        if len(asked) == 17:
            raise KeyboardInterrupt
        return problem.evaluate(choice, seed)

    assert run_search(problem.trace, evaluate, settings).interrupted
    run_search(problem.trace, evaluate, settings)
    assert asked[16] == asked[17]
    assert len(set(asked)) == 20


def test_a_study_of_before_there_was_more_to_search_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Mechanisms(10)
    settings = SearchSettings(trials=14, seeds=1, storage=tmp_path / "study.journal", resume=True)
    now, new = study.problem_fingerprint, ("variants", "groups", "rules", "allocations", "objectives")
    with monkeypatch.context() as patched:
        patched.setattr(study, "problem_fingerprint", lambda *a: {k: v for k, v in now(*a).items() if k not in new})
        before = run_search(problem.trace, problem.evaluate, settings)
    counted = Counted(problem)
    after = run_search(problem.trace, counted, replace(settings, trials=18))
    assert len(counted.calls) == 4
    assert {c.choice for c in before.candidates} < {c.choice for c in after.candidates}
    assert not {"rule", "allocation", "variant"} & set(after.to_json()["candidates"][0])
    for changed in ({"rules": ("abadi",)}, {"allocations": ("uniform",)}, {"groups": 2}):
        with pytest.raises(GroupSearchError, match=next(iter(changed))):
            run_search(problem.trace, problem.evaluate, replace(settings, **changed))


def test_an_evaluation_is_read_back_as_it_was_with_and_without_options() -> None:
    for choice in (Choice((1, 4)), Choice((1, 4), "auto-v", "adaptive")):
        made = Evaluation(choice, 3, 0.5, 0.1, 7, ((0, 0.25), (7, 0.5)), 1.5, None)
        written = json.loads(json.dumps(made.to_json()))
        assert Evaluation.from_json(written) == made
        assert set(written) - {"rule", "allocation"} == {
            *("boundaries", "seed", "value", "step_seconds", "steps", "points", "seconds", "error")
        }


@pytest.mark.parametrize("count", [None, 3])
def test_the_least_peak_over_variants_and_its_variant_are_those_of_all(count: int | None) -> None:
    trace = make_trace(9)
    traces = {"plain": trace, "frugal": frugal(trace)}
    space = Space.of(traces, SearchSettings(groups=count))
    many = groupings(9)
    each = np.array([peaks(t, many) for t in traces.values()])
    assert (space.peaks(many) == each.min(axis=0)).all()
    names = [space.variants.cheapest(b) for b in many]
    assert names == [list(traces)[i] for i in each.argmin(axis=0)]
    assert set(names) == set(traces)  # neither is the better one everywhere
    for boundaries, peak in space.exact_front:
        assert peak == space.peak_bytes(boundaries)
        assert peak == min(p for b, p in zip(many, each.min(axis=0), strict=True) if len(b) == len(boundaries))
    assert space.exact_front[-1][1] == (each.min() if count is None else space.exact_front[0][1])
    assert len(space.exact_front) == 1 or count is None


def test_a_search_over_variants_trains_once_and_says_which_way_needs_least() -> None:
    problem = Mechanisms(10)
    traces = {"plain": problem.trace, "frugal": frugal(problem.trace)}
    counted = Counted(problem)
    result = run_search(traces, counted, SearchSettings(trials=40, seeds=1))
    assert max(Counter(counted.calls).values()) == 1
    for candidate in result.candidates:
        known = {name: int(peaks(trace, [candidate.boundaries])[0]) for name, trace in traces.items()}
        assert candidate.peak_bytes == min(known.values()) == known[candidate.variant or ""]
    assert {row["variant"] for row in result.to_json()["candidates"]} == set(traces)
    alone = run_search(problem.trace, problem.evaluate, SearchSettings(trials=40, seeds=1))
    assert {c.variant for c in alone.candidates} == {None}


def test_variants_of_other_sites_and_another_set_of_variants_are_refused(tmp_path: Path) -> None:
    problem = Mechanisms(8)
    with pytest.raises(GroupSearchError, match="8 sites of 'a' and 9 of 'b'"):
        Variants({"a": make_trace(8), "b": make_trace(9)})
    with pytest.raises(GroupSearchError, match="at least one"):
        Variants({})
    settings = SearchSettings(trials=8, seeds=1, storage=tmp_path / "study.journal", resume=True)
    run_search(problem.trace, problem.evaluate, settings)
    with pytest.raises(GroupSearchError, match="variants"):
        run_search({"a": problem.trace, "b": frugal(problem.trace)}, problem.evaluate, settings)


@pytest.mark.parametrize("sampler", ["front", "tpe", "nsga2", "random"])
def test_with_time_the_front_is_that_of_three_objectives(sampler: str) -> None:
    problem = Mechanisms(8)
    settings = SearchSettings(trials=40, seeds=1, sampler=sampler, objectives=("metric", "peak", "time"))
    result = run_search(problem.trace, problem.evaluate, settings)
    points = {c.choice: (-c.mean, c.peak_bytes, c.step_seconds) for c in result.candidates}
    assert all(point[2] == problem.seconds(choice.boundaries) for choice, point in points.items())
    for candidate in result.candidates:
        own = points[candidate.choice]
        beaten = any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in points.values())
        assert candidate.on_front != beaten
    two = run_search(problem.trace, problem.evaluate, replace(settings, objectives=("metric", "peak")))
    if sampler == "random":  # it learns from nothing, so both have seen the same
        assert {c.choice for c in two.front} < {c.choice for c in result.front}


def test_with_time_our_sampler_finds_more_of_the_front_than_random() -> None:
    problem = Mechanisms(12, shape="balance")
    many = [Choice(b) for b in groupings(12)]
    every = np.array(
        [
            (-problem.mean_of(c), p, problem.seconds(c.boundaries))
            for c, p in zip(many, _peaks(problem, many), strict=True)
        ]
    )
    low, high = every.min(axis=0), every.max(axis=0)
    probes = np.random.default_rng(0).uniform(low, low + 0.6 * (high - low), (4000, 3))
    reachable = np.array([(every <= probe).all(axis=1).any() for probe in probes])
    found = {}
    for sampler in ("front", "random"):
        settings = SearchSettings(trials=50, seeds=1, sampler=sampler, objectives=("metric", "peak", "time"))
        result = run_search(problem.trace, problem.evaluate, settings)
        made = np.array([(-c.mean, c.peak_bytes, c.step_seconds) for c in result.candidates])
        reached = np.array([(made <= probe).all(axis=1).any() for probe in probes])
        found[sampler] = reached.sum() / reachable.sum()
    assert found["front"] > found["random"]
    assert found["front"] > 0.95


@pytest.mark.parametrize("sampler", ["front", "tpe"])
def test_a_number_of_groups_that_is_fixed_is_kept(sampler: str) -> None:
    counted = Counted(Mechanisms(10, shape="balance"))
    result = run_search(counted.problem.trace, counted, SearchSettings(trials=30, seeds=1, groups=4, sampler=sampler))
    assert {choice.groups for choice, _ in counted.calls} == {4}
    assert len(counted.calls) == 30
    assert {c.groups for c in result.candidates} == {4}


def test_a_number_of_groups_that_cannot_be_is_refused_before_anything_is_evaluated() -> None:
    trace = make_trace(9)
    with pytest.raises(GroupSearchError, match="at most 3 groups with cuts between blocks, found 4"):
        Space.of(trace, SearchSettings(groups=4, granularity="block"))
    floor = Space.of(trace, SearchSettings(groups=2)).exact_front[0][1]
    with pytest.raises(BudgetError, match=rf"and 2 groups, found .*\({floor - 1} bytes\)"):
        Space.of(trace, SearchSettings(groups=2, budget_bytes=floor - 1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rules": ("abadi", "abadi")},
        {"rules": ("sgd",)},
        {"allocations": ("median",)},
        {"objectives": ("metric", "time")},
        {"groups": 0},
        {"groups": 2, "max_groups": 3},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(GroupSearchError):
        SearchSettings(**wrong)
