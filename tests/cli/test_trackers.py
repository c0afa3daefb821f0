"""``train --track``: what is told of every step is true, goes where it was asked for, and changes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from groupsearch import Grouping, trace_model
from groupsearch.documents import Train
from groupsearch.jobs import trackers
from groupsearch.training import StepRecord, TrainSettings, train
from groupsearch.workloads import Data, TrainingDefaults, Workload
from tests.cli.running import refused, run

SMALL = ("digits-vit", "--setting", "blocks=1", "--setting", "width=8", "--grouping", "best:2", "--seed", 1)


def task() -> Workload:
    """Two layers and 24 examples, one of which has no finite gradient."""

    def build(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch["x"]).squeeze(1).square() * batch["weight"]

    generator = torch.Generator().manual_seed(0)
    rows = {"x": torch.randn(24, 4, generator=generator), "weight": torch.linspace(0.1, 9, 24)}
    data = Data(rows, {name: each[:4] for name, each in rows.items()})
    defaults = TrainingDefaults(steps=2, learning_rate=0.01, sampling_rate=1.0)
    return Workload("mine", build, lambda n: {k: v[:n] for k, v in rows.items()}, loss, data=data, training=defaults)


@pytest.mark.parametrize("rule", ["abadi", "auto-s"])
def test_what_a_step_tells_is_what_autograd_finds_example_by_example(rule: str) -> None:
    workload, records = task(), []
    assert workload.data is not None
    settings = TrainSettings.of(workload, rule=rule, physical_batch=7, seed=5, max_grad_norm=2.0, evaluate_every=2)
    trace = trace_model(workload.model, workload.make_batch(7), workload.loss)
    grouping = Grouping.layer_wise(trace)
    assert train(workload, grouping, settings).curve == train(workload, grouping, settings, track=records.append).curve
    model = workload.build(settings.streams().number("weights"))
    norms, losses = [], []
    for row in range(24):
        loss = workload.loss(model, {name: each[row : row + 1] for name, each in workload.data.train.items()}).sum()
        found = torch.autograd.grad(loss, list(model.parameters()))
        norms.append([math.hypot(*(g.norm().item() for g in found[at : at + 2])) for at in (0, 2)])
        losses.append(loss.item())
    first, last = records
    assert (first.step, first.examples, first.epsilon, first.point) == (1, 24, None, None)
    assert first.loss == pytest.approx(sum(losses) / 24, rel=1e-5)
    thresholds = settings.plan(grouping).thresholds
    groups = list(zip(*norms, strict=True))
    shares = [sum(n > r for n in each) / 24 for each, r in zip(groups, thresholds, strict=True)]
    assert first.clipped == pytest.approx(shares)
    assert 0 < min(shares) < max(shares) < 1
    for told, each in zip(first.norms, groups, strict=True):
        assert told == pytest.approx([sorted(each)[round(q * 23)] for q in (0.1, 0.5, 0.9)], rel=1e-4)
    assert last.point is not None
    assert last.epsilon == settings.statement(24).epsilon


def test_an_empty_batch_and_a_step_without_privacy_are_told_too() -> None:
    workload, records = task(), []
    settings = TrainSettings.of(workload, seed=5, sampling_rate=0.01, steps=12)
    grouping = Grouping.all_layer(trace_model(workload.model, workload.make_batch(7), workload.loss))
    train(workload, grouping, settings, track=records.append)
    empty = next(record for record in records if not record.examples)
    assert (empty.loss, empty.clipped, empty.norms) == (None, None, None)
    assert set(trackers.numbers(empty)) <= {"not-private/step_seconds", "not-private/examples", "epsilon"}
    records.clear()
    train(workload, None, TrainSettings.of(workload, seed=5), track=records.append)
    assert [(r.clipped, r.norms, r.examples) for r in records] == [(None, None, 24)] * 2
    assert records[-1].epsilon == math.inf


def test_the_document_keeps_every_step_and_says_that_it_is_not_private(tmp_path: Path) -> None:
    place = tmp_path / "train.json"
    result = run("train", *SMALL, "--steps", 4, "--evaluate-every", 2, "--track", "document", "--track", "terminal",
                 "-o", place)  # fmt: skip
    found = Train.load(place)
    assert found.tracked is not None
    assert [row["step"] for row in found.tracked] == [1, 2, 3, 4]
    assert [row["epsilon"] is None for row in found.tracked] == [True, False, True, False]
    assert found.tracked[-1]["epsilon"] == found.privacy.epsilon
    assert "training examples, exact" in found.not_private["tracked"]
    told = [line for line in result.stderr.splitlines() if line.startswith("Step ")]
    assert len(told) == 2
    assert all("not private" in line and "clipped by group" in line and "epsilon" in line for line in told)
    plain = json.loads(run("train", *SMALL, "--steps", 4, "--evaluate-every", 2, "--json").stdout)
    assert "tracked" not in plain
    assert "tracked" not in plain["not_private"]
    assert plain["curve"] == [list(point) for point in found.curve]


def test_a_norm_that_is_not_finite_is_null_in_a_document() -> None:
    record = StepRecord(1, None, 0.1, 2, math.nan, (0.5,), ((1.0, math.inf, math.inf),))
    row = trackers.row(record)
    assert (row["norms"], row["loss"]) == ([[1.0, None, None]], None)
    json.dumps(row, allow_nan=False)


def test_tensorboard_shows_what_the_document_has_and_no_step_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place, runs = tmp_path / "train.json", tmp_path / "runs"
    asked = [*SMALL, "--steps", 3, "--track", f"tensorboard:{runs}", "--track", "document", "-o", place, "--force"]
    for _ in range(2):  # the second takes the place of the first, as one that goes on does of what was beyond
        assert run("train", *asked).exit_code == 0
    shown = EventAccumulator(str(runs)).Reload()
    document = json.loads(place.read_text())
    values = {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}
    assert values["epsilon"][-1] == (3, pytest.approx(document["epsilon"]))
    assert {name for name in values if not name.startswith("not-private/")} == {"epsilon"}
    for name, of in (("loss", lambda row: row["loss"]), ("clipped/1", lambda row: row["clipped"][1]),
                     ("norm/0/p50", lambda row: row["norms"][0][1])):  # fmt: skip
        expected = [(row["step"], pytest.approx(of(row))) for row in document["tracked"]]
        assert values[f"not-private/{name}"] == expected, name
    assert [value for _, value in values["not-private/validation/metric"]] == pytest.approx(
        [point[2] for point in document["curve"]]
    )


@pytest.mark.parametrize("track", ["tensorboard", "wandb:project", "tensorboard:{file}/runs", "tensorboard:{file}"])
def test_what_cannot_be_followed_there_is_refused_before_anything_is_done(track: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused("train", *SMALL, "--track", track.format(file=tmp_path / "file"), "-o", tmp_path / "a.json")
    assert "Expected" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
