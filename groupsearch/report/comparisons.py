"""Estimate against simulation and measurement: signed errors, and under-estimates counted apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from groupsearch.report.subject import Subject
from groupsearch.units import format_count, format_percent, format_signed_percent

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
    parts = (("simulations", "simulation"), ("measurements", "measurement"), ("rows", "measurement"))
    rows = [(level, row) for part, level in parts for row in subject.document.get(part) or []]
    return tuple(_comparison(level, row, subject) for level, row in rows if row.get("relative_error") is not None)


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


def _comparison(default_level: str, row: Mapping[str, Any], subject: Subject) -> Comparison:
    seen, error = int(row["peak_bytes"]), float(row["relative_error"])
    recorded = [e for e in subject.document.get("estimates") or [] if e["boundaries"] == row["boundaries"]]
    estimate = row.get("estimate_bytes") or (recorded[0]["peak_bytes"] if recorded else round(seen * (1 + error)))
    name = str(row.get("grouping") or ",".join(map(str, row["boundaries"])) or "all-layer")
    level, groups = str(row.get("level", default_level)), int(row["groups"])
    seconds, reserved = row.get("step_seconds"), row.get("reserved_bytes")
    return Comparison(level, name, groups, int(estimate), seen, error, seconds, row.get("within"), reserved)
