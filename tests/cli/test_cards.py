"""profile and fit for a card that is not there: what they say, and what they refuse."""

from __future__ import annotations

import json

import pytest

from groupsearch.fit import BATCH, Room, Sizes, fit_rows
from groupsearch.plan.cards import CARDS
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.reserved import CONTEXT_BYTES, MIB, NoRoomError, Rules, replay_memory
from groupsearch.records import read_document
from groupsearch.verify import Setup
from tests.cli.running import refused, run

CARD = "cuda:a100"
SMALL = ("--batch-size", 8, "--setting", "blocks=1")


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("card") / "profile.json"
    how = ("--device", CARD, *SMALL, "--grouping", "all-layer", "--grouping", "layer-wise")
    return path, run("profile", "stdlib-gpt", *how, "--verify", "simulate", "-o", path)


def test_a_profile_says_what_the_allocator_holds_and_that_nothing_was_measured(profile):
    path, result = profile
    assert result.exit_code == 0, result.stderr
    document = read_document(path)
    assert document["environment"]["device"] == CARD
    assert document["not_measured"] == CARDS["a100"].not_measured
    assert "Not measured on a GPU" in result.stderr
    assert "to hold" in result.stderr
    trace = Setup("stdlib-gpt", {BATCH: 8, "blocks": 1}, device=CARD).trace()
    for row in document["estimates"]:
        found = replay_memory(trace, row["boundaries"], Rules())
        assert (row["allocated_bytes"], row["reserved_bytes"]) == (found.allocated_bytes, found.reserved_bytes)
        assert row["peak_bytes"] <= row["allocated_bytes"] < row["reserved_bytes"]
    assert document["nonprivate_held"]["reserved_bytes"] == replay_memory(trace, None, Rules()).reserved_bytes
    assert all(abs(row["relative_error"]) < 1e-3 for row in document["simulations"])


def test_the_page_says_it_too(profile, tmp_path):
    page = tmp_path / "page.html"
    assert run("report", profile[0], "-o", page).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "<strong>Not measured on a GPU" in text
    assert '<th scope="col">to hold</th>' in text


def test_a_profile_of_the_cpu_says_none_of_it(tmp_path):
    result = run("profile", "stdlib-gpt", *SMALL, "--grouping", "all-layer", "--json")
    document = json.loads(result.stdout)
    assert {"not_measured", "nonprivate_held"}.isdisjoint(document)
    assert "reserved_bytes" not in document["estimates"][0]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("profile", "stdlib-gpt", "--device", "cuda"), ["cuda:h100", "--device cpu"]),
        (("profile", "stdlib-gpt", "--device", CARD, "--verify", "measure"), ["measured", "--device cuda"]),
        (("profile", "stdlib-gpt", "--device", CARD, "--verify", "all"), ["measured"]),
        (("profile", "stdlib-gpt", "--device", "cuda:h9"), ["cuda:rtx4090"]),
        (("fit", "stdlib-gpt", "--device", CARD, "--measure"), ["measured"]),
        (("fit", "stdlib-gpt"), ["--memory", "cuda:h100"]),
        (("train", "stdlib-gpt", "--device", CARD, "--grouping", "all-layer"), ["profile", "fit"]),
        (("optimize", "stdlib-gpt", "--device", CARD), ["profile", "fit"]),
    ],
)
def test_what_a_card_that_is_not_there_cannot_do_is_refused(command, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(*command)
    assert all(part in message for part in said), message


def test_a_document_of_a_card_is_not_measured_again(profile):
    message = refused("verify", profile[0])
    assert "cuda:a100" in message
    assert "--device cuda" in message


@pytest.fixture(scope="module")
def sizes():
    return Sizes(Setup("stdlib-gpt", {BATCH: 8, "blocks": 1}, device=CARD))


def room(mib: int) -> Room:
    return Room(mib * MIB, margin=0.04, limit=12, context_bytes=50 * MIB)


def test_a_batch_fits_a_card_when_what_the_allocator_holds_does(sizes):
    given = room(100)
    assert given.usable_bytes == int(100 * MIB * 0.96) - 50 * MIB
    tight = Rules(capacity_bytes=given.usable_bytes)
    for row in fit_rows(sizes, given, ("layer-wise",)):
        for size, fits in ((row.size, True), (row.size + 1, False)):
            trace = sizes.at(size)
            boundaries = row.boundaries
            if row.grouping == "layer-wise":
                boundaries = Grouping.layer_wise(trace).boundaries
            try:
                assert replay_memory(trace, boundaries, tight).reserved_bytes <= given.usable_bytes
                held = True
            except NoRoomError:
                held = False
            assert held is fits
        found = replay_memory(sizes.at(row.size), row.boundaries, Rules())
        assert row.allocated_bytes == found.allocated_bytes
        assert row.reserved_bytes == found.reserved_bytes


def test_a_card_that_holds_nothing_says_what_is_held_back(sizes):
    with pytest.raises(Exception, match=r"4.0 % of it and 50.0 MiB for the device's context held back"):
        list(fit_rows(sizes, room(70)))


def test_all_of_a_named_card_is_the_default(tmp_path):
    path = tmp_path / "fit.json"
    how = ("--device", CARD, "--limit", 16, *SMALL, "--grouping", "layer-wise")
    result = run("fit", "stdlib-gpt", *how, "-o", path)
    assert result.exit_code == 0, result.stderr
    fit = read_document(path)["fit"]
    assert fit["memory_bytes"] == CARDS["a100"].memory_bytes
    assert (fit["margin"], fit["context_bytes"]) == (0.04, CONTEXT_BYTES)
    assert "4.0 % of it and 717 MiB for the context held back" in fit["held_back"]
    assert "to hold" in result.stderr
    assert "Not measured on a GPU" in result.stderr
    page = tmp_path / "page.html"
    assert run("report", path, "-o", page).exit_code == 0
    assert "717 MiB for the context held back" in page.read_text(encoding="utf-8")
