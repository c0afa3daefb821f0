"""The numbers behind the figures as HTML tables: every string escaped, every number worded by ``units``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from groupsearch.report.comparisons import Comparison
from groupsearch.report.curves import CurvesInfo
from groupsearch.report.info import BreakdownRow
from groupsearch.report.subject import PARTS, Subject, is_share, metric_of, options_of
from groupsearch.units import (
    format_bytes,
    format_count,
    format_interval,
    format_number,
    format_percent,
    format_seconds,
    format_signed_percent,
)

RESERVED = ("reserved", "fragmented")
HELD = {"allocated_bytes": "to allocate", "reserved_bytes": "to hold"}
COST_WORDS = {
    "whole": "epsilon of the whole",
    "epsilon": "epsilon of each run",
    "seconds": "wall-clock time",
    "trials": "groupings tried",
    "trained": "training runs",
    "steps": "training steps",
    "full_trainings": "equivalent full trainings",
}


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table whose first ``words`` columns are text and whose others are numbers; cells are escaped here."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td{'' if k < words else ' class=number'}>{escape(cell)}</td>" for k, cell in enumerate(row))
        + "</tr>\n"
        for row in rows
    )
    label = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption>{label}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def comparison_table(rows: Sequence[Comparison]) -> str:
    """Estimate against what was seen; beside what was allocated on a GPU, what was reserved for it and left over."""
    known = any(row.reserved_bytes for row in rows)
    return table(
        "Estimate against what was seen (error = estimate / seen - 1)",
        ("grouping", "level", "groups", "estimate", "seen", "error", *(RESERVED if known else ()), "step", "verdict"),
        [
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
        ],
        words=2,
    )


def candidates_table(subject: Subject) -> str:
    """Every candidate of a search, trained or not, by rising peak."""
    rows = sorted(subject.document["candidates"], key=lambda row: (row["peak_bytes"], row["boundaries"]))
    return table(
        "All candidates",
        ("boundaries", "from", "groups", "peak", "metric", "seeds", "front"),
        [
            (
                _boundaries(row["boundaries"]),
                ", ".join(filter(None, (str(row.get("source", "")), *options_of(row), row.get("variant")))),
                format_count(row["groups"]),
                format_bytes(row["peak_bytes"]),
                found.text if (found := metric_of(row)) else "not trained",
                format_count(row["metric"].get("seeds") or 1) if found else "",
                "yes" if row.get("on_front") else "",
            )
            for row in rows
        ],
        words=2,
    )


def peaks_table(caption: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Groupings with their peaks: the front of a profile, or its estimates, with what a CUDA device holds for them."""
    rows = list(rows)
    held = [part for part in HELD if any(part in row for row in rows)]
    return table(
        caption,
        ("grouping", "groups", "peak", *(HELD[part] for part in held), "bytes", "where"),
        [
            (
                str(row.get("grouping") or _boundaries(row["boundaries"])),
                format_count(row["groups"]),
                format_bytes(row["peak_bytes"]),
                *(format_bytes(row[part]) if part in row else "" for part in held),
                format_count(row["peak_bytes"]),
                str(row.get("where", "")),
            )
            for row in rows
        ],
    )


def breakdown_table(rows: Sequence[BreakdownRow]) -> str:
    """What is alive at the peak, in bytes; the last column is the sum of the others."""
    return table(
        "Alive at the peak, in bytes",
        ("grouping", "where", *PARTS, "peak"),
        [(row.name, row.where, *map(format_count, (*row.part_bytes, row.peak_bytes))) for row in rows],
        words=2,
    )


def sites_table(subject: Subject) -> str:
    """The sites in order: numbers to name boundaries by."""
    assert subject.trace is not None
    return table(
        "Sites, input side first (a boundary b cuts before site b)",
        ("name", "kind", "norm", "site", "positions", "inputs", "outputs", "parameters"),
        [
            (s.name, s.kind, s.method, *map(format_count, (i, s.positions, s.inputs, s.outputs, s.parameter_count)))
            for i, s in enumerate(subject.trace.sites)
        ],
        words=3,
    )


def curves_table(info: CurvesInfo) -> str:
    """Where every curve ends."""
    share = is_share(info.metric_name)
    return table(
        f"{info.metric_name} at the last step",
        ("grouping", "seeds", "steps", "mean", "least", "largest"),
        [
            (
                curve.name,
                format_count(curve.seeds),
                format_count(curve.steps[-1]),
                *(format_interval(ends[-1], None, percent=share) for ends in (curve.mean, curve.low, curve.high)),
            )
            for curve in info.curves
            if curve.steps
        ],
    )


def cost_list(cost: Mapping[str, Any]) -> str:
    """What a search spent, as labelled numbers."""
    known = [(word, _cost_text(key, cost[key])) for key, word in COST_WORDS.items() if cost.get(key) is not None]
    return '<dl class="facts">' + "".join(f"<div><dt>{w}</dt><dd>{escape(t)}</dd></div>" for w, t in known) + "</dl>"


def facts_table(caption: str, facts: Mapping[str, Any]) -> str:
    """Names and values, nested mappings flattened, in the order of the names."""
    return table(caption, ("name", "value"), sorted(_flat(facts)), words=2)


def _reserved(row: Comparison) -> tuple[str, str]:
    if not row.reserved_bytes:
        return "", ""
    return format_bytes(row.reserved_bytes), format_percent(1 - row.seen_bytes / row.reserved_bytes)


def _verdict(row: Comparison) -> str:
    sign = "under-estimate" if row.is_under else ""
    tolerance = {None: "", True: "within", False: "outside"}[row.within]
    return ", ".join(part for part in (tolerance, sign) if part)


def _cost_text(key: str, value: Any) -> str:
    if key == "seconds":
        return format_seconds(float(value))
    return format_count(value) if isinstance(value, int) else format_number(float(value))


def _boundaries(boundaries: Sequence[int]) -> str:
    return ",".join(map(str, boundaries)) or "none (all-layer)"


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            rows.append((f"{prefix}{key}", format_count(value)))
        elif value is not None:
            rows.append((f"{prefix}{key}", str(value)))
    return rows
