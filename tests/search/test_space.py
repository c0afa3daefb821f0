from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import optuna
import pytest

from groupsearch.errors import BudgetError
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import peaks
from groupsearch.plan.trace import Trace
from groupsearch.search import Choice, SearchSettings
from groupsearch.search.space import Space
from tests.search.problem import make_trace


def space(length: int = 9, **settings: object) -> Space:
    return Space.of(make_trace(length), SearchSettings(**settings))  # type: ignore[arg-type]


def all_groupings(cuts: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [chosen for count in range(len(cuts) + 1) for chosen in combinations(cuts, count)]


@pytest.mark.parametrize("ends", [0, 1])
def test_the_end_points_of_every_parameter_are_groupings(ends: int) -> None:
    here = space()
    trial = optuna.create_study().ask()
    fixed = optuna.trial.FixedTrial(dict.fromkeys(here.distributions(), ends))
    assert here.suggest(fixed).boundaries == (here.cuts if ends else ())  # type: ignore[arg-type]
    assert all(cut in here.cuts for cut in here.suggest(trial).boundaries)


def test_parameters_and_suggest_are_inverse() -> None:
    here = space()
    for boundaries in all_groupings(here.cuts):
        choice = Choice(boundaries)
        assert here.suggest(optuna.trial.FixedTrial(here.parameters(choice))) == choice  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", ["site", "layer", "block"])
def test_the_exact_front_equals_brute_force_at_every_granularity(granularity: str) -> None:
    here = space(10, granularity=granularity)
    groupings = all_groupings(here.cuts)
    found = peaks(here.trace, groupings)
    for boundaries, peak in here.exact_front:
        groups = len(boundaries)
        assert set(boundaries) <= set(here.cuts)
        assert peak == here.peak_bytes(boundaries)
        assert peak == min(p for b, p in zip(groupings, found, strict=True) if len(b) == groups)
    assert here.exact_front[-1][1] == found.min()


def test_blocks_and_layers_limit_the_cuts() -> None:
    trace = make_trace(9)
    reused = replace(trace, sites=tuple(replace(s, layer=f"layer{i // 2}") for i, s in enumerate(trace.sites)))
    assert Space.of(reused, SearchSettings(granularity="layer")).cuts == (2, 4, 6, 8)
    assert Space.of(reused, SearchSettings(granularity="block")).cuts == (3, 6)
    assert Space.of(reused, SearchSettings(granularity="site")).cuts == tuple(range(1, 9))


@pytest.mark.parametrize("limits", [{}, {"granularity": "block"}, {"max_groups": 3}])
def test_a_budget_below_the_floor_is_refused_with_the_floor(limits: dict[str, object]) -> None:
    here = space(12, **limits)
    allowed = [b for b in all_groupings(here.cuts) if here.feasible(b)]
    floor = int(peaks(here.trace, allowed).min())
    with pytest.raises(BudgetError, match=rf"\({floor} bytes\)"):
        space(12, budget_bytes=floor - 1, **limits)
    assert any(space(12, budget_bytes=floor, **limits).feasible(b) for b in allowed)


def test_the_warm_start_begins_with_the_references_and_fits_the_limits() -> None:
    here = space(24)
    trace: Trace = here.trace
    warm = here.warm_start(60)
    styles = (Grouping.all_layer(trace), Grouping.layer_wise(trace), Grouping.uniform(trace, 4))
    assert warm[:3] == [Choice(g.boundaries) for g in styles]
    assert {Choice(b) for b, _ in here.exact_front} <= set(warm)
    assert Choice(Grouping.block_wise(trace).boundaries) in warm
    assert len(warm) == len(set(warm))
    tight = space(24, budget_bytes=here.exact_front[2][1], max_groups=8)
    assert tight.warm_start(60)
    assert all(tight.feasible(c.boundaries) for c in tight.warm_start(60))


def test_the_exact_front_takes_at_most_half_of_few_trials_and_keeps_its_ends() -> None:
    here = space(48)
    lowering = [b for b, _ in here.exact_front if here.source(b) == "exact front"]
    assert len(lowering) >= 4
    few = [c.boundaries for c in here.warm_start(4) if here.source(c.boundaries) == "exact front"]
    assert len(few) <= 2
    assert here.exact_front[-1][0] in few


def test_neighbours_differ_by_one_cut_or_one_move() -> None:
    here = space(6)
    expected = [(1, 2, 3), (3,), (2,), (2, 3, 4), (2, 3, 5), (1, 3), (2, 4)]
    assert sorted(here.neighbours(Choice((2, 3)))) == sorted(map(Choice, expected))


def test_sources_are_named() -> None:
    here = space(24)
    assert here.source(()) == "all-layer"
    assert here.source(tuple(range(1, 24))) == "layer-wise"
    assert here.source((6, 12, 18)) == "uniform:4"
    assert here.source(here.exact_front[1][0]) == "exact front"
    assert here.source((1, 2, 3, 4, 5, 23)) == "search"
