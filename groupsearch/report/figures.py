"""The second of a figure's two steps: from an info to a plotly figure. Nothing here reads a document.

Apart from the sections that show them, as drawing is all that is done here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import plotly.graph_objects as go

from groupsearch.documents.rows import Descent
from groupsearch.report.info import (
    BreakdownRow,
    CurvesInfo,
    FitInfo,
    FrontInfo,
    FrontPoint,
    GroupsInfo,
    StripInfo,
    TimelineInfo,
    front_line,
)
from groupsearch.report.subject import PARTS, is_share
from groupsearch.units import format_bytes, format_count, format_number, format_percent, format_short_bytes

Axis = dict[str, object]


class Look(NamedTuple):
    """Colour, marker and dash of a role: told apart by each of the three alone."""

    colour: str
    symbol: str
    dash: str


NEUTRAL = "#8a939e"
# Okabe & Ito's palette, which every common kind of colour vision tells apart; blue a shade lighter for dark pages.
LOOKS = {
    "all-layer": Look("#d55e00", "circle", "solid"),
    "recommended": Look("#009e73", "diamond", "solid"),
    "layer-wise": Look("#3a8fd0", "square", "dash"),
    "": Look(NEUTRAL, "circle-open", "dot"),
}
# Tol's muted palette: groups must not look like the roles above.
GROUP_COLOURS = ("#44aa99", "#ddcc77", "#88ccee", "#cc6677", "#6f63c5", "#aa4499")
PART_COLOURS = ("#6b7785", "#98a2ad", "#b8a05a", "#c4cad1", "#56b4e9", "#cc79a7", "#d55e00", "#e69f00")


def round_ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """About ``count`` ticks between ``low`` and ``high`` at multiples of 1, 2 or 5 times a power of ten.

    >>> round_ticks(0.9, 0.95)
    (0.9, 0.91, 0.92, 0.93, 0.94, 0.95)
    """
    if not high > low:
        return (low,)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.8 * raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(k * step, 12) for k in range(first, last + 1))


def bytes_axis(low_bytes: float, high_bytes: float, title: str, count: int = 5) -> Axis:
    """An axis of sizes with ticks at round numbers of KiB, MiB or GiB."""
    unit = 2 ** (10 * max(0, min(4, (int(high_bytes).bit_length() - 1) // 10)))
    ticks = [value * unit for value in round_ticks(low_bytes / unit, high_bytes / unit, count)]
    return _axis(low_bytes, high_bytes, title, ticks, [format_short_bytes(tick) for tick in ticks])


def metric_axis(low: float, high: float, name: str) -> Axis:
    """An axis of a metric; accuracies in percent."""
    ticks = round_ticks(low, high)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 0.1
    if is_share(name):
        digits = max(0, -math.floor(math.log10(step) + 1e-9) - 2)
        return _axis(low, high, name, list(ticks), [format_percent(tick, digits) for tick in ticks])
    return _axis(low, high, name, list(ticks), [format_number(tick, 4) for tick in ticks])


def padded(low: float, high: float, share: float = 0.08) -> tuple[float, float]:
    """A range with room for markers on both sides."""
    room = share * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def new_figure(up: Axis, across: Axis, height: int = 400) -> go.Figure:
    """An empty figure; colours of text and grid come from the page's style sheet."""
    figure = go.Figure(layout=go.Layout(template=go.layout.Template()))
    figure.update_layout(
        yaxis=up,
        xaxis=across,
        height=height,
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0},
        dragmode=False,
        hovermode="closest",
    )
    return figure


def plain_axis(title: str) -> Axis:
    """An axis that plotly finds the ticks of."""
    look = {"zeroline": False, "fixedrange": True, "automargin": True, "ticks": ""}
    return {"title": {"text": title, "standoff": 12}, **look}


def faded(colour: str, opacity: float) -> str:
    """The colour, let through by ``opacity``."""
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _axis(low: float, high: float, title: str, ticks: list[float], words: list[str]) -> Axis:
    return {**plain_axis(title), "range": [low, high], "tickvals": ticks, "ticktext": words}


