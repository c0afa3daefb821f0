"""Communication of groupings: bytes, instants and what backward hides, against a clock that is turned by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupsearch.errors import GroupSearchError
from groupsearch.plan.communication import (
    Link,
    Pace,
    bucket_bytes,
    overlap,
)
from groupsearch.plan.trace import Site, StaticBytes, Trace


def site(name: str, size: int, *parameters: str) -> Site:
    kinds = {"kind": "linear", "method": "ghost", "positions": 1, "inputs": 1, "outputs": 1}
    names = parameters or (f"{name}.weight",)
    return Site(name, name, name, parameters=names, parameter_count=size // 4, gradient_bytes=size, **kinds)


def trace_of(*sites: Site, carried: int = 0) -> Trace:
    return Trace(sites, (), (), (), StaticBytes(), 0, 0, batch_size=1, carried_bytes=carried)


THREE = trace_of(site("a", 400), site("b", 800), site("c", 1200))
PACE = Pace(1.0, (0.9, 0.6, 0.4))
LINK = Link(2, 4000.0, 0.0)  # 1200 bytes: 0.3 s


def test_all_layer_hides_nothing_and_groups_hide_what_backward_leaves_time_for() -> None:
    one = overlap(THREE, (), PACE, LINK)
    assert (one.size_bytes, one.starts_seconds) == (2400, (0.9,))
    assert one.step_seconds == pytest.approx(1.6)
    assert one.hidden == pytest.approx(0)
    each = overlap(THREE, (1, 2), PACE, LINK)
    assert each.starts_seconds == (0.9, 0.6, 0.4)
    assert each.step_seconds == pytest.approx(1.1)  # 0.4 to 0.7, to 0.9, to 1.0; backward ends at 0.9
    assert each.hidden == pytest.approx(5 / 6)


def test_latency_is_paid_for_every_group() -> None:
    link = replace(LINK, processes=4, latency_seconds=0.01)
    assert link.sent_bytes(1200) == pytest.approx(1800)
    assert link.seconds(1200) == pytest.approx(0.45 + 0.06)
    assert link.seconds(0) == 0
    one, each = overlap(THREE, (), PACE, link), overlap(THREE, (1, 2), PACE, link)
    assert each.link_seconds - one.link_seconds == pytest.approx(0.12)


def test_a_shared_parameter_is_sent_once_with_the_last_group_that_uses_it() -> None:
    tied = trace_of(site("embed", 0, "w"), site("b", 800), replace(site("head", 1200, "w")))
    assert bucket_bytes(tied, (1, 2)) == (1200, 800, 0)
    assert bucket_bytes(tied, (2,)) == (2000, 0)
    accumulated = trace_of(site("a", 400), site("b", 800), carried=1200)
    assert bucket_bytes(accumulated, (1,)) == (400, 800)


@given(st.lists(st.tuples(st.integers(0, 2000), st.floats(0.01, 1)), min_size=2, max_size=8), st.data())
def test_a_clock_turned_by_hand_agrees(sites: list[tuple[int, float]], data: st.DataObject) -> None:
    trace = trace_of(*(site(str(index), 4 * size) for index, (size, _) in enumerate(sites)))
    closes, now = [], 0.0
    for _, seconds in reversed(sites):
        closes.append(now := now + seconds)
    pace = Pace(now + 0.1, tuple(reversed(closes)))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sites) - 1))))
    link, found, free = Link(2, 5000.0, 0.003), overlap(trace, cuts, pace, Link(2, 5000.0, 0.003)), 0.0
    now, waiting = 0.0, 0
    for index in reversed(range(len(sites))):  # backward, site by site; the link takes a group when it is free
        now += sites[index][1]
        waiting += 4 * sites[index][0]
        if index in (0, *cuts):
            free = max(free, now) + link.seconds(waiting)
            waiting = 0
    assert found.step_seconds == pytest.approx(max(now, free) + 0.1)
    assert 0 <= found.hidden <= 1


def test_what_is_none_is_refused() -> None:
    with pytest.raises(GroupSearchError, match="2 processes"):
        Link(1, 1.0)
    with pytest.raises(GroupSearchError, match="3 sites"):
        overlap(THREE, (), Pace(1.0, (0.5,)), LINK)
