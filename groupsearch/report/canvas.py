"""What figures are drawn on: the roles' looks, the empty figure, axes with round ticks worded by ``units``."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import plotly.graph_objects as go

from groupsearch.report.subject import is_share
from groupsearch.units import format_number, format_percent, format_short_bytes


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


def bytes_axis(low_bytes: float, high_bytes: float, title: str, count: int = 5) -> dict[str, Any]:
    """An axis of sizes with ticks at round numbers of KiB, MiB or GiB."""
    unit = 2 ** (10 * max(0, min(4, (int(high_bytes).bit_length() - 1) // 10)))
    ticks = [value * unit for value in round_ticks(low_bytes / unit, high_bytes / unit, count)]
    return _axis(low_bytes, high_bytes, title, ticks, [format_short_bytes(tick) for tick in ticks])


def metric_axis(low: float, high: float, name: str) -> dict[str, Any]:
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


def new_figure(up: dict[str, Any], across: dict[str, Any], height: int = 400) -> go.Figure:
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


def plain_axis(title: str) -> dict[str, Any]:
    """An axis that plotly finds the ticks of."""
    look = {"zeroline": False, "fixedrange": True, "automargin": True, "ticks": ""}
    return {"title": {"text": title, "standoff": 12}, **look}


def faded(colour: str, opacity: float) -> str:
    """The colour, let through by ``opacity``."""
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _axis(low: float, high: float, title: str, ticks: list[float], words: list[str]) -> dict[str, Any]:
    return {**plain_axis(title), "range": [low, high], "tickvals": ticks, "ticktext": words}
