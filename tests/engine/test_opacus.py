"""Opacus 1.6 as a second oracle: clipping without noise, whole runs and epsilon, where it supports the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupsearch.engine import make_private
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.privacy.accounting import epsilon
from groupsearch.tracer.sites import observe_sites
from tests.engine.test_parity import assert_agree, by_name, step, truth, typical_norm
from tests.support.cases import BATCH_SIZE, EVERY_CASE, Case
from tests.support.reference import trainable

pytest.importorskip("opacus")
SUPPORTED = {name: case for name, case in EVERY_CASE.items() if case.opacus}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


def without_padding(case: Case, batch_size: int = BATCH_SIZE) -> dict[str, Tensor]:
    """The case's batch without the padding token 0, whose embedding Opacus trains and torch does not."""
    batch = case.batch(batch_size=batch_size)
    return {**batch, "x": batch["x"].clamp(min=1)} if case.tokens else batch


def opacus_sums(case: Case, max_grad_norm: float) -> dict[str, Tensor]:
    """Opacus' clipped sums: GradSampleModule with hooks, DPOptimizer with flat clipping, noise 0."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model, batch = case.model(), without_padding(case)
    wrapped: Any = GradSampleModule(model, batch_first=True, loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(trainable(model).values(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        expected_batch_size=BATCH_SIZE,
    )
    case.loss(wrapped, batch).mean().backward()
    optimizer.clip_and_accumulate()
    return {name: p.summed_grad for name, p in trainable(model).items()}


@by_name(SUPPORTED)
def test_clipped_sums_equal_those_of_opacus(case: Case) -> None:
    sites, gradients = truth(case, torch.float64)
    plan = ClipPlan(Grouping((), sites), max_grad_norm=typical_norm(gradients))
    _, sums = step(case, torch.float64, plan, batch=without_padding(case))
    assert_agree(sums, opacus_sums(case, plan.max_grad_norm), 1e-5)


def test_enough_cases_are_held_against_opacus() -> None:
    assert len(SUPPORTED) >= 25


def opacus_ghost_sums(case: Case, max_grad_norm: float) -> dict[str, Tensor]:
    """Opacus' clipped sums in ghost mode: two backward passes, flat clipping."""
    model, batch = case.model(), without_padding(case)
    _, backward, optimizer = opacus_loop(case, model, "ghost", max_grad_norm, lr=0.0)
    backward(batch)
    optimizer.accumulate()
    return {name: p.summed_grad for name, p in trainable(model).items()}


def opacus_loop(
    case: Case, model: nn.Module, mode: str, max_grad_norm: float | list[float], lr: float
) -> tuple[Any, Callable[[Any], None], Any]:
    """Opacus around a model, with Adam and without noise: the wrapped model, its backward and its optimizer."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping, DPPerLayerOptimizer
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    adam = adam_of(model, lr)
    settings = {"noise_multiplier": 0.0, "max_grad_norm": max_grad_norm, "expected_batch_size": BATCH_SIZE}
    if mode == "ghost":
        ghost: Any = GradSampleModuleFastGradientClipping(
            model, batch_first=True, loss_reduction="mean", max_grad_norm=max_grad_norm, use_ghost_clipping=True
        )
        fast: Any = DPOptimizerFastGradientClipping(adam, **settings)
        return ghost, lambda b: DPTensorFastGradientClipping(ghost, fast, case.loss(ghost, b), "mean").backward(), fast
    hooks: Any = GradSampleModule(model, batch_first=True, loss_reduction="mean")
    optimizer: Any = (DPPerLayerOptimizer if mode == "per-layer" else DPOptimizer)(adam, **settings)
    return hooks, lambda b: case.loss(hooks, b).mean().backward(), optimizer


def adam_of(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam that does not blow up what is zero but for rounding, as the gradient of an attention key's bias is."""
    return torch.optim.Adam(trainable(model).values(), lr=lr, eps=1e-4)


# Opacus' ghost mode refuses a layer that is used several times, and has no norm for inputs of four dimensions.
GHOST = {name: case for name, case in SUPPORTED.items() if name not in ("reused-linear", "linear-4d")}


