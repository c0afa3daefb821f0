"""Documents written by versions before this one: read, equal in every figure, and written again as they were.

The five kinds in ``fixtures`` were written by the last version whose documents had no types, the second fit by one that
told nothing of a device's context; all are of a small model of three layers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import pytest

from groupsearch import DocumentError
from groupsearch.documents import KINDS, Document, Fit, Search, Study, Train, json_schema
from groupsearch.documents.codec import Part
from groupsearch.report import render_page
from tests.documents.schemas import violations

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.json"))
each_of_them = pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)


def plain(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def figures(value: object, where: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a plain structure, with the way to it."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from figures(each, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from figures(each, f"{where}[{index}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield where, value


def typed_figures(value: object, where: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a typed document, taken from its attributes; what reads itself is asked for its own form."""
    if isinstance(value, Part):
        known = {each.name: getattr(value, each.name) for each in fields(value) if each.name != "extra"}
        for key, each in {**known, **value.extra}.items():
            yield from typed_figures(each, f"{where}.{key}")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from typed_figures(each, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from typed_figures(each, f"{where}[{index}]")
    elif hasattr(value, "to_json"):
        yield from figures(value.to_json(), where)
    else:
        yield from figures(value, where)


def parts(value: object) -> Iterator[Part]:
    """Every part of a document, the document itself first."""
    if isinstance(value, Part):
        yield value
        for each in fields(value):
            yield from parts(getattr(value, each.name))
    elif isinstance(value, tuple):
        for each in value:
            yield from parts(each)


def unknown_keys(value: object, raw: object) -> int:
    """Put a key that nobody knows into every part of a plain document; how many parts there are."""
    if isinstance(value, Part):
        for each in fields(value):
            if each.name != "extra" and each.name in raw:
                unknown_keys(getattr(value, each.name), raw[each.name])
        raw["of_a_later_version"] = {"a": [1, None]}
    elif isinstance(value, tuple):
        for each, plain_one in zip(value, raw, strict=True):
            unknown_keys(each, plain_one)
    return len(list(parts(value)))


def test_every_kind_is_among_them():
    assert {type(Document.load(path)) for path in FIXTURES} == set(KINDS) - {Study}  # which no older version wrote
    assert sum(path.stat().st_size for path in FIXTURES) < 60_000


@each_of_them
def test_they_are_read_with_every_figure(path):
    document, raw = Document.load(path), plain(path)
    assert document.extra == {}, "every key has its field"
    told = dict(figures(raw))
    assert len(told) > 20
    assert dict(typed_figures(document)) == {key: value for key, value in told.items() if key != ".schema_version"}
    schema = json_schema(type(document))
    assert list(violations(schema, raw, schema)) == []


@each_of_them
def test_they_are_written_again_with_nothing_changed(path, tmp_path):
    """Lines may be cut otherwise; an int stays an int, a null a null."""
    once = Document.load(path).save(tmp_path / "once.json")
    assert json.dumps(plain(once), sort_keys=True) == json.dumps(plain(path), sort_keys=True)
    assert Document.load(once).save(tmp_path / "twice.json").read_bytes() == once.read_bytes()


@each_of_them
def test_what_a_later_version_adds_is_kept_in_every_part(path):
    raw = plain(path)
    count = unknown_keys(Document.load(path), raw)
    assert json.dumps(raw).count("of_a_later_version") == count >= 5
    again = Document.from_json(copy.deepcopy(raw))
    assert again.to_json() == raw
    assert sum("of_a_later_version" in each.extra for each in parts(again)) == count


@each_of_them
def test_they_are_shown_and_drawn(path):
    document = Document.load(path)
    assert document.finding in repr(document)
    assert render_page(plain(path)).startswith("<!DOCTYPE html>")


def test_a_fit_that_tells_no_context_says_what_is_held_back():
    found = Fit.load(next(path for path in FIXTURES if path.stem == "fit-without-context"))
    assert found.fit.context_bytes is None
    assert found.fit.room == "40.0 KiB, 0.5 % held back"
    assert found.fit.room in repr(found)


@pytest.mark.parametrize("kind", [Search, Train])
def test_a_training_from_before_its_noise_was_stated_is_refused_by_name(kind):
    raw = plain(next(path for path in FIXTURES if path.stem == kind.KIND))
    for key in ("privacy", "randomness", "not_private"):
        del raw[key]
    with pytest.raises(DocumentError, match=r"privacy.*not_private.*randomness|randomness.*not_private.*privacy"):
        kind.from_json(raw)
