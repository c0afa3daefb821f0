from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from groupsearch.errors import DocumentError
from groupsearch.report import render_page
from groupsearch.report.figures import round_ticks
from groupsearch.units import format_bytes
from tests.report.conftest import KINDS
from tests.report.synthetic import STYLES, peak, profile_document, search_document, transformer_trace

Documents = dict[str, dict[str, Any]]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&"


class Page(HTMLParser):
    """What a browser would build: tags with their attributes, text by tag, and the tags that never closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[tuple[str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.append((self.open[-1], data))

    def words(self, *tags: str) -> list[str]:
        return [data for tag, data in self.text if tag in tags]

    def figures(self) -> dict[str, Any]:
        ids = [a["id"] for tag, a in self.tags if tag == "script" and a.get("type") == "application/json"]
        data = [text for tag, text in self.text if tag == "script" and text.startswith("{")]
        return {str(name): json.loads(text) for name, text in zip(ids, data, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_well_formed_and_loads_nothing(pages: dict[str, str], kind: str) -> None:
    page = Page(pages[kind])
    assert page.open == []
    loads = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert loads == ["data:,"]
    assert "@import" not in "".join(page.words("style"))
    assert "url(" not in "".join(page.words("style"))


@pytest.mark.parametrize(("kind", "count"), [("profile", 1), ("search", 1), ("train", 1), ("verify", 0)])
def test_plotly_is_embedded_once_and_the_page_stays_small(pages: dict[str, str], kind: str, count: int) -> None:
    assert pages[kind].count(get_plotlyjs()) == count
    assert pages[kind].count(f"plotly.js v{get_plotlyjs_version()}") == count
    assert len(pages[kind].encode()) < 7 * 2**20


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_the_same_every_time(documents: Documents, pages: dict[str, str], kind: str) -> None:
    assert render_page(copy.deepcopy(documents[kind])) == pages[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_plot_has_its_data_a_label_and_an_id_of_its_own(pages: dict[str, str], kind: str) -> None:
    page = Page(pages[kind])
    plots = [attrs for tag, attrs in page.tags if tag == "div" and attrs.get("class") == "plot"]
    assert {f"{plot['id']}-data" for plot in plots} == set(page.figures())
    assert all(plot["aria-label"] and plot["role"] == "img" for plot in plots)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("kind", "figures"),
    [
        ("profile", {"timeline", "groups", "strip", "breakdown"}),
        ("search", {"front", "timeline", "strip", "breakdown", "curves"}),
        ("train", {"timeline", "strip", "breakdown", "curves"}),
        ("verify", set()),
    ],
)
def test_each_kind_shows_its_figures(pages: dict[str, str], kind: str, figures: set[str]) -> None:
    assert set(Page(pages[kind]).figures()) == {f"figure-{name}-data" for name in figures}


def test_hostile_strings_stay_text() -> None:
    document = search_document(HOSTILE)
    document["environment"]["device"] = HOSTILE
    document["settings"][HOSTILE] = HOSTILE
    document["trace"]["sites"][3]["name"] = HOSTILE
    document["candidates"][2]["source"] = HOSTILE
    for candidate in document["candidates"]:
        if candidate["metric"]:
            candidate["metric"]["name"] = HOSTILE
    html = render_page(document)
    page = Page(html)
    assert page.open == []
    tame = search_document("tame")
    tame["settings"]["one more"] = "row"
    plain = Page(render_page(tame))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    drawn = json.dumps([trace for figure in page.figures().values() for trace in figure["data"]])
    assert "<img" not in drawn  # plotly reads tags in texts of its own
    assert any(HOSTILE in text for text in ["".join(page.words("td", "h1", "p"))])


def test_the_recommendation_and_the_key_figures_come_first(pages: dict[str, str]) -> None:
    page, trace = Page(pages["search"]), transformer_trace()
    least, whole = peak(trace, STYLES["4"]).peak_bytes, peak(trace, ()).peak_bytes
    saving = f"{100 * (1 - least / whole):.1f}"
    assert "".join(page.words("h1")).replace("\N{NO-BREAK SPACE}", " ") == (
        f"Cut the model into 4 groups: 93.1 ± 0.3 % accuracy at a peak of {format_bytes(least)}, {saving} % less "
        f"memory than all-layer clipping, 0.4 points below all-layer, which is within the noise of the runs."
    )
    values = [text.replace("\N{NO-BREAK SPACE}", " ") for text in page.words("dd")]
    for expected in ("93.1 ± 0.3 %", format_bytes(least), f"-{saving} %", "4"):
        assert expected in values


def test_a_difference_outside_the_noise_and_one_without_seeds_are_told_apart() -> None:
    document = search_document()
    document["recommended"] = next(c for c in document["candidates"] if c["groups"] == 28)
    assert "1.8 points below all-layer." in render_page(document).replace("\N{NO-BREAK SPACE}", " ")
    document["recommended"]["metric"]["half_width"] = None
    assert "too few seeds" in render_page(document)


@pytest.mark.parametrize("kind", ["profile", "search", "train"])
def test_printed_parts_sum_to_the_printed_peak(pages: dict[str, str], kind: str) -> None:
    caption = "Alive at the peak, in bytes"
    body = pages[kind].split(f"<caption>{caption}</caption>")[1].split("</table>")[0]
    rows = [re.findall(r"<td class=number>([\d,]+)</td>", row) for row in body.split("</tr>")[1:-1]]
    assert len(rows) == 3
    for row in rows:
        *parts, total = [int(cell.replace(",", "")) for cell in row]
        assert sum(parts) == total


def test_the_figures_carry_the_numbers_of_the_document(documents: Documents, pages: dict[str, str]) -> None:
    front = Page(pages["search"]).figures()["figure-front-data"]["data"]
    drawn = {
        (x, y) for trace in front if "markers" in trace["mode"] for x, y in zip(trace["x"], trace["y"], strict=True)
    }
    candidates = [row for row in documents["search"]["candidates"] if row["metric"]]
    assert drawn == {(row["peak_bytes"], row["metric"]["mean"]) for row in candidates}
    lines = Page(pages["profile"]).figures()["figure-timeline-data"]["data"]
    whole = next(trace for trace in lines if trace.get("name") == "all-layer")
    assert max(whole["y"]) == peak(transformer_trace(), ()).peak_bytes


@pytest.mark.parametrize(
    ("kind", "part", "title"),
    [
        ("search", "cost", "What the search cost"),
        ("search", "training", "How training went"),
        ("search", "candidates", "What accuracy costs in memory"),
        ("search", "trace", "Memory over one training step"),
        ("profile", "front", "How many groups are enough"),
        ("train", "curve", "How training went"),
        ("train", "epsilon", "Privacy spent"),
        ("verify", "rows", "Is the estimate right?"),
    ],
)
def test_a_missing_part_leaves_its_section_out(
    documents: Documents, pages: dict[str, str], kind: str, part: str, title: str
) -> None:
    heading = f"<h2>{title}</h2>"
    assert heading in pages[kind]
    rest = {key: value for key, value in documents[kind].items() if key != part}
    assert heading not in render_page(rest)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bare_header_still_makes_a_page(documents: Documents, kind: str) -> None:
    header = ("schema_version", "kind", "model", "environment", "settings")
    page = Page(render_page({key: documents[kind][key] for key in header}))
    assert page.open == []
    assert page.words("h1")[0]


def test_a_garbled_document_is_refused(documents: Documents) -> None:
    with pytest.raises(DocumentError, match="Write it again"):
        render_page({**documents["search"], "candidates": [{"metric": {"mean": 0.5}, "boundaries": []}]})
    with pytest.raises(DocumentError):
        render_page({**documents["search"], "trace": {"sites": []}})


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)), (0.0, 37.0, (0.0, 10.0, 20.0, 30.0)), (3.0, 3.0, (3.0,))],
)
def test_ticks_are_round(low: float, high: float, ticks: tuple[float, ...]) -> None:
    assert round_ticks(low, high) == ticks


def test_a_profiles_own_summary_is_its_headline_and_a_search_keeps_the_recommendation() -> None:
    summary = "4 groups need 25 MiB."
    assert Page(render_page({**profile_document(), "summary": summary})).words("h1") == [
        "4 groups need 25\N{NO-BREAK SPACE}MiB."
    ]
    assert "Cut the model into 4 groups" in Page(render_page({**search_document(), "summary": summary})).words("h1")[0]


def test_an_interrupted_search_says_that_it_recommends_nothing() -> None:
    memory = {key: profile_document()[key] for key in ("front", "floor_bytes", "estimates")}
    document = {**search_document(), **memory, "recommended": None, "candidates": []}
    assert "no recommendation" in Page(render_page(document)).words("h1")[0]
