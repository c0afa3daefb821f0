"""How training went, as plain values: the info step of the curves' figure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from groupsearch.report.subject import Shown, Subject, groups_word, metric_of, options_of

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
        points = [(int(step), float(value)) for step, value in curve["points"] if value is not None]
        runs[_choice(curve)].append(points)
    shown = {_choice(curve): entry for curve in recorded if (entry := subject.shown_as(curve)) is not None}
    front = {_choice(row) for row in subject.document.get("candidates") or [] if row.get("on_front")}
    curves = [
        _mean_curve(runs[choice], shown.get(choice) or _unnamed(choice))
        for choice in sorted(runs, key=lambda choice: (len(choice[0]), choice))
        if choice in front or choice in shown
    ]
    metric = subject.metric(subject.chosen)
    return CurvesInfo(metric.name if metric else "metric", tuple(curves)) if curves else None


def _choice(row: Mapping[str, Any]) -> _Choice:
    return tuple(row["boundaries"]), options_of(row)


def _unnamed(choice: _Choice) -> Shown:
    boundaries, options = choice
    return Shown(", ".join((groups_word(len(boundaries) + 1), *options)), "", boundaries)


def _training_curve(subject: Subject) -> CurvesInfo:
    metric = metric_of(subject.document)
    column = 2 if all(len(point) > 2 and point[2] is not None for point in subject.document["curve"]) else 1
    points = [(int(p[0]), float(p[column])) for p in subject.document["curve"] if p[column] is not None]
    name = "training loss" if column == 1 else metric.name if metric else "metric"
    boundaries = tuple(subject.document.get("boundaries") or ())
    shown = next((entry for entry in subject.shown if entry.boundaries == boundaries), None)
    entry = shown or Shown(str(subject.document.get("grouping", "this training")), "recommended", boundaries)
    return CurvesInfo(name, (_mean_curve([points], entry),))


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
