"""One self-contained HTML page from one document: works offline, the same bytes for the same document."""

from __future__ import annotations

import webbrowser
from collections.abc import Mapping
from html import escape
from pathlib import Path

from plotly.offline import get_plotlyjs

from groupsearch.documents import Document
from groupsearch.errors import DocumentError, GroupSearchError
from groupsearch.records import read_document, write_text
from groupsearch.report import words
from groupsearch.report.sections import SECTIONS, Section, unbroken
from groupsearch.report.subject import Subject, read

TITLES = {
    "search": "search report",
    "profile": "memory profile",
    "fit": "what fits",
    "verify": "verification",
    "train": "training report",
    "study": "study of methods",
}


def render_page(document: Mapping[str, object]) -> str:
    """The page of a document of any kind.

    Everything it needs is inside, plotly once; nothing is loaded from elsewhere. Text from the
    document is escaped. Parts that the document lacks leave their section out. The result
    depends on the document alone.

    Raises:
        DocumentError: when a part of the document is garbled.
    """
    subject = Subject(read(document))
    try:
        sections = [section for make in SECTIONS if (section := make(subject)) is not None]
        return _page(subject, sections)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DocumentError(
            f"Expected a complete groupsearch document, found one that lacks or garbles {error!r}. "
            f"Write it again with the command that made it."
        ) from error


def _page(subject: Subject, sections: list[Section]) -> str:
    model = subject.document["model"]
    batch = model.get("batch_size")
    eyebrow = f"groupsearch {TITLES[subject.topic]} · {subject.model_name}" + (f" · batch {batch}" if batch else "")
    keys = "".join(
        f'<div><dt>{escape(key.label)}</dt><dd class="value">{unbroken(escape(key.value))}</dd>'
        f'<dd class="note">{escape(key.note)}</dd></div>'
        for key in words.key_figures(subject)
    )
    drawn = any('class="plot"' in section.body for section in sections)
    scripts = f"<script>{get_plotlyjs()}</script>\n<script>{SCRIPT}</script>" if drawn else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(eyebrow)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n'
        f'<main>\n<header>\n<p class="eyebrow">{escape(eyebrow)}</p>\n'
        f"<h1>{unbroken(escape(words.headline(subject)))}</h1>\n"
        + (f'<dl class="keys">{keys}</dl>\n' if keys else "")
        + f'<p class="lede">{words.EXPLAINER if subject.kind != "study" else ""} {words.PURPOSE[subject.topic]}</p>\n'
        f"{_randomness(subject)}{_not_measured(subject)}</header>\n"
        + "".join(f"<section>\n<h2>{escape(s.title)}</h2>\n{s.body}\n</section>\n" for s in sections)
        + f"<footer>Made by groupsearch from a {escape(subject.kind)} document, schema "
        f"{escape(str(subject.document['schema_version']))}. The page needs no network.</footer>\n</main>\n"
        f"{scripts}\n</body>\n</html>\n"
    )


def _randomness(subject: Subject) -> str:
    """At the top, as it says what every epsilon of the page is worth."""
    if subject.kind not in ("search", "train", "study"):
        return ""
    return f'<p class="lede"><strong>{escape(words.randomness(subject.document))}</strong></p>\n'


def _not_measured(subject: Subject) -> str:
    """At the top, of numbers for a card that was not there."""
    said = subject.document.get("not_measured")
    return f'<p class="lede"><strong>{escape(str(said))}</strong></p>\n' if said else ""


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


CSS = """
:root { color-scheme: light dark; --ink: #1b2026; --soft: #59636e; --page: #ffffff; --panel: #f5f7f9; --line: #dfe4e9;
  --accent: #00795a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #a0aab4; --page: #121518; --panel: #1b1f24;
  --line: #30363d; --accent: #3fcf9f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55; font-size: 1rem;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
.eyebrow { margin: 0 0 .5rem; color: var(--accent); font-weight: 600; font-size: .875rem; letter-spacing: .02em;
  overflow-wrap: anywhere; }
h1 { margin: 0 0 1.5rem; font-size: clamp(1.35rem, 1rem + 1.9vw, 2.1rem); line-height: 1.25; font-weight: 650;
  letter-spacing: -.015em; text-wrap: balance; overflow-wrap: anywhere; }
h2 { margin: 3.5rem 0 .35rem; font-size: 1.3rem; line-height: 1.3; font-weight: 650; letter-spacing: -.01em; }
p { margin: 0 0 1rem; max-width: 44rem; }
.lede { color: var(--soft); }
.keys { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1px; margin: 0 0 1.75rem;
  background: var(--line); border: 1px solid var(--line); border-radius: .75rem; overflow: hidden; }
.keys div { background: var(--panel); padding: 1rem 1.15rem; display: flex; flex-direction: column; }
.keys dt { color: var(--soft); font-size: .875rem; }
.keys dd { margin: 0; }
.keys .value { font-size: 1.4rem; font-weight: 650; letter-spacing: -.02em; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
.keys .note { color: var(--soft); font-size: .8125rem; overflow-wrap: anywhere; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem;
  margin: 0 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .875rem; }
figure { margin: 1rem 0 0; }
figcaption { color: var(--soft); font-size: .875rem; max-width: 44rem; margin-top: .5rem; }
.plot { width: 100%; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 .5rem; }
th, td { text-align: left; padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td { max-width: 22rem; overflow-wrap: anywhere; min-width: 4.5rem; }
td.number { white-space: nowrap; }
.facts, .side { display: grid; gap: 1rem 1.5rem; margin: 1rem 0; }
.facts { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.side { grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 0 2.5rem; }
.facts dt { color: var(--soft); font-size: .875rem; }
.facts dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; }
details { border-top: 1px solid var(--line); }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: .8rem 0; font-weight: 600; }
summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
footer { margin-top: 3rem; color: var(--soft); font-size: .875rem; overflow-wrap: anywhere; }
@media (max-width: 36rem) { main { padding: 2rem 1rem 3rem; } .keys { grid-template-columns: 1fr 1fr; }
  .keys div { padding: .8rem .9rem; } .keys .value { font-size: 1.3rem; } h2 { margin-top: 2.75rem; } }
@media print { .plot { break-inside: avoid; } }
"""

SCRIPT = """
(function () {
  const plots = Array.from(document.querySelectorAll(".plot"));
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
  function themed(layout) {
    const look = JSON.parse(JSON.stringify(layout));
    const family = getComputedStyle(document.body).fontFamily;
    look.font = { color: colour("--ink"), family: family, size: 13 };
    look.hoverlabel = { bgcolor: colour("--panel"), bordercolor: colour("--line"),
      font: { color: colour("--ink"), family: family, size: 13 }, align: "left" };
    for (const axis of ["xaxis", "yaxis"]) {
      look[axis].gridcolor = colour("--line");
      look[axis].tickfont = { color: colour("--soft"), size: 12 };
      look[axis].title.font = { color: colour("--soft"), size: 13 };
    }
    return look;
  }
  function draw() {
    for (const plot of plots) {
      const figure = JSON.parse(document.getElementById(plot.id + "-data").textContent);
      Plotly.react(plot, figure.data, themed(figure.layout), { displayModeBar: false, responsive: true });
    }
  }
  dark.addEventListener("change", draw);
  draw();
})();
"""
