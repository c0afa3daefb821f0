"""The closed form against a literal replay, and the promises of its docstrings."""

from __future__ import annotations

from dataclasses import astuple, replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsearch.errors import DocumentError, GroupSearchError
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import UNREACHABLE_BYTES, cost_table, peak_memory, peaks, timeline
from groupsearch.plan.trace import Booked, CrossTerm, Instant, Site, StaticBytes, Trace
from tests.support.reference_memory import replay
from tests.support.strategies import boundaries_of, random_trace, traces


def every_grouping(length: int) -> list[tuple[int, ...]]:
    return [cut for count in range(length) for cut in combinations(range(1, length), count)]


def small_trace() -> Trace:
    """Two sites; site 1's input (10 bytes) and its output gradient (5 bytes) outlive site 1 only in a book."""
    site = Site("a", "a", "a", "linear", "ghost", 1, 2, 3, ("a.weight",), 6)
    return Trace(
        sites=(
            replace(site, close_bytes=7, gradient_bytes=6, close_live_bytes=120),
            replace(
                site,
                name="b",
                layer="b",
                block="b",
                parameters=("b.weight",),
                close_bytes=9,
                gradient_bytes=8,
                close_live_bytes=130,
            ),
        ),
        instants=(
            Instant(-1, False, 125, 25),
            Instant(1, True, 135, 25),
            Instant(1, False, 130, 25),
            Instant(1, False, 118, 15),
            Instant(0, True, 122, 15),
            Instant(0, False, 105, 0),
        ),
        booked=(Booked(10, 1, 1, 3), Booked(5, 1, 1, 4), Booked(4, 0, 0, 5)),
        cross_terms=(),
        static=StaticBytes(weights=60, buffers=10, optimizer=20, batch=10),
        step_bytes=116,
        nonprivate_peak_bytes=130,
        batch_size=1,
    )


class TestByHand:
    def test_timeline_of_one_group(self) -> None:
        # Open: 135; 130; 118+10; 122+15. Close at a: 120+15+9, then b's book is gone: 120+8+7. After: 105+14.
        expected = [(-1, 125), (1, 135), (1, 130), (1, 128), (0, 137), (0, 144), (0, 135), (0, 119), (-1, 116)]
        assert timeline(small_trace(), ()) == expected

    def test_timeline_of_two_groups(self) -> None:
        # b closes at once, 130+9, and leaves 8 bytes of sums: 138; 126; 130. Close at a: 120+8+7. After: 105+14.
        expected = [(-1, 125), (1, 135), (1, 139), (1, 138), (1, 126), (0, 130), (0, 135), (0, 119), (-1, 116)]
        assert timeline(small_trace(), (1,)) == expected

    def test_cost_table(self) -> None:
        table = cost_table(small_trace())
        # Site 0 alone: hook 122 + 8 sums, close 120 + 8 + 7, after 105 + 14.
        assert table.cost_bytes.tolist() == [[135, 144], [UNREACHABLE_BYTES, 139]]
        assert table.outside_bytes == 125

    def test_peak_says_where_and_what(self) -> None:
        peak = peak_memory(small_trace(), ())
        assert (peak.peak_bytes, peak.site, peak.where) == (144, 0, "close at a")
        # weights, buffers, optimizer, batch; 15 activations; 120 - 100 - 15 + 9 transients; 15 book; no sums yet.
        assert astuple(peak.breakdown) == (60, 10, 20, 10, 15, 14, 15, 0)

    def test_cross_term_counts_within_a_group_only(self) -> None:
        trace = replace(small_trace(), cross_terms=(CrossTerm(early=1, late=0, transient_bytes=50),))
        # 120 alive at the close of a, 15 in the book, 50 for the inner product.
        assert peaks(trace, [(), (1,)]).tolist() == [185, 139]
        assert peak_memory(trace, ()).where == "norm of a"

    def test_sums_of_earlier_micro_batches_are_alive_throughout(self) -> None:
        sites = tuple(replace(site, gradient_bytes=0) for site in small_trace().sites)
        trace = replace(small_trace(), sites=sites, carried_bytes=14, step_bytes=139)
        # Forward 125+14; 135+14; 130+14; 128+14; 137+14; closes 120+15+9+14 and 120+7+14; 105+14; the step as it is.
        expected = [(-1, 139), (1, 149), (1, 144), (1, 142), (0, 151), (0, 158), (0, 141), (0, 119), (-1, 139)]
        assert timeline(trace, ()) == expected
        assert peaks(trace, [(), (1,)]).tolist() == [158, 153]
        assert peak_memory(trace, ()).breakdown.sums == 14
        forward = replace(trace, instants=(Instant(-1, False, 900, 25), *trace.instants[1:]))
        assert peak_memory(forward, ()).peak_bytes == 914 == peaks(forward, [()])[0]

    @pytest.mark.parametrize(
        ("change", "where"),
        [
            ({"step_bytes": 900}, "optimizer step"),
            ({"instants": (Instant(-1, False, 900, 25), *small_trace().instants[1:])}, "forward and loss"),
            ({"instants": (*small_trace().instants[:2], Instant(1, False, 900, 25), *small_trace().instants[3:])}, "b"),
        ],
    )
    def test_every_phase_can_hold_the_peak(self, change: dict[str, Any], where: str) -> None:
        trace = replace(small_trace(), **change)
        peak = peak_memory(trace, ())
        assert peak.peak_bytes == 900 == peaks(trace, [()])[0]
        assert peak.where == (f"after {where}" if where == "b" else where)
        assert sum(astuple(peak.breakdown)) == 900


