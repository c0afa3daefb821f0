"""The first of a figure's two steps: what it shows, as plain values. Nothing here draws.

Every ``*_info`` function returns None when the document lacks what its figure needs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple, TypeVar

from groupsearch.documents.rows import FitRow
from groupsearch.plan.memory import timeline
from groupsearch.report.subject import PARTS, Metric, Row, Shown, Subject, groups_word, metric_of, options_of
from groupsearch.units import format_count, format_percent, format_signed_percent

T = TypeVar("T")
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


def thin(points: Sequence[T], limit: int, key: Callable[[T], float]) -> list[T]:
    """At most ``limit`` points, in order: the ends, and between them the largest of each stretch.

    The largest point of all is always kept, so a thinned timeline has the peak of the full one.
    """
    if len(points) <= limit:
        return list(points)
    edges = [1 + round(i * (len(points) - 2) / (limit - 2)) for i in range(limit - 1)]
    return [points[0], *(max(points[a:b], key=key) for a, b in pairwise(edges)), points[-1]]


def _front_point(row: Row, shown: Shown | None) -> FrontPoint:
    metric, told = metric_of(row), row.get("metric")
    assert metric is not None
    assert told is not None
    name = shown.name if shown else groups_word(row["groups"])
    seeds = int(told.get("seeds") or 1)
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


_Choice = tuple[tuple[int, ...], tuple[str, ...]]  # boundaries, and what else was chosen


class Curve(NamedTuple):
    """A metric over the steps of training: mean, least and largest over the seeds."""

    name: str
    role: str
    seeds: int
    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


class CurvesInfo(NamedTuple):
    """The curves of the candidates on the front and of the reference styles."""

    metric_name: str
    curves: tuple[Curve, ...]


def curves_info(subject: Subject) -> CurvesInfo | None:
    """How training went: of a search its front and references, of a training its one curve."""
    if subject.document.get("curve"):
        return _training_curve(subject)
    recorded = (subject.document.get("training") or {}).get("curves") or []
    runs: dict[_Choice, list[list[tuple[int, float]]]] = defaultdict(list)
    for curve in recorded:
        runs[_choice(curve)].append(_points(curve["points"], 1))
    shown = {_choice(curve): entry for curve in recorded if (entry := subject.shown_as(curve)) is not None}
    front = {_choice(row) for row in subject.document.get("candidates") or [] if row.get("on_front")}
    curves = [
        _mean_curve(runs[choice], shown.get(choice) or _unnamed(choice))
        for choice in sorted(runs, key=lambda choice: (len(choice[0]), choice))
        if choice in front or choice in shown
    ]
    metric = subject.metric(subject.chosen)
    return CurvesInfo(metric.name if metric else "metric", tuple(curves)) if curves else None


def _choice(row: Row) -> _Choice:
    return tuple(row["boundaries"]), options_of(row)


def _unnamed(choice: _Choice) -> Shown:
    boundaries, options = choice
    return Shown(", ".join((groups_word(len(boundaries) + 1), *options)), "", boundaries)


def _training_curve(subject: Subject) -> CurvesInfo:
    metric = metric_of(subject.document)
    column = 2 if all(len(point) > 2 and point[2] is not None for point in subject.document["curve"]) else 1
    points = _points(subject.document["curve"], column)
    name = "training loss" if column == 1 else metric.name if metric else "metric"
    boundaries = tuple(subject.document.get("boundaries") or ())
    shown = next((entry for entry in subject.shown if entry.boundaries == boundaries), None)
    entry = shown or Shown(str(subject.document.get("grouping", "this training")), "recommended", boundaries)
    return CurvesInfo(name, (_mean_curve([points], entry),))


def _points(points: Iterable[Sequence[float | None]], column: int) -> list[tuple[int, float]]:
    """Steps and the values in a column, as far as there are any."""
    found = [(point[0], point[column]) for point in points]
    return [(int(step), float(value)) for step, value in found if step is not None and value is not None]


def _mean_curve(runs: Sequence[Sequence[tuple[int, float]]], shown: Shown) -> Curve:
    values: dict[int, list[float]] = defaultdict(list)
    for step, value in (point for run in runs for point in run):
        values[step].append(value)
    steps = tuple(sorted(step for step in values if len(values[step]) == len(runs)))  # where every seed was measured
    return Curve(
        shown.name,
        shown.role,
        len(runs),
        steps,
        tuple(math.fsum(values[step]) / len(runs) for step in steps),
        tuple(min(values[step]) for step in steps),
        tuple(max(values[step]) for step in steps),
    )


ROLES = {"all-layer": "all-layer", "best": "recommended", "layer-wise": "layer-wise"}


class FitBar(NamedTuple):
    """The largest size of one grouping: ``measured`` are the sizes at which its step was run."""

    name: str
    role: str
    size: int
    measured: tuple[int, ...]


class FitInfo(NamedTuple):
    """What fits, non-private training first, and what was enlarged: the batch or the length of a sequence."""

    what: str
    memory_bytes: int
    rows: tuple[FitBar, ...]


def fit_info(subject: Subject) -> FitInfo | None:
    """The rows of a fit; None where the document tells none."""
    fit = subject.fit
    if fit is None:
        return None
    batch = fit.varies == "batch_size"
    bars = tuple(_fit_bar(row, batch) for row in fit.rows)
    return FitInfo("batch" if batch else "sequence", fit.memory_bytes, bars)


def _fit_bar(row: FitRow, batch: bool) -> FitBar:
    timed = sorted({timing.batch_size for timing in row.timings or ()})
    return FitBar(row.grouping, ROLES.get(row.grouping, ""), row.size, tuple(timed) if batch else ())


NEGLIGIBLE = 1e-4


class Comparison(NamedTuple):
    """One grouping's estimate against what was seen; ``relative_error`` = estimate / seen - 1.

    ``reserved_bytes`` is what a GPU's caching allocator had reserved; None elsewhere.
    """

    level: str
    grouping: str
    groups: int
    estimate_bytes: int
    seen_bytes: int
    relative_error: float
    step_seconds: float | None
    within: bool | None
    reserved_bytes: int | None = None

    @property
    def is_under(self) -> bool:
        """Whether more was needed than was predicted, by more than a few bytes per example."""
        return self.relative_error < -NEGLIGIBLE


def comparisons(subject: Subject) -> tuple[Comparison, ...]:
    """Every simulation, measurement and verification in the document, in that order."""
    document = subject.document
    measured = [*(document.get("measurements") or []), *(document.get("rows") or [])]
    rows = [("simulation", row) for row in document.get("simulations") or []]
    rows += [("measurement", row) for row in measured]
    found = [(level, row, row.get("relative_error")) for level, row in rows]
    return tuple(_comparison(level, row, error, subject) for level, row, error in found if error is not None)


def summary_of(rows: Sequence[Comparison]) -> str:
    """The worst errors and the count of under-estimates in one sentence."""
    low, high = min(row.relative_error for row in rows), max(row.relative_error for row in rows)
    under = sum(row.is_under for row in rows)
    judged = [row.within for row in rows if row.within is not None]
    inside = f"{sum(judged)} of {len(judged)} are within their tolerance; " if judged else ""
    return (
        f"{inside}errors of the estimate run from {format_signed_percent(low)} to {format_signed_percent(high)}, "
        f"and {format_count(under)} of {format_count(len(rows))} are under-estimates by more than "
        f"{format_percent(NEGLIGIBLE, 2)}."
    ).capitalize()


def _comparison(default_level: str, row: Row, error: float, subject: Subject) -> Comparison:
    seen = int(row["peak_bytes"])
    recorded = [e for e in subject.document.get("estimates") or [] if e["boundaries"] == row["boundaries"]]
    estimate = row.get("estimate_bytes") or (recorded[0]["peak_bytes"] if recorded else round(seen * (1 + error)))
    name = str(row.get("grouping") or ",".join(map(str, row["boundaries"])) or "all-layer")
    level, groups = str(row.get("level", default_level)), int(row["groups"])
    seconds, reserved = row.get("step_seconds"), row.get("reserved_bytes")
    return Comparison(level, name, groups, int(estimate), seen, error, seconds, row.get("within"), reserved)