def draw_timeline(info: TimelineInfo) -> go.Figure:
    """Live bytes along one step, one line for each grouping."""
    highest = max(max(line.live_bytes) for line in info.lines)
    top = 1.08 * max(highest, info.nonprivate_peak_bytes or 0)
    start, end = info.lines[0].positions[0], max(line.positions[-1] for line in info.lines)
    end = max(end, info.length * 1.07)
    across = {**plain_axis("one training step"), "range": [start, end]}
    across |= {"tickvals": [start / 2, info.length / 2], "ticktext": ["forward", "backward"]}
    figure = new_figure(bytes_axis(0, top, "live memory"), {**across, "showgrid": False})
    figure.add_vrect(x0=start, x1=0, fillcolor=NEUTRAL, opacity=0.10, line_width=0, layer="below")
    figure.add_vrect(x0=info.length, x1=end, fillcolor=NEUTRAL, opacity=0.10, line_width=0, layer="below")
    if info.nonprivate_peak_bytes:
        _add_level(figure, (start, end), info.nonprivate_peak_bytes, "peak without privacy", "dot")
    for line in info.lines:
        look = LOOKS[line.role]
        figure.add_scatter(
            x=[*line.positions, end],  # steps are drawn from each moment to the next, so the last needs an end
            y=[*line.live_bytes, line.live_bytes[-1]],
            mode="lines",
            line={"color": look.colour, "width": 2, "shape": "hv"},
            name=escape(line.name),
            text=[
                f"{escape(label)}<br>{format_bytes(b)}" for label, b in zip(line.labels, line.live_bytes, strict=True)
            ],
            hovertemplate="%{text}<extra>" + escape(line.name) + "</extra>",
        )
        highest_at = max(range(len(line.live_bytes)), key=line.live_bytes.__getitem__)
        figure.add_scatter(
            x=[line.positions[highest_at]],
            y=[line.live_bytes[highest_at]],
            mode="markers",
            marker={"color": look.colour, "symbol": look.symbol, "size": 11},
            showlegend=False,
            hoverinfo="skip",
        )
    return figure


def draw_groups(info: GroupsInfo) -> go.Figure:
    """Least peak against number of groups (a logarithmic axis), over the floor."""
    counts = [groups for groups, _ in info.least] + ([info.layer_wise[0]] if info.layer_wise else [])
    sizes = [size for _, size in info.least] + ([info.layer_wise[1]] if info.layer_wise else [])
    levels = [level for level in (info.floor_bytes, info.nonprivate_peak_bytes) if level]
    low, high = padded(min(sizes + levels), max(sizes + levels))
    ticks = sorted({2**k for k in range(max(counts).bit_length())} | {max(counts)})
    ticks = [t for t in ticks if t == max(counts) or t * 1.5 < max(counts)]
    span = [-0.08, math.log10(max(counts)) + 0.12]
    across = {**plain_axis("number of groups"), "type": "log", "range": span, "tickvals": ticks}
    figure = new_figure(
        bytes_axis(max(0, low), high, "least peak memory"), {**across, "ticktext": [str(t) for t in ticks]}
    )
    ends = (10 ** span[0], 10 ** span[1])
    if info.nonprivate_peak_bytes:
        _add_level(figure, ends, info.nonprivate_peak_bytes, "peak without privacy", "dot")
    if info.floor_bytes:
        _add_level(figure, ends, info.floor_bytes, "floor: no grouping needs less", "dash")
    _add_group_points(figure, list(info.least), "least peak with this many groups", "recommended", line=True)
    if info.layer_wise:
        _add_group_points(figure, [info.layer_wise], "layer-wise", "layer-wise", line=False)
    _add_group_points(figure, [row for row in info.least if row[0] == 1], "all-layer", "all-layer", line=False)
    return figure


def draw_strip(info: StripInfo) -> go.Figure:
    """One row of cells for each grouping, one cell for each site, coloured by group."""
    cycle, last = len(GROUP_COLOURS), len(GROUP_COLOURS) - 1
    rows = info.rows[::-1]
    text = [
        [
            f"{escape(row.name)}<br>site {site}: {escape(name)}<br>group {group + 1} of {row.group_of[-1] + 1}"
            for site, (name, group) in enumerate(zip(info.sites, row.group_of, strict=True))
        ]
        for row in rows
    ]
    across = {**plain_axis("sites, input to output"), "showgrid": False}
    down = {**plain_axis(""), "showgrid": False, "automargin": True}
    figure = new_figure(down, across, height=130 + 62 * len(rows))
    figure.add_heatmap(
        z=[[group % cycle for group in row.group_of] for row in rows],
        y=[_broken(row.name) for row in rows],
        text=text,
        hovertemplate="%{text}<extra></extra>",
        colorscale=[[at, GROUP_COLOURS[k]] for k in range(cycle) for at in (k / cycle, (k + 1) / cycle)],
        zmin=-0.5,
        zmax=last + 0.5,
        showscale=False,
        xgap=1 if len(info.sites) <= 150 else 0,
        ygap=10,
    )
    return figure


