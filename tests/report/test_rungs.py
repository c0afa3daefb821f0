"""What a page says of how a search came to its front: from documents as the search writes them."""

from __future__ import annotations

from dataclasses import replace
from html import escape

import pytest

from groupsearch.report import sections
from groupsearch.report.subject import Subject
from groupsearch.search import Proxy, SearchSettings, Short, search_in_rungs
from tests.search.problem import Problem


@pytest.fixture(scope="module")
def document():
    problem = Problem(12, noise=0.004, shape="mixed")

    def short(choice, seed):
        return replace(problem.evaluate(choice, seed), steps=10)

    result = search_in_rungs(
        problem.trace,
        problem.evaluate,
        SearchSettings(trials=6, seeds=4, metric_name="accuracy"),
        proxy=Proxy(lambda choice: -problem.mean(choice.boundaries), 2.0, 25, 6),
        short=Short(short, 0.1, 12),
    )
    return {"kind": "search", "model": {"name": "made <up>"}, **result.to_json()}


def test_every_rung_has_its_row_and_every_correlation_its_sentence(document):
    html = sections.evidence(Subject(document)).body
    assert html.count("<tr>") == 1 + 4
    for words in ("proxy", "short runs", "full runs", "further seeds"):
        assert f"<td>{words}</td>" in html
    assert len(document["correlations"]) == 4
    for row in document["correlations"]:
        assert escape(row["statement"]) in html
    first = document["correlations"][0]
    assert (first["lower"], first["upper"]) == ("proxy", "short")
    assert f"<td>short runs {first['value']:.2g} ({first['low']:.2g} to {first['high']:.2g}); full runs" in html
    assert "it was not used" in html


def test_differences_are_those_of_the_document(document):
    html = sections.differences(Subject(document)).body
    assert html.count("<tr>") == 1 + len(document["comparisons"])
    assert escape(document["answer"]) in html
    for row in document["comparisons"]:
        assert row["verdict"] in html
        assert f"{100 * row['gap']:.1f} ± {100 * row['half_width']:.1f} %" in html


def test_what_choosing_cost_is_said(document):
    assert "no theorem accounts for" in sections.selection(Subject(document))


def test_documents_without_such_parts_leave_them_out():
    subject = Subject({"kind": "search", "model": {"name": "m"}, "candidates": []})
    assert sections.evidence(subject) is None
    assert sections.differences(subject) is None
    assert sections.selection(subject) is None


def test_strings_of_the_document_are_escaped(document):
    hostile = {**document, "answer": "<script>", "correlations": [{**document["correlations"][0], "statement": "<b>"}]}
    assert "<script>" not in sections.differences(Subject(hostile)).body
    assert "<b>" not in sections.evidence(Subject(hostile)).body