class TestAgainstReplay:
    @settings(max_examples=60, deadline=None)
    @given(traces(max_sites=6))
    def test_every_grouping_equals_the_replay(self, trace: Trace) -> None:
        groupings = every_grouping(trace.length)
        assert peaks(trace, groupings).tolist() == [max(replay(trace, cut)) for cut in groupings]

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_timeline_is_the_replay(self, data: st.DataObject) -> None:
        trace = data.draw(traces())
        cut = data.draw(boundaries_of(trace))
        assert [live for _, live in timeline(trace, cut)] == replay(trace, cut)

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_peak_is_the_largest_of_the_timeline_and_its_parts_sum_to_it(self, data: st.DataObject) -> None:
        trace = data.draw(traces())
        cut = data.draw(boundaries_of(trace))
        peak = peak_memory(trace, cut)
        assert peak.peak_bytes == max(replay(trace, cut)) == peaks(trace, [cut])[0]
        assert sum(astuple(peak.breakdown)) == peak.peak_bytes
        assert (peak.site, peak.peak_bytes) in timeline(trace, cut)

    def test_a_long_trace(self) -> None:
        trace = random_trace(60, seed=1)
        rng = np.random.default_rng(2)
        cuts = [tuple((np.flatnonzero(rng.random(59) < density) + 1).tolist()) for density in np.linspace(0, 1, 12)]
        assert peaks(trace, cuts).tolist() == [max(replay(trace, cut)) for cut in cuts]


class TestPeaks:
    def test_groupings_tuples_and_masks_agree(self) -> None:
        trace = random_trace(9, seed=3)
        cuts = every_grouping(9)
        mask = np.array([[b in cut for b in range(1, 9)] for cut in cuts])
        by_tuple = peaks(trace, cuts)
        assert by_tuple.dtype == np.int64
        assert np.array_equal(by_tuple, peaks(trace, mask))
        assert np.array_equal(by_tuple, peaks(trace, [Grouping(cut, trace.sites) for cut in cuts]))
        assert len(np.unique(by_tuple)) > 1

    def test_more_rows_than_one_chunk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trace = random_trace(8, seed=4)
        mask = np.random.default_rng(0).random((50, 7)) < 0.5
        whole = peaks(trace, mask)
        monkeypatch.setattr("groupsearch.plan.memory._CHUNK_CELLS", 24)
        assert np.array_equal(peaks(trace, mask), whole)

    def test_no_grouping_and_a_single_site(self) -> None:
        trace = random_trace(1, seed=5)
        assert peaks(trace, []).shape == (0,)
        assert peaks(trace, [()]).tolist() == [max(replay(trace, ()))]
        assert peaks(trace, np.zeros((3, 0), np.bool_)).tolist() == [max(replay(trace, ()))] * 3

    @pytest.mark.parametrize("wrong", [np.zeros((2, 3), np.bool_), np.zeros((2, 4), np.int64), np.zeros(4, np.bool_)])
    def test_arrays_of_another_form_are_refused(self, wrong: np.ndarray) -> None:
        with pytest.raises(GroupSearchError, match=r"shape \(N, 4\)"):
            peaks(random_trace(5), wrong)

    @pytest.mark.parametrize("wrong", [(0,), (5,), (3, 3), (3, 2), (-1,)])
    def test_boundaries_outside_the_model_are_refused(self, wrong: tuple[int, ...]) -> None:
        for function in (peak_memory, timeline, lambda trace, cut: peaks(trace, [cut])):
            with pytest.raises(GroupSearchError, match="between 1 and 4"):
                function(random_trace(5), wrong)

    def test_a_grouping_of_a_longer_model_is_refused(self) -> None:
        with pytest.raises(GroupSearchError, match="between 1 and 4"):
            peak_memory(random_trace(5), Grouping.layer_wise(random_trace(8)))


def test_instants_out_of_order_are_refused() -> None:
    trace = small_trace()
    shuffled = replace(trace, instants=trace.instants[::-1])
    missing = replace(trace, instants=trace.instants[:-1])
    for broken in (shuffled, missing):
        with pytest.raises(DocumentError, match="Trace the model again"):
            cost_table(broken)


@pytest.mark.parametrize(
    "change",
    [
        {"booked": (Booked(10, 2, 1, 3),)},
        {"booked": (Booked(10, 0, 1, 3),)},
        {"booked": (Booked(10, 1, -1, 3),)},
        {"booked": (Booked(10, 1, 1, 7),)},
        {"cross_terms": (CrossTerm(2, 0, 5),)},
    ],
)
def test_storages_beyond_the_trace_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DocumentError, match="2 sites and 6 instants"):
        cost_table(replace(small_trace(), **change))


def test_the_table_is_kept_and_cannot_be_written() -> None:
    trace = small_trace()
    table = cost_table(trace)
    assert cost_table(trace) is table
    with pytest.raises(ValueError, match="read-only"):
        table.cost_bytes[0, 0] = 1
