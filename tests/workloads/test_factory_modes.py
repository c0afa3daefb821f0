"""Models that come in evaluation mode are traced and trained in training mode, and documents say in which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import groupsearch as gs
from groupsearch.workloads import load_workload
from groupsearch.workloads.factory import described, in_training_mode
from tests.cli.running import run

FILE = """
import torch
from torch import nn
from groupsearch.workloads import Workload

class Stubborn(nn.Dropout):
    def train(self, mode=True):
        return super().train(False)

def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.2), Stubborn(0.5), nn.Tanh(), nn.Linear(32, 2)).eval()

def batch(size):
    return {"x": torch.ones(size, 8), "y": torch.zeros(size, dtype=torch.long)}

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

def workload():
    return Workload("mine", build, batch, loss, batch_size=64)

def triple():
    return build(), batch(64), loss
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


@pytest.mark.parametrize("name", ["workload", "triple"])
def test_a_model_in_evaluation_mode_is_traced_in_training_mode(name: str, file: Path) -> None:
    workload = load_workload(f"{file}:{name}")
    for model in (workload.build(), workload.empty(), workload.model):
        assert model.training
        assert model[1].training
        assert not model[2].training, "it insists"
    result = run("profile", f"{file}:{name}", "--grouping", "all-layer", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["model"]["mode"] == "training mode, but for 2; dropout up to 0.2"
    trained = gs.trace_model(workload.build(), workload.make_batch(64), workload.loss)
    assert document["nonprivate_peak_bytes"] == trained.nonprivate_peak_bytes
    evaluated = gs.trace_model(workload.build().eval(), workload.make_batch(64), workload.loss)
    assert evaluated.nonprivate_peak_bytes < trained.nonprivate_peak_bytes, "dropout keeps a mask"


def test_a_workload_that_is_given_is_put_into_training_mode_too(file: Path) -> None:
    made = load_workload(f"{file}:workload")
    given = gs.Workload("given", lambda seed=0: made.build(seed).eval(), made.make_batch, made.loss, batch_size=8)
    assert gs.profile(given, grouping="all-layer").model.extra["mode"].startswith("training mode")


def test_what_is_in_training_mode_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    model[1].eval()
    assert not in_training_mode(model)[1].training
    assert described(model) == "training mode, but for 1; no dropout"


def test_frozen_batchnorm_stays_in_evaluation_mode_and_a_trained_one_does_not() -> None:
    for frozen in (True, False):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).requires_grad_(not frozen)).eval()
        assert in_training_mode(model)[1].training is not frozen


def test_hub_models_say_whether_they_drop(tiny) -> None:
    told = [described(tiny("bert", dropout=how).empty()) for how in ("off", "config")]
    assert told == ["training mode; no dropout", "training mode; dropout up to 0.1"]
