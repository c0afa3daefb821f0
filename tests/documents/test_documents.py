"""Typed documents: read and written without loss, refused by name, shown in few lines, without torch."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from html import unescape
from pathlib import Path

import pytest

from groupsearch import DocumentError, GroupSearchError
from groupsearch.documents import KINDS, Document, Fit, Profile, Search, Train, Verify, json_schema
from tests.documents.schemas import texts, violations
from tests.report.synthetic import train_document, verify_document

ROOT = Path(__file__).resolve().parents[2]
PROFILE, SEARCH = (
    ROOT / "profiles" / "hf-gpt2-b16-cpu-checkpoint-blocks.json",
    ROOT / "reports" / "digits-vit-checkpointed.json",
)
COMMITTED = [*sorted((ROOT / "profiles").glob("hf-*.json")), *sorted((ROOT / "reports").glob("*.json"))]

OLDER = sorted((Path(__file__).parent / "fixtures").glob("*.json"))


def plain(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_documents_round_trip_and_are_as_the_schema_says(path):
    document, raw = Document.load(path), plain(path)
    assert document.extra == {}, "every key has its field"
    assert document.to_json() == raw
    assert list(violations(json_schema(type(document)), raw, json_schema(type(document)))) == []


def test_every_committed_document_of_a_kind_is_among_them():
    found = [path for folder in ("profiles", "reports") for path in (ROOT / folder).glob("*.json")]
    kinds = {kind.KIND for kind in KINDS}
    assert sorted(path for path in found if plain(path).get("kind") in kinds) == sorted(COMMITTED)


def test_the_schemas_that_are_shipped_are_those_of_the_classes():
    for path, text in texts().items():
        assert path.read_text(encoding="utf-8") == text, "run `python -m tests.documents.schemas`"


def test_the_schema_sees_what_is_wrong():
    schema, garbled = json_schema(Profile), plain(PROFILE)
    garbled["estimates"][0]["peak_bytes"] = "many"
    del garbled["floor_bytes"]
    garbled["kind"] = "search"
    assert len(list(violations(schema, garbled, schema))) == 3


def test_what_is_not_known_is_kept():
    raw = plain(SEARCH)
    raw["later"] = {"a": [1, None]}
    raw["candidates"][0]["metric"]["later"] = 3
    raw["trace"]["sites"][0]["later"] = "x"
    raw["trace"]["later"] = 1
    document = Search.from_json(raw)
    assert document.extra["later"] == {"a": [1, None]}
    assert document.to_json() == raw
    assert document.trace.sites[0].name == raw["trace"]["sites"][0]["name"]


def test_a_null_and_a_missing_key_are_told_apart():
    raw = plain(PROFILE)
    assert "not_measured" not in Profile.from_json(raw).to_json()
    assert Profile.from_json({**raw, "not_measured": None}).to_json()["not_measured"] is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.pop("floor_bytes"), "floor_bytes"),
        (lambda raw: raw["estimates"][3].update(peak_bytes=None), r"estimates\[3\]\.peak_bytes"),
        (lambda raw: raw["estimates"][3].update(boundaries=[1, "2"]), r"estimates\[3\]\.boundaries\[1\]"),
        (lambda raw: raw["model"].update(name=7), r"model\.name"),
        (lambda raw: raw.update(estimates={}), "estimates to be a list"),
        (lambda raw: raw["trace"].pop("sites"), "trace to be a Trace"),
        (lambda raw: raw.update(schema_version=9), "newer"),
        (lambda raw: raw.update(settings=None), "settings"),
        (lambda raw: raw.update(kind="verify"), "kind verify"),
    ],
)
def test_what_is_wrong_is_refused_by_name(change, said):
    raw = plain(PROFILE)
    change(raw)
    with pytest.raises(DocumentError, match=said):
        Profile.from_json(raw)


def test_a_profile_is_no_fit_and_a_search_is_no_profile():
    with pytest.raises(DocumentError, match="Expected a Fit"):
        Fit.load(PROFILE)
    with pytest.raises(DocumentError, match=r"Expected a Profile .* kind search"):
        Profile.load(SEARCH)


def test_saving_is_whole_and_overwrites_only_by_force(tmp_path):
    document, path = Profile.load(PROFILE), tmp_path / "a.json"
    assert document.save(path) == path
    assert path.read_bytes() == PROFILE.read_bytes()
    with pytest.raises(GroupSearchError, match="exists already"):
        document.save(path)
    document.save(path, force=True)
    assert Profile.load(path).to_json() == document.to_json()
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_documents_do_not_change():
    with pytest.raises(FrozenInstanceError):
        Profile.load(PROFILE).summary = "better"


def test_they_are_shown_in_few_lines():
    for path in COMMITTED:
        document = Document.load(path)
        shown, page = repr(document), document._repr_html_()
        assert shown.startswith(f"{type(document).__name__} of {document.model.name}")
        assert document.finding in shown
        assert len(shown.splitlines()) <= 16
        assert page.count("<tr>") == 1 + min(12, len(document.table().rows))
    named = plain(PROFILE)
    named["estimates"][0]["grouping"] = "<script>"
    assert "<script>" not in Profile.from_json(named)._repr_html_()


@pytest.mark.parametrize("path", COMMITTED[-1:] + OLDER, ids=lambda path: path.stem)
def test_a_table_says_the_same_in_every_drawing(path):
    table = Document.load(path).table()
    heads, *rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.html().split("<tr>")[1:]]
    assert [unescape(cell) for cell in heads] == [heading.strip() for heading in table.columns]
    assert [tuple(map(unescape, row)) for row in rows] == list(table.rows)
    lines = table.text(len(table.rows)).splitlines()
    assert [line.split() for line in lines[1:]] == [" ".join(row).split() for row in table.rows]
    assert len(table.text(1).splitlines()) == 2


def test_rows_become_a_table(monkeypatch):
    document = Search.load(SEARCH)
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "polars", None)
    rows = document.to_dataframe()
    assert [row["peak_bytes"] for row in rows] == [row.peak_bytes for row in document.candidates]
    assert rows[0]["metric.mean"] == document.candidates[0].metric.mean
    monkeypatch.undo()
    pandas = pytest.importorskip("pandas")
    frame = document.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["peak_bytes"]) == [row["peak_bytes"] for row in rows]


def test_no_torch_is_needed():
    code = (
        f"import sys; from groupsearch.documents import Document; d = Document.load({str(SEARCH)!r}); repr(d); "
        "d.recommended.metric.mean; assert 'torch' not in sys.modules and 'optuna' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(("kind", "make"), [(Verify, verify_document), (Train, train_document)])
def test_what_a_report_is_drawn_from_is_checked_too(kind, make):
    raw = copy.deepcopy(make())
    del raw["model"]["name"]
    with pytest.raises(DocumentError, match="name"):
        kind.from_json(raw)
