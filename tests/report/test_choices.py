"""A page about a search that chose the clip rule and the thresholds with the grouping."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from groupsearch.report.info import curves_info, front_info
from groupsearch.report.page import render_page
from groupsearch.report.subject import Subject
from tests.report.synthetic import search_document


@pytest.fixture
def document() -> dict[str, Any]:
    """The recommended grouping twice: with abadi it is not recommended and trains worse."""
    found = search_document()
    for row in (*found["candidates"], found["recommended"], *found["training"]["curves"]):
        row |= {"rule": "auto-s", "variant": "checkpoint blocks"}
    other = deepcopy(found["recommended"]) | {"rule": "abadi", "on_front": True}
    other["metric"]["mean"] -= 0.05
    found["candidates"].insert(0, other)
    cuts = found["recommended"]["boundaries"]
    found["training"]["curves"] += [
        {**deepcopy(curve), "rule": "abadi"} for curve in found["training"]["curves"] if curve["boundaries"] == cuts
    ]
    return found


def test_of_equal_groupings_the_recommended_one_is_meant(document: dict[str, Any]) -> None:
    subject, recommended = Subject(document), document["recommended"]
    metric = subject.metric(subject.chosen)
    assert metric is not None
    assert metric.mean == recommended["metric"]["mean"]
    info = front_info(subject)
    assert info is not None
    named = [point for point in info.points if point.role == "recommended"]
    assert [point.metric.mean for point in named] == [recommended["metric"]["mean"]]


def test_each_has_a_curve_of_its_own(document: dict[str, Any]) -> None:
    plain, info = curves_info(Subject(search_document())), curves_info(Subject(document))
    assert plain is not None
    assert info is not None
    assert len(info.curves) == len(plain.curves) + 1
    assert [curve.seeds for curve in info.curves if curve.role == "recommended"] == [
        curve.seeds for curve in plain.curves if curve.role == "recommended"
    ]
    assert sum("abadi" in curve.name for curve in info.curves) == 1


def test_the_table_says_rule_and_way(document: dict[str, Any]) -> None:
    page = render_page(document)
    assert "abadi, checkpoint blocks" in page
    assert "auto-s, checkpoint blocks" in page
    assert "auto-s" not in render_page(search_document())