def draw_breakdown(rows: Sequence[BreakdownRow]) -> go.Figure:
    """What is alive at each grouping's peak, stacked; parts that are nowhere alive are left out."""
    rows = rows[::-1]
    figure = new_figure(
        {**plain_axis(""), "showgrid": False, "automargin": True},
        bytes_axis(0, 1.03 * max(row.peak_bytes for row in rows), "alive at the peak", 3),
        height=190 + 58 * len(rows),
    )
    figure.update_layout(barmode="stack", bargap=0.35)
    figure.update_layout(legend={"traceorder": "normal", "entrywidth": 84})
    for index, part in enumerate(PARTS):
        sizes = [row.part_bytes[index] for row in rows]
        if any(sizes):
            figure.add_bar(
                x=sizes,
                y=[_broken(row.name) for row in rows],
                orientation="h",
                name=part,
                marker={"color": PART_COLOURS[index]},
                text=[
                    f"{part}: {format_bytes(size)}<br>of {format_bytes(row.peak_bytes)}"
                    for size, row in zip(sizes, rows, strict=True)
                ],
                textposition="none",
                hovertemplate="%{text}<extra></extra>",
            )
    return figure


def draw_fit(info: FitInfo) -> go.Figure:
    """A bar to the largest size of each grouping, filled where that was run, and a diamond wherever it was run."""
    rows = info.rows[::-1]
    reach = max(1, *(row.size for row in rows))
    across = {**plain_axis(f"largest {info.what} that fits"), "range": [0, 1.12 * reach]}
    figure = new_figure({**plain_axis(""), "showgrid": False}, across, height=130 + 38 * len(rows))
    figure.update_layout(bargap=0.35, barmode="overlay")
    for run, name in ((True, "measured at that size"), (False, "predicted: traced, not run")):
        shown = [row for row in rows if (row.size in row.measured) is run]
        colours = [LOOKS[row.role].colour for row in shown]
        if shown:
            figure.add_bar(
                x=[row.size for row in shown],
                y=[_broken(row.name) for row in shown],
                orientation="h",
                name=name,
                marker={
                    "color": colours if run else [faded(colour, 0.16) for colour in colours],
                    "line": {"color": colours, "width": 1.5},
                },
                text=[format_count(row.size) for row in shown],
                textposition="outside",
                cliponaxis=False,
                hovertemplate="%{y}: %{x}<extra></extra>",
            )
    figure.add_scatter(
        x=[size for row in rows for size in row.measured],
        y=[_broken(row.name) for row in rows for _ in row.measured],
        mode="markers",
        marker={"symbol": "diamond", "size": 8, "color": NEUTRAL},
        name="step measured",
        hovertemplate="%{y}: step measured at %{x}<extra></extra>",
        showlegend=any(row.measured for row in rows),
    )
    figure.update_yaxes(categoryorder="array", categoryarray=[_broken(row.name) for row in rows])
    return figure


def _add_level(figure: go.Figure, ends: tuple[float, float], size_bytes: int, name: str, dash: str) -> None:
    figure.add_scatter(
        x=list(ends),
        y=[size_bytes, size_bytes],
        mode="lines",
        line={"color": NEUTRAL, "width": 1.5, "dash": dash},
        name=name,
        hovertemplate=f"{name}: {format_bytes(size_bytes)}<extra></extra>",
    )


def _add_group_points(figure: go.Figure, rows: list[tuple[int, int]], name: str, role: str, *, line: bool) -> None:
    look = LOOKS[role]
    figure.add_scatter(
        x=[groups for groups, _ in rows],
        y=[size for _, size in rows],
        mode="lines+markers" if line else "markers",
        line={"color": look.colour, "width": 2},
        marker={"color": look.colour, "symbol": look.symbol, "size": 8 if line else 12},
        name=name,
        text=[f"{groups} groups: {format_bytes(size)}" for groups, size in rows],
        hovertemplate="%{text}<extra>" + name + "</extra>",
    )


def _broken(name: str) -> str:
    return escape(name).replace(", ", ",<br>").replace(" (", "<br>(")


def draw_front(info: FrontInfo) -> go.Figure:
    """Metric (up) against peak (right), intervals as bars, the front as a line of steps."""
    reach = [point.metric.half_width or 0.0 for point in info.points]
    low, high = padded(
        min(p.metric.mean - r for p, r in zip(info.points, reach, strict=True)),
        max(p.metric.mean + r for p, r in zip(info.points, reach, strict=True)),
    )
    left, right = padded(info.points[0].peak_bytes, info.points[-1].peak_bytes, 0.12)
    line = front_line(info.points)
    others = [point for point in info.points if not point.role and not point.on_front]
    figure = new_figure(metric_axis(low, high, info.metric_name), bytes_axis(left, right, "peak memory of one step"))
    figure.add_scatter(
        x=[p.peak_bytes for p in line],
        y=[p.metric.mean for p in line],
        mode="lines",
        line={"color": NEUTRAL, "width": 1.5, "shape": "hv"},
        name="front",
        hoverinfo="skip",
    )
    _add_points(figure, [p for p in others if p.metric.half_width is not None], "tried", opacity=0.45)
    _add_points(figure, [p for p in others if p.metric.half_width is None], "tried once", opacity=0.45)
    _add_points(figure, [p for p in line if not p.role], "on the front", opacity=1.0)
    for point in info.points:
        if point.role:
            inward = "left" if point.peak_bytes > (left + right) / 2 else "right"
            _add_points(figure, [point], point.name, opacity=1.0, label=f"bottom {inward}")
    return figure


