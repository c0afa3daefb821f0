"""The tables of documents: made once, as text in rows and columns; drawn on a terminal, in a notebook or on a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from groupsearch.documents.rows import (
    Candidate,
    Cell,
    Check,
    Communication,
    Correlation,
    Estimate,
    Fitting,
    Guarantee,
    Joint,
    Measurement,
    Model,
    Point,
    Rung,
    Simulation,
)
from groupsearch.units import (
    format_at_most,
    format_bytes,
    format_count,
    format_interval,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
    format_signed_percent,
)

RESERVED = ("reserved", "fragmented")
HELD = ("to allocate", "to hold")
LIMITED = {"memory": "", "limit": " or more", "model": ", all the model takes"}
RUNG_WORDS = {
    "proxy": "proxy",
    "short": "short runs",
    "full": "full runs",
    "exploration": "full runs",
    "replication": "further seeds",
}
REFERENCES = ("all-layer", "layer-wise")
DOUBTFUL = 0.01


class Table(NamedTuple):
    """Text in rows and columns; a heading that ends in a blank is of a column that is aligned to the left."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def html(self) -> str:
        """The table as HTML, under its title where it has one; everything is escaped here."""
        kinds = ["" if heading.endswith(" ") else " class=number" for heading in self.columns]
        head = "".join(f'<th scope="col">{escape(heading.strip())}</th>' for heading in self.columns)
        rows = (zip(kinds, row, strict=True) for row in self.rows)
        body = "".join(f"<tr>{''.join(f'<td{kind}>{escape(cell)}</td>' for kind, cell in row)}</tr>\n" for row in rows)
        title = escape(self.title)
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table><caption>{title}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
        )

    def text(self, most: int) -> str:
        """The table as lines of text, without its title, and of its rows the first ones."""
        lines = [self.columns, *self.rows[:most]]
        widths = [max(len(line[i].strip()) for line in lines) for i in range(len(self.columns))]
        left = [heading.endswith(" ") for heading in self.columns]
        return "\n".join(
            "  ".join(
                cell.strip().ljust(w) if is_left else cell.strip().rjust(w)
                for cell, w, is_left in zip(line, widths, left, strict=True)
            ).rstrip()
            for line in lines
        )


def doubt(checks: Sequence[tuple[str, str, float, int]]) -> str:
    """That a check is more than 1 % off its estimate, and which is furthest; empty where none is.

    Args:
        checks: of each how it was made (a simulation, a measurement), its grouping, estimate / check - 1, its bytes.
    """
    off = [each for each in checks if abs(each[2]) > DOUBTFUL]
    if not off:
        return ""
    how, grouping, error, peak_bytes = max(off, key=lambda each: abs(each[2]))
    return (
        f"{len(off)} of {len(checks)} checks are more than {format_percent(DOUBTFUL, 0)} off: the estimate of "
        f"{grouping} is {format_signed_percent(error)} from its {how}, {format_bytes(peak_bytes)}. Trust what was "
        "measured, and report the model: estimates are meant to be exact."
    )


def peaks(
    title: str,
    reference: int,
    estimates: Sequence[Estimate],
    simulations: Sequence[Simulation],
    measurements: Sequence[Measurement],
) -> Table:
    """Every estimate with its ratio to the reference, non-private training; its simulation and its measurement."""
    simulated = {row.boundaries: row for row in simulations}
    measured = {row.boundaries: row for row in measurements}
    held = any(row.reserved_bytes is not None for row in estimates)
    reserved = any(row.reserved_bytes is not None for row in measurements)
    columns = ["grouping ", "groups", "estimate", "of non-private", *(HELD if held else ())]
    columns += ["simulated", "error"] if simulated else []
    columns += ["measured", "error", *(RESERVED if reserved else ()), "step"] if measured else []
    rows = []
    for row in estimates:
        peak, check = row.peak_bytes, measured.get(row.boundaries)
        cells = [row.grouping, str(row.groups), format_bytes(peak), format_ratio(peak / reference)]
        cells += [_bytes(size) for size in (row.allocated_bytes, row.reserved_bytes)] if held else []
        cells += _checked(simulated.get(row.boundaries)) if simulated else []
        cells += [*_checked(check), *(_reserved(check) if reserved else ())] if measured else []
        cells += ["" if check is None else format_seconds(check.step_seconds)] if measured else []
        rows.append(tuple(cells))
    return Table(title, tuple(columns), tuple(rows))


def joint(found: Joint) -> Table:
    """What was chosen jointly against what each norm method alone needs."""
    operations, rows = found.operations, []
    for row in found.compared:
        less = format_ratio(row.operations / operations) if operations else ""
        sizes = format_bytes(row.all_layer_bytes), format_bytes(row.floor_bytes)
        rows.append((row.norm_method, *sizes, format_number(row.operations), less))
    columns = ("norm method ", "all-layer peak", "least peak of any grouping", "operations", "of joint")
    return Table("Peaks and operations by norm method", columns, tuple(rows))


