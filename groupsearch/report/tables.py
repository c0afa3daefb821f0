"""The tables that a page has besides those that documents have themselves: every number worded by ``units``.

Apart from the sections, which put them under headings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from groupsearch.documents.tables import HELD, RESERVED, Table
from groupsearch.plan.trace import Trace
from groupsearch.report.info import BreakdownRow, Comparison, CurvesInfo
from groupsearch.report.subject import PARTS, Against, Row, Subject, groups_word, is_share, metric_of, options_of
from groupsearch.units import (
    format_bytes,
    format_count,
    format_interval,
    format_percent,
    format_seconds,
    format_signed_percent,
)


def comparison_table(rows: Sequence[Comparison]) -> Table:
    """Estimate against what was seen; beside what was allocated on a GPU, what was reserved for it and left over."""
    known = any(row.reserved_bytes for row in rows)
    columns = ("groups", "estimate", "seen", "error", *(RESERVED if known else ()), "step", "verdict")
    cells = (
        (
            row.grouping,
            row.level,
            format_count(row.groups),
            format_bytes(row.estimate_bytes),
            format_bytes(row.seen_bytes),
            format_signed_percent(row.relative_error),
            *(_reserved(row) if known else ()),
            "" if row.step_seconds is None else format_seconds(row.step_seconds),
            _verdict(row),
        )
        for row in rows
    )
    title = "Estimate against what was seen (error = estimate / seen - 1)"
    return Table(title, ("grouping ", "level ", *columns), tuple(cells))


def candidates_table(candidates: Sequence[Row]) -> Table:
    """Every candidate of a search, trained or not, by rising peak."""
    rows = sorted(candidates, key=lambda row: (row["peak_bytes"], row["boundaries"]))
    cells = (
        (
            _boundaries(row["boundaries"]),
            ", ".join(filter(None, (row.get("source", ""), *options_of(row), row.get("variant")))),
            format_count(row["groups"]),
            format_bytes(row["peak_bytes"]),
            *_trained(row),
            "yes" if row.get("on_front") else "",
        )
        for row in rows
    )
    columns = ("boundaries ", "from ", "groups", "peak", "metric", "seeds", "front")
    return Table("All candidates", columns, tuple(cells))


def peaks_table(title: str, rows: Sequence[Row]) -> Table:
    """Groupings with their peaks: the front of a profile, or its estimates, with what a CUDA device holds for them."""
    on_card = any("reserved_bytes" in row for row in rows)
    cells = (
        (
            row.get("grouping") or _boundaries(row["boundaries"]),
            format_count(row["groups"]),
            format_bytes(row["peak_bytes"]),
            *(_held(row) if on_card else ()),
            format_count(row["peak_bytes"]),
            row.get("where", ""),
        )
        for row in rows
    )
    columns = ("grouping ", "groups", "peak", *(HELD if on_card else ()), "bytes", "where")
    return Table(title, columns, tuple(cells))


def breakdown_table(rows: Sequence[BreakdownRow]) -> Table:
    """What is alive at the peak, in bytes; the last column is the sum of the others."""
    cells = ((row.name, row.where, *map(format_count, (*row.part_bytes, row.peak_bytes))) for row in rows)
    return Table("Alive at the peak, in bytes", ("grouping ", "where ", *PARTS, "peak"), tuple(cells))


def sites_table(trace: Trace) -> Table:
    """The sites in order: numbers to name boundaries by."""
    cells = (
        (s.name, s.kind, s.method, *map(format_count, (i, s.positions, s.inputs, s.outputs, s.parameter_count)))
        for i, s in enumerate(trace.sites)
    )
    columns = ("name ", "kind ", "norm ", "site", "positions", "inputs", "outputs", "parameters")
    return Table("Sites, input side first (a boundary b cuts before site b)", columns, tuple(cells))


def curves_table(info: CurvesInfo) -> Table:
    """Where every curve ends."""
    share = is_share(info.metric_name)
    cells = (
        (
            curve.name,
            format_count(curve.seeds),
            format_count(curve.steps[-1]),
            *(format_interval(ends[-1], None, percent=share) for ends in (curve.mean, curve.low, curve.high)),
        )
        for curve in info.curves
        if curve.steps
    )
    columns = ("grouping ", "seeds", "steps", "mean", "least", "largest")
    return Table(f"{info.metric_name} at the last step", columns, tuple(cells))


def differences_table(subject: Subject, rows: Sequence[Against]) -> Table:
    """What the comparisons of the front with the best grouping say."""
    told = [row.get("metric") for row in (subject.document.get("candidates") or [])[:1]]
    share = any(metric is not None and is_share(metric.get("name", "")) for metric in told)
    cells = (
        (
            _name(subject, row["boundaries"], options_of(row)),
            row["verdict"],
            format_count(row["seeds"]),
            format_interval(row["gap"], row["half_width"], percent=share),
        )
        for row in rows
    )
    best = _name(subject, rows[0]["versus"])
    columns = ("grouping ", "verdict ", "seeds", "below it by")
    return Table(f"Against the best mean ({best}), seed by seed", columns, tuple(cells))


def facts_table(title: str, facts: Mapping[str, object]) -> Table:
    """Names and values, nested mappings flattened, in the order of the names."""
    return Table(title, ("name ", "value "), tuple(sorted(_flat(facts))))


def _trained(row: Row) -> tuple[str, str]:
    """A candidate's metric and over how many seeds it is."""
    metric, told = metric_of(row), row.get("metric")
    if metric is None or told is None:
        return "not trained", ""
    return metric.text, format_count(told.get("seeds") or 1)


def _held(row: Row) -> tuple[str, str]:
    sizes = row.get("allocated_bytes"), row.get("reserved_bytes")
    allocated, reserved = ("" if size is None else format_bytes(size) for size in sizes)
    return allocated, reserved


def _reserved(row: Comparison) -> tuple[str, str]:
    if not row.reserved_bytes:
        return "", ""
    return format_bytes(row.reserved_bytes), format_percent(1 - row.seen_bytes / row.reserved_bytes)


def _verdict(row: Comparison) -> str:
    sign = "under-estimate" if row.is_under else ""
    tolerance = {None: "", True: "within", False: "outside"}[row.within]
    return ", ".join(part for part in (tolerance, sign) if part)


def _boundaries(boundaries: Sequence[int]) -> str:
    return ",".join(map(str, boundaries)) or "none (all-layer)"


def _name(subject: Subject, boundaries: Sequence[int], options: Sequence[str] = ()) -> str:
    source = (subject.candidate(boundaries) or {}).get("source", "")
    groups = groups_word(len(boundaries) + 1)
    return ", ".join([groups if source in ("", "search") else f"{source}, {groups}", *options])


def _flat(facts: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            rows.append((f"{prefix}{key}", format_count(value)))
        elif value is not None:
            rows.append((f"{prefix}{key}", str(value)))
    return rows