def draw_curves(info: CurvesInfo) -> go.Figure:
    """Mean over the seeds along training; the band of a reference style is its least to its largest."""
    curves = [curve for curve in info.curves if curve.steps]
    settled = [value for c in curves for value in (*c.low[len(c.low) // 4 :], *c.high)]  # the first steps say little
    low, high = padded(min(settled), max(settled))
    figure = new_figure(metric_axis(low, high, info.metric_name), plain_axis("training step"))
    for curve in curves:
        look = LOOKS[curve.role]
        if curve.role and curve.seeds > 1:
            figure.add_scatter(
                x=[*curve.steps, *curve.steps[::-1]],
                y=[*curve.high, *curve.low[::-1]],
                mode="lines",
                line={"width": 0},
                fill="toself",
                fillcolor=faded(look.colour, 0.16),
                hoverinfo="skip",
                showlegend=False,
            )
    others = [curve for curve in curves if not curve.role]
    for curve in curves:
        look = LOOKS[curve.role]
        figure.add_scatter(
            x=curve.steps,
            y=curve.mean,
            mode="lines+markers" if curve.role else "lines",
            line={"color": look.colour, "width": 2 if curve.role else 1.5, "dash": look.dash},
            marker={"symbol": look.symbol, "size": 6},
            name=escape(curve.name) if curve.role else "others on the front",
            legendgroup=curve.role or "others",
            showlegend=bool(curve.role) or curve is others[0],
            text=[escape(curve.name)] * len(curve.steps),
            hovertemplate="%{text}<br>step %{x}<extra></extra>",
        )
    return figure


def _add_points(figure: go.Figure, points: Sequence[FrontPoint], name: str, *, opacity: float, label: str = "") -> None:
    if not points:
        return
    look, reach = LOOKS[points[0].role], [p.metric.half_width for p in points]
    figure.add_scatter(
        x=[p.peak_bytes for p in points],
        y=[p.metric.mean for p in points],
        error_y=None if None in reach else {"array": reach, "thickness": 1.5, "width": 4},
        mode="markers+text" if label else "markers",
        marker={"color": look.colour, "symbol": look.symbol, "size": 12 if points[0].role else 8},
        text=[escape(p.name) for p in points],
        textposition=label or None,
        showlegend=not label,
        cliponaxis=False,
        opacity=opacity,
        name=escape(name),
        customdata=[
            f"{escape(p.name)}<br>{p.metric.text}, {format_bytes(p.peak_bytes)}<br>seeds: {p.seeds}" for p in points
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )


METHOD_COLOURS = {"clip": "#d55e00", "dp-sgd": "#d55e00", "clip21": "#009e73", "alpha": "#3a8fd0"}


def curve_name(curve: Descent) -> str:
    """The method of a curve, and its epsilon."""
    return curve.method if curve.epsilon is None else f"{curve.method}, epsilon {format_number(curve.epsilon)}"


def draw_methods(records: Sequence[int], curves: Sequence[Descent]) -> go.Figure:
    """Squared gradient norms along the steps, both logarithmic; those with noise are dotted."""
    up = {**plain_axis("squared gradient norm"), "type": "log", "exponentformat": "power"}
    across = {**plain_axis("step"), "type": "log"}
    figure = new_figure(up, across, height=460)
    for place, curve in enumerate(curves):
        family = curve.method.removeprefix("dp-").partition("-")[0]
        colour = METHOD_COLOURS.get(curve.method) or METHOD_COLOURS.get(family, NEUTRAL)
        stochastic = "sgd" in curve.method
        figure.add_scatter(
            x=list(records[1:]),
            y=list(curve.squared[1:]),
            mode="lines+markers",
            line={
                "color": colour,
                "width": 2,
                "dash": "dot" if curve.epsilon is not None else "dash" if stochastic else "solid",
            },
            marker={"symbol": place, "size": 6},
            name=escape(curve_name(curve)),
            hovertemplate="step %{x}: %{y:.2e}<extra>" + escape(curve_name(curve)) + "</extra>",
        )
    return figure
