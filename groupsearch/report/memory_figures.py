"""Figures of memory, the drawing step: from an info to a plotly figure. Nothing here reads a document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from groupsearch.report.canvas import (
    GROUP_COLOURS,
    LOOKS,
    NEUTRAL,
    PART_COLOURS,
    bytes_axis,
    faded,
    new_figure,
    padded,
    plain_axis,
)
from groupsearch.report.fits import FitInfo
from groupsearch.report.info import BreakdownRow, GroupsInfo, StripInfo, TimelineInfo
from groupsearch.report.subject import PARTS
from groupsearch.units import format_bytes, format_count


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
