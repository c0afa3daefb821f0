"""The first of a figure's two steps: what it shows, as plain values. Nothing here draws.

Every ``*_info`` function returns None when the document lacks what its figure needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from groupsearch.memory import timeline
from groupsearch.report.subject import PARTS, Metric, Shown, Subject, groups_word, metric_of

MAX_POINTS = 600
FORWARD_SHARE, UPDATE_SHARE = 0.15, 0.07


class FrontPoint(NamedTuple):
    """One trained candidate: ``role`` is the reference style it stands for, or empty."""

    name: str
    role: str
    groups: int
    peak_bytes: int
    metric: Metric
    seeds: int
    on_front: bool


class FrontInfo(NamedTuple):
    """Metric against peak: candidates by rising peak, and the label of the metric."""

    metric_name: str
    points: tuple[FrontPoint, ...]


class TimelineLine(NamedTuple):
    """Live bytes of one grouping; ``positions`` count backward sites: 0 backward begins, L it ends."""

    name: str
    role: str
    positions: tuple[float, ...]
    live_bytes: tuple[int, ...]
    labels: tuple[str, ...]


class TimelineInfo(NamedTuple):
    """Memory over one step of the shown groupings, against the peak of the same step without privacy."""

    lines: tuple[TimelineLine, ...]
    nonprivate_peak_bytes: int | None
    length: int


class GroupsInfo(NamedTuple):
    """Least peak with M groups, (M, bytes) by rising M, with the lines it is read against."""

    least: tuple[tuple[int, int], ...]
    floor_bytes: int | None
    nonprivate_peak_bytes: int | None
    layer_wise: tuple[int, int] | None
    chosen_groups: int | None


class StripRow(NamedTuple):
    """Which group each site is in, site 0 first."""

    name: str
    group_of: tuple[int, ...]


class StripInfo(NamedTuple):
    """Rows of sites by group."""

    sites: tuple[str, ...]
    rows: tuple[StripRow, ...]


class BreakdownRow(NamedTuple):
    """What is alive at one grouping's peak: bytes in the order of ``PARTS``."""

    name: str
    where: str
    part_bytes: tuple[int, ...]
    peak_bytes: int


def front_info(subject: Subject) -> FrontInfo | None:
    """Every candidate that was trained and did not diverge."""
    rows = [row for row in subject.document.get("candidates") or [] if metric_of(row)]
    points = [_front_point(row, subject.shown_as(row)) for row in rows]
    if not points:
        return None
    points.sort(key=lambda point: (point.peak_bytes, point.metric.mean, point.groups))
    return FrontInfo(points[0].metric.name, tuple(points))


def timeline_info(subject: Subject) -> TimelineInfo | None:
    """The shown groupings' steps, thinned to ``MAX_POINTS`` points each without losing the peak."""
    trace = subject.trace
    if trace is None:
        return None
    names = [site.name for site in trace.sites]
    lines = []
    for entry in subject.shown:
        step = timeline(trace, entry.boundaries)
        points = list(zip(_positions([site for site, _ in step], trace.length), step, strict=True))
        kept = thin(points, MAX_POINTS, key=lambda point: point[1][1])
        lines.append(
            TimelineLine(
                entry.name,
                entry.role,
                tuple(x for x, _ in kept),
                tuple(live for _, (_, live) in kept),
                tuple(names[s] if s >= 0 else "forward and loss" if x < 0 else "update" for x, (s, _) in kept),
            )
        )
    return TimelineInfo(tuple(lines), subject.nonprivate_peak_bytes, trace.length)


def groups_info(subject: Subject) -> GroupsInfo | None:
    """The exact front of number of groups against peak that a profile carries."""
    front = subject.document.get("front")
    if not front:
        return None
    wise = next((entry for entry in subject.shown if entry.role == "layer-wise"), None)
    peak = subject.peak(wise.boundaries) if wise else None
    return GroupsInfo(
        tuple(sorted((row["groups"], row["peak_bytes"]) for row in front)),
        subject.document.get("floor_bytes"),
        subject.nonprivate_peak_bytes,
        (wise.groups, peak.peak_bytes) if wise and peak else None,
        None if subject.chosen is None else len(subject.chosen) + 1,
    )


def strip_info(subject: Subject) -> StripInfo | None:
    """The shown groupings as rows of coloured sites."""
    if subject.trace is None:
        return None
    length = subject.trace.length
    rows = [
        StripRow(entry.name, tuple(sum(cut <= site for cut in entry.boundaries) for site in range(length)))
        for entry in subject.shown
    ]
    return StripInfo(tuple(site.name for site in subject.trace.sites), tuple(rows))


def breakdown_info(subject: Subject) -> tuple[BreakdownRow, ...] | None:
    """What is alive at the peak of every shown grouping; each row's parts sum to its peak."""
    found = [(entry, subject.peak(entry.boundaries)) for entry in subject.shown]
    rows = [
        BreakdownRow(entry.name, peak.where, tuple(peak.parts[part] for part in PARTS), peak.peak_bytes)
        for entry, peak in found
        if peak is not None
    ]
    return tuple(rows) or None


def front_line(points: Iterable[FrontPoint]) -> tuple[FrontPoint, ...]:
    """The points on the front, by rising peak."""
    return tuple(point for point in points if point.on_front)


def thin(points: Sequence[Any], limit: int, key: Any) -> list[Any]:
    """At most ``limit`` points, in order: the ends, and between them the largest of each stretch.

    The largest point of all is always kept, so a thinned timeline has the peak of the full one.
    """
    if len(points) <= limit:
        return list(points)
    edges = [1 + round(i * (len(points) - 2) / (limit - 2)) for i in range(limit - 1)]
    return [points[0], *(max(points[a:b], key=key) for a, b in pairwise(edges)), points[-1]]


def _front_point(row: Mapping[str, Any], shown: Shown | None) -> FrontPoint:
    metric = metric_of(row)
    assert metric is not None
    name = shown.name if shown else groups_word(row["groups"])
    seeds = int(row["metric"].get("seeds") or 1)
    role = shown.role if shown else ""
    return FrontPoint(name, role, row["groups"], row["peak_bytes"], metric, seeds, bool(row.get("on_front")))


def _positions(sites: Sequence[int], length: int) -> list[float]:
    """Where on the step's axis each moment lies: forward below 0, site s in [L-1-s, L-s), the update from L on."""
    positions: list[float] = []
    for site, run in groupby(sites):
        count = len(list(run))
        if site >= 0:
            start, width = float(length - 1 - site), 1.0
        elif not positions:
            start, width = -FORWARD_SHARE * length, FORWARD_SHARE * length
        else:
            start, width = float(length), UPDATE_SHARE * length
        positions += [start + width * i / count for i in range(count)]
    return positions