def communication(found: Communication) -> Table:
    """Steps on several processes by grouping."""
    rows = []
    for row in found.rows:
        times = map(format_seconds, (row.starts_seconds[-1], row.link_seconds, row.step_seconds))
        rows.append((row.grouping, format_count(row.groups), *times, format_percent(row.hidden, 0)))
    columns = ("grouping ", "groups", "first sent after", "on the link", "predicted step", "hidden")
    title = f"{found.processes} processes, {format_bytes(found.sent_bytes)} sent by each per step"
    return Table(title, columns, tuple(rows))


def fits(model: Model, fit: Fitting) -> Table:
    """What fits, against non-private training."""
    batch = fit.varies == "batch_size"
    rated = any(row.examples_per_second is not None for row in fit.rows)
    held = any(row.reserved_bytes is not None for row in fit.rows)
    columns = ["grouping ", "groups", "batch" if batch else "sequence", "of non-private", "expected batch"]
    columns += ["pieces"] if fit.poisson.sampling_rate else []
    columns += ["peak", "with one more", *(["to hold"] if held else []), *(["per second"] if rated else [])]
    rows = []
    for row in fit.rows:
        rate, reference = row.examples_per_second, fit.rows[0].size
        cells = [row.grouping, _count(row.groups), f"{format_count(row.size)}{LIMITED[row.limited_by]}"]
        cells += [format_ratio(row.size / reference) if reference else "", _count(row.expected_batch_size)]
        cells += ["-".join(map(str, dict.fromkeys(row.pieces or ())))] if "pieces" in columns else []
        cells += [_bytes(row.peak_bytes), _bytes(row.next_peak_bytes)]
        cells += [_bytes(row.reserved_bytes)] if held else []
        cells += [f"{_per_second(rate.value)} {rate.source}" if rate else ""] if rated else []
        rows.append(tuple(cells))
    fixed = "" if batch else f", batch {model.batch_size}"
    return Table(f"{model.name}{fixed}: {fit.room}", tuple(columns), tuple(rows))


def checks(title: str, checked: Sequence[Check]) -> Table:
    """Estimates and what was measured now, side by side."""
    known = any(row.reserved_bytes is not None for row in checked)
    columns = ("grouping ", "groups", "estimate", "measured", "error", *(RESERVED if known else ()), "step", "within")
    rows = tuple(
        (
            row.grouping,
            str(row.groups),
            format_bytes(row.estimate_bytes),
            *_checked(row),
            *(_reserved(row) if known else ()),
            format_seconds(row.step_seconds),
            "yes" if row.within else "no",
        )
        for row in checked
    )
    return Table(title, columns, rows)


def candidates(title: str, found: Sequence[Candidate], best: Candidate | None) -> Table:
    """The front, all-layer, layer-wise, and what is recommended."""
    shown = [c for c in found if c.on_front or c == best or c.source in REFERENCES]
    rows = tuple(
        (
            ", ".join((c.source, *c.options)),
            str(c.groups),
            format_bytes(c.peak_bytes),
            _value(c.metric.mean, c.metric.half_width, c.metric.name),
            str(c.metric.seeds),
            "yes" if c.on_front else "",
            "<- recommended" if c == best else "",
        )
        for c in shown
    )
    names = {c.metric.name: None for c in found}
    columns = ("from ", "groups", "peak", next(iter(names), "metric"), "seeds", "front", " ")
    return Table(title, columns, rows)


def rungs(found: Sequence[Rung], correlations: Sequence[Correlation]) -> Table:
    """What each kind of evidence cost, and how far it foretold the dearer ones, as that was measured first."""
    rows = (
        (
            RUNG_WORDS.get(rung.name, rung.name),
            _foretold(rung.name, correlations),
            format_count(rung.runs) if rung.runs else "",
            format_seconds(rung.seconds),
            format_count(rung.steps),
            format_number(rung.full_trainings),
        )
        for rung in found
    )
    columns = ("rung ", "predicts ", "runs", "time", "steps", "full trainings")
    return Table("What each rung of evidence cost", columns, tuple(rows))


def _foretold(name: str, correlations: Sequence[Correlation]) -> str:
    """The rank correlations with the rungs above, each as it was before anything was chosen by it."""
    first: dict[str, Correlation] = {}
    for row in correlations:
        if row.lower == name:
            first.setdefault(row.upper, row)
    return "; ".join(f"{RUNG_WORDS[upper]} {_correlation(row)}" for upper, row in first.items())


def _correlation(row: Correlation) -> str:
    value, low, high = (format_number(each, 2) for each in (row.value, row.low, row.high))
    return f"{value} ({low} to {high})"


def curve(title: str, points: Sequence[Point], name: str) -> Table:
    """Loss and metric along the steps."""
    rows = tuple(
        (str(point.step), "" if point.loss is None else format_number(point.loss), _value(point.metric, None, name))
        for point in points
    )
    return Table(title, ("step", "loss", name), rows)


def _value(mean: float | None, half_width: float | None, name: str) -> str:
    return "" if mean is None else format_interval(mean, half_width, percent="accuracy" in name)


def _count(number: int | None) -> str:
    return "" if number is None else format_count(number)


def _per_second(rate: float) -> str:
    return format_count(round(rate)) if rate >= 100 else format_number(rate)


