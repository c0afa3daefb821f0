"""Opacus 1.6 as a second oracle: flat clipping without noise, where it supports the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from groupsearch.clipping import ClipPlan
from groupsearch.grouping import Grouping
from tests.cases import BATCH_SIZE, EVERY_CASE, Case
from tests.engine.test_parity import assert_agree, by_name, step, truth, typical_norm
from tests.reference import trainable

pytest.importorskip("opacus")
SUPPORTED = {name: case for name, case in EVERY_CASE.items() if case.opacus}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


def without_padding(case: Case) -> dict[str, Tensor]:
    """The case's batch without the padding token 0, whose embedding Opacus trains and torch does not."""
    batch = case.batch()
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
