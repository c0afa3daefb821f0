"""A run that is saved and resumed goes on as if it had not stopped, and counts what it cost."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.engine.loading import PoissonSampler
from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import AdaptiveQuantile, ClipPlan
from groupsearch.privacy.accounting import epsilon
from groupsearch.tracer.sites import observe_sites
from tests.engine.loop import CASE, part, plan_of, private
from tests.engine.test_parity import assert_agree
from tests.support.cases import EVERY_CASE
from tests.support.reference import clipped_sums, trainable

RATE, EXAMPLES = 0.3, 12
ALLOCATIONS: dict[str, Any] = {"fixed": "uniform", "adaptive": AdaptiveQuantile(count_noise=3.0)}


class Run:
    """Model, optimizer, engine, schedule and sampler of one training run."""

    def __init__(self, allocation: str, seed: int = 0) -> None:
        plan = plan_of(CASE, (3,), allocation=ALLOCATIONS[allocation])
        self.model = CASE.model(torch.float32)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.engine = make_private(
            self.model,
            self.optimizer,
            plan,
            noise_multiplier=1.5,
            expected_batch_size=RATE * EXAMPLES,
            sampling_rate=RATE,
            generator=torch.Generator().manual_seed(seed),
        )
        self.sampling = torch.Generator().manual_seed(seed + 1)

    def train(self, steps: int) -> None:
        data = CASE.batch(torch.float32, EXAMPLES)
        for indices in PoissonSampler(EXAMPLES, RATE, steps, self.sampling):
            for rows in indices.split(2):  # micro-batches
                CASE.loss(self.model, {name: value[rows] for name, value in data.items()}).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()

    @property
    def _parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "optimizer", "schedule", "engine")}

    def save(self, path: Path) -> None:
        states = {name: part_.state_dict() for name, part_ in self._parts.items()}
        states["engine"] = self.engine.state_dict(exact=True)
        torch.save({**states, "sampling": self.sampling.get_state()}, path)

    def load(self, path: Path, exact: bool = True) -> None:
        states = torch.load(path, weights_only=True)
        self.sampling.set_state(states.pop("sampling"))
        self.engine.load_state_dict(states.pop("engine"), exact=exact)
        for name, state in states.items():
            self._parts[name].load_state_dict(state)


def _same(one: Run, other: Run) -> None:
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert one.engine.steps == other.engine.steps
    assert one.engine.mechanism.thresholds == other.engine.mechanism.thresholds
    assert one.engine.epsilon(1e-5) == other.engine.epsilon(1e-5)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_resumed_run_is_the_run_that_never_stopped(allocation: str, tmp_path: Path) -> None:
    straight, first, second = Run(allocation), Run(allocation), Run(allocation, seed=77)
    straight.train(7)
    first.train(3)
    first.save(tmp_path / "state.pt")
    first.train(1)  # what happens after saving changes nothing of what was saved
    second.load(tmp_path / "state.pt")
    second.train(4)
    _same(straight, second)


def test_a_new_process_resumes_bit_for_bit(tmp_path: Path) -> None:
    straight, first = Run("adaptive"), Run("adaptive")
    straight.train(5)
    first.train(3)
    first.save(tmp_path / "begun.pt")
    script = (
        "import sys, pathlib; from tests.engine.test_private_state import Run; run = Run('adaptive', seed=5)\n"
        "run.load(pathlib.Path(sys.argv[1])); run.train(2); run.save(pathlib.Path(sys.argv[2]))"
    )
    done = tmp_path / "done.pt"
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "begun.pt"), str(done)],
        check=True,
        cwd=Path(__file__).parents[2],
    )
    resumed = Run("adaptive", seed=9)
    resumed.load(done)
    _same(straight, resumed)


def test_epsilon_is_that_of_the_steps_taken() -> None:
    run = Run("fixed")
    assert run.engine.epsilon(1e-5) == 0.0
    run.train(4)
    assert run.engine.epsilon(1e-5) == epsilon(1.5, RATE, 4, 1e-5)
    _, optimizer, engine = private(sampling_rate=0.5)  # without noise
    optimizer.step()
    assert engine.epsilon(1e-5) == math.inf


def test_epsilon_without_a_sampling_rate_says_what_to_give() -> None:
    _, optimizer, engine = private()
    optimizer.step()
    with pytest.raises(GroupSearchError, match="sampling_rate"):
        engine.epsilon(1e-5)


@pytest.mark.parametrize("rate", [0.0, 1.5, -0.1])
def test_a_sampling_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(GroupSearchError, match="sampling_rate"):
        private(sampling_rate=rate)


SETTINGS = {"noise_multiplier": 1.0, "sampling_rate": 0.5}
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "boundaries": ({"boundaries": (2,)}, {}, "boundaries"),
    "threshold": ({"max_grad_norm": 0.6}, {}, "max_grad_norm"),
    "rule": ({"rule": "auto-s"}, {}, "rule"),
    "noise": ({}, {"noise_multiplier": 1.1}, "noise_multiplier"),
    "batch": ({}, {"expected_batch_size": 5.0}, "expected_batch_size"),
    "rate": ({}, {"sampling_rate": 0.4}, "sampling_rate"),
    "no rate": ({}, {"sampling_rate": None}, "sampling_rate"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_mechanism_is_refused_by_name_and_nothing_changes(name: str) -> None:
    plan, settings, match = DIFFERENT[name]
    _, optimizer, engine = private(CASE, plan_of(CASE), **SETTINGS)
    optimizer.step()
    _, _, other = private(CASE, plan_of(CASE, **plan), **{**SETTINGS, **settings})
    before = other.state_dict(exact=True)
    with pytest.raises(GroupSearchError, match=match):
        other.load_state_dict(engine.state_dict())
    after = other.state_dict(exact=True)
    assert torch.equal(before["mechanism"].pop("generator"), after["mechanism"].pop("generator"))
    assert before == after


def test_a_state_of_something_else_is_refused() -> None:
    _, optimizer, engine = private()
    for state in ({}, optimizer.state_dict(), {**engine.state_dict(), "version": 0}):
        with pytest.raises(GroupSearchError, match="state_dict"):
            engine.load_state_dict(state)


def test_the_middle_of_a_logical_batch_is_neither_saved_nor_loaded() -> None:
    model, optimizer, engine = private()
    state = engine.state_dict()
    CASE.loss(model, part(CASE.batch(), 0, 2)).mean().backward()
    for act in (engine.state_dict, lambda: engine.load_state_dict(state)):
        with pytest.raises(GroupSearchError, match="middle of a logical batch"):
            act()
    optimizer.step()
    assert engine.state_dict()["steps"] == 1


# -- parameters frozen and unfrozen between steps ----------------------------------------------------


def _attach(model: nn.Module, optimizer: torch.optim.Optimizer, like: Any, **settings: Any) -> PrivateEngine:
    from groupsearch.plan.grouping import Grouping

    sites = tuple(observe_sites(like, CASE.batch(), CASE.loss))
    settings = {"noise_multiplier": 0.0, "expected_batch_size": 4, **settings}
    return make_private(model, optimizer, ClipPlan(Grouping((), sites), max_grad_norm=0.5), **settings)


def _frozen(names: str, frozen: bool = True) -> nn.Module:
    model = CASE.model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(names)))
    return model


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen later", "unfrozen later"])
def test_a_parameter_frozen_or_unfrozen_later_is_refused_by_name_and_served_by_a_new_plan(freeze: bool) -> None:
    model = _frozen("0.", frozen=not freeze)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    engine = _attach(model, optimizer, _frozen("0.", frozen=not freeze), noise_multiplier=1.0, sampling_rate=0.5)
    CASE.loss(model, CASE.batch()).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model[0].requires_grad_(not freeze)  # type: ignore[index]
    CASE.loss(model, CASE.batch()).mean().backward()
    with pytest.raises(GroupSearchError, match=r"0\.bias, 0\.weight.*detach"):
        optimizer.step()
    engine.detach()
    follower = _attach(model, optimizer, _frozen("0.", frozen=freeze), noise_multiplier=0.5, sampling_rate=0.25)
    assert engine.accountant is not None
    assert follower.accountant is not None
    follower.accountant.load_state_dict(engine.accountant.state_dict())
    twin = _frozen("0.", frozen=freeze)
    twin.load_state_dict(model.state_dict())
    optimizer.zero_grad()
    CASE.loss(model, CASE.batch()).mean().backward()
    expected = clipped_sums(twin, CASE.batch(), CASE.loss, follower.plan)
    assert_agree(follower.clipped_sums(), expected, 1e-10)
    optimizer.step()
    assert follower.accountant.steps == 2
    assert follower.epsilon(1e-5) > engine.epsilon(1e-5)


def test_a_parameter_frozen_for_a_while_is_trained_as_ever() -> None:
    """Frozen while something else runs and unfrozen before the step: nothing of it is lost."""
    model, optimizer, engine = private()
    model[0].requires_grad_(False)  # type: ignore[index]
    CASE.loss(model, CASE.batch()).mean().backward()
    model[0].requires_grad_(True)  # type: ignore[index]
    expected = clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan)
    assert_agree(engine.clipped_sums(), expected, 1e-10)
    optimizer.step()
    assert engine.steps == 1


def test_a_frozen_parameter_keeps_its_value_and_a_stale_gradient_is_refused() -> None:
    case = EVERY_CASE["frozen-first-half"]
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    engine = make_private(model, optimizer, plan_of(case, ()), noise_multiplier=1.0, expected_batch_size=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    case.loss(model, case.batch()).mean().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert moved == set(trainable(model))
    frozen: Tensor = next(p for p in model.parameters() if not p.requires_grad)
    frozen.grad = torch.ones_like(frozen)
    with pytest.raises(GroupSearchError, match="frozen parameters with a gradient"):
        optimizer.step()
    assert engine.steps == 1
