"""A case's model in a training loop: what the tests of loops begin with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer.sites import observe_sites
from tests.support.cases import BATCH_SIZE, EVERY_CASE, Case
from tests.support.reference import trainable

CASE = EVERY_CASE["residual-mlp-3d"]
TIED = EVERY_CASE["tied-embedding-head"]
TOLERANCE = 1e-10


def plan_of(case: Case, boundaries: tuple[int, ...] = (3,), **settings: Any) -> ClipPlan:
    """A plan for the case; by default two groups."""
    sites = tuple(observe_sites(case.model(), case.batch(), case.loss))
    return ClipPlan(Grouping(boundaries, sites), **{"max_grad_norm": 0.5, **settings})


def private(
    case: Case = CASE, plan: ClipPlan | None = None, optimizer: str = "SGD", **settings: Any
) -> tuple[nn.Module, torch.optim.Optimizer, PrivateEngine]:
    """The case's model, its optimizer and the engine, without noise unless asked."""
    model = case.model()
    chosen: torch.optim.Optimizer = getattr(torch.optim, optimizer)(trainable(model).values(), lr=0.1)
    settings = {"noise_multiplier": 0.0, "expected_batch_size": BATCH_SIZE, **settings}
    return model, chosen, make_private(model, chosen, plan or plan_of(case), **settings)


def part(batch: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Some examples of a batch."""
    return {name: value[start:stop] for name, value in batch.items()}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """What the optimizer saw, by name."""
    found = {}
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


@contextmanager
def seen_by(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """Collects the gradients that the optimizer reads at every step."""
    seen: list[dict[str, Tensor]] = []
    handle = optimizer.register_step_pre_hook(lambda *_: seen.append(gradients_of(model)))
    try:
        yield seen
    finally:
        handle.remove()


def scaled(sums: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Every tensor times a number."""
    return {name: value * factor for name, value in sums.items()}
