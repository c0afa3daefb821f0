"""One self-contained HTML page from one document: works offline, the same bytes for the same document."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from plotly.offline import get_plotlyjs

from groupsearch.errors import DocumentError
from groupsearch.privacy import not_private_sentence
from groupsearch.report import curves, info, memory_figures, rungs, tables, training_figures, words
from groupsearch.report.comparisons import comparisons, summary_of
from groupsearch.report.profile_sections import fit_section, joint_section
from groupsearch.report.section import Section, plot, unbroken
from groupsearch.report.style import CSS, SCRIPT
from groupsearch.report.subject import PARTS, Subject, groups_word
from groupsearch.units import format_bytes, format_count, format_number

TITLES = {
    "search": "search report",
    "profile": "memory profile",
    "fit": "what fits",
    "verify": "verification",
    "train": "training report",
}


def render_page(document: Mapping[str, Any]) -> str:
    """The page of a profile, search, verify or train document.

    Everything it needs is inside, plotly once; nothing is loaded from elsewhere. Text from the
    document is escaped. Parts that the document lacks leave their section out. The result
    depends on the document alone.

    Raises:
        DocumentError: when a part of the document is garbled.
    """
    subject = Subject(document)
    try:
        sections = [section for make in _SECTIONS if (section := make(subject)) is not None]
        return _page(subject, sections)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DocumentError(
            f"Expected a complete groupsearch document, found one that lacks or garbles {error!r}. "
            f"Write it again with the command that made it."
        ) from error


def _page(subject: Subject, sections: list[Section]) -> str:
    model = subject.document["model"]
    batch = model.get("batch_size")
    eyebrow = f"groupsearch {TITLES[subject.topic]} · {subject.model_name}" + (f" · batch {batch}" if batch else "")
    keys = "".join(
        f'<div><dt>{escape(key.label)}</dt><dd class="value">{unbroken(escape(key.value))}</dd>'
        f'<dd class="note">{escape(key.note)}</dd></div>'
        for key in words.key_figures(subject)
    )
    drawn = any('class="plot"' in section.body for section in sections)
    scripts = f"<script>{get_plotlyjs()}</script>\n<script>{SCRIPT}</script>" if drawn else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(eyebrow)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n'
        f'<main>\n<header>\n<p class="eyebrow">{escape(eyebrow)}</p>\n'
        f"<h1>{unbroken(escape(words.headline(subject)))}</h1>\n"
        + (f'<dl class="keys">{keys}</dl>\n' if keys else "")
        + f'<p class="lede">{words.EXPLAINER} {words.PURPOSE[subject.topic]}</p>\n'
        f"{_randomness(subject)}{_not_measured(subject)}</header>\n"
        + "".join(f"<section>\n<h2>{escape(s.title)}</h2>\n{s.body}\n</section>\n" for s in sections)
        + f"<footer>Made by groupsearch from a {escape(subject.kind)} document, schema "
        f"{escape(str(subject.document['schema_version']))}. The page needs no network.</footer>\n</main>\n"
        f"{scripts}\n</body>\n</html>\n"
    )


def _randomness(subject: Subject) -> str:
    """At the top, as it says what every epsilon of the page is worth."""
    if subject.kind not in ("search", "train"):
        return ""
    return f'<p class="lede"><strong>{escape(words.randomness(subject.document))}</strong></p>\n'


def _not_measured(subject: Subject) -> str:
    """At the top, of numbers for a card that was not there."""
    said = subject.document.get("not_measured")
    return f'<p class="lede"><strong>{escape(str(said))}</strong></p>\n' if said else ""


def _front(subject: Subject) -> Section | None:
    found = info.front_info(subject)
    if found is None:
        return None
    lede = (
        f"Each point is one way to cut the model, trained with the same privacy. Up is better {found.metric_name}, "
        f"left is less memory. Along the line, the front, more {found.metric_name} is only to be had for more memory."
    )
    styles = "; ".join(f"{p.name} {p.metric.text} at {format_bytes(p.peak_bytes)}" for p in found.points if p.role)
    caption = (
        f"{format_count(len(found.points))} trained groupings, {format_count(len(info.front_line(found.points)))} "
        f"on the front: {styles}. Bars are intervals over the seeds; a point without one was trained once."
    )
    title = f"What {found.metric_name} costs in memory"
    return Section(title, plot("front", training_figures.draw_front(found), lede, caption))


def _timeline(subject: Subject) -> Section | None:
    found = info.timeline_info(subject)
    if found is None:
        return None
    lede = (
        "Live memory from the forward pass through backward, last layer first, to the update. A group keeps what it "
        "needs until backward has passed its last layer, then lets go of it: a large group that backward meets early "
        "comes on top of everything else."
    )
    peaks = "; ".join(f"{line.name} {format_bytes(max(line.live_bytes))}" for line in found.lines)
    plain = found.nonprivate_peak_bytes
    caption = f"Peaks: {peaks}" + (f"; without privacy {format_bytes(plain)}." if plain else ".")
    return Section(
        "Memory over one training step", plot("timeline", memory_figures.draw_timeline(found), lede, caption)
    )


def _groups(subject: Subject) -> Section | None:
    found = info.groups_info(subject)
    if found is None:
        return None
    lede = (
        "For each number of groups, the cuts that need the least memory of all possible cuts. "
        "The floor is the least that any grouping can reach."
    )
    least = "; ".join(f"{groups_word(m)} {format_bytes(b)}" for m, b in found.least[:8])
    caption = f"Least peak: {least}" + (f"; floor {format_bytes(found.floor_bytes)}." if found.floor_bytes else ".")
    return Section("How many groups are enough", plot("groups", memory_figures.draw_groups(found), lede, caption))


def _strip(subject: Subject) -> Section | None:
    found = info.strip_info(subject)
    if found is None:
        return None
    lede = "The layers in order, each use of a layer (a site) one cell; neighbours of one colour are clipped together."
    sizes = "; ".join(f"{row.name}: {groups_word(row.group_of[-1] + 1)}" for row in found.rows)
    caption = f"{format_count(len(found.sites))} sites. {sizes}. Point at a cell for its name."
    return Section("Where the model is cut", plot("strip", memory_figures.draw_strip(found), lede, caption))


def _breakdown(subject: Subject) -> Section | None:
    rows = info.breakdown_info(subject)
    if rows is None:
        return None
    lede = (
        "Book is what an open group keeps for clipping, sums are the clipped gradients already formed, "
        "transients are passing buffers of the backward pass."
    )
    book, sums = PARTS.index("book"), PARTS.index("sums")
    kept = "; ".join(f"{row.name} {format_bytes(row.part_bytes[book] + row.part_bytes[sums])}" for row in rows)
    caption = f"Book and sums at the peak: {kept}."
    return Section(
        "What fills memory at the peak", plot("breakdown", memory_figures.draw_breakdown(rows), lede, caption)
    )


def _comparison(subject: Subject) -> Section | None:
    rows = comparisons(subject)
    if not rows:
        return None
    lede = (
        "The estimate comes from one traced step; a simulation runs the real engine without data, "
        "a measurement runs it on the device. "
    )
    finding = "" if subject.kind == "verify" else escape(summary_of(rows))  # a verification says it at the top
    body = f'<p class="lede">{lede}{finding}</p>\n{tables.comparison_table(rows)}'
    return Section("Is the estimate right?", body)


def _curves(subject: Subject) -> Section | None:
    found = curves.curves_info(subject)
    if found is None or not any(curve.steps for curve in found.curves):
        return None
    lede = "Every run has the same number of steps and the same privacy; only the grouping differs."
    if subject.kind == "train":
        lede = f"The {found.metric_name} over the steps of this training."
    several = any(curve.seeds > 1 for curve in found.curves)
    runs = "Lines are means over the seeds; a band reaches from the worst to the best seed." if several else "One run."
    steps = max(curve.steps[-1] for curve in found.curves if curve.steps)
    caption = f"Up to step {format_count(steps)}. {runs}"
    return Section("How training went", plot("curves", training_figures.draw_curves(found), lede, caption))


def _cost(subject: Subject) -> Section | None:
    cost = subject.document.get("cost")
    if not cost:
        return None
    training = subject.document.get("training") or {}
    whole = None if subject.privacy is None else subject.privacy.whole
    facts = tables.cost_list({"epsilon": training.get("epsilon"), **cost, "whole": whole})
    note = "" if subject.privacy is not None else f'<p class="lede">{escape(_cost_note(subject))}</p>'
    return Section("What the search cost", f"{facts}\n{note}\n{_training(training)}")


def _cost_note(subject: Subject) -> str:
    return rungs.selection(subject) or (
        "Epsilon is what each training run spends. Choosing among runs by the accuracy on private validation data "
        "spends more, which is not counted here; choosing on public or synthetic data spends nothing."
    )


def _differences(subject: Subject) -> Section | None:
    body = rungs.differences(subject)
    return None if body is None else Section("Is one of them better?", body)


def _evidence(subject: Subject) -> Section | None:
    body = rungs.evidence(subject)
    return None if body is None else Section("How the front was found", body)


def _privacy(subject: Subject) -> Section | None:
    document = subject.document
    if subject.privacy is not None:
        stated = [*subject.privacy.sentences, not_private_sentence(document.get("not_private") or {})]
        if (added := document.get("added_delta")) is not None:
            stated.append(f"That noise ends somewhere adds {format_number(added, 2)} to delta at most.")
        body = "\n".join(f'<p class="lede">{escape(sentence)}</p>' for sentence in stated if sentence)
        return Section("What is private", body + (_training(document) if subject.kind == "train" else ""))
    if document.get("epsilon") is None:
        return None
    note = "What this run spends on its training data; choosing its settings by private data would spend more."
    return Section("Privacy spent", f'<p class="lede">{note}</p>\n{_training(document)}')


def _training(settings: Mapping[str, Any]) -> str:
    keys = ("epsilon", "delta", "noise_multiplier", "sampling_rate", "steps", "learning_rate", "optimizer")
    return tables.facts_table("How each run was trained", {key: settings.get(key) for key in keys})


def _numbers(subject: Subject) -> Section | None:
    document, parts = subject.document, []
    if document.get("candidates"):
        parts.append(("Candidates", tables.candidates_table(subject)))
    if document.get("front"):
        parts.append(("Least peak by number of groups", tables.peaks_table("Least peak", document["front"])))
    if document.get("estimates"):
        parts.append(("Estimates", tables.peaks_table("Estimated peaks", document["estimates"])))
    if (rows := info.breakdown_info(subject)) is not None:
        parts.append(("Breakdown at the peak", tables.breakdown_table(rows)))
    if (ends := curves.curves_info(subject)) is not None:
        parts.append(("Ends of the curves", tables.curves_table(ends)))
    if subject.trace is not None:
        parts.append(("Sites", tables.sites_table(subject)))
    body = "\n".join(f"<details><summary>{escape(name)}</summary>\n{html}\n</details>" for name, html in parts)
    return Section("The numbers", body) if parts else None


def _origin(subject: Subject) -> Section:
    parts = (("Model", "model"), ("Settings", "settings"), ("Environment", "environment"))
    body = "\n".join(tables.facts_table(caption, subject.document[part]) for caption, part in parts)
    return Section("Where the numbers come from", f'<div class="side">{body}</div>')


_SECTIONS = (
    *(_front, _privacy, _differences, fit_section, _timeline, _groups, _strip, _breakdown, joint_section, _comparison),
    *(_curves, _evidence, _cost, _numbers, _origin),
)
