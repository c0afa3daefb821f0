"""Figures, tables and the one HTML page of a document; plotly is used here and nowhere else.

The page is imported when it is first asked for: what a job or a terminal says of a document needs no plotly.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from groupsearch.report.page import render_page

__all__ = ["render_page"]


def __getattr__(name: str) -> Callable[..., str]:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: Callable[..., str] = getattr(import_module("groupsearch.report.page"), name)
    return found
