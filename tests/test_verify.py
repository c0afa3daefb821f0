"""Rows, sentences and setups of the comparison of levels; the measuring itself is tested through the command."""

from __future__ import annotations

import json

import pytest

from groupsearch.errors import DocumentError
from groupsearch.options import EngineOptions
from groupsearch.plan.grouping import named_groupings
from groupsearch.plan.memory import peaks
from groupsearch.records import environment, new_document
from groupsearch.verify import Setup, estimate_rows, front_rows, rows_to_check
from tests.report.synthetic import profile_document, search_document, train_document, transformer_trace

TRACE = transformer_trace()
SETUP = Setup("digits-vit", {"blocks": "1", "batch_size": 8}, EngineOptions("ghost"), "sgd", "blocks")


def document_of(setup):
    return new_document("profile", setup.describe_model(), environment("cpu"), setup.describe_step())


def test_a_document_tells_the_setup_it_came_from():
    assert Setup.from_document(document_of(SETUP)) == SETUP
    assert Setup.from_document(document_of(SETUP), device="cuda:1").device == "cuda:1"


@pytest.mark.parametrize(
    "setup",
    [
        Setup("digits-vit", {"batch_size": 8}, checkpoint="every:2", micro_batches=3, autocast="bfloat16"),
        Setup("digits-vit", {"batch_size": 8}, EngineOptions("mixed", {"head.weight": "recompute"})),
    ],
    ids=["step", "methods"],
)
def test_step_options_and_methods_are_in_the_document(setup):
    found = Setup.from_document(json.loads(json.dumps(document_of(setup))))
    assert found == setup
    assert found.options.methods == setup.options.methods


def test_a_joint_choice_is_a_method_per_weight():
    document = document_of(SETUP)
    document["settings"] |= {"norm_method": "joint", "methods": {"head.weight": "ghost"}}
    assert Setup.from_document(document).options == EngineOptions("mixed", {"head.weight": "ghost"})
    assert Setup.from_document(document).options.methods == {"head.weight": "ghost"}
    for garbled in ({}, {"methods": None}, {"methods": ["head.weight"]}):
        settings = {key: value for key, value in document["settings"].items() if key != "methods"} | garbled
        with pytest.raises(DocumentError, match="Write it again with `groupsearch profile`"):
            Setup.from_document({**document, "settings": settings})


def test_the_model_part_has_name_batch_size_and_trainable_parameters():
    model = SETUP.describe_model()
    assert (model["name"], model["batch_size"], model["blocks"]) == ("digits-vit", 8, 1)
    assert model["parameters"] == sum(p.numel() for p in SETUP.loaded.build().parameters())


def test_the_model_of_a_setup_allocates_nothing():
    assert {parameter.device.type for parameter in SETUP.empty_model().parameters()} == {"meta"}


@pytest.mark.parametrize("key", ["norm_method", "optimizer", "checkpoint", "workload"])
def test_a_document_that_does_not_say_how_a_step_was_taken(key):
    document = document_of(SETUP)
    del document["settings"][key]
    with pytest.raises(DocumentError, match=f"{key}.*groupsearch profile"):
        Setup.from_document(document)


def test_estimates_are_those_of_peaks():
    named = named_groupings(TRACE, (2, 4))
    rows = estimate_rows(TRACE, named)
    assert [row.peak_bytes for row in rows] == list(peaks(TRACE, list(named.values())))
    assert [row.grouping for row in rows] == list(named)
    assert all(sum(row.breakdown.values()) == row.peak_bytes for row in rows)


def test_the_front_ends_at_the_limit():
    rows = front_rows(TRACE, 3)
    assert [row.groups for row in rows] == [1, 2, 3]
    assert [row.peak_bytes for row in rows] == list(peaks(TRACE, [row.boundaries for row in rows]))


def test_of_a_profile_the_measured_groupings_are_measured_again():
    document = profile_document()
    estimates = {tuple(row["boundaries"]): row["peak_bytes"] for row in document["estimates"]}
    document["measurements"] = [document["estimates"][1]]
    (row,) = rows_to_check(document)
    assert row.grouping == document["estimates"][1]["grouping"]
    assert row.peak_bytes == estimates[row.boundaries]
    document["measurements"] = []
    assert len(rows_to_check(document)) == len(estimates)


def test_of_a_search_front_and_recommendation_are_measured_again_each_once():
    document = search_document()
    rows = [row.boundaries for row in rows_to_check(document)]
    front = {tuple(row["boundaries"]) for row in document["candidates"] if row["on_front"]}
    assert front | {tuple(document["recommended"]["boundaries"])} <= set(rows)
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("key", ["boundaries", "peak_bytes"])
def test_a_garbled_row_is_refused(key):
    document = profile_document() | {"measurements": []}
    del document["estimates"][1][key]
    with pytest.raises(DocumentError, match=f"garbles '{key}'.*groupsearch profile"):
        rows_to_check(document)
    with pytest.raises(DocumentError, match="garbles"):
        rows_to_check(document | {"measurements": "abc"})


def test_nothing_to_measure():
    with pytest.raises(DocumentError, match="groupsearch profile"):
        rows_to_check(train_document())
