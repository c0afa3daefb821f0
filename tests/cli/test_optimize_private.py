"""optimize --private-selection on a very small digits-vit: only the chosen grouping is told, at a known epsilon."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html import escape
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from groupsearch import trace_model
from groupsearch.errors import GroupSearchError
from groupsearch.jobs import search as jobs_search
from groupsearch.privacy import PrivacyStatement
from groupsearch.records import read_document
from groupsearch.search import Choice
from groupsearch.training import TrainSettings
from groupsearch.units import format_at_most
from groupsearch.workloads import load_workload
from groupsearch.workloads.embedded import classification_loss
from tests.cli.running import refused, run

SMALL = ("--setting", "blocks=1", "--setting", "width=8", "--verify", "none", "--steps", "4")
ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(11, 65)) + [128, 256, 512, 1024]


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    path = tmp_path_factory.mktemp("private") / "a.json"
    result = run("optimize", *SMALL, "--private-selection", "--trials", 3, "--score-noise", 4, "-o", path)
    assert result.exit_code == 0, result.stderr
    return path, result.stderr


def test_nothing_but_the_winner_is_published(selected):
    path, told = selected
    document = read_document(path, "search")
    (row,) = document["candidates"]
    assert document["recommended"] == row
    assert 0 <= row["metric"]["mean"] <= 1
    assert row["metric"]["half_width"] == pytest.approx(1.96 * 4 / 360, rel=1e-3)
    assert row["source"] != "search"
    assert document["cost"].keys() == {"epsilon", "selection"}, "counts and times tell how many were trained"
    assert not {"comparisons", "evidence", "correlations", "failures", "hypervolume"} & document.keys()
    assert "curves" not in document["training"]
    assert "seed" not in document["settings"]
    assert told.count("accuracy") == 0
    assert told.count("%") == told.count(document["reason"][-8:-1]) + document["summary"].count("%")
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.html", "a.json"], "no study on disk"


def test_the_epsilon_is_that_of_dp_accounting(selected):
    document = read_document(selected[0], "search")
    training, settings = document["training"], document["settings"]
    step = dp_accounting.PoissonSampledDpEvent(
        training["sampling_rate"], dp_accounting.GaussianDpEvent(training["noise_multiplier"])
    )
    one = dp_accounting.SelfComposedDpEvent(step, training["steps"])
    scored = dp_accounting.ComposedDpEvent([one, dp_accounting.GaussianDpEvent(settings["score_noise"])])
    accountant = RdpAccountant(ORDERS)
    accountant.compose(RepeatAndSelectDpEvent(scored, settings["trials"], 1.0))
    found = document["cost"]["selection"]
    assert found["epsilon"] == pytest.approx(accountant.get_epsilon(training["delta"]))
    assert found["epsilon"] > document["cost"]["epsilon"] == training["epsilon"]
    accountant.compose(one)
    anew = accountant.get_epsilon(training["delta"])
    assert found["whole"] == pytest.approx(anew)
    assert format_at_most(anew) in found["statement"], "training it anew costs as well"


def test_text_page_and_document_say_the_same_and_lead_with_the_whole(selected):
    path, told = selected
    document, page = read_document(path), path.with_suffix(".html").read_text(encoding="utf-8")
    stated = PrivacyStatement.from_json(document["privacy"])
    assert stated.whole == document["cost"]["selection"]["whole"] > stated.epsilon == document["cost"]["epsilon"]
    assert document["privacy"]["sentences"] == list(stated.sentences)
    assert str(stated) in told
    assert all(escape(sentence) in page for sentence in stated.sentences)
    assert "of the whole" in stated.sentences[0]
    assert page.index("epsilon of the whole") < page.index("epsilon of each run")
    assert not stated.seeded
    assert document["not_private"] == {}


def test_the_page_and_the_text_say_what_it_costs(selected):
    path, told = selected
    statement = read_document(path)["cost"]["selection"]["statement"]
    assert statement in told
    assert statement in path.with_suffix(".html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "option",
    [
        *(["--rungs", "full"], ["--sampler", "tpe"], ["--seeds", "3"], ["--max-runs", "90"], ["--confidence", "0.9"]),
        *(["--resume"], ["--storage", "a.journal"], ["--worker"], ["--seed", "0"], ["--selection-data", "public"]),
    ],
    ids=lambda option: option[0],
)
def test_what_would_break_the_proof_is_refused(tmp_path, option):
    message = refused("optimize", *SMALL, "--private-selection", *option, "-o", tmp_path / "a.json")
    assert option[0] in message
    assert list(tmp_path.iterdir()) == []


def test_every_selection_draws_anew(tmp_path, monkeypatch):
    """Nothing of it can be had again from the command: neither the number of trainings nor their seeds."""
    seen = []

    def score(choice, seed):
        seen.append(seed)
        return 1.0

    monkeypatch.setattr(jobs_search, "_scorer", lambda *_: score)
    for name in ("a", "b"):
        result = run("optimize", *SMALL, "--private-selection", "--json", "-o", tmp_path / f"{name}.json")
        assert result.exit_code == 0, result.stderr
        assert len(json.loads(result.stdout)["candidates"]) == 1
    assert len(set(seen)) == len(seen) >= 2


def test_an_example_weighs_one_at_most_whatever_the_metric_says():
    workload = load_workload("digits-vit", blocks=1, width=8)
    wild = torch.tensor([0.5, 7.0, -3.0, math.nan, math.inf])
    judged = jobs_search._judged_by_shares(replace(workload, metric=lambda model, batch: wild, metric_name="skill"))
    assert judged.metric(None, None).tolist() == [0.5, 1.0, 0.0, 0.0, 1.0]
    with pytest.raises(GroupSearchError, match=r"'accuracy' is not stated to be one.*metric_is_share=True"):
        jobs_search._judged_by_shares(replace(workload, metric_is_share=False))


def is_checking() -> bool:
    """Whether the pass that runs is one of the check or the watch, which make random draws alike."""
    return _len_torch_dispatch_stack() > 0


def test_a_run_fails_by_its_weights_alone(monkeypatch):
    """A loss that is not finite scores as any other; weights that are not score nothing."""
    made = load_workload("digits-vit", blocks=1, width=8)

    def broken(model: Any, batch: Any) -> torch.Tensor:
        return classification_loss(model, batch) * (math.nan if model.training and not is_checking() else 1.0)

    made = replace(made, loss=broken)
    trace = trace_model(made.model, made.make_batch(4), classification_loss)
    training = TrainSettings.of(made, noise_multiplier=1.0, steps=2)
    choice = Choice(())
    judged = jobs_search._judged_by_shares(made)
    assert 0 <= jobs_search._scorer(judged, trace, training)(choice, 0) <= 360
    wild = replace(training, learning_rate=1e38, optimizer="sgd", noise_multiplier=1e6)
    assert jobs_search._scorer(judged, trace, wild)(choice, 0) is None
