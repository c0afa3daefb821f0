from __future__ import annotations

from typing import Any

import pytest

from groupsearch.plan.memory import peak_memory, timeline
from groupsearch.report.info import (
    MAX_POINTS,
    Curve,
    FrontPoint,
    GroupsInfo,
    StripRow,
    breakdown_info,
    comparisons,
    curves_info,
    front_info,
    front_line,
    groups_info,
    strip_info,
    summary_of,
    thin,
    timeline_info,
)
from groupsearch.report.subject import Metric, Shown, Subject
from tests.report.synthetic import STYLES, transformer_trace

Documents = dict[str, dict[str, Any]]
LAYER_WISE = tuple(range(1, 28))


def test_shown_groupings_are_all_layer_the_recommended_and_layer_wise(documents: Documents) -> None:
    assert Subject(documents["search"]).shown == (
        Shown("all-layer", "all-layer", ()),
        Shown("recommended, 4 groups", "recommended", STYLES["4"]),
        Shown("layer-wise", "layer-wise", LAYER_WISE),
    )


def test_a_recommended_style_is_shown_once(documents: Documents) -> None:
    document = {**documents["search"], "recommended": {"boundaries": [], "groups": 1}}
    assert [entry.name for entry in Subject(document).shown] == ["all-layer (recommended)", "layer-wise"]


def test_a_profile_chooses_the_fewest_groups_within_a_percent_of_the_floor() -> None:
    front = [{"groups": m, "boundaries": list(range(1, m)), "peak_bytes": b} for m, b in ((1, 200), (2, 101), (3, 100))]
    document = {"kind": "profile", "model": {}, "front": front, "floor_bytes": 100}
    assert Subject(document).chosen == (1,)
    assert Subject({**document, "floor_bytes": 90}).chosen == (1, 2), "a front that ends above the floor: its last"
    assert Subject({**document, "front": front[::-1]}).chosen == (1,)


def test_front_info_by_equality() -> None:
    def candidate(boundaries: list[int], peak_bytes: int, mean: float | None, on_front: bool) -> dict[str, Any]:
        metric = {"name": "accuracy", "mean": mean, "half_width": 0.01, "seeds": 3}
        size = len(boundaries) + 1
        return {
            "boundaries": boundaries,
            "groups": size,
            "peak_bytes": peak_bytes,
            "metric": metric,
            "on_front": on_front,
        }

    rows = [candidate([3], 90, 0.8, True), candidate([], 100, 0.9, True), candidate([1, 2], 95, 0.7, False)]
    untrained = [{**rows[2], "metric": None}, candidate([2], 80, None, False)]
    document = {"kind": "search", "model": {}, "candidates": [*rows, *untrained], "recommended": rows[0]}
    found = front_info(Subject({**document, "trace": None}))
    assert found is not None
    points = (
        FrontPoint("recommended, 2 groups", "recommended", 2, 90, Metric("accuracy", 0.8, 0.01), 3, True),
        FrontPoint("3 groups", "", 3, 95, Metric("accuracy", 0.7, 0.01), 3, False),
        FrontPoint("1 group", "", 1, 100, Metric("accuracy", 0.9, 0.01), 3, True),
    )
    assert found == ("accuracy", points)
    assert front_line(found.points) == (found.points[0], found.points[2])


@pytest.mark.parametrize("kind", ["profile", "search", "train"])
def test_a_timeline_is_in_order_and_reaches_the_estimated_peak(documents: Documents, kind: str) -> None:
    trace, found = transformer_trace(), timeline_info(Subject(documents[kind]))
    assert found is not None
    assert found.nonprivate_peak_bytes == trace.nonprivate_peak_bytes
    for line, shown in zip(found.lines, Subject(documents[kind]).shown, strict=True):
        assert list(line.positions) == sorted(line.positions)
        assert max(line.live_bytes) == peak_memory(trace, shown.boundaries).peak_bytes
        assert list(line.live_bytes) == [live for _, live in timeline(trace, shown.boundaries)]
        assert line.labels[0] == "forward and loss"
        assert line.labels[-1] == "update"
        at = line.labels.index("head")  # backward reaches the last site first
        assert line.positions[at] == 0.0


def test_timelines_of_groupings_line_up_at_every_site(documents: Documents) -> None:
    found = timeline_info(Subject(documents["profile"]))
    assert found is not None
    first = [{label: line.positions[line.labels.index(label)] for label in set(line.labels)} for line in found.lines]
    assert first[0] == first[1] == first[2]