def _bytes(size_bytes: int | None) -> str:
    return "" if size_bytes is None else format_bytes(size_bytes)


def _checked(row: Simulation | None) -> Iterable[str]:
    return ("", "") if row is None else (format_bytes(row.peak_bytes), format_signed_percent(row.relative_error))


def _reserved(row: Measurement | None) -> Iterable[str]:
    """What a GPU's caching allocator had reserved at a measured peak, and how much of that was not allocated."""
    if row is None or row.reserved_bytes is None:
        return "", ""
    return format_bytes(row.reserved_bytes), format_percent(1 - row.peak_bytes / row.reserved_bytes)


def methods(cells: Sequence[Cell]) -> Table:
    """What every method reaches at its best threshold and step size: a row for each, a column for each setting."""
    settings = list(dict.fromkeys((cell.problem, cell.workers) for cell in cells))
    rows: dict[tuple[str, float | None, str], dict[tuple[str, int], Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.method, cell.epsilon, cell.steps), {})[cell.problem, cell.workers] = cell
    body = (
        (method, "none" if epsilon is None else format_number(epsilon), steps, *(_reached(of.get(s)) for s in settings))
        for (method, epsilon, steps), of in rows.items()
    )
    columns = (f"{problem}, {workers}" for problem, workers in settings)
    title = "squared gradient norm at the end, at the best threshold / at the middle one"
    return Table(title, ("method ", "epsilon ", "step size ", *columns), tuple(body))


def rates(cells: Sequence[Cell], thresholds: Sequence[float]) -> Table:
    """Fitted rates at the middle threshold with their intervals; from which step on nothing was clipped, at each."""
    body = (
        (
            cell.problem,
            format_count(cell.workers),
            cell.method,
            "none" if cell.epsilon is None else format_number(cell.epsilon),
            cell.steps,
            "" if cell.step_size is None else format_number(cell.step_size),
            power(cell),
            *("never" if step is None else format_count(step) for step in cell.inactive_from),
        )
        for cell in cells
    )
    bounds = (f"unclipped at {format_number(bound)}" for bound in thresholds)
    columns = ("problem ", "workers", "method ", "epsilon ", "steps ", "step size", "rate", *bounds)
    return Table("The squared gradient norm falls as the step to the power of the rate", columns, tuple(body))


def by_threshold(cells: Sequence[Cell], thresholds: Sequence[float]) -> Table:
    """The squared gradient norm at the end, threshold by threshold."""
    body = (
        (
            cell.problem,
            format_count(cell.workers),
            cell.method,
            "none" if cell.epsilon is None else format_number(cell.epsilon),
            cell.steps,
            *("diverged" if value is None else f"{value:.1e}" for value in cell.squared),
        )
        for cell in cells
    )
    bounds = (f"threshold {format_number(bound)}" for bound in thresholds)
    columns = ("problem ", "workers", "method ", "epsilon ", "steps ", *bounds)
    return Table("Squared gradient norm at the end, threshold by threshold", columns, tuple(body))


def guarantees(rows: Sequence[Guarantee]) -> Table:
    """What noise costs a worker."""
    body = (
        (
            format_count(row.workers),
            format_number(row.noise_multiplier, 4),
            format_number(row.delta),
            format_at_most(row.of_weights, 4),
            format_at_most(row.of_messages, 4),
        )
        for row in rows
    )
    columns = ("workers", "noise multiplier", "delta", "epsilon of the weights", "epsilon of a worker's messages")
    return Table("What the noise costs one worker", columns, tuple(body))


def power(cell: Cell) -> str:
    """The fitted rate with its interval."""
    if cell.slope is None or cell.half_width is None:
        return ""
    return f"{cell.slope:.2f} ± {cell.half_width:.2f}"


def _reached(cell: Cell | None) -> str:
    return "" if cell is None else " / ".join("diverged" if v is None else f"{v:.1e}" for v in (cell.best, cell.middle))


def methods_finding(cells: Sequence[Cell]) -> str:
    """In how many settings error feedback ends lower than clipping alone, threshold by threshold."""
    pairs = (("clip-gd", "clip21-gd", "without noise"), ("dp-sgd", "dp-clip21-sgd2m", "with noise"))
    said = [_against(cells, plain, feedback, where) for plain, feedback, where in pairs]
    return " ".join(each for each in said if each)


def _against(cells: Sequence[Cell], plain: str, feedback: str, where: str) -> str:
    tuned = {(c.problem, c.workers, c.epsilon, c.method): c for c in cells if c.steps == "tuned"}
    ratios = sorted(
        a / b
        for (problem, workers, epsilon, method), cell in tuned.items()
        if method == plain and (other := tuned.get((problem, workers, epsilon, feedback))) is not None
        for a, b in zip(cell.squared, other.squared, strict=True)
        if a is not None and b
    )
    if not ratios:
        return ""
    return (
        f"Of {format_count(len(ratios))} settings and thresholds {where}, {feedback} ends with the smaller gradient in "
        f"{format_count(sum(ratio > 1 for ratio in ratios))}; in the median the squared norm that {plain} ends with is "
        f"{format_number(ratios[len(ratios) // 2])} times its."
    )
