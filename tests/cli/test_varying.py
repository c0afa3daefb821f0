"""optimize --vary: what is searched besides the grouping, by real training on a very small digits-vit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from groupsearch.errors import GroupSearchError
from groupsearch.jobs.evaluation import DEFAULTS, THRESHOLDS, Ways, mechanism_of, searched
from groupsearch.plan.clipping import RULES, AdaptiveQuantile
from groupsearch.plan.memory import peak_memory
from groupsearch.records import read_document
from groupsearch.search import Choice, settings
from groupsearch.training import TrainSettings
from groupsearch.verify import Setup, rows_to_check
from tests.cli.running import refused, run

SMALL = ("--setting", "blocks=2", "--setting", "width=8", "--verify", "none", "--rungs", "full")
VARY = ("--vary", "rule=auto-s,abadi", "--vary", "thresholds", "--vary", "checkpoint")
TRAINING = TrainSettings(steps=1, learning_rate=0.01, noise_multiplier=1.0, rule="auto-v")


def test_choices_are_those_of_the_stages():
    assert THRESHOLDS == settings.ALLOCATIONS
    assert DEFAULTS["rule"] == RULES


@pytest.fixture(scope="module")
def searched_document(tmp_path_factory):
    path = tmp_path_factory.mktemp("vary") / "a.json"
    arguments = ("optimize", *SMALL, *VARY, "--steps", 2, "--trials", 7, "--seeds", 1, "-o", path, "--json")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == read_document(path)
    return path


def test_the_document_says_what_was_chosen_and_the_peak_is_that_of_the_best_way(searched_document):
    document = read_document(searched_document, "search")
    assert document["settings"]["vary"] == {"rule": ["auto-s", "abadi"], "thresholds": [], "checkpoint": []}
    ways = {way["name"]: way["checkpoint"] for way in document["variants"]}
    assert ways == {"checkpoint none": "none", "checkpoint blocks": "blocks"}
    assert document["variants"][0]["name"] == "checkpoint none"
    setup = Setup.from_document(document)
    traces = {name: replace(setup, checkpoint=checkpoint).trace() for name, checkpoint in ways.items()}
    rows = document["candidates"]
    for row in rows:
        known = {name: peak_memory(trace, tuple(row["boundaries"])).peak_bytes for name, trace in traces.items()}
        assert row["peak_bytes"] == min(known.values()) == known[row["variant"]]
    assert {row["rule"] for row in rows} == {"auto-s", "abadi"}
    assert {row["allocation"] for row in rows} == {"uniform", "dimension"}
    assert document["cost"]["failed"] == 0
    assert "rule" in document["training"]["curves"][0]


def test_what_needs_least_in_another_way_is_not_measured_in_this_one(searched_document):
    document = read_document(searched_document)
    own = {tuple(row["boundaries"]) for row in document["candidates"] if row["variant"] == "checkpoint none"}
    others = {tuple(row["boundaries"]) for row in document["candidates"]} - own
    assert others
    listed = {tuple(row["boundaries"]) for row in document["estimates"]}
    assert {row.boundaries for row in rows_to_check(document)} <= own | listed


def test_going_on_with_other_things_to_search_is_refused(searched_document):
    arguments = ("optimize", *SMALL, "--steps", 2, "--trials", 7, "--seeds", 1, "-o", searched_document, "--resume")
    assert "rules" in refused(*arguments, *VARY[2:])
    assert "variants" in refused(*arguments, *VARY[:4])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--vary", "colour"], "rule, thresholds"),
        (["--vary", "rule=median"], "abadi"),
        (["--vary", "thresholds=0.5"], "adaptive"),
        (["--vary", "checkpoint=every:0"], "blocks"),
        (["--vary", "micro-batches=none"], "micro-batches"),
        (["--vary", "rule", "--vary", "rule=abadi"], "once"),
        (["--vary", "rule", "--rule", "abadi"], "Leave one out"),
        (["--groups", "2", "--max-groups", "3"], "Give one of them"),
        (["--groups", "500"], "at most"),
        (["--private-selection", "--vary", "checkpoint"], "checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_requests_leave_nothing_behind(tmp_path, arguments, word):
    own = () if "--private-selection" in arguments else SMALL[4:]
    assert word in refused("optimize", *arguments, *SMALL[:4], *own, "-o", tmp_path / "a.json")
    assert [path for path in tmp_path.iterdir() if path.suffix != ".journal"] == []


def test_a_choice_changes_the_mechanism_and_nothing_else():
    changed = mechanism_of(Choice((3,), "abadi", "dimension"), TRAINING)
    assert changed == replace(TRAINING, rule="abadi", allocation="dimension")
    assert mechanism_of(Choice((3,)), TRAINING) == TRAINING
    assert mechanism_of(Choice((3,), None, "adaptive"), TRAINING).allocation == AdaptiveQuantile()


def test_the_rule_of_the_training_is_tried_first_and_time_is_an_objective_on_request():
    assert searched({"rule": []}, None, "auto-v", "time") == {
        "rules": ("auto-v", "abadi", "auto-s"),
        "allocations": (),
        "objectives": ("metric", "peak", "time"),
    }
    with pytest.raises(GroupSearchError):
        searched({"rule": []}, "abadi", "abadi", None)


def test_every_way_is_trained_as_it_is_traced():
    setup = Setup("digits-vit", {"blocks": 2, "width": 8})
    vary = {"checkpoint": ["blocks"], "micro-batches": ["2"]}
    ways = Ways.of(setup, setup.trace(), TRAINING, vary)
    assert len(ways.setups) == 4
    batch = TRAINING.sampling_rate * setup.loaded.data.train_size
    for name, way in ways.setups.items():
        assert ways.traces[name].settings["checkpoint"] == way.checkpoint
        assert ways.traces[name].batch_size * way.micro_batches == pytest.approx(batch, abs=2)
    grouping, chosen = ways.of_choice(Choice((3,), "abadi"), TRAINING)
    best = ways.setups[ways.variants.cheapest((3,))]
    assert grouping.boundaries == (3,)
    assert (chosen.checkpoint, chosen.rule) == (best.checkpoint, "abadi")
    assert (best.micro_batches, chosen.physical_batch) == (2, best.loaded.batch_size)
