"""Sections of a page: a heading, and under it figures and tables as HTML.

Apart from the page, which only puts them into a frame.
"""

from __future__ import annotations

import re
from html import escape
from typing import NamedTuple

import plotly.graph_objects as go
import plotly.io

from groupsearch.documents import tables as document_tables
from groupsearch.documents.commands import Next
from groupsearch.documents.rows import Correlation, Model, Rung
from groupsearch.documents.tables import Table
from groupsearch.privacy import not_private_sentence
from groupsearch.report import figures, info, tables
from groupsearch.report.info import comparisons, summary_of
from groupsearch.report.subject import PARTS, Cost, Subject, Training, groups_word
from groupsearch.units import format_bytes, format_count, format_number, format_seconds

_TRAINING = ("epsilon", "delta", "noise_multiplier", "sampling_rate", "steps", "learning_rate", "optimizer")


class Section(NamedTuple):
    """One heading of the page with what stands under it, as HTML."""

    title: str
    body: str


def plot(name: str, figure: go.Figure, lede: str, caption: str) -> str:
    """A figure between what it shows and what its numbers are, both given as text."""
    # "<" only ever stands inside JSON strings, where its escape means the same and cannot end the script
    data = str(plotly.io.to_json(figure, validate=False, engine="json")).replace("<", "\\u003c")
    return (
        f'<p class="lede">{escape(lede)}</p>\n<figure>\n'
        f'<div class="plot" id="figure-{name}" role="img" aria-label="{escape(caption)}"></div>\n'
        f'<script type="application/json" id="figure-{name}-data">{data}</script>\n'
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def unbroken(text: str) -> str:
    """No line ends between a number and its unit or its interval."""
    return re.sub(r"(?<=[\d±]) (?=%|±|[KMGT]i?B|B\b|\d)", "\N{NO-BREAK SPACE}", text)


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
    return Section(title, plot("front", figures.draw_front(found), lede, caption))


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
    return Section("Memory over one training step", plot("timeline", figures.draw_timeline(found), lede, caption))


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
    return Section("How many groups are enough", plot("groups", figures.draw_groups(found), lede, caption))


def _strip(subject: Subject) -> Section | None:
    found = info.strip_info(subject)
    if found is None:
        return None
    lede = "The layers in order, each use of a layer (a site) one cell; neighbours of one colour are clipped together."
    sizes = "; ".join(f"{row.name}: {groups_word(row.group_of[-1] + 1)}" for row in found.rows)
    caption = f"{format_count(len(found.sites))} sites. {sizes}. Point at a cell for its name."
    return Section("Where the model is cut", plot("strip", figures.draw_strip(found), lede, caption))


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
    return Section("What fills memory at the peak", plot("breakdown", figures.draw_breakdown(rows), lede, caption))


def _comparison(subject: Subject) -> Section | None:
    rows = comparisons(subject)
    if not rows:
        return None
    lede = (
        "The estimate comes from one traced step; a simulation runs the real engine without data, "
        "a measurement runs it on the device. "
    )
    finding = "" if subject.kind == "verify" else escape(summary_of(rows))  # a verification says it at the top
    body = f'<p class="lede">{lede}{finding}</p>\n{tables.comparison_table(rows).html()}'
    return Section("Is the estimate right?", body)


def _curves(subject: Subject) -> Section | None:
    found = info.curves_info(subject)
    if found is None or not any(curve.steps for curve in found.curves):
        return None
    lede = "Every run has the same number of steps and the same privacy; only the grouping differs."
    if subject.kind == "train":
        lede = f"The {found.metric_name} over the steps of this training."
    several = any(curve.seeds > 1 for curve in found.curves)
    runs = "Lines are means over the seeds; a band reaches from the worst to the best seed." if several else "One run."
    steps = max(curve.steps[-1] for curve in found.curves if curve.steps)
    caption = f"Up to step {format_count(steps)}. {runs}"
    return Section("How training went", plot("curves", figures.draw_curves(found), lede, caption))


def _cost(subject: Subject) -> Section | None:
    cost = subject.document.get("cost")
    if not cost:
        return None
    training = subject.document.get("training") or {}
    whole = None if subject.privacy is None else subject.privacy.whole
    note = "" if subject.privacy is not None else _paragraph(_cost_note(subject))
    return Section("What the search cost", f"{_facts(cost, training, whole)}\n{note}\n{_training(training)}")


def _facts(cost: Cost, training: Training, whole: float | None) -> str:
    """What a search spent, as labelled numbers."""
    counts = {
        "groupings tried": cost.get("trials"),
        "training runs": cost.get("trained"),
        "training steps": cost.get("steps"),
    }
    epsilon = cost.get("epsilon", training.get("epsilon"))
    seconds, full = cost.get("seconds"), cost.get("full_trainings")
    known = {
        "epsilon of the whole": None if whole is None else format_number(whole),
        "epsilon of each run": None if epsilon is None else format_number(epsilon),
        "wall-clock time": None if seconds is None else format_seconds(seconds),
        **{word: None if count is None else format_count(count) for word, count in counts.items()},
        "equivalent full trainings": None if full is None else format_number(full),
    }
    listed = (f"<div><dt>{word}</dt><dd>{escape(text)}</dd></div>" for word, text in known.items() if text is not None)
    return f'<dl class="facts">{"".join(listed)}</dl>'


def _cost_note(subject: Subject) -> str:
    return selection(subject) or (
        "Epsilon is what each training run spends. Choosing among runs by the accuracy on private validation data "
        "spends more, which is not counted here; choosing on public or synthetic data spends nothing."
    )


def differences(subject: Subject) -> Section | None:
    """What the comparisons of the front with the best grouping say."""
    rows = subject.document.get("comparisons")
    if not rows:
        return None
    lede = (
        "Groupings are trained with the same seeds, so that they differ in nothing else; the seed by which one came to "
        "be on the front is left out."
    )
    answer, table = subject.document.get("answer", ""), tables.differences_table(subject, rows)
    return Section("Is one of them better?", f"{_paragraph(answer)}\n{table.html()}\n{_paragraph(lede)}")


def evidence(subject: Subject) -> Section | None:
    """What every rung of the search cost and whether it foretold the next one."""
    rungs = [Rung.from_json(each, "rungs") for each in (subject.document.get("cost") or {}).get("rungs") or []]
    if not rungs:
        return None
    correlations = [Correlation.from_json(each, "correlations") for each in subject.document.get("correlations") or []]
    lede = (
        "Cheap evidence first: each rung is an order dearer than the one before it and judges fewer groupings. Whether "
        "one foretells the next is measured by the rank correlation, with its 95 % interval."
    )
    said = (_paragraph(each.statement) for each in correlations)
    body = "\n".join([_paragraph(lede), document_tables.rungs(rungs, correlations).html(), *said])
    return Section("How the front was found", body)


def selection(subject: Subject) -> str | None:
    """What choosing has cost in privacy, in a sentence; None where the document says nothing of it."""
    found = (subject.document.get("cost") or {}).get("selection")
    return None if found is None else found.get("statement")


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


def _training(settings: Training) -> str:
    told = {key: value for key, value in settings.items() if key in _TRAINING}
    return tables.facts_table("How each run was trained", told).html()


def _numbers(subject: Subject) -> Section | None:
    document = subject.document
    parts: list[tuple[str, Table]] = []
    if candidates := document.get("candidates"):
        parts.append(("Candidates", tables.candidates_table(candidates)))
    if front := document.get("front"):
        parts.append(("Least peak by number of groups", tables.peaks_table("Least peak", front)))
    if estimates := document.get("estimates"):
        parts.append(("Estimates", tables.peaks_table("Estimated peaks", estimates)))
    if (rows := info.breakdown_info(subject)) is not None:
        parts.append(("Breakdown at the peak", tables.breakdown_table(rows)))
    if (ends := info.curves_info(subject)) is not None:
        parts.append(("Ends of the curves", tables.curves_table(ends)))
    if subject.trace is not None:
        parts.append(("Sites", tables.sites_table(subject.trace)))
    body = "\n".join(f"<details><summary>{escape(name)}</summary>\n{table.html()}\n</details>" for name, table in parts)
    return Section("The numbers", body) if parts else None


def _origin(subject: Subject) -> Section:
    told = subject.document
    parts = {"Model": told["model"], "Settings": told["settings"], "Environment": told["environment"]}
    body = "\n".join(tables.facts_table(title, facts).html() for title, facts in parts.items())
    return Section("Where the numbers come from", f'<div class="side">{body}</div>')


def fit_section(subject: Subject) -> Section | None:
    """What fits, as a figure and a table."""
    drawn, fit = info.fit_info(subject), subject.fit
    if drawn is None or fit is None:
        return None
    grown = "batch" if drawn.what == "batch" else "longest sequence"
    lede = (
        f"The largest {drawn.what} whose step stays within {fit.room}. A hollow bar is predicted: its step was "
        "traced, not run. Diamonds mark what was run."
    )
    caption = f"Largest {grown}: {'; '.join(f'{row.name} {format_count(row.size)}' for row in drawn.rows)}."
    model = Model.from_json(subject.document["model"], "model")
    table, title = document_tables.fits(model, fit), f"Largest {drawn.what} of every grouping"
    title += "; examples per second, measured or predicted" if "per second" in table.columns else ""
    body = plot("fit", figures.draw_fit(drawn), lede, caption) + "\n" + table._replace(title=title).html()
    summary = subject.document.get("summary", "").strip()
    notes = [fit.poisson.rule, f"At batch {model.batch_size}, where the search began: {summary}" if summary else ""]
    body += "".join(f"\n{_paragraph(note)}" for note in notes if note)
    return Section(f"What fits into {format_bytes(fit.memory_bytes)}", body)


def joint_section(subject: Subject) -> Section | None:
    """What one norm method for all weights needs, against the methods that were chosen together with the grouping."""
    joint = subject.joint
    if joint is None:
        return None
    lede = (
        "A per-example norm can be had from products of inputs and gradients (ghost), from the per-example gradients "
        "kept until their group closes (instantiate), or formed twice (recompute). Which is cheapest depends on the "
        "layer and on the grouping; here every weight has its own. Operations are multiply-accumulates of norms and "
        "clipped sums in one step."
    )
    chosen = "; ".join(f"{method}: {format_count(count)} weights" for method, count in joint.weights.items())
    table = document_tables.joint(joint)
    return Section("How norms are taken", f"{_paragraph(lede)}\n{table.html()}\n{_paragraph(f'{chosen}.')}")


def _paragraph(text: str) -> str:
    return f'<p class="lede">{escape(text)}</p>'


def _next(subject: Subject) -> Section | None:
    told = subject.document.get("next")
    if not told:
        return None
    found = Next.from_json(told)
    note = f'<p class="lede">{escape(found.note)}</p>\n' if found.note else ""
    command = "" if found.command is None else f"<pre><code>{escape(found.command)}</code></pre>\n"
    code = escape("\n".join(found.python))
    python = f'<p class="lede">In Python:</p>\n<pre><code>{code}</code></pre>\n' if code else ""
    return Section("What to do next", f"{note}{command}{python}") if command or python else None


def _methods(subject: Subject) -> Section | None:
    """Curves of every problem of a study, and its tables."""
    study = subject.study
    if study is None:
        return None
    middle = format_number(study.thresholds[len(study.thresholds) // 2])
    parts = []
    for place, problem in enumerate(dict.fromkeys(curve.problem for curve in study.curves)):
        curves = [curve for curve in study.curves if curve.problem == problem]
        ends = "; ".join(
            f"{figures.curve_name(c)} {format_number(c.squared[-1])}" for c in curves if c.squared[-1] is not None
        )
        lede = (
            f"{problem}, {format_count(curves[0].workers)} workers: squared norm of the gradient, threshold {middle}."
        )
        drawn = figures.draw_methods(study.records, curves)
        parts.append(plot(f"methods-{place}", drawn, lede, f"At the end: {ends}."))
    parts.append(document_tables.methods(study.cells).html())
    return Section("How the methods converge", "\n".join(parts))


def _rates(subject: Subject) -> Section | None:
    """Rates, the end of clipping, thresholds one by one, and what the noise costs."""
    study = subject.study
    if study is None:
        return None
    note = (
        "The interval is that of a straight line in logarithms through the last nine tenths of the steps, whose "
        "residuals are not independent: it says how straight the line is. O(1/K) is a rate of -1; a stall is 0."
    )
    spent = document_tables.guarantees(study.guarantees)
    privacy = (
        "Epsilon is of the weights after every step, whatever the data of one worker are replaced by, if the noise of "
        "all workers is added and nobody sees a message. Of the messages it is what protects a worker without trusting "
        "the others. Every worker takes part in every step: nothing is amplified by subsampling. Thresholds and step "
        "sizes were chosen by a look at the gradients, which epsilon leaves out."
    )
    shown = (
        document_tables.rates(study.cells, study.thresholds),
        document_tables.by_threshold(study.cells, study.thresholds),
    )
    body = _paragraph(note) + "".join(f"\n{table.html()}" for table in shown)
    return Section("Rates, thresholds and noise", f"{body}\n{_paragraph(privacy)}\n{spent.html()}")


SECTIONS = (
    *(_methods, _rates),
    *(_front, _privacy, _next, differences, fit_section, _timeline, _groups, _strip, _breakdown, joint_section),
    *(_comparison, _curves, evidence, _cost, _numbers, _origin),
)
