"""``groupsearch report``: one self-contained HTML page from a document.

Apart from ``optimize``, which writes such a page, too: one file for each command.
"""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from groupsearch.cli.parameters import json_option, no_seed_option
from groupsearch.cli.terminal import say, writable


@click.command("report")
@click.argument("document", type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="Where to write the page. [default: beside DOCUMENT, as .html]")
@click.option("--force", is_flag=True, help="Overwrite what is there.")
@click.option("--open", "open_page", is_flag=True, help="Open the page in a browser.")
@no_seed_option
@json_option
def command(document: str, output: str | None, force: bool, open_page: bool, as_json: bool) -> None:
    """Draw DOCUMENT as one HTML page.

    DOCUMENT is of any kind; the page works offline.

    \b
    groupsearch report reports/digits-vit-b288-cpu-search.json --open
    """
    from groupsearch.records import read_document

    found = read_document(document)
    path = write_page(found, output or Path(document).with_suffix(".html"), force=force)
    if as_json:
        click.echo(json.dumps({"page": str(path), "size_bytes": path.stat().st_size}))
    if open_page:
        webbrowser.open(path.resolve().as_uri())


def write_page(document: Mapping[str, Any], path: str | Path, *, force: bool) -> Path:
    """Draw the page of a document and say where it is."""
    from groupsearch.records import write_text
    from groupsearch.report import render_page

    path = writable(path, force=force)
    write_text(path, render_page(document), force=force)
    say(f"Wrote {path}")
    return path
