"""ClipPlan: thresholds and noise, and a sensitivity that holds for the worst gradients and is reached by them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.inflation import PAGE, page_with_tables
from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import AdaptiveQuantile, ClipPlan, gradient_noise_multiplier
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import Site
from tests.support.strategies import random_trace


def grouping(boundaries: tuple[int, ...], parameters: Sequence[tuple[str, ...]]) -> Grouping:
    site = random_trace(1).sites[0]
    sites: tuple[Site, ...] = tuple(
        replace(site, name=f"s{i}", layer=f"s{i}", parameters=names, parameter_count=2 * len(names))
        for i, names in enumerate(parameters)
    )
    return Grouping(boundaries, sites)


def separate(sites: int) -> list[tuple[str, ...]]:
    return [(f"w{i}",) for i in range(sites)]


def parameters_of(plan: ClipPlan) -> list[str]:
    return sorted({name for site in plan.grouping.sites for name in site.parameters})


def uses_of(plan: ClipPlan) -> np.ndarray:
    """1 where a group (row) uses a parameter (column), else 0."""
    return np.array(
        [
            [any(name in site.parameters for site in plan.grouping.sites[lo:hi]) for name in parameters_of(plan)]
            for lo, hi in plan.grouping.spans
        ],
        dtype=float,
    )


def largest_sum(plan: ClipPlan, scaled: bool = False) -> float:
    """The longest sum of clipped contributions found by ascent over what one example may contribute.

    Every group may add any vector of norm R_m to the parameters its sites use. The length is convex in each
    group's vector, so the best one for the gradient of the squared length is R_m along it: alternate until it stands.
    With ``scaled`` the sum is divided by the scales of its noise.
    """
    uses, radius = uses_of(plan), np.array(plan.thresholds)[:, None]
    scales = np.array([plan.noise_scales[name] if scaled else 1.0 for name in parameters_of(plan)])
    best, rng = 0.0, np.random.default_rng(0)
    for _ in range(4):
        moves = uses * rng.random(uses.shape)
        for _ in range(1000):
            moves *= radius / np.linalg.norm(moves, axis=1, keepdims=True)
            best = max(best, float(np.linalg.norm(moves.sum(axis=0) / scales)))
            moves = uses * (moves.sum(axis=0) / scales**2 + 1e-12)
    return best


def exhaustive_sum(plan: ClipPlan, scaled: bool, angles: int) -> float:
    """The longest sum over a grid of all that one example may add, for groups of one or two parameters.

    A group's vector lies on the circle of radius R_m over its two parameters, or is R_m or -R_m on its one.
    """
    names = parameters_of(plan)
    scales = np.array([plan.noise_scales[name] if scaled else 1.0 for name in names])
    total = np.zeros((1, len(names)))
    for row, radius in zip(uses_of(plan), plan.thresholds, strict=True):
        columns = np.flatnonzero(row)
        turns = np.linspace(0, 2 * np.pi, angles, endpoint=False)
        points = np.zeros((angles if len(columns) == 2 else 2, len(names)))
        circle = np.stack([np.cos(turns), np.sin(turns)], axis=1)
        points[:, columns] = radius * (circle if len(columns) == 2 else np.array([[1.0], [-1.0]]))
        total = (total[:, None] + points[None]).reshape(-1, len(names))
    return float(np.linalg.norm(total / scales, axis=1).max())


TIED = [
    pytest.param((1,), [("a",), ("a",)], (1.0, 2.0), id="one shared by two"),
    pytest.param((1, 2), [("w",), ("v",), ("w",)], (1.0, 4.0, 2.0), id="first and last"),
    pytest.param((1, 2), [("a",), ("a", "b"), ("b",)], (1.0, 1.0, 1.0), id="chain"),
    pytest.param((1, 2), [("a",), ("a", "b"), ("b",)], (0.2, 3.0, 1.0), id="uneven chain"),
    pytest.param((1,), [("a", "b"), ("a", "c")], (1.0, 3.0), id="one of two shared"),
    pytest.param((1,), [("a", "b"), ("a", "b")], (1.0, 3.0), id="both shared"),
    pytest.param((1, 2), [("a", "b"), ("b", "c"), ("c", "a")], (1.0, 2.0, 0.5), id="ring"),
    pytest.param((1, 2), [("a", "b"), ("b",), ("a", "c")], (2.0, 1.0, 1.0), id="tree"),
]


@st.composite
def tied_plans(draw: st.DrawFn, **fields: Any) -> ClipPlan:
    """Up to six sites, each with one or two of four parameters, in any groups of any thresholds."""
    count = draw(st.integers(1, 6))
    names = st.sets(st.sampled_from("abcd"), min_size=1, max_size=2)
    parameters = [tuple(sorted(draw(names))) for _ in range(count)]
    boundaries = tuple(b for b in range(1, count) if draw(st.booleans()))
    groups = len(boundaries) + 1
    numbers = st.lists(st.floats(0.1, 5), min_size=groups, max_size=groups)
    noise = draw(st.sampled_from(["global", "equal"]) | numbers)
    return ClipPlan(grouping(boundaries, parameters), allocation=draw(numbers), noise_allocation=noise, **fields)


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

    def test_groups_connected_through_others_cannot_all_push_one_way(self) -> None:
        # 0 and 1 share a, 1 and 2 share b: group 1 divides itself, 1 / sqrt(2) for each: sqrt(2) (1 + 1 / sqrt(2)).
        plan = ClipPlan(grouping((1, 2), [("a",), ("a", "b"), ("b",)]), allocation=(1.0, 1.0, 1.0))
        assert plan.sensitivity == pytest.approx(1 + math.sqrt(2))

    @pytest.mark.parametrize(("boundaries", "parameters", "radii"), TIED)
    def test_it_is_the_most_that_all_gradients_on_a_grid_reach(
        self, boundaries: tuple[int, ...], parameters: list[tuple[str, ...]], radii: tuple[float, ...]
    ) -> None:
        plan = ClipPlan(grouping(boundaries, parameters), allocation=radii)
        found = exhaustive_sum(plan, scaled=False, angles=96)
        assert 0.997 * plan.sensitivity <= found <= plan.sensitivity * (1 + 1e-9)

    @settings(max_examples=40, deadline=None)
    @given(tied_plans())
    def test_no_example_moves_the_sum_further_and_some_as_far(self, plan: ClipPlan) -> None:
        assert 0.999 * plan.sensitivity <= largest_sum(plan) <= plan.sensitivity * (1 + 1e-9)

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_it_is_reached_where_each_site_uses_one_parameter_of_its_group(self, data: st.DataObject) -> None:
        parameters = [(name,) for name in data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=6))]
        radii = data.draw(st.lists(st.floats(0.1, 5), min_size=len(parameters), max_size=len(parameters)))
        plan = ClipPlan(grouping(tuple(range(1, len(parameters))), parameters), allocation=radii)
        assert largest_sum(plan) == pytest.approx(plan.sensitivity, rel=1e-6)


class TestNoise:
    def test_global_noise_is_the_sensitivity_for_every_parameter(self) -> None:
        plan = ClipPlan(grouping((1, 2), [("w",), ("v", "u"), ("w",)]), allocation=(1.0, 4.0, 2.0))
        assert plan.noise_scales == dict.fromkeys("uvw", plan.sensitivity)

    def test_equal_noise_is_the_threshold_times_the_root_of_the_groups(self) -> None:
        plan = ClipPlan(grouping((1, 3), separate(4)), allocation=(1.0, 2.0, 5.0), noise_allocation="equal")
        root = math.sqrt(3)
        assert dict(plan.noise_scales) == pytest.approx({"w0": root, "w1": 2 * root, "w2": 2 * root, "w3": 5 * root})

    def test_given_weights_are_kept_in_proportion(self) -> None:
        plan = ClipPlan(grouping((1,), separate(2)), allocation=(3.0, 4.0), noise_allocation=(1, 2))
        # gamma (1, 2) c with (3 / c)^2 + (4 / 2c)^2 = 1
        assert dict(plan.noise_scales) == pytest.approx({"w0": math.sqrt(13), "w1": 2 * math.sqrt(13)})

    def test_it_is_never_louder_than_noise_for_every_group_added_up(self) -> None:
        # Releasing each group's own sum with noise R_m sqrt(M) and adding up the releases is as private.
        plan = ClipPlan(grouping((1,), [("a", "b"), ("a",)]), allocation=(3.0, 4.0), noise_allocation="equal")
        assert plan.noise_scales["a"] <= math.sqrt(2) * 5 * (1 + 1e-9)
        assert plan.noise_scales["b"] <= math.sqrt(2) * 3 * (1 + 1e-9)

    @pytest.mark.parametrize("noise", ["global", "equal", "weights"])
    @pytest.mark.parametrize(("boundaries", "parameters", "radii"), TIED)
    def test_over_its_noise_the_sum_moves_by_one_at_most_and_at_worst(
        self, boundaries: tuple[int, ...], parameters: list[tuple[str, ...]], radii: tuple[float, ...], noise: str
    ) -> None:
        weights = [0.3, 1.0, 2.0][: len(radii)]
        allocation = weights if noise == "weights" else noise
        plan = ClipPlan(grouping(boundaries, parameters), allocation=radii, noise_allocation=allocation)
        assert 0.997 <= exhaustive_sum(plan, scaled=True, angles=96) <= 1 + 1e-9

    @settings(max_examples=60, deadline=None)
    @given(tied_plans())
    def test_no_example_moves_any_plans_sum_by_more_than_its_noise(self, plan: ClipPlan) -> None:
        assert 0.999 <= largest_sum(plan, scaled=True) <= 1 + 1e-9


class TestAdaptive:
    def test_it_begins_with_the_initial_thresholds(self) -> None:
        groups = grouping((1,), separate(4))
        for initial in ("uniform", "dimension", (0.5, 2)):
            fixed = ClipPlan(groups, 2.0, allocation=initial)
            plan = ClipPlan(groups, 2.0, allocation=AdaptiveQuantile(initial=initial))
            assert (plan.thresholds, plan.sensitivity) == (fixed.thresholds, fixed.sensitivity)
            assert plan.noise_scales == fixed.noise_scales
            assert fixed.adaptive is None
            assert plan.adaptive is not None

    def test_thresholds_of_a_step_change_all_but_the_rest(self) -> None:
        plan = ClipPlan(
            grouping((1,), separate(2)), rule="auto-v", allocation=AdaptiveQuantile(), noise_allocation="equal"
        )
        step = plan.with_thresholds((3.0, 4.0))
        assert step.thresholds == (3.0, 4.0)
        assert (step.rule, step.noise_allocation, step.adaptive) == ("auto-v", "equal", None)
        assert step.sensitivity == pytest.approx(5.0)

    def test_thresholds_move_geometrically_towards_the_quantile(self) -> None:
        allocation = AdaptiveQuantile(quantile=0.6, learning_rate=0.5)
        # All within: shrink by exp(-0.5 * 0.4); none: grow by exp(0.5 * 0.6); as asked: stay.
        found = allocation.updated((2.0, 2.0, 2.0), (1.0, 0.0, 0.6))
        assert found == pytest.approx((2 * math.exp(-0.2), 2 * math.exp(0.3), 2.0))

    @given(
        st.lists(st.floats(1e-3, 10), min_size=1, max_size=4),
        st.lists(st.floats(-1e300, 1e300), min_size=4, max_size=4),
    )
    def test_thresholds_stay_in_their_range_whatever_the_noise(self, start: list[float], shares: list[float]) -> None:
        allocation = AdaptiveQuantile(least=1e-3, most=10)
        found = allocation.updated(start, shares[: len(start)])
        assert all(1e-3 <= r <= 10 for r in found)

    @pytest.mark.parametrize("groups", [1, 2, 5])
    @pytest.mark.parametrize("noise", [0.5, 1.0, 3.0])
    def test_sums_and_counts_together_cost_the_noise_multiplier(self, groups: int, noise: float) -> None:
        # Each count changes by 1/2 up or down: the longest change over all signs, beside a sum that changes by 1.
        changes = [math.hypot(*signs) for signs in itertools.product((-0.5, 0.5), repeat=groups)]
        for count_noise in (10.0, 25.0):
            gradient = gradient_noise_multiplier(noise, groups, count_noise)
            assert math.hypot(1 / gradient, max(changes) / count_noise) == pytest.approx(1 / noise)

    def test_the_published_formula_is_one_group(self) -> None:
        # arXiv 1905.03871, theorem 1: z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2).
        assert gradient_noise_multiplier(1.5, 1, 5.0) == pytest.approx((1.5**-2 - 10.0**-2) ** -0.5)
        assert gradient_noise_multiplier(0.0, 100, 1e-6) == 0.0

    def test_counts_that_cost_all_are_refused_with_a_remedy_that_works(self) -> None:
        with pytest.raises(GroupSearchError, match=r"above 4.5 for 81 .*noise multiplier 1, found 4.5.*at 10.8 the"):
            gradient_noise_multiplier(1.0, 81, 4.5)
        assert gradient_noise_multiplier(1.0, 81, 10.8) == pytest.approx(1.1, abs=0.005)

    def test_the_counts_noise_is_a_twentieth_of_the_batch_unless_given(self) -> None:
        assert AdaptiveQuantile().count_noise_for(200.0) == 10.0
        assert AdaptiveQuantile(count_noise=3.0).count_noise_for(200.0) == 3.0

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"quantile": 0.0}, "quantile between 0 and 1"),
            ({"quantile": 1.0}, "quantile between 0 and 1"),
            ({"quantile": math.nan}, "quantile between 0 and 1"),
            ({"learning_rate": 0.0}, "learning_rate > 0"),
            ({"learning_rate": math.inf}, "learning_rate > 0"),
            ({"count_noise": 0.0}, "count_noise > 0"),
            ({"count_noise": math.inf}, "count_noise > 0"),
            ({"least": 0.0}, "0 < least < most"),
            ({"least": 2.0, "most": 1.0}, "0 < least < most"),
            ({"most": math.inf}, "0 < least < most"),
            ({"initial": "equal"}, "uniform, dimension"),
            ({"initial": (1.0,)}, "2 positive thresholds"),
            ({"initial": (1.0, 1e-9)}, "between 1e-06 and 1e"),
        ],
    )
    def test_wrong_values(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(GroupSearchError, match=message):
            ClipPlan(grouping((1,), separate(2)), allocation=AdaptiveQuantile(**fields))


class TestPage:
    TEXT = PAGE.read_text(encoding="utf-8")

    def test_its_tables_are_what_the_plans_say(self) -> None:
        assert page_with_tables(self.TEXT) == self.TEXT, "run `python -m benchmarks.inflation`"

    def test_its_inflation_is_the_formula(self) -> None:
        rows = re.findall(r"^\| (\d+) \| \+([\d.]+) % \|", self.TEXT, re.MULTILINE)
        assert len(rows) == 8
        for groups, percent in rows:
            assert float(percent) == pytest.approx(100 * ((1 - int(groups) / 400) ** -0.5 - 1), abs=0.006)


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
            ({"noise_allocation": "uniform"}, "global, equal or a sequence of 2 weights"),
            ({"noise_allocation": (1.0,)}, "2 positive weights"),
            ({"noise_allocation": (1.0, 0.0)}, "2 positive weights"),
            ({"max_grad_norm": 0.0}, "max_grad_norm > 0"),
            ({"max_grad_norm": math.inf}, "max_grad_norm > 0"),
            ({"max_grad_norm": math.nan}, "max_grad_norm > 0"),
        ],
    )
    def test_wrong_values(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(GroupSearchError, match=message):
            ClipPlan(grouping((1,), separate(2)), **change)
