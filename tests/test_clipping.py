"""ClipPlan: thresholds, and a sensitivity that holds for the worst gradients and is reached by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsearch.clipping import ClipPlan
from groupsearch.errors import GroupSearchError
from groupsearch.grouping import Grouping
from groupsearch.trace import Site
from tests.strategies import random_trace


def grouping(boundaries: tuple[int, ...], parameters: Sequence[tuple[str, ...]]) -> Grouping:
    site = random_trace(1).sites[0]
    sites: tuple[Site, ...] = tuple(
        replace(site, name=f"s{i}", layer=f"s{i}", parameters=names, parameter_count=2 * len(names))
        for i, names in enumerate(parameters)
    )
    return Grouping(boundaries, sites)


def separate(sites: int) -> list[tuple[str, ...]]:
    return [(f"w{i}",) for i in range(sites)]


def largest_sum(plan: ClipPlan, seed: int = 0) -> float:
    """The longest sum of clipped contributions found by ascent over what one example may contribute.

    Every group may add any vector of norm R_m to the parameters its sites use. The sum is linear in each
    group's vector, so the best answer to the others' is R_m along their sum: alternate until it stands.
    """
    names = sorted({name for site in plan.grouping.sites for name in site.parameters})
    uses = np.array(
        [
            [any(name in site.parameters for site in plan.grouping.sites[lo:hi]) for name in names]
            for lo, hi in plan.grouping.spans
        ],
        dtype=float,
    )
    radius = np.array(plan.thresholds)[:, None]
    best, rng = 0.0, np.random.default_rng(seed)
    for _ in range(8):
        moves = uses * rng.random(uses.shape)
        for _ in range(300):
            moves *= radius / np.linalg.norm(moves, axis=1, keepdims=True)
            moves = uses * (moves.sum(axis=0) + 1e-12)
        moves *= radius / np.linalg.norm(moves, axis=1, keepdims=True)
        best = max(best, float(np.linalg.norm(moves.sum(axis=0))))
    return best


class TestThresholds:
    def test_uniform(self) -> None:
        plan = ClipPlan(grouping((1, 2, 3), separate(4)), max_grad_norm=3.0)
        assert plan.thresholds == pytest.approx((1.5,) * 4)

    def test_dimension(self) -> None:
        # Groups of 2 and 6 numbers: R sqrt(2 / 8) and R sqrt(6 / 8).
        plan = ClipPlan(grouping((1,), separate(4)), max_grad_norm=2.0, allocation="dimension")
        assert plan.thresholds == pytest.approx((1.0, math.sqrt(3)))

    def test_given(self) -> None:
        assert ClipPlan(grouping((1,), separate(2)), allocation=[1, 0.5]).thresholds == (1.0, 0.5)

    @pytest.mark.parametrize("allocation", ["uniform", "dimension"])
    @pytest.mark.parametrize("boundaries", [(), (2,), (1, 2, 3, 4)])
    def test_allotted_thresholds_keep_the_sensitivity(self, allocation: str, boundaries: tuple[int, ...]) -> None:
        plan = ClipPlan(grouping(boundaries, separate(5)), max_grad_norm=1.7, allocation=allocation)
        assert plan.sensitivity == pytest.approx(1.7)


class TestSensitivity:
    def test_given_thresholds_add_in_squares(self) -> None:
        assert ClipPlan(grouping((1,), separate(2)), allocation=(3.0, 4.0)).sensitivity == pytest.approx(5.0)

    def test_a_parameter_shared_by_two_groups_adds_their_thresholds(self) -> None:
        # w is in groups 0 and 2 (bounds 1 and 2, together 3), group 1 stands alone with 4.
        plan = ClipPlan(grouping((1, 2), [("w",), ("v",), ("w",)]), allocation=(1.0, 4.0, 2.0))
        assert plan.sensitivity == pytest.approx(5.0)

    def test_a_parameter_shared_within_a_group_changes_nothing(self) -> None:
        plan = ClipPlan(grouping((2,), [("w",), ("w",), ("v",)]), allocation=(3.0, 4.0))
        assert plan.sensitivity == pytest.approx(5.0)

    def test_groups_connected_through_others_count_together(self) -> None:
        # 0 and 1 share a, 1 and 2 share b: a safe bound of 1 + 1 + 1, no less than what can be reached.
        plan = ClipPlan(grouping((1, 2), [("a",), ("a", "b"), ("b",)]), allocation=(1.0, 1.0, 1.0))
        assert plan.sensitivity == pytest.approx(3.0)
        assert largest_sum(plan) < 3.0

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_no_example_moves_the_sum_further(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, 6))
        names = st.sets(st.sampled_from("abcd"), min_size=1, max_size=2)
        parameters = [tuple(sorted(data.draw(names))) for _ in range(count)]
        boundaries = tuple(b for b in range(1, count) if data.draw(st.booleans()))
        radii = data.draw(st.lists(st.floats(0.1, 5), min_size=len(boundaries) + 1, max_size=len(boundaries) + 1))
        plan = ClipPlan(grouping(boundaries, parameters), allocation=radii)
        assert largest_sum(plan) <= plan.sensitivity * (1 + 1e-9)

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_it_is_reached_where_each_site_uses_one_parameter_of_its_group(self, data: st.DataObject) -> None:
        parameters = [(name,) for name in data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=6))]
        radii = data.draw(st.lists(st.floats(0.1, 5), min_size=len(parameters), max_size=len(parameters)))
        plan = ClipPlan(grouping(tuple(range(1, len(parameters))), parameters), allocation=radii)
        assert largest_sum(plan) == pytest.approx(plan.sensitivity, rel=1e-6)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"rule": "flat"}, "abadi, auto-s, auto-v"),
            ({"allocation": "equal"}, "uniform, dimension"),
            ({"allocation": (1.0,)}, "2 positive thresholds"),
            ({"allocation": (1.0, 0.0)}, "2 positive thresholds"),
            ({"allocation": (1.0, math.nan)}, "2 positive thresholds"),
            ({"allocation": (1.0, math.inf)}, "2 positive thresholds"),
            ({"max_grad_norm": 0.0}, "max_grad_norm > 0"),
            ({"max_grad_norm": math.inf}, "max_grad_norm > 0"),
            ({"max_grad_norm": math.nan}, "max_grad_norm > 0"),
        ],
    )
    def test_wrong_values(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(GroupSearchError, match=message):
            ClipPlan(grouping((1,), separate(2)), **change)
