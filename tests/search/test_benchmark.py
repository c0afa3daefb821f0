from __future__ import annotations

import json

import pytest

from benchmarks.bench_search import Case, as_text, run, share, summary, verdict


def test_the_whole_front_is_a_share_of_one_and_nothing_is_none() -> None:
    exact = Case("front", 10, "places", 0).problem.exact_front()
    assert share(exact, exact) == 1
    assert share([], exact) == 0
    assert 0 < share(exact[:1], exact) < 1


def test_a_small_problem_is_searched_to_its_end_and_the_verdict_names_who_is_first() -> None:
    rows = [run(Case(way, 7, "places", 0)) for way in ("front", "uniform", "exact memory")]
    front, uniform, memory = rows
    assert front["found_200"] == pytest.approx(1)
    assert front["distinct"] == 2**6
    assert max(uniform["found_200"], memory["found_200"]) < 1
    means = list(summary(rows))
    assert verdict(means) == {"not_first": [], "below_0.99_at_200": []}
    for each in means:
        if each["way"] == "front":
            each["found_200"] = 0.0
    assert verdict(means)["below_0.99_at_200"] == [["places", 7, 0.0], ["all", 7, 0.0]]
    best = max((uniform, memory), key=lambda row: row["found_200"])["way"]
    assert verdict(means)["not_first"] == [["places", 7, 200, best], ["all", 7, 200, best]]


def test_the_document_is_json_with_a_line_for_every_row() -> None:
    document = {"verdict": {"a": []}, "rows": [{"way": "x", "found_60": 1 / 3}, {"way": "y", "found_60": 1.0}]}
    text = as_text(document)
    assert json.loads(text)["rows"] == [{"way": "x", "found_60": 0.333333}, {"way": "y", "found_60": 1.0}]
    assert len(text.splitlines()) == 7
