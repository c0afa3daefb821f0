"""What a page says before any figure: the recommendation, the key numbers, and what it all means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from groupsearch.documents.tables import doubt
from groupsearch.report.info import comparisons, summary_of
from groupsearch.report.subject import NEAR_FLOOR, Metric, Subject, groups_word, is_share, metric_of, read
from groupsearch.units import (
    format_at_most,
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_ratio,
    format_signed_percent,
)

EXPLAINER = (
    "Training with differential privacy limits how far any single example can move the model, by clipping each "
    "example's gradient. Layers that are clipped together form a group. One group for the whole model (all-layer) "
    "usually learns best but keeps the most in memory; one group per layer (layer-wise) keeps the least but often "
    "learns worse. In between, the layers can be cut into a few groups."
)
PURPOSE = {
    "search": "This page shows which cuts are worth having for this model, and what each costs.",
    "profile": "This page shows how much memory each way to cut this model needs.",
    "fit": "This page shows how much fits into a given memory, for each way to cut this model.",
    "verify": "This page compares the memory that was predicted with the memory that was used.",
    "train": "This page shows a training run with one such cut.",
    "study": (
        "Workers that hold different data send bounded messages, and all take the same step. Clipping bounds what one "
        "worker can do, and turns the mean of the messages away from that of the gradients. Error feedback (Clip21) "
        "sends the difference to what was sent before, so that in the end nothing is clipped. This page shows what "
        "that does, and what noise for privacy does to it. Smaller gradients are better."
    ),
}


class KeyFigure(NamedTuple):
    """One of the few numbers at the top: what it is, the number, and what it is read against."""

    label: str
    value: str
    note: str


def randomness(document: Mapping[str, object]) -> str:
    """Whether the noise can be had again, and what epsilon is worth then; of a search or a training."""
    told = read(document)
    seed = told["settings"].get("seed")
    found = told.get("randomness") or {"secret": seed is None, "seed": seed}
    if found["secret"]:
        source = "a cipher that the operating system seeds" if found.get("secure") else "the operating system's entropy"
        return f"Noise and batches were drawn from {source}: nobody can draw them again."
    if document["kind"] in ("train", "study"):
        return (
            f"Experiment: noise and batches come from seed {found['seed']}, so that they can be had again. Epsilon "
            f"holds for nobody who knows the seed."
        )
    return (
        f"Experiment: noise and batches come from seed {found['seed']} and those after it, the same for every "
        f"grouping. Epsilon holds for nobody who knows them, and trainings that share their noise do not compose: "
        f"the difference of two is the difference of what the noise was to hide."
    )


def headline(subject: Subject) -> str:
    """The page's finding in one sentence, and a warning where checks do not bear it out."""
    warning = doubt([(row.level, row.grouping, row.relative_error, row.seen_bytes) for row in comparisons(subject)])
    return f"{_finding(subject)}{f' Warning: {warning}' if warning else ''}"


def _finding(subject: Subject) -> str:
    recorded = (subject.fit.summary if subject.fit is not None else None) or subject.document.get("summary")
    if subject.kind == "profile" and isinstance(recorded, str) and recorded.strip():
        return recorded.strip()
    makers = {
        "search": _search_line,
        "profile": _profile_line,
        "verify": _verify_line,
        "train": _train_line,
        "study": _study_line,
    }
    return makers[subject.kind](subject)


def key_figures(subject: Subject) -> tuple[KeyFigure, ...]:
    """Three to five numbers; those the document does not know are left out."""
    makers = {"verify": _verify_figures, "fit": _fit_figures, "study": _study_figures}
    return tuple(figure for figure in makers.get(subject.topic, _grouping_figures)(subject) if figure is not None)


