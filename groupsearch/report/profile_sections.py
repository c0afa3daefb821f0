"""Sections of a profile that also tells what fits into a memory, or which norm methods were chosen for it."""

from __future__ import annotations

from html import escape

from groupsearch.report import memory_figures, tables
from groupsearch.report.fits import FitInfo, FitRow, fit_info
from groupsearch.report.section import Section, plot
from groupsearch.report.subject import Subject
from groupsearch.units import format_bytes, format_count, format_number, format_ratio

LIMITED = {"memory": "", "limit": " or more", "model": ", all the model takes"}


def fit_section(subject: Subject) -> Section | None:
    """What fits, as a figure and a table."""
    info = fit_info(subject)
    if info is None:
        return None
    fit = subject.document["fit"]
    grown = "batch" if info.what == "batch" else "longest sequence"
    lede = (
        f"The largest {info.what} whose step stays within {info.held_back}. A hollow bar is predicted: its step was "
        "traced, not run. Diamonds mark what was run."
    )
    caption = f"Largest {grown}: {'; '.join(f'{row.name} {format_count(row.size)}' for row in info.rows)}."
    body = plot("fit", memory_figures.draw_fit(info), lede, caption) + "\n" + fit_table(info)
    notes = [fit["poisson"]["rule"], _about_the_start(subject)]
    body += "".join(f'\n<p class="lede">{escape(note)}</p>' for note in notes if note)
    return Section(f"What fits into {format_bytes(info.memory_bytes)}", body)


def fit_table(info: FitInfo) -> str:
    """The numbers behind the figure."""
    reference = info.rows[0].size
    rated = any(row.rate is not None for row in info.rows)
    held = any(row.reserved_bytes is not None for row in info.rows)
    columns = ["grouping", "groups", info.what, "of non-private", "expected", "peak", "with one more"]
    columns += ["to hold"] if held else []
    return tables.table(
        f"Largest {info.what} of every grouping" + ("; examples per second, measured or predicted" if rated else ""),
        (*columns, *(("per second",) if rated else ())),
        [
            (
                row.name,
                "" if row.groups is None else format_count(row.groups),
                f"{format_count(row.size)}{LIMITED[row.limited_by]}",
                format_ratio(row.size / reference) if reference else "",
                "" if row.expected_batch_size is None else format_count(row.expected_batch_size),
                *("" if size is None else format_bytes(size) for size in (row.peak_bytes, row.next_peak_bytes)),
                *(("" if row.reserved_bytes is None else format_bytes(row.reserved_bytes),) if held else ()),
                *((_rate(row),) if rated else ()),
            )
            for row in info.rows
        ],
    )


def joint_section(subject: Subject) -> Section | None:
    """What one norm method for all weights needs, against the methods that were chosen together with the grouping."""
    joint = subject.document.get("joint")
    if not joint:
        return None
    lede = (
        "A per-example norm can be had from products of inputs and gradients (ghost), from the per-example gradients "
        "kept until their group closes (instantiate), or formed twice (recompute). Which is cheapest depends on the "
        "layer and on the grouping; here every weight has its own. Operations are multiply-accumulates of norms and "
        "clipped sums in one step."
    )
    rows = [
        (
            row["norm_method"],
            format_bytes(row["all_layer_bytes"]),
            format_bytes(row["floor_bytes"]),
            format_number(row["operations"]),
            format_ratio(row["operations"] / joint["operations"]) if joint["operations"] else "",
        )
        for row in joint["compared"]
    ]
    columns = ("norm method", "all-layer peak", "least peak of any grouping", "operations", "of joint")
    chosen = "; ".join(f"{method}: {format_count(count)} weights" for method, count in joint["weights"].items())
    table = tables.table("Peaks and operations by norm method", columns, rows)
    return Section("How norms are taken", f'<p class="lede">{lede}</p>\n{table}\n<p class="lede">{escape(chosen)}.</p>')


def _rate(row: FitRow) -> str:
    if row.rate is None:
        return ""
    return f"{format_count(round(row.rate)) if row.rate >= 100 else format_number(row.rate)} {row.rate_source}"


def _about_the_start(subject: Subject) -> str:
    summary = str(subject.document.get("summary") or "").strip()
    return f"At batch {subject.document['model']['batch_size']}, where the search began: {summary}" if summary else ""
