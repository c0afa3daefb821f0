"""Norm methods chosen with the grouping: profiled, checked, measured again and trained with, as a user would."""

from __future__ import annotations

import json
from typing import Any

import pytest

from groupsearch.options import SITE_METHODS, EngineOptions
from groupsearch.plan.joint import fewest_operations, least_peak_choice
from groupsearch.plan.trace import Trace
from groupsearch.records import read_document, write_document
from groupsearch.units import format_bytes
from groupsearch.verify import Setup
from tests.cli.running import refused, run

STEP = ("--batch-size", "16", "--setting", "blocks=2", "--setting", "width=8", "--checkpoint", "blocks")
SMALL = ("digits-vit", *STEP)
SETUP = Setup("digits-vit", {"batch_size": 16, "blocks": "2", "width": "8"}, checkpoint="blocks")


@pytest.fixture(scope="module")
def alternatives():
    return SETUP.alternatives()


@pytest.fixture(scope="module")
def budget(alternatives) -> int:
    """Between the joint floor and what the operations alone would choose, so that it binds."""
    least, _ = least_peak_choice(alternatives)
    return round(1.03 * least.peak_bytes)


@pytest.fixture(scope="module")
def chosen(budget, tmp_path_factory):
    """A small profile with a budget, and what was said."""
    path = tmp_path_factory.mktemp("joint") / "joint.json"
    how = ("--norm-method", "joint", "--budget", f"{budget}B", "--grouping", "all-layer", "--grouping", "best:2")
    result = run("profile", *SMALL, *how, "--verify", "simulate", "-o", path)
    assert result.exit_code == 0, result.output
    return path, result


def test_the_document_has_the_choice_its_cost_and_how_exact_it_is(chosen, alternatives, budget):
    document = read_document(chosen[0], "profile")
    joint, expected = document["joint"], fewest_operations(alternatives, budget)
    assert document["settings"]["norm_method"] == "joint"
    assert document["settings"]["budget_bytes"] == joint["budget_bytes"] == budget
    assert document["settings"]["methods"] == dict(expected.methods)
    assert sum(joint["weights"].values()) == len(expected.methods)
    assert set(joint["weights"]) == set(expected.methods.values())
    assert len(joint["weights"]) > 1, "a choice of one method for all weights is none"
    assert joint["boundaries"] == list(expected.boundaries)
    assert joint["peak_bytes"] == expected.peak_bytes <= budget
    assert joint["bound"] == {"of": "operations", "least": expected.operations, "gap": 0.0}


def test_it_is_compared_with_every_method_alone(chosen, alternatives, budget):
    compared = {row["norm_method"]: row for row in read_document(chosen[0])["joint"]["compared"]}
    assert list(compared) == ["mixed", *SITE_METHODS, "joint"]
    for method in SITE_METHODS:
        assert compared[method]["operations"] == alternatives.operations(method)
    whole = Setup(**{**vars(SETUP), "options": EngineOptions("mixed")}).trace()
    assert compared["mixed"]["operations"] == alternatives.operations_of(whole.sites)
    within = [row["operations"] for row in compared.values() if row["floor_bytes"] <= budget]
    assert compared["joint"]["operations"] == min(within)


def test_the_estimates_are_those_of_the_methods_chosen_and_are_simulated(chosen):
    document = read_document(chosen[0])
    trace = Trace.from_json(document["trace"])
    methods = document["settings"]["methods"]
    assert {s.parameters[0]: s.method for s in trace.sites if s.parameters[0] in methods} == methods
    assert [row["grouping"] for row in document["estimates"]] == ["joint", "all-layer", "best:2"]
    assert document["estimates"][0]["peak_bytes"] == document["joint"]["peak_bytes"]
    assert [row["grouping"] for row in document["simulations"]] == ["joint", "all-layer", "best:2"]
    assert all(abs(row["relative_error"]) < 0.005 for row in document["simulations"])


def test_what_was_chosen_is_said(chosen):
    document, said = read_document(chosen[0]), chosen[1].stderr
    joint = document["joint"]
    assert document["summary"] in said
    for words in (f"{joint['groups']} group", format_bytes(joint["peak_bytes"]), "no choice takes fewer operations"):
        assert words in document["summary"]
    for method, count in joint["weights"].items():
        assert f"{count} by {method}" in document["summary"]


def test_without_a_budget_it_is_the_least_peak_under_a_name_that_says_so(alternatives, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("profile", *SMALL, "--norm-method", "joint", "--grouping", "all-layer")
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "profiles").iterdir()
    assert path.name == "digits-vit-b16-cpu-checkpoint-blocks-norms-joint.json"
    document = read_document(path)
    least, bound = least_peak_choice(alternatives)
    assert document["joint"]["peak_bytes"] == least.peak_bytes == bound
    assert document["joint"]["bound"] == {"of": "peak_bytes", "least": bound, "gap": 0.0}
    assert document["joint"]["budget_bytes"] is None
    assert "the least peak" in document["summary"]
    assert least.peak_bytes <= min(row["floor_bytes"] for row in document["joint"]["compared"])