def _search_line(subject: Subject) -> str:
    chosen, metric = subject.chosen, subject.metric(subject.chosen)
    peak = None if chosen is None else _peak_bytes(subject, chosen)
    if chosen is None or metric is None or peak is None:
        return "The search has no recommendation: no candidate has been trained to the end yet."
    reached = f"{metric.text} {metric.name} at a peak of {format_bytes(peak)}"
    whole, reference = _peak_bytes(subject, ()), subject.metric(())
    if chosen == ():
        return f"Keep one group for the whole model: {reached}; no grouping that was tried is a better bargain."
    against = "" if whole is None else f", {_saving(peak, whole)} than all-layer clipping"
    trade = "" if reference is None else f", {_difference(metric, reference)}"
    return f"Cut the model into {groups_word(len(chosen) + 1)}: {reached}{against}{trade}."


def _profile_line(subject: Subject) -> str:
    chosen, whole = subject.chosen, _peak_bytes(subject, ())
    peak = None if chosen is None else _peak_bytes(subject, chosen)
    if chosen is None or peak is None or whole is None:
        return "This profile holds estimates of memory, without the least peak that any grouping can reach."
    near = format_percent(NEAR_FLOOR - 1, 0)
    if chosen == ():
        return (
            f"Grouping saves nothing worth having here: all-layer clipping needs {format_bytes(whole)}, "
            f"within {near} of the least that any grouping can reach."
        )
    return (
        f"{groups_word(len(chosen) + 1).capitalize()} are enough: they need {format_bytes(peak)}, within {near} of the "
        f"least that any grouping can reach and {_saving(peak, whole)} than all-layer clipping."
    )


def _verify_line(subject: Subject) -> str:
    rows = comparisons(subject)
    return summary_of(rows) if rows else "This document holds no measurements to compare."


def _study_line(subject: Subject) -> str:
    found = "" if subject.study is None else subject.study.finding
    return found or "This study has no settings to compare yet."


def _study_figures(subject: Subject) -> tuple[KeyFigure | None, ...]:
    found = subject.study
    if found is None:
        return ()
    cells = [c for c in found.cells if c.steps == "tuned" and c.method == "clip21-gd"]
    middle = len(found.thresholds) // 2
    calm = [c.inactive_from[middle] for c in cells]
    known = sorted(step for step in calm if step is not None)
    note = f"of {format_count(len(calm))} settings, at threshold {format_number(found.thresholds[middle])}"
    return (
        KeyFigure("settings", format_count(len({(c.problem, c.workers) for c in found.cells})), "problems and workers"),
        KeyFigure("runs", format_count(len(found.cells) * len(found.thresholds)), "each at the best step size tried"),
        KeyFigure("clip21-gd stops clipping", format_count(len(known)), note) if calm else None,
        KeyFigure("in the median after", f"{format_count(known[len(known) // 2])} steps", "where it does")
        if known
        else None,
    )


def _train_line(subject: Subject) -> str:
    metric = _trained_metric(subject)
    groups = groups_word(len(subject.chosen) + 1) if subject.chosen is not None else "this grouping"
    reached = f" reached {metric.text} {metric.name}" if metric else " finished"
    return f"Training with {groups}{reached}{_spent(subject)}."


def _grouping_figures(subject: Subject) -> tuple[KeyFigure | None, ...]:
    chosen = subject.chosen
    if chosen is None:
        return ()
    metric = _trained_metric(subject) if subject.kind == "train" else subject.metric(chosen)
    peak, whole, plain = _peak_bytes(subject, chosen), _peak_bytes(subject, ()), subject.nonprivate_peak_bytes
    total = f"of {format_count(subject.trace.length)} layer uses (sites)" if subject.trace else ""
    return (
        _epsilon_figure(subject),
        _metric_figure(subject, metric),
        KeyFigure(
            "peak memory",
            format_bytes(peak),
            f"{format_ratio(peak / plain)} of training without privacy" if plain else "of one step",
        )
        if peak
        else None,
        KeyFigure(
            "memory vs all-layer", format_signed_percent(peak / whole - 1, 1), f"all-layer: {format_bytes(whole)}"
        )
        if peak and whole
        else None,
        KeyFigure("clipping groups", format_count(len(chosen) + 1), total),
    )


