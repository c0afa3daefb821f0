"""What fits into a memory, as plain values: the info step of the fit's figure and table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from groupsearch.report.subject import Subject
from groupsearch.units import format_bytes, format_percent

ROLES = {"all-layer": "all-layer", "best": "recommended", "layer-wise": "layer-wise"}


class FitRow(NamedTuple):
    """The largest size of one grouping: ``measured`` are the sizes at which its step was run."""

    name: str
    role: str
    groups: int | None
    size: int
    limited_by: str
    expected_batch_size: int | None
    peak_bytes: int | None
    next_peak_bytes: int | None
    reserved_bytes: int | None
    rate: float | None
    rate_source: str
    measured: tuple[int, ...]


class FitInfo(NamedTuple):
    """What fits, non-private training first, and what was enlarged: the batch or the length of a sequence."""

    what: str
    memory_bytes: int
    held_back: str
    rows: tuple[FitRow, ...]


def fit_info(subject: Subject) -> FitInfo | None:
    """The rows of a fit; None where the document tells none."""
    fit = subject.document.get("fit") or {}
    if not fit.get("rows"):
        return None
    batch = fit["varies"] == "batch_size"
    rows = tuple(_fit_row(row, batch) for row in fit["rows"])
    held_back = (
        fit.get("held_back") or f"{format_bytes(fit['memory_bytes'])}, {format_percent(fit['margin'])} held back"
    )
    return FitInfo("batch" if batch else "sequence", fit["memory_bytes"], held_back, rows)


def _fit_row(row: Mapping[str, Any], batch: bool) -> FitRow:
    rate, name = row.get("examples_per_second") or {}, str(row["grouping"])
    timed = sorted({int(timing["batch_size"]) for timing in row.get("timings") or ()})
    return FitRow(
        name,
        ROLES.get(name, ""),
        row["groups"],
        row["size"],
        row["limited_by"],
        row["expected_batch_size"],
        row["peak_bytes"],
        row["next_peak_bytes"],
        row.get("reserved_bytes"),
        rate.get("value"),
        str(rate.get("source", "")),
        tuple(timed) if batch else (),
    )
