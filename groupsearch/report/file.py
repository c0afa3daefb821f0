"""The page of a document as a file."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from groupsearch.documents import Document
from groupsearch.errors import GroupSearchError
from groupsearch.records import read_document, write_text
from groupsearch.report.page import render_page


def report(
    document: Document | str | Path, output: str | Path | None = None, *, force: bool = False, open: bool = False
) -> Path:
    """Draw a document as one HTML page that works offline, and return its path.

    Args:
        document: of any kind, or the file of one.
        output: where to write the page; beside a document's file as .html where nothing is said.
        force: overwrite what is there.
        open: open the page in a browser.

    Raises:
        DocumentError: when the document cannot be read or drawn.
        GroupSearchError: when the page cannot be written, or nobody says where.
    """
    found = document.to_json() if isinstance(document, Document) else read_document(document)
    if output is None and isinstance(document, Document):
        raise GroupSearchError(
            "Expected a file to write the page to, found none. Name it, as in report(found, 'a.html')."
        )
    path = write_text(output or Path(str(document)).with_suffix(".html"), render_page(found), force=force)
    if open:
        webbrowser.open(path.resolve().as_uri())
    return path
