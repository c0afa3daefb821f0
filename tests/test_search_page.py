"""docs/search.md says what the committed documents say, and those say what the page and the README conclude."""

from __future__ import annotations

import pytest

from benchmarks.bench_search import LENGTHS, NOISES
from benchmarks.fronts import EPSILONS, MODELS, MOST_TRAININGS
from tests.support.memory_page import BLOCK, document
from tests.support.search_page import BLOCKS, PAGE, WAYS, mean_share, synthetic, with_numbers


def test_the_page_has_the_numbers_of_the_documents() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_numbers(text)
    assert {name for _, name, _ in BLOCK.findall(text)} == set(BLOCKS)


@pytest.mark.parametrize(("length", "least"), list(zip(LENGTHS, (0.99, 0.99, 0.99), strict=True)))
def test_the_default_finds_nearly_everything_and_is_first_in_every_column(length: int, least: float) -> None:
    for trials in (60, 200):
        means = {way: mean_share(way, length, trials) for way in WAYS}
        assert max(means, key=lambda way: means[way]) == "front"
    assert means["front"] >= least
    rows = [row for row in synthetic()["summary"] if row["length"] == length and row["way"] == "front"]
    assert {row["shape"] for row in rows} == {*NOISES, "all"}
    assert all(row["runs"] >= 5 for row in rows)


def test_every_workload_is_searched_at_both_epsilons_for_less_than_ten_trainings() -> None:
    cases = document("fronts")["cases"]
    assert {(case["model"], case["epsilon"]) for case in cases} == {(m, e) for m in MODELS for e in EPSILONS}
    for case in cases:
        assert case["trainings_to_find"] < MOST_TRAININGS
        named = {row["grouping"] for row in case["rows"]}
        assert {"all-layer", "layer-wise"} <= named
        assert all(row["half_width"] is not None and len(row["values"]) >= 3 for row in case["rows"])


def test_a_proxy_that_was_not_seen_to_predict_was_dropped() -> None:
    for case in document("fronts")["cases"]:
        first = next(each for each in case["correlations"] if each["lower"] == "proxy" and each["used"] is not None)
        assert first["used"] <= (first["low"] > 0)


def test_eight_workers_do_the_work_of_six_and_large_studies_open() -> None:
    found = document("scale")
    eight = {row["storage"]: row["speedup"] for row in found["throughput"] if row["workers"] == 8}
    assert set(eight) == {"journal", "postgresql"}
    assert min(eight.values()) >= 6
    assert {row["storage"] for row in found["size"]} == set(eight)
    for row in found["size"]:
        assert row["trials"] >= 5000
        assert row["total_seconds"] < 20
        assert row["peak_bytes"] < 2**30