def test_it_is_what_is_exported(chosen):
    exported = run("export", chosen[0], "--format", "jax-privacy", "--json")
    assert json.loads(exported.stdout)["boundaries"] == read_document(chosen[0])["joint"]["boundaries"]


@pytest.mark.slow
def test_verify_measures_the_methods_chosen(chosen, tmp_path):
    document = read_document(chosen[0])
    setup = Setup.from_document(document)
    assert setup.options == EngineOptions("mixed", document["settings"]["methods"])
    assert setup.options.methods == document["settings"]["methods"]
    document["estimates"] = document["estimates"][:2]
    document["joint"] = {}  # the measurement needs the settings alone
    path = write_document(tmp_path / "two.json", document)
    result = run("verify", path, "--tolerance", "1%", "--json")
    assert result.exit_code == 0, result.output
    assert [row["grouping"] for row in json.loads(result.stdout)["rows"]] == ["joint", "all-layer"]
    # all-layer by ghost needs another peak: the estimate for the methods chosen is outside
    document["settings"]["methods"] = dict.fromkeys(document["settings"]["methods"], "ghost")
    document["estimates"] = document["estimates"][1:]
    other = write_document(tmp_path / "ghost.json", document)
    assert run("verify", other, "--tolerance", "1%", "--json").exit_code == 1


def test_train_takes_grouping_and_methods_from_the_document(chosen):
    found = read_document(chosen[0])
    result = run("train", *SMALL, "--grouping", chosen[0], "--sampling-rate", 0.01, "--steps", 2, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["boundaries"] == found["joint"]["boundaries"]
    assert document["settings"]["methods"] == found["settings"]["methods"]
    assert document["peak_bytes"] == found["joint"]["peak_bytes"]
    assert document["steps"] == 2


@pytest.mark.slow
def test_the_methods_change_the_peak_and_no_result_of_training(chosen, tmp_path):
    """The same seed by the methods chosen and by others: the same curve but for rounding."""
    document = read_document(chosen[0])
    document["settings"]["methods"] = dict.fromkeys(document["settings"]["methods"], "recompute")
    other = write_document(tmp_path / "recompute.json", document)
    how = ("--sampling-rate", 0.01, "--steps", 3, "--evaluate-every", 1, "--json")
    first, second = (json.loads(run("train", *SMALL, "--grouping", path, *how).stdout) for path in (chosen[0], other))
    assert first["peak_bytes"] != second["peak_bytes"]
    losses = [[point[1] for point in trained["curve"]] for trained in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_budget_below_the_joint_floor_says_the_least(alternatives, tmp_path):
    least, _ = least_peak_choice(alternatives)
    message = refused("profile", *SMALL, "--norm-method", "joint", "--budget", "64KiB", "-o", tmp_path / "a.json")
    assert f"{least.peak_bytes} bytes" in message
    assert "the least there is" in message
    assert list(tmp_path.iterdir()) == []


def joint_less(document: dict[str, Any]) -> None:
    del document["joint"]


def other_model(document: dict[str, Any]) -> None:
    document["model"]["name"] = "digits-cnn"


def unknown_weight(document: dict[str, Any]) -> None:
    document["settings"]["methods"] = {"nowhere.weight": "ghost"}


def unknown_method(document: dict[str, Any]) -> None:
    document["settings"]["methods"] = {"head.weight": "guess"}


def outside(document: dict[str, Any]) -> None:
    document["joint"]["boundaries"] = [400]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (joint_less, "--norm-method joint"),
        (other_model, "one of digits-cnn"),
        (unknown_weight, "nowhere.weight"),
        (unknown_method, "'guess'"),
        (outside, "400"),
    ],
)
def test_training_by_a_document_of_something_else_is_refused(chosen, tmp_path, change, words):
    document = read_document(chosen[0])
    change(document)
    path = write_document(tmp_path / "other.json", document)
    assert words in refused("train", *SMALL, "--grouping", path, "--steps", 2, "-o", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("profile", *SMALL, "--budget", "1MiB"), "--norm-method joint"),
        (("fit", *SMALL, "--memory", "1MiB", "--norm-method", "joint"), "groupsearch profile"),
        (("train", *SMALL, "--grouping", "best:2", "--norm-method", "joint"), "--grouping DOCUMENT"),
        (("optimize", *SMALL, "--norm-method", "joint"), "groupsearch profile"),
        (("train", *SMALL, "--grouping", "nowhere.json"), "No such file"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_where_there_is_no_joint_choice_it_is_refused(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(*arguments)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