def _metric_figure(subject: Subject, metric: Metric | None) -> KeyFigure | None:
    if metric is None:
        return None
    reference = subject.metric(())
    told = (subject.candidate(subject.chosen) or {}).get("metric")
    seeds = None if told is None else told.get("seeds")
    note = f"all-layer: {reference.text}" if reference else ""
    if seeds:
        note += (", " if note else "") + ("1 seed" if seeds == 1 else f"{format_count(seeds)} seeds")
    return KeyFigure(metric.name, metric.text, note)


def _verify_figures(subject: Subject) -> tuple[KeyFigure | None, ...]:
    rows = comparisons(subject)
    if not rows:
        return ()
    worst = max(rows, key=lambda row: abs(row.relative_error))
    judged = [row.within for row in rows if row.within is not None]
    under = sum(row.is_under for row in rows)
    return (
        KeyFigure("within tolerance", f"{sum(judged)} of {len(judged)}", "groupings measured again")
        if judged
        else None,
        KeyFigure("largest error", format_signed_percent(worst.relative_error), worst.grouping),
        KeyFigure("under-estimates", f"{under} of {len(rows)}", "used more than was predicted"),
    )


def _fit_figures(subject: Subject) -> tuple[KeyFigure | None, ...]:
    fit = subject.fit
    assert fit is not None  # it is the topic
    what = "largest batch" if fit.varies == "batch_size" else "longest sequence"
    plain = fit.rows[0].size
    labels = {"best": f"{what}, best grouping", "all-layer": "all-layer", "layer-wise": "layer-wise"}
    found = {row.grouping: row.size for row in fit.rows}
    return (
        *(
            KeyFigure(label, format_count(size), f"{format_ratio(size / plain)} of non-private" if plain else "")
            for name, label in labels.items()
            if (size := found.get(name)) is not None
        ),
        KeyFigure("without privacy", format_count(plain), f"in {format_bytes(fit.memory_bytes)}"),
    )


def _trained_metric(subject: Subject) -> Metric | None:
    found = metric_of(subject.document)
    if found is None and isinstance(subject.document.get("final_metric"), (int, float)):
        name = str(subject.document.get("metric_name", "metric"))
        return Metric(name, float(subject.document["final_metric"]), None)
    return found


def _peak_bytes(subject: Subject, boundaries: tuple[int, ...]) -> int | None:
    row = subject.candidate(boundaries)
    if row is not None:
        return int(row["peak_bytes"])
    peak = subject.peak(boundaries)
    return None if peak is None else peak.peak_bytes


def _saving(peak_bytes: int, reference_bytes: int) -> str:
    change = peak_bytes / reference_bytes - 1
    if abs(change) < 0.0005:
        return "no less memory"
    return f"{format_percent(abs(change))} {'more' if change > 0 else 'less'} memory"


def _difference(metric: Metric, reference: Metric) -> str:
    gap = metric.mean - reference.mean
    size = f"{format_number(100 * abs(gap), 2)} points" if is_share(metric.name) else format_number(abs(gap))
    words = f"{size} {'below' if gap < 0 else 'above'} all-layer"
    if metric.half_width is None or reference.half_width is None:
        return f"{words} (too few seeds to say whether that is noise)"
    within = abs(gap) <= math.hypot(metric.half_width, reference.half_width)
    return f"{words}, which is within the noise of the runs" if within else words


def _spent(subject: Subject) -> str:
    if subject.privacy is not None:
        return f" at {subject.privacy.brief}"
    epsilon, delta = subject.document.get("epsilon"), subject.document.get("delta")
    if epsilon is None:
        return ""
    return f" at epsilon {format_at_most(epsilon)}" + ("" if delta is None else f", delta {format_at_most(delta)}")


def _epsilon_figure(subject: Subject) -> KeyFigure | None:
    """Epsilon of the whole where it is known."""
    stated = subject.privacy
    if stated is None:
        return None
    note = f"at delta {format_at_most(stated.delta)}" + (", with a known seed" if stated.seeded else "")
    if stated.whole is None:
        return KeyFigure("epsilon of one training", format_at_most(stated.epsilon), f"{note}; choosing not counted")
    one = "" if stated.whole == stated.epsilon else f"; {format_at_most(stated.epsilon)} of one training"
    return KeyFigure("epsilon of the whole", format_at_most(stated.whole), note + one)
