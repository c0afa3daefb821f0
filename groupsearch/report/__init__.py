"""Figures, tables and the one HTML page of a document; plotly is used here and nowhere else."""

from groupsearch.report.page import render_page

__all__ = ["render_page"]
