"""optimize in rungs on a very small digits-vit: what is run, what is said of it, and going on."""

from __future__ import annotations

import pytest

from groupsearch.jobs.evaluation import TRIALS
from groupsearch.jobs.events import LOSS
from groupsearch.jobs.request import RUNGS
from groupsearch.proxy import default_steps
from groupsearch.records import read_document
from groupsearch.search.selection import SELECTION_DATA
from groupsearch.training import TrainSettings
from groupsearch.workloads import load_workload
from tests.cli.running import refused, run

SMALL = ("--setting", "blocks=1", "--setting", "width=8", "--seeds", "2", "--verify", "none", "--steps", "8")
RUNGED = ("optimize", *SMALL, "--trials", 8, "--promote", 4, "--short-fraction", 0.25)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    path = tmp_path_factory.mktemp("rungs") / "a.json"
    result = run(*RUNGED, "-o", path, "--selection-data", "public")
    assert result.exit_code == 0, result.stderr
    return path, result.stderr


def test_the_document_tells_what_every_rung_cost(searched):
    document = read_document(searched[0], "search")
    rungs = {rung["name"]: rung for rung in document["cost"]["rungs"]}
    assert list(rungs) == [*RUNGS, "replication"]
    assert (rungs["short"]["runs"], rungs["short"]["steps"], rungs["short"]["full_trainings"]) == (8, 16, 2)
    assert (rungs["full"]["runs"], rungs["full"]["steps"]) == (4, 32)
    instants = default_steps(TrainSettings.of(load_workload("digits-vit"), steps=8))
    assert rungs["proxy"]["steps"] == max(instants)
    assert rungs["proxy"]["passes"] == 2 * len(set(instants))  # two batches at each
    assert rungs["proxy"]["full_trainings"] > 0
    for part in ("seconds", "steps", "full_trainings"):
        assert document["cost"][part] == pytest.approx(sum(rung[part] for rung in rungs.values()))
    assert document["cost"]["trained"] == sum(rung["runs"] for rung in rungs.values())
    assert len(document["training"]["curves"]) == rungs["full"]["runs"] + rungs["replication"]["runs"]
    assert {len(curve["points"]) for curve in document["training"]["curves"]} == {8}


def test_the_document_tells_what_the_rungs_found_and_whether_they_agreed(searched):
    document = read_document(searched[0], "search")
    assert [part["rung"] for part in document["evidence"]] == list(RUNGS)
    assert [part["fraction"] for part in document["evidence"]] == [0, 0.25, 1]
    assert [len(part["values"]) for part in document["evidence"]][:2] == [8, 8]
    pairs = [(row["lower"], row["upper"]) for row in document["correlations"]]
    assert pairs[0] == ("proxy", "short")
    assert {("proxy", "full"), ("short", "full")} <= set(pairs)
    for row in document["correlations"]:
        assert -1 <= row["low"] <= row["value"] <= row["high"] <= 1
        assert row["predicts"] == (row["low"] > 0)
    assert document["correlations"][0]["used"] in (True, False)
    settings = document["settings"]
    assert (settings["rungs"], settings["trials"], settings["promote"]) == (list(RUNGS), 8, 4)


def test_the_text_and_the_page_say_it_too(searched):
    path, told = searched
    document = read_document(path, "search")
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    for row in document["correlations"]:
        assert row["statement"] in told
        assert row["statement"] in page
    assert "to find the front" in told
    assert "8/8 Short run: " in told
    assert all(LOSS in line for line in told.splitlines() if "Short run: " in line)
    assert "How the front was found" in page
    assert document["answer"] in told
    statement = document["cost"]["selection"]["statement"]
    assert document["cost"]["selection"]["epsilon"] == 0
    assert "costs no privacy" in statement
    assert statement in told
    assert statement in page


def test_going_on_runs_nothing_again_and_refuses_other_short_runs(searched):
    path, _ = searched
    before = read_document(path)
    assert "short_fraction" in refused(*RUNGED[:-1], 0.5, "-o", path, "--resume")
    result = run(*RUNGED, "-o", path, "--resume")
    assert result.exit_code == 0, result.stderr
    assert "Short run:" not in result.stderr
    assert "Full run:" not in result.stderr
    after = read_document(path)
    assert after["candidates"] == before["candidates"]
    assert after["correlations"] == before["correlations"]
    assert after["cost"]["selection"]["epsilon"] is None, "private unless it is said to be public"


def test_more_runs_are_made_until_groupings_are_told_apart(tmp_path):
    path = tmp_path / "a.json"
    small = ("optimize", *SMALL, "--seeds", 3, "--rungs", "full", "--trials", 3)
    arguments = (*small, "--max-runs", 12, "--confidence", 0.5)
    result = run(*arguments, "-o", path)
    assert result.exit_code == 0, result.stderr
    document = read_document(path)
    assert 3 + 2 < document["cost"]["trained"] <= 12
    assert document["confidence"] == 0.5
    assert document["comparisons"]
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    assert "Is one of them better?" in page
    assert all(row["verdict"] in page for row in document["comparisons"])


def test_options_name_what_the_library_knows():
    text = run("optimize", "--help").stdout
    assert set(TRIALS) <= set(RUNGS)
    for word in (*RUNGS, *SELECTION_DATA, "--max-runs", "--confidence", "--private-selection", "--short-fraction"):
        assert word in text