@pytest.mark.parametrize("length", [5, 600, 601, 10_000])
def test_thinning_keeps_ends_order_and_peak(length: int) -> None:
    points = [(x, (x * 7919) % 10_007) for x in range(length)]
    kept = thin(points, MAX_POINTS, key=lambda point: point[1])
    assert len(kept) == min(length, MAX_POINTS)
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert max(kept, key=lambda p: p[1]) == max(points, key=lambda p: p[1])


def test_groups_info_by_equality(documents: Documents) -> None:
    document, trace = documents["profile"], transformer_trace()
    assert groups_info(Subject(document)) == GroupsInfo(
        least=tuple((row["groups"], row["peak_bytes"]) for row in document["front"]),
        floor_bytes=document["floor_bytes"],
        nonprivate_peak_bytes=trace.nonprivate_peak_bytes,
        layer_wise=(28, peak_memory(trace, LAYER_WISE).peak_bytes),
        chosen_groups=7,
    )
    assert groups_info(Subject(documents["search"])) is None


def test_strip_info_by_equality(documents: Documents) -> None:
    found = strip_info(Subject(documents["search"]))
    assert found is not None
    assert found.sites[:3] == ("patch", "position", "blocks.0.norm1")
    assert found.rows == (
        StripRow("all-layer", (0,) * 28),
        StripRow("recommended, 4 groups", (0,) * 14 + (1,) * 8 + (2,) * 3 + (3,) * 3),
        StripRow("layer-wise", tuple(range(28))),
    )


@pytest.mark.parametrize("kind", ["profile", "search", "train"])
def test_parts_sum_to_the_peak(documents: Documents, kind: str) -> None:
    rows = breakdown_info(Subject(documents[kind]))
    assert rows is not None
    assert len(rows) == 3
    for row in rows:
        assert sum(row.part_bytes) == row.peak_bytes


def test_a_recorded_breakdown_wins_over_the_trace(documents: Documents) -> None:
    recorded = {"boundaries": [], "groups": 1, "peak_bytes": 3, "breakdown": {"weights": 1, "book_bytes": 2}}
    rows = breakdown_info(Subject({**documents["profile"], "estimates": [recorded]}))
    assert rows is not None
    assert (rows[0].part_bytes, rows[0].peak_bytes) == ((1, 0, 0, 0, 0, 0, 2, 0), 3)


def test_comparisons_are_signed_and_under_estimates_counted(documents: Documents) -> None:
    row = {"grouping": "all-layer", "boundaries": [], "groups": 1, "peak_bytes": 1000, "step_seconds": 0.5}
    document = {
        "kind": "profile",
        "model": {},
        "estimates": [{**row, "peak_bytes": 990}],
        "simulations": [{**row, "relative_error": -0.01}],
        "measurements": [{**row, "boundaries": [1], "relative_error": 0.02}, {**row, "relative_error": None}],
    }
    rows = comparisons(Subject(document))
    assert rows == (
        ("simulation", "all-layer", 1, 990, 1000, -0.01, 0.5, None, None),
        ("measurement", "all-layer", 1, 1020, 1000, 0.02, 0.5, None, None),
    )
    assert summary_of(rows) == (
        "Errors of the estimate run from -1.00 % to +2.00 %, and 1 of 2 are under-estimates by more than 0.01 %."
    )
    assert [row.within for row in comparisons(Subject(documents["verify"]))] == [True] * 6


def test_curves_are_means_over_seeds_of_the_front_and_the_references() -> None:
    curves = [
        {"boundaries": [1], "seed": 0, "points": [[10, 0.2], [20, 0.4]]},
        {"boundaries": [1], "seed": 1, "points": [[10, 0.4], [20, 0.8], [30, 0.9]]},
        {"boundaries": [2], "seed": 0, "points": [[10, 0.1]]},
    ]
    candidates = [{"boundaries": [1], "on_front": True}, {"boundaries": [2], "on_front": False}]
    document = {"kind": "search", "model": {}, "candidates": candidates, "training": {"curves": curves}}
    found = curves_info(Subject(document))
    assert found is not None
    mean = (pytest.approx(0.3), pytest.approx(0.6))
    assert found.curves == (Curve("2 groups", "", 2, (10, 20), mean, (0.2, 0.4), (0.4, 0.8)),)


def test_a_training_without_metric_shows_its_loss(documents: Documents) -> None:
    document = documents["train"]
    found = curves_info(Subject(document))
    assert found is not None
    assert found.metric_name == "accuracy"
    assert found.curves[0].mean == tuple(point[2] for point in document["curve"])
    losses = {**document, "curve": [[step, loss, None] for step, loss, _ in document["curve"]]}
    found = curves_info(Subject(losses))
    assert found is not None
    assert found.metric_name == "training loss"
    assert found.curves[0].mean == tuple(point[1] for point in document["curve"])
