"""What the engine refuses, and that the refusal names the culprit and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer.sites import observe_sites
from tests.support.cases import BATCH_SIZE, LAYER_CASES, Case, Wrap, readout
from tests.support.reference import clipped_sums, trainable


def attach(model: nn.Module, batch: Any, loss: Callable[..., Tensor] = readout, **settings: Any) -> PrivateEngine:
    """The engine on a model, with a plan made from that model."""
    sites = tuple(observe_sites(model, batch, loss))
    optimizer = settings.pop("optimizer", None) or torch.optim.SGD(trainable(model).values(), lr=0.1)
    settings = {"noise_multiplier": 0.0, "expected_batch_size": BATCH_SIZE, **settings}
    return make_private(model, optimizer, ClipPlan(Grouping((), sites)), **settings)


def example_of(build: Callable[[], nn.Module], shape: tuple[int, ...], tokens: bool = False) -> tuple[nn.Module, Any]:
    """A model and a batch of it."""
    case = Case("refused", build, shape, tokens)
    return case.model(), case.batch()


def attach_and_step(model: nn.Module, batch: Any) -> None:
    """The engine on a model, and one backward pass."""
    attach(model, batch)
    backward(model, batch)


def backward(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
    """One backward pass, and a step where an optimizer is given."""
    readout(model, batch).mean().backward()
    if optimizer is not None:
        optimizer.step()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.BatchNorm1d(6), (6,)),
        (lambda: nn.BatchNorm1d(6, affine=False), (6,)),
        (lambda: nn.BatchNorm1d(6, track_running_stats=False), (6,)),
        (lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True), (6, 4)),
    ],
    ids=["batch norm", "batch norm without parameters", "batch norm without statistics", "tracking instance norm"],
)
def test_layers_that_mix_examples_are_refused_by_name(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    def build() -> nn.Module:
        first = nn.Linear(6, 6) if len(shape) == 1 else nn.Conv1d(6, 6, 1)
        return nn.Sequential(first, nn.ModuleDict({"deep": layer()})["deep"])

    model, batch = example_of(build, shape)
    with pytest.raises(UnsupportedModelError, match=r"'1'.*Norm.*(GroupNorm|LayerNorm)"):
        attach(model, batch)


def test_a_frozen_batch_norm_in_evaluation_mode_is_not_refused() -> None:
    model, batch = example_of(lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), (6,))
    model[1].eval().requires_grad_(False)  # type: ignore[index]
    twin = deepcopy(model)
    engine = attach(model, batch)
    readout(model, batch).mean().backward()
    expected = clipped_sums(twin, batch, readout, engine.plan)
    for name, value in engine.clipped_sums().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


def test_a_batch_norm_switched_to_training_afterwards_is_refused() -> None:
    model, batch = example_of(lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), (6,))
    model[1].eval().requires_grad_(False)  # type: ignore[index]
    attach(model, batch)
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"'1'"):
        readout(model, batch).mean().backward()


def test_a_penalty_on_the_weights_is_refused_by_name() -> None:
    model, batch = example_of(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,))
    attach(model, batch)
    with pytest.raises(UnsupportedModelError, match=r"2\.weight"):
        (readout(model, batch).mean() + model[2].weight.square().sum()).backward()  # type: ignore[index]


def test_a_penalty_does_not_leave_its_gradient_behind() -> None:
    model, batch = example_of(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,))
    attach(model, batch)
    with pytest.raises(UnsupportedModelError):
        (readout(model, batch).mean() + model[2].weight.square().sum()).backward()  # type: ignore[index]
    assert all(p.grad is None for p in model.parameters())


def test_a_weight_that_is_borrowed_after_the_trace_is_refused_by_name() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        z = torch.tanh(m.first(x))
        return F.linear(z, m.first.weight) if m.borrows else z

    model, batch = example_of(lambda: Wrap(forward, first=nn.Linear(6, 6)), (6,))
    model.borrows = False
    attach(model, batch)
    model.borrows = True
    with pytest.raises(UnsupportedModelError, match=r"first\.weight"):
        readout(model, batch).mean().backward()


def test_an_optimizer_without_a_trainable_parameter_is_refused_by_name() -> None:
    model, batch = example_of(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), (6,))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)  # type: ignore[index]
    with pytest.raises(GroupSearchError, match=r"1\.weight"):
        attach(model, batch, optimizer=optimizer)


def test_an_optimizer_with_foreign_parameters_is_refused() -> None:
    model, batch = example_of(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), (6,))
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(GroupSearchError, match="optimizer"):
        attach(model, batch, optimizer=optimizer)


def test_a_parameter_group_added_later_is_refused() -> None:
    model, batch = example_of(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), (6,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, batch, optimizer=optimizer)
    foreign = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [foreign]})
    foreign.grad = torch.ones(3)
    readout(model, batch).mean().backward()
    with pytest.raises(GroupSearchError):
        optimizer.step()


def test_a_parameter_unfrozen_later_is_refused_by_name() -> None:
    model, batch = example_of(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,))
    model[0].requires_grad_(False)  # type: ignore[index]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, batch, optimizer=optimizer)
    model[0].requires_grad_(True)  # type: ignore[index]
    with pytest.raises(GroupSearchError, match=r"0\.weight"):
        backward(model, batch, optimizer)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model, batch = example_of(lambda: nn.Linear(6, 5).requires_grad_(False), (6,))
    with pytest.raises(GroupSearchError):
        attach(model, batch, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_plan_of_another_model_is_refused_by_name() -> None:
    one, batch = example_of(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), (6,))
    other, _ = example_of(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,))
    plan = ClipPlan(Grouping((), tuple(observe_sites(one, batch, readout))))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(GroupSearchError, match=r"2\.weight|1\.weight"):
        make_private(other, optimizer, plan, noise_multiplier=0.0, expected_batch_size=BATCH_SIZE)


def _repeating() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(m.times):
            x = torch.tanh(m.a(x))
        return x

    model = Wrap(forward, a=nn.Linear(6, 6))
    model.times = 1  # type: ignore[assignment]
    return model


def test_more_uses_of_a_layer_than_planned_are_refused_by_name() -> None:
    model, batch = example_of(_repeating, (6,))
    attach(model, batch)
    model.times = 3  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match="'a'"):
        readout(model, batch).mean().backward()


def test_fewer_uses_of_a_layer_than_planned_are_exact_or_refused() -> None:
    model, batch = example_of(_repeating, (6,))
    model.times = 3  # type: ignore[assignment]
    twin = deepcopy(model)
    engine = attach(model, batch)
    model.times = twin.times = 2  # type: ignore[assignment]
    try:
        readout(model, batch).mean().backward()
        found = engine.clipped_sums()
    except UnsupportedModelError:
        return
    sites = engine.plan.grouping.sites[:2]
    expected = clipped_sums(twin, batch, readout, ClipPlan(Grouping((), sites)))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: Wrap(lambda m, x: m.a(x.transpose(0, 2)).transpose(0, 2), a=nn.Linear(4, 4)), (3, 6)),
        (lambda: Wrap(lambda m, x: m.a(x.reshape(2, -1, 6)).view(len(x), -1), a=nn.Linear(6, 5)), (6,)),
        (
            lambda: Wrap(lambda m, x: m.a(x.transpose(0, 1).flatten(0, 1)).view(3, len(x), -1)[0], a=nn.Linear(6, 5)),
            (3, 6),
        ),
        (lambda: Wrap(lambda m, x: m.p * x, p=nn.Parameter(torch.randn(BATCH_SIZE, 6))), (6,)),
    ],
    ids=["batch last", "in halves", "folded the other way", "parameter per example"],
)
def test_a_batch_that_is_not_first_is_refused(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model, batch = example_of(build, shape)
    with pytest.raises(UnsupportedModelError):
        attach_and_step(model, batch)


def test_a_closure_is_refused() -> None:
    model, batch = example_of(lambda: nn.Linear(6, 5), (6,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, batch, optimizer=optimizer)

    def closure() -> float:
        loss = readout(model, batch).mean()
        loss.backward()
        return float(loss)

    with pytest.raises(GroupSearchError, match="closure"):
        optimizer.step(closure)


def test_a_gradient_the_engine_did_not_make_is_refused_by_name() -> None:
    model, batch = example_of(lambda: nn.Linear(6, 5), (6,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, batch, optimizer=optimizer)
    readout(model, batch).mean().backward()
    model.bias.grad = torch.ones_like(model.bias)  # type: ignore[union-attr, arg-type]
    with pytest.raises(GroupSearchError, match="bias"):
        optimizer.step()


@pytest.mark.parametrize(
    "settings",
    [
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": float("inf")},
        {"expected_batch_size": 0},
        {"expected_batch_size": -2},
        {"expected_batch_size": float("nan")},
        {"expected_batch_size": float("inf")},
        {"loss_reduction": "none"},
    ],
    ids=str,
)
def test_numbers_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    model, batch = example_of(lambda: nn.Linear(6, 5), (6,))
    with pytest.raises(GroupSearchError, match="Expected"):
        attach(model, batch, **settings)


def test_two_engines_on_one_model_are_refused() -> None:
    case = LAYER_CASES["linear-3d"]
    model, batch = case.model(), case.batch()
    plan = attach(model, batch).plan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(GroupSearchError, match="engine"):
        make_private(model, optimizer, plan, noise_multiplier=0.0, expected_batch_size=BATCH_SIZE)


def test_observing_a_private_model_is_refused() -> None:
    case = LAYER_CASES["linear-3d"]
    model, batch = case.model(), case.batch()
    attach(model, batch)
    with pytest.raises(GroupSearchError, match="engine"):
        observe_sites(model, batch, case.loss)


def test_a_refusal_at_construction_leaves_no_hooks() -> None:
    model, batch = example_of(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), (6,))
    sites = tuple(observe_sites(model, batch, readout))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)  # type: ignore[index]
    with pytest.raises(GroupSearchError):
        make_private(model, optimizer, ClipPlan(Grouping((), sites)), noise_multiplier=0.0, expected_batch_size=4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks


def test_a_loss_that_draws_random_numbers_is_no_mixing():
    case = LAYER_CASES["linear-2d"]

    def noisy(model, batch):
        return case.loss(model, {**batch, "x": batch["x"] + torch.randn_like(batch["x"])})

    before = torch.get_rng_state()
    assert observe_sites(case.model(), case.batch(), noisy) == observe_sites(case.model(), case.batch(), case.loss)
    assert torch.equal(torch.get_rng_state(), before)
