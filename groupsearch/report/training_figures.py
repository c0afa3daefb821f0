"""Figures of training, the drawing step: from an info to a plotly figure. Nothing here reads a document."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from groupsearch.report.canvas import LOOKS, NEUTRAL, bytes_axis, faded, metric_axis, new_figure, padded, plain_axis
from groupsearch.report.curves import CurvesInfo
from groupsearch.report.info import FrontInfo, FrontPoint, front_line
from groupsearch.units import format_bytes


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
