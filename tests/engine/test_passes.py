"""Several forward passes before one backward: of the same examples, of different ones, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupsearch.engine import PrivateEngine
from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer.sites import observe_sites
from tests.engine.loop import CASE, TIED, TOLERANCE, part, plan_of, private
from tests.engine.test_parity import assert_agree
from tests.support.cases import BATCH_SIZE, EVERY_CASE, Case
from tests.support.reference import clipped_sums, group_norms, per_site_gradients

CLASS_TOKEN = EVERY_CASE["class-token"]


def two_views(model: nn.Module, batch: Any) -> Tensor:
    """A loss (B,) of two passes over the same examples, as a contrastive one has."""
    one, other = model(batch["x"]), model(1.5 - batch["x"].flip(1))
    return batch["scale"] * (one - other).flatten(1).sin().sum(1)


def _views_plan(case: Case, boundaries: tuple[int, ...]) -> ClipPlan:
    sites = tuple(observe_sites(case.model(), case.batch(), two_views))
    return ClipPlan(Grouping(boundaries, sites), max_grad_norm=0.5)


@pytest.mark.parametrize("boundaries", [(), (3,), (2, 9, 20)], ids=str)
@pytest.mark.parametrize("case", [CASE, CLASS_TOKEN], ids=lambda c: c.name)
def test_passes_of_the_same_examples_are_clipped_as_one(case: Case, boundaries: tuple[int, ...]) -> None:
    plan = _views_plan(case, tuple(b for b in boundaries if b < len(_views_plan(case, ()).grouping.sites)))
    model, optimizer, engine = private(case, plan)
    for _ in range(2):
        optimizer.zero_grad()
        with engine.same_examples():
            two_views(model, case.batch()).mean().backward()
        gradients = per_site_gradients(case.model(), case.batch(), two_views, plan.grouping.sites)
        assert_agree(engine.clipped_sums(), clipped_sums(case.model(), case.batch(), two_views, plan), TOLERANCE)
        torch.testing.assert_close(engine.norms, group_norms(gradients, plan), rtol=1e-9, atol=1e-12)


def test_micro_batches_of_two_views_add_up() -> None:
    plan = _views_plan(CASE, (5,))
    model, _, engine = private(CASE, plan)
    with engine.same_examples():
        for start, stop in ((0, 1), (1, 4)):
            two_views(model, part(CASE.batch(), start, stop)).mean().backward()
    assert_agree(engine.clipped_sums(), clipped_sums(CASE.model(), CASE.batch(), two_views, plan), TOLERANCE)


def test_a_pass_left_over_is_not_gone_on_with() -> None:
    """A forward pass without backward, of other examples, is no part of what the next context says."""
    plan = _views_plan(CASE, (5,))
    model, _, engine = private(CASE, plan)
    with engine.same_examples():
        model(CASE.batch()["x"][:2])
    with engine.same_examples():
        two_views(model, CASE.batch()).mean().backward()
    assert_agree(engine.clipped_sums(), clipped_sums(CASE.model(), CASE.batch(), two_views, plan), TOLERANCE)


def test_more_passes_of_the_same_examples_than_planned_are_refused() -> None:
    model, _, engine = private(CASE, plan_of(CASE))
    with engine.same_examples(), pytest.raises(GroupSearchError, match="used 2 times"):
        two_views(model, CASE.batch()).mean().backward()


@pytest.mark.parametrize("boundaries", [(), (1,), (1, 2)], ids=str)
@pytest.mark.parametrize("case", [CASE, TIED, CLASS_TOKEN], ids=lambda c: c.name)
def test_passes_of_different_examples_add_up_to_the_batch(case: Case, boundaries: tuple[int, ...]) -> None:
    plan = plan_of(case, boundaries)
    model, optimizer, engine = private(case, plan, loss_reduction="sum")
    for _ in range(2):
        optimizer.zero_grad()
        with engine.different_examples():
            losses = [case.loss(model, part(case.batch(), *cut)).sum() for cut in ((0, 1), (1, 3), (3, 4))]
            sum(losses).backward()  # type: ignore[union-attr]
        assert_agree(engine.clipped_sums(), clipped_sums(case.model(), case.batch(), case.loss, plan), TOLERANCE)


def test_sizes_of_different_passes_are_their_own() -> None:
    """Each mean is over its own pass, so each gradient is scaled by its own size."""
    model, _, engine = private(CASE)
    with engine.different_examples():
        one, other = (CASE.loss(model, part(CASE.batch(), *cut)).mean() for cut in ((0, 1), (1, 4)))
        (one + other).backward()
    assert_agree(engine.clipped_sums(), clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan), TOLERANCE)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_backward_passes_may_come_one_by_one(order: tuple[int, ...]) -> None:
    model, _, engine = private(CASE)
    with engine.different_examples():
        losses = [CASE.loss(model, part(CASE.batch(), *cut)).mean() for cut in ((0, 1), (1, 4))]
        for index in order:
            losses[index].backward()
    assert engine.norms.shape == (3, 2), "those of the pass that began last"
    assert_agree(engine.clipped_sums(), clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan), TOLERANCE)


def test_norms_are_those_of_the_last_pass() -> None:
    model, _, engine = private(CASE)
    gradients = per_site_gradients(CASE.model(), CASE.batch(), CASE.loss, engine.plan.grouping.sites)
    expected = group_norms(gradients, engine.plan)
    with engine.different_examples():
        one, other = (CASE.loss(model, part(CASE.batch(), *cut)).sum() for cut in ((0, 3), (3, 4)))
        (3 * one + other).backward()  # mean over one example is its own loss; three times as much for the others
    torch.testing.assert_close(engine.norms, expected[3:], rtol=1e-9, atol=1e-12)


def _open_twice(engine: PrivateEngine, model: nn.Module) -> None:
    first = CASE.loss(model, part(CASE.batch(), 0, 2)).mean()
    second = CASE.loss(model, part(CASE.batch(), 2, 4)).mean()
    (first + second).backward()


def test_two_open_passes_are_refused_naming_both_contexts() -> None:
    model, _, engine = private(CASE)
    with pytest.raises(GroupSearchError, match=r"same_examples.*different_examples"):
        _open_twice(engine, model)


def test_what_was_said_of_passes_holds_inside_the_context_only() -> None:
    model, optimizer, engine = private(CASE)
    with engine.different_examples():
        _open_twice(engine, model)
    with engine.different_examples(), engine.same_examples():
        pass
    with pytest.raises(RuntimeError, match="given up"), engine.different_examples():
        raise RuntimeError("given up")
    optimizer.zero_grad()
    with pytest.raises(GroupSearchError, match="same_examples"):
        _open_twice(engine, model)


def test_an_accident_in_one_of_two_open_passes_drops_both() -> None:
    model, _, engine = private(CASE)
    with engine.different_examples():
        first = CASE.loss(model, part(CASE.batch(), 0, 2))
        second = CASE.loss(model, part(CASE.batch(), 2, 4))

        def fail(g: Tensor) -> None:
            raise ZeroDivisionError

        first.register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            (first.mean() + second.mean()).backward()
    del first, second
    CASE.loss(model, CASE.batch()).mean().backward()
    assert_agree(engine.clipped_sums(), clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan), TOLERANCE)
    assert engine.norms.shape == (BATCH_SIZE, 2)
