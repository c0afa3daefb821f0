"""What a page is put together from: sections under a heading, and figures as the page's script draws them."""

from __future__ import annotations

import re
from html import escape
from typing import NamedTuple

import plotly.graph_objects as go
import plotly.io


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
