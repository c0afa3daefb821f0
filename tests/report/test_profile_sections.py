"""What fits and what norm methods were chosen, as a page shows them; and what a GPU reserved beside the allocated."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from groupsearch.errors import DocumentError
from groupsearch.report import render_page
from groupsearch.report.figures import draw_fit
from groupsearch.report.info import comparisons, fit_info
from groupsearch.report.subject import Subject
from groupsearch.units import format_bytes
from tests.report.synthetic import fit_document, joint_document, profile_document
from tests.report.test_page import HOSTILE, Page


def cells(html: str, caption: str) -> list[list[str]]:
    """The rows of the table whose caption begins so, as text."""
    body = re.split(rf"<caption>{re.escape(caption)}[^<]*</caption>", html)[1].split("</table>")[0]
    return [re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", row) for row in body.split("<tr>")[1:]]


def test_the_rows_are_those_of_the_document() -> None:
    document = fit_document()
    info = fit_info(Subject(document))
    assert info is not None
    assert (info.what, info.memory_bytes) == ("batch", 2**16)
    assert [(row.name, row.size) for row in info.rows] == [
        (row["grouping"], row["size"]) for row in document["fit"]["rows"]
    ]
    assert {row.name: row.measured for row in info.rows if row.measured} == {"best": (15, 30), "best:2": (1,)}
    assert [row.role for row in info.rows[:4]] == ["", "recommended", "all-layer", "layer-wise"]


def test_a_bar_is_filled_only_where_the_size_itself_was_run() -> None:
    info = fit_info(Subject(fit_document()))
    assert info is not None
    run, predicted, diamonds = draw_fit(info).data
    assert (run.name, list(run.y), list(run.x)) == ("measured at that size", ["best:2"], [1])
    assert "predicted" in predicted.name
    assert dict(zip(predicted.y, predicted.x, strict=True)) == {
        row.name: row.size for row in info.rows if row.name != "best:2"
    }
    assert all("rgba" in colour for colour in predicted.marker.color)
    assert not any("rgba" in colour for colour in run.marker.color)
    assert sorted(zip(diamonds.y, diamonds.x, strict=True)) == [("best", 15), ("best", 30), ("best:2", 1)]


def test_the_page_begins_with_what_fits() -> None:
    document = fit_document()
    html = render_page(document)
    page = Page(html)
    assert page.open == []
    assert "".join(page.words("h1")) == document["fit"]["summary"]
    assert "figure-fit-data" in page.figures()
    assert "Grouping saves much here." in html, "the finding about the step it began from is still told"
    assert "what fits" in page.words("title")[0]
    values = page.words("dd")
    for expected in ("60", "0.94x of non-private", "40", "64"):
        assert expected in values


def test_the_table_marks_rates_as_measured_or_predicted_and_the_end_of_the_search() -> None:
    head, *rows = cells(render_page(fit_document()), "Largest batch of every grouping")
    assert head[-1] == "per second"
    by_name = {row[0]: row for row in rows}
    assert by_name["best"][-1] == "1,234 predicted"
    assert by_name["best:2"][-1] == "10 measured"
    assert by_name["non-private"][2] == "64 or more"
    assert by_name["uniform:4"][1:4] == ["4", "0", "0.00x"]
    assert by_name["uniform:4"][5] == "", "nothing fits, so there is no peak"
    bare = fit_document()
    for row in bare["fit"]["rows"]:
        row.pop("examples_per_second", None)
    assert "per second" not in cells(render_page(bare), "Largest batch of every grouping")[0]


def test_lengths_are_called_so_and_batches_that_were_measured_are_no_lengths() -> None:
    document = fit_document()
    document["fit"]["varies"] = "context"
    info = fit_info(Subject(document))
    assert info is not None
    assert info.what == "sequence"
    assert all(row.measured == () for row in info.rows)
    assert "longest sequence, best grouping" in render_page(document)


@pytest.mark.parametrize("rows", [None, []])
def test_a_fit_without_rows_is_a_profile(rows: Any) -> None:
    document = fit_document()
    document["fit"]["rows"] = rows
    html = render_page(document)
    assert "What fits into" not in html
    assert "Grouping saves much here." in "".join(Page(html).words("h1"))


def test_names_in_a_fit_stay_text() -> None:
    document = fit_document()
    for row in document["fit"]["rows"][4:]:
        row["grouping"] += HOSTILE
    page, plain = Page(render_page(document)), Page(render_page(fit_document()))
    assert page.open == []
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]


def test_a_garbled_row_is_a_document_error() -> None:
    document = fit_document()
    del document["fit"]["rows"][2]["size"]
    with pytest.raises(DocumentError):
        render_page(document)


def test_a_joint_choice_is_shown_against_every_method() -> None:
    document = joint_document()
    html = render_page(document)
    _, *rows = cells(html, "Peaks and operations by norm method")
    assert [row[0] for row in rows] == ["mixed", "ghost", "instantiate", "recompute", "joint"]
    assert rows[0] == ["mixed", format_bytes(2**20), format_bytes(2**19), "1e+06", "2.00x"]
    assert "ghost: 5 weights; instantiate: 13 weights." in html
    assert Subject(document).chosen == tuple(document["joint"]["boundaries"])
    assert "joint, 3 groups" in [entry.name for entry in Subject(document).shown]
    assert "How norms are taken" not in render_page(profile_document())


def test_reserved_is_shown_beside_allocated_and_only_where_it_is_known() -> None:
    document = joint_document()
    head, *rows = cells(render_page(document), "Estimate against what was seen")
    reserved = head.index("reserved")
    assert head[reserved + 1] == "fragmented"
    found = {(row[0], row[1]): row for row in rows}
    for row in document["measurements"]:
        shown = found[row["grouping"], "measurement"]
        assert shown[reserved : reserved + 2] == [format_bytes(2 * row["peak_bytes"]), "50.0 %"]
        assert found[row["grouping"], "simulation"][reserved : reserved + 2] == ["", ""]
    assert "reserved" not in cells(render_page(profile_document()), "Estimate against what was seen")[0]
    assert all(row.seen_bytes != row.reserved_bytes for row in comparisons(Subject(document))), "never mixed"


@pytest.mark.parametrize("make", [fit_document, joint_document])
def test_the_same_document_makes_the_same_page(make: Any) -> None:
    assert render_page(copy.deepcopy(make())) == render_page(make())