@by_name(GHOST)
def test_clipped_sums_equal_those_of_opacus_in_ghost_mode(case: Case) -> None:
    sites, gradients = truth(case, torch.float64)
    plan = ClipPlan(Grouping((), sites), max_grad_norm=typical_norm(gradients))
    _, sums = step(case, torch.float64, plan, batch=without_padding(case))
    assert_agree(sums, opacus_ghost_sums(case, plan.max_grad_norm), 1e-5)


def batches(case: Case, steps: int) -> Iterator[dict[str, Tensor]]:
    """Batches of any size but none, as Opacus' own loop has them."""
    examples = without_padding(case, 12)
    draw = torch.Generator().manual_seed(case.seed)
    for _ in range(steps):
        taken = torch.randperm(12, generator=draw)[: int(torch.randint(1, 7, (), generator=draw))]
        yield {name: value[taken] for name, value in examples.items()}


RUNS = ("residual-mlp-3d", "conv2d-groups", "embedding", "attention", "layernorm", "roberta", "vit-eager", "llama")


def run_beside(case: Case, mode: str, plan: ClipPlan, theirs: float | list[float]) -> None:
    """Eight steps of Adam from the same weights: after each, all weights are the same."""
    ours, other = case.model(), case.model()
    optimizer = adam_of(ours, lr=0.01)
    make_private(ours, optimizer, plan, noise_multiplier=0.0, expected_batch_size=BATCH_SIZE)
    _, backward, their_optimizer = opacus_loop(case, other, mode, theirs, lr=0.01)
    for number, batch in enumerate(batches(case, 8)):
        optimizer.zero_grad()
        case.loss(ours, batch).mean().backward()
        optimizer.step()
        their_optimizer.zero_grad()
        backward(batch)
        their_optimizer.step()
        for name, parameter in trainable(other).items():
            torch.testing.assert_close(
                trainable(ours)[name], parameter, rtol=1e-5, atol=1e-5, msg=lambda m, n=name, k=number: f"{k} {n}: {m}"
            )


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run_equals_that_of_opacus(name: str, mode: str) -> None:
    case = EVERY_CASE[name]
    sites, gradients = truth(case, torch.float64)
    threshold = typical_norm(gradients)
    run_beside(case, mode, ClipPlan(Grouping((), sites), threshold), threshold)


PER_LAYER = {
    case.name: case
    for case in (
        Case("per-layer-2d", lambda: _chain(lambda: nn.Linear(6, 6, bias=False)), (6,)),
        Case("per-layer-3d", lambda: _chain(lambda: nn.Linear(6, 6, bias=False)), (4, 6)),
        Case("per-layer-conv", lambda: _chain(lambda: nn.Conv1d(4, 4, 3, padding=1, bias=False)), (4, 5)),
    )
}


def _chain(layer: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(layer(), nn.Tanh(), layer(), nn.Tanh(), layer())


@by_name(PER_LAYER)
def test_opacus_per_layer_is_layer_wise_where_layers_have_one_tensor(case: Case) -> None:
    """Opacus' ``per_layer`` has one threshold per parameter tensor; without biases that is one per layer."""
    sites = tuple(observe_sites(case.model(), case.batch(), case.loss))
    assert [site.parameters for site in sites] == [(name,) for name in trainable(case.model())]
    given = [0.2, 0.05, 0.4]
    run_beside(case, "per-layer", ClipPlan(Grouping((1, 2), sites), allocation=given), given)


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [(1.0, 0.01, 1000), (0.7, 0.05, 200), (2.0, 0.2, 100), (4.0, 1.0, 50), (1.1, 0.004, 5000)],
)
@pytest.mark.parametrize("delta", [1e-5, 1e-7])
def test_epsilon_equals_that_of_opacus(noise: float, rate: float, steps: int, delta: float) -> None:
    """Both by Renyi divergences, on lists of orders that differ: within 1 %. Our own figure is never above theirs."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise, rate, steps)]
    theirs = accountant.get_epsilon(delta)
    assert epsilon(noise, rate, steps, delta, "rdp") == pytest.approx(theirs, rel=0.01)
    assert epsilon(noise, rate, steps, delta) <= theirs
