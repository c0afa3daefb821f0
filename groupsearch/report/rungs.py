"""How a search came to its front and what may be said of it: rungs of evidence, differences, the price in privacy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from groupsearch.report.subject import Subject, groups_word, is_share
from groupsearch.report.tables import table
from groupsearch.units import format_count, format_interval, format_number, format_seconds

RUNG_WORDS = {
    "proxy": "proxy",
    "short": "short runs",
    "full": "full runs",
    "exploration": "full runs",
    "replication": "further seeds",
}


def differences(subject: Subject) -> str | None:
    """What the comparisons of the front with the best grouping say, as HTML; None where there are none."""
    rows: Sequence[Mapping[str, Any]] = subject.document.get("comparisons") or []
    if not rows:
        return None
    share = is_share(_metric_name(subject))
    best = _name(subject, rows[0]["versus"])
    body = table(
        f"Against the best mean ({best}), seed by seed",
        ("grouping", "verdict", "seeds", "below it by"),
        [
            (
                _name(subject, row["boundaries"], row),
                str(row["verdict"]),
                format_count(row["seeds"]),
                format_interval(row["gap"], row["half_width"], percent=share),
            )
            for row in rows
        ],
        words=2,
    )
    lede = (
        "Groupings are trained with the same seeds, so that they differ in nothing else; the seed by which one came to "
        "be on the front is left out."
    )
    return f"{_paragraph(str(subject.document.get('answer', '')))}\n{body}\n{_paragraph(lede)}"


def evidence(subject: Subject) -> str | None:
    """What every rung of the search cost and whether it foretold the next one, as HTML; None of a search without."""
    cost = subject.document.get("cost") or {}
    rungs: Sequence[Mapping[str, Any]] = cost.get("rungs") or []
    if not rungs:
        return None
    correlations: Sequence[Mapping[str, Any]] = subject.document.get("correlations") or []
    body = table(
        "What each rung of evidence cost",
        ("rung", "predicts", "runs", "time", "steps", "full trainings"),
        [
            (
                RUNG_WORDS.get(str(rung["name"]), str(rung["name"])),
                _foretold(str(rung["name"]), correlations),
                format_count(rung["runs"]) if rung["runs"] else "",
                format_seconds(float(rung["seconds"])),
                format_count(rung["steps"]),
                format_number(float(rung["full_trainings"])),
            )
            for rung in rungs
        ],
        words=2,
    )
    lede = (
        "Cheap evidence first: each rung is an order dearer than the one before it and judges fewer groupings. Whether "
        "one foretells the next is measured by the rank correlation, with its 95 % interval."
    )
    return "\n".join([_paragraph(lede), body, *map(_paragraph, _statements(correlations))])


def selection(subject: Subject) -> str | None:
    """What choosing has cost in privacy, in a sentence; None where the document says nothing of it."""
    found = (subject.document.get("cost") or {}).get("selection") or {}
    return found.get("statement")


def _foretold(name: str, correlations: Iterable[Mapping[str, Any]]) -> str:
    """The rank correlations with the rungs above, each as it was measured first: before anything was chosen by it."""
    first: dict[str, Mapping[str, Any]] = {}
    for row in correlations:
        if row["lower"] == name:
            first.setdefault(str(row["upper"]), row)
    return "; ".join(f"{RUNG_WORDS[upper]} {_correlation(row)}" for upper, row in first.items())


def _correlation(row: Mapping[str, Any]) -> str:
    value, low, high = (format_number(float(row[key]), 2) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _statements(correlations: Iterable[Mapping[str, Any]]) -> list[str]:
    return [str(row["statement"]) for row in correlations]


def _name(subject: Subject, boundaries: Sequence[int], choice: Mapping[str, Any] | None = None) -> str:
    row = subject.candidate(boundaries) or {}
    groups = groups_word(len(boundaries) + 1)
    source = str(row.get("source", ""))
    options = [str(choice[key]) for key in ("rule", "allocation") if choice and choice.get(key)]
    return ", ".join([groups if source in ("", "search") else f"{source}, {groups}", *options])


def _metric_name(subject: Subject) -> str:
    rows = subject.document.get("candidates") or [{}]
    return str((rows[0].get("metric") or {}).get("name", ""))


def _paragraph(text: str) -> str:
    return f'<p class="lede">{escape(text)}</p>'
