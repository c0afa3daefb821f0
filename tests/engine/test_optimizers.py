"""Optimizers of torch and of others: each sees the private gradient and does with it what it always does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.errors import GroupSearchError
from tests.engine.loop import part, plan_of, private, seen_by
from tests.support.cases import BATCH_SIZE, EVERY_CASE, Case
from tests.support.reference import clipped_sums, trainable

CASE = EVERY_CASE["linear-3d"]
MATRICES = Case(
    "matrices", lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)), (4, 6)
)
Make = Callable[[Any], torch.optim.Optimizer]


class Plain(torch.optim.Optimizer):
    """An optimizer of somebody else, with a step of its own."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Sign descent."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad.sign()


class Calling(torch.optim.SGD):
    """An optimizer whose step calls the step of its parent class, hooks and all."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """A step, after which weights are made smaller."""
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.999)
        return result


def _of(name: str, **settings: Any) -> Make:
    return lambda parameters: getattr(torch.optim, name)(parameters, **{"lr": 0.02, **settings})


OPTIMIZERS: dict[str, Make] = {
    **{
        name: _of(name)
        for name in ("Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "Adafactor")
    },
    "SGD nesterov": _of("SGD", momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD maximize": _of("SGD", maximize=True),
    "Adam amsgrad": _of("Adam", amsgrad=True),
    **{f"{name} foreach": _of(name, foreach=True) for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam")},
    **{f"{name} fused": _of(name, fused=True) for name in ("SGD", "Adam", "AdamW", "Adagrad")},
    "Plain": lambda parameters: Plain(parameters, 0.02),
    "Calling": lambda parameters: Calling(parameters, 0.02, momentum=0.5),
    "groups": lambda parameters: _grouped(list(parameters)),
}


def _grouped(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Rates and weight decays of their own; one group comes later."""
    groups = [{"params": parameters[:1], "lr": 0.1, "weight_decay": 0.5}, {"params": parameters[1:2], "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, lr=0.3)
    optimizer.add_param_group({"params": parameters[2:], "lr": 0.05, "weight_decay": 0.0})
    return optimizer


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda optimizer: None,
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=8, cycle_momentum=False
    ),
}


@pytest.fixture(autouse=True)
def _one_plain_sgd() -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # hooks of SGD.step itself, for `Calling`


def _check_loop(case: Case, make: Make, schedule: str) -> None:
    """A private loop equals a plain one on the reference's clipped sums and the same noise."""
    plan = plan_of(case, (1,))
    model, twin = case.model(), case.model()
    optimizer, plain = (make(list(trainable(m).values())) for m in (model, twin))
    settings: dict[str, Any] = {"noise_multiplier": 0.5, "expected_batch_size": 3}
    engine = make_private(model, optimizer, plan, **settings, generator=torch.Generator().manual_seed(1))
    noises = _noises(case, settings)
    schedules = SCHEDULES[schedule](optimizer), SCHEDULES[schedule](plain)
    for (start, stop), noise in zip(((0, 4), (1, 3), (2, 2), (0, 3)), noises, strict=True):
        batch = part(case.batch(), start, stop)
        optimizer.zero_grad()
        if stop > start:
            case.loss(model, batch).mean().backward()
        optimizer.step()
        sums = clipped_sums(twin, batch, case.loss, plan) if stop > start else {}
        for name, parameter in trainable(twin).items():
            parameter.grad = sums.get(name, torch.zeros_like(parameter)) / 3 + noise[name]
        plain.step()
        for found in schedules:
            if found is not None:
                found.step()
    assert engine.steps == 4
    for name, parameter in trainable(twin).items():
        torch.testing.assert_close(trainable(model)[name], parameter, rtol=1e-7, atol=1e-6)


def _noises(case: Case, settings: dict[str, Any]) -> list[dict[str, Tensor]]:
    model, optimizer, _ = private(case, plan_of(case, (1,)), **settings, generator=torch.Generator().manual_seed(1))
    with seen_by(optimizer, model) as seen:
        for _ in range(4):
            optimizer.step()
    return seen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_on_the_private_gradient(name: str) -> None:
    _check_loop(CASE, OPTIMIZERS[name], "none")


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_steps_on_the_private_gradient() -> None:
    _check_loop(MATRICES, lambda p: torch.optim.Muon(p, lr=0.02), "none")


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "none"])
@pytest.mark.parametrize("name", ["SGD nesterov", "Calling", "groups"])
def test_schedules_turn_the_rates_as_ever(name: str, schedule: str) -> None:
    _check_loop(CASE, OPTIMIZERS[name], schedule)


def test_a_parameter_group_added_later_is_trained_if_the_plan_covers_it() -> None:
    """The optimizer holds the second layer from the second step on; until then the step is refused by name."""
    model = CASE.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = make_private(model, optimizer, plan_of(CASE, (1,)), noise_multiplier=0.0, expected_batch_size=BATCH_SIZE)
    last = optimizer.param_groups[0]["params"].pop()
    CASE.loss(model, CASE.batch()).mean().backward()
    with pytest.raises(GroupSearchError, match=r"2\.weight"):
        optimizer.step()
    optimizer.add_param_group({"params": [last], "lr": 0.7})
    before = last.detach().clone()
    expected = clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan)["2.weight"]
    optimizer.step()
    torch.testing.assert_close(last.detach(), before - 0.7 * expected / BATCH_SIZE, rtol=1e-9, atol=1e-12)


def test_a_step_that_calls_its_parents_step_draws_noise_once() -> None:
    model = CASE.model()
    optimizer = Calling(model.parameters(), 0.1)
    engine = make_private(
        model, optimizer, plan_of(CASE, (1,)), noise_multiplier=1.0, expected_batch_size=BATCH_SIZE, sampling_rate=0.5
    )
    with seen_by(optimizer, model) as seen:
        for _ in range(2):
            optimizer.step()
    assert len(seen) == 4, "the hooks of both classes run"
    assert engine.steps == 2
    for one, again in ((0, 1), (2, 3)):
        assert all(torch.equal(seen[one][name], seen[again][name]) for name in seen[one])
    assert not torch.equal(seen[0]["0.weight"], seen[2]["0.weight"])


class Wrapper(torch.optim.Optimizer):
    """Wraps another optimizer without being one: torch's hooks never run."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """The inner one's."""
        self.inner.step()


def _sparse(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SparseAdam(list(parameters), lr=0.1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS"),
        (_sparse, "SparseAdam"),
        (lambda p: Wrapper(torch.optim.SGD(p, lr=0.1)), r"Wrapper.*wraps"),
    ],
    ids=["LBFGS", "SparseAdam", "wrapper"],
)
def test_optimizers_that_cannot_be_served_are_refused_by_name(make: Make, match: str) -> None:
    model = CASE.model()
    with pytest.raises(GroupSearchError, match=match):
        make_private(model, make(model.parameters()), plan_of(CASE, (1,)), noise_multiplier=0.0, expected_batch_size=1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_closure_in_the_middle_of_a_batch_leaves_the_batch() -> None:
    model, optimizer, engine = private(CASE, plan_of(CASE, (1,)))
    CASE.loss(model, CASE.batch()).mean().backward()
    with pytest.raises(GroupSearchError, match="closure"):
        optimizer.step(lambda: 0.0)
    expected = clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan)
    for name, value in engine.clipped_sums().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    assert isinstance(engine, PrivateEngine)
