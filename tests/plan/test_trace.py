"""Trace: its JSON form, and the boundaries it knows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsearch.errors import DocumentError
from groupsearch.plan.memory import peaks
from groupsearch.plan.trace import StaticBytes, Trace
from tests.support.strategies import boundaries_of, random_trace, traces


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_json_round_trip_keeps_every_part(data: st.DataObject) -> None:
    trace = data.draw(traces())
    back = Trace.from_json(json.loads(json.dumps(trace.to_json())))
    assert all(getattr(back, name) == getattr(trace, name) for name in Trace.__dataclass_fields__)
    cut = data.draw(boundaries_of(trace))
    assert peaks(back, [cut]) == peaks(trace, [cut])


def test_unknown_keys_of_a_site_are_passed_over() -> None:
    document = random_trace(3).to_json()
    document["sites"][0]["colour"] = "green"
    assert Trace.from_json(document).sites == random_trace(3).sites


@pytest.mark.parametrize("part", [part for part in random_trace(3).to_json() if part != "carried_bytes"])
def test_a_missing_part_is_refused_by_name(part: str) -> None:
    document = random_trace(3).to_json()
    del document[part]
    with pytest.raises(DocumentError, match=part):
        Trace.from_json(document)


@pytest.mark.parametrize(
    ("part", "garbled"),
    [
        ("sites", [{"name": "a"}]),
        ("sites", [17]),
        ("sites", None),
        ("instants", [[0, 1]]),
        ("instants", [3]),
        ("instants", [[0, 1, "many", 3]]),
        ("instants", [[0, 1, 2, None]]),
        ("booked", [[1.5, 1, 0, 2]]),
        ("booked", [[1, 2]]),
        ("booked", 4),
        ("cross_terms", [[1]]),
        ("static", {"weights": 1, "elsewhere": 2}),
        ("static", []),
        ("settings", [1]),
        ("settings", "abc"),
    ],
)
def test_a_garbled_part_is_refused(part: str, garbled: Any) -> None:
    document = {**random_trace(3).to_json(), part: garbled}
    with pytest.raises(DocumentError, match="groupsearch profile"):
        Trace.from_json(document)


@pytest.mark.parametrize("document", [[], "text", None, 3])
def test_what_is_no_object_is_refused(document: Any) -> None:
    with pytest.raises(DocumentError, match="Expected a trace"):
        Trace.from_json(document)


def test_boundaries_between_layers_and_blocks() -> None:
    trace = random_trace(6)
    assert trace.layer_boundaries == (1, 2, 3, 4, 5)
    assert trace.block_boundaries == (2, 4)
    assert trace.length == 6


def test_static_bytes_add_up() -> None:
    assert StaticBytes(weights=1, buffers=20, optimizer=300, batch=4000).total == 4321
