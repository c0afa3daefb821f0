"""Grouping: styles, text form and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsearch.errors import BudgetError, GroupSearchError
from groupsearch.plan.grouping import Grouping, fewest_groups, least_peak, named_groupings
from groupsearch.plan.memory import peaks
from groupsearch.plan.partition import floor_bytes
from groupsearch.plan.trace import Trace
from tests.support.strategies import boundaries_of, random_trace, traces


@pytest.fixture
def trace() -> Trace:
    """Seven sites: blocks of two, and layer 3 used twice."""
    made = random_trace(7, seed=8)
    sites = list(made.sites)
    sites[4] = replace(sites[4], layer=sites[3].layer, name=f"{sites[3].name}#1", block=sites[3].block)
    return replace(made, sites=tuple(sites))


class TestStyles:
    def test_all_layer_is_one_group(self, trace: Trace) -> None:
        grouping = Grouping.all_layer(trace)
        assert (grouping.boundaries, grouping.groups, grouping.spans) == ((), 1, ((0, 7),))

    def test_layer_wise_keeps_the_uses_of_a_layer_together(self, trace: Trace) -> None:
        assert Grouping.layer_wise(trace).boundaries == (1, 2, 3, 5, 6)

    def test_block_wise_cuts_between_blocks(self, trace: Trace) -> None:
        # Blocks 0 0 1 1 1 2 3: site 4 stands in the block of site 3.
        assert Grouping.block_wise(trace).boundaries == (2, 5, 6)

    @pytest.mark.parametrize("groups", range(1, 8))
    def test_uniform_groups_differ_by_one_site_at_most(self, trace: Trace, groups: int) -> None:
        sizes = [hi - lo for lo, hi in Grouping.uniform(trace, groups).spans]
        assert len(sizes) == groups
        assert max(sizes) - min(sizes) <= 1

    @pytest.mark.parametrize("groups", [0, 8])
    def test_impossible_numbers_of_groups_are_refused(self, trace: Trace, groups: int) -> None:
        for make in (Grouping.uniform, least_peak):
            with pytest.raises(GroupSearchError, match="between 1 and 7 groups"):
                make(trace, groups)

    def test_named_groupings_name_each_set_of_boundaries_once(self, trace: Trace) -> None:
        named = named_groupings(trace, uniform=(1, 2, 99))
        assert list(named) == ["all-layer", "layer-wise", "block-wise", "uniform:2"]


class TestBoundaries:
    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def test_spans_cover_every_site_once_and_group_of_finds_them(self, data: st.DataObject) -> None:
        trace = data.draw(traces())
        grouping = Grouping.from_boundaries(trace, data.draw(boundaries_of(trace)))
        assert list(chain.from_iterable(range(lo, hi) for lo, hi in grouping.spans)) == list(range(trace.length))
        assert all(grouping.group_of(site) == m for m, (lo, hi) in enumerate(grouping.spans) for site in range(lo, hi))

    def test_from_boundaries_sorts(self, trace: Trace) -> None:
        assert Grouping.from_boundaries(trace, [5, 2]).boundaries == (2, 5)

    @pytest.mark.parametrize("outside", [(0,), (7,), (-3,), (3, 40)])
    def test_a_boundary_outside_the_model_is_refused(self, trace: Trace, outside: tuple[int, ...]) -> None:
        with pytest.raises(GroupSearchError, match="between 1 and 6"):
            Grouping.from_boundaries(trace, outside)

    @pytest.mark.parametrize("wrong", [(3, 3), (4, 2)])
    def test_repeats_and_disorder_are_refused(self, trace: Trace, wrong: tuple[int, ...]) -> None:
        with pytest.raises(GroupSearchError, match="increasing order"):
            Grouping(wrong, trace.sites)

    def test_groupings_with_the_same_boundaries_are_equal(self, trace: Trace) -> None:
        assert len({Grouping.from_boundaries(trace, [3]), Grouping.parse(trace, "3")}) == 1


class TestText:
    @pytest.mark.parametrize(
        ("text", "boundaries"),
        [
            ("all-layer", ()),
            (" layer-wise ", (1, 2, 3, 5, 6)),
            ("block-wise", (2, 5, 6)),
            ("uniform:7", (1, 2, 3, 4, 5, 6)),
            ("uniform:1", ()),
            ("5, 2", (2, 5)),
            ("4", (4,)),
        ],
    )
    def test_forms(self, trace: Trace, text: str, boundaries: tuple[int, ...]) -> None:
        assert Grouping.parse(trace, text).boundaries == boundaries

    def test_best_is_the_least_peak(self, trace: Trace) -> None:
        assert Grouping.parse(trace, "best:3") == least_peak(trace, 3)
        assert least_peak(trace, groups=3).groups == 3

    def test_within_is_the_fewest_groups(self, trace: Trace) -> None:
        floor = floor_bytes(trace)
        grouping = Grouping.parse(trace, f"within:{floor}")
        assert grouping == fewest_groups(trace, floor)
        assert peaks(trace, [grouping])[0] == floor

    def test_within_less_than_the_floor_is_refused(self, trace: Trace) -> None:
        with pytest.raises(BudgetError, match="at least"):
            Grouping.parse(trace, "within:1KiB")

    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def test_str_is_parsed_back(self, data: st.DataObject) -> None:
        trace = data.draw(traces())
        grouping = Grouping.from_boundaries(trace, data.draw(boundaries_of(trace)))
        assert Grouping.parse(trace, str(grouping)) == grouping

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "layerwise",
            "uniform",
            "uniform:",
            "uniform:four",
            "best:-1",
            "within:",
            "3,,4",
            "3;4",
            "1.5",
            "all-layer:2",
        ],
    )
    def test_anything_else_is_refused_with_the_forms(self, trace: Trace, text: str) -> None:
        with pytest.raises(GroupSearchError, match="uniform:4, best:4, within:12GiB or boundaries"):
            Grouping.parse(trace, text)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("within:much", "12GiB"),
            ("uniform:0", "between 1 and 7 groups"),
            ("best:8", "groups"),
            ("9", "between 1 and 6"),
        ],
    )
    def test_a_form_with_a_wrong_value_says_what_was_expected(self, trace: Trace, text: str, message: str) -> None:
        with pytest.raises(GroupSearchError, match=message):
            Grouping.parse(trace, text)
