"""optimize --private-selection on a very small digits-vit: only the chosen grouping is told, at a known epsilon."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import dp_accounting
import pytest
import torch
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant

from groupsearch.cli import selecting
from groupsearch.errors import GroupSearchError
from groupsearch.records import read_document
from groupsearch.workloads import load_workload
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
    assert f"{accountant.get_epsilon(training['delta']):.3g}" in found["statement"], "training it anew costs as well"


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

    monkeypatch.setattr(selecting, "_scorer", lambda *_: score)
    for name in ("a", "b"):
        result = run("optimize", *SMALL, "--private-selection", "--json", "-o", tmp_path / f"{name}.json")
        assert result.exit_code == 0, result.stderr
        assert len(json.loads(result.stdout)["candidates"]) == 1
    assert len(set(seen)) == len(seen) >= 2


def test_an_example_weighs_one_at_most_whatever_the_metric_says():
    workload = load_workload("digits-vit", blocks=1, width=8)
    wild = torch.tensor([0.5, 7.0, -3.0, math.nan, math.inf])
    judged = selecting._judged_by_shares(replace(workload, metric=lambda model, batch: wild))
    assert judged.metric(None, None).tolist() == [0.5, 1.0, 0.0, 0.0, 1.0]
    with pytest.raises(GroupSearchError, match="accuracy"):
        selecting._judged_by_shares(replace(workload, metric_name="negative perplexity"))
