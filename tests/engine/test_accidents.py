"""What goes wrong in the middle of a step, and batches that are given up: no example is ever counted twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from groupsearch.engine import PrivateEngine
from tests.engine.loop import CASE, TOLERANCE, part, private, seen_by
from tests.engine.test_parity import assert_agree
from tests.support.reference import clipped_sums, trainable


class Accident(Exception):
    """What the tests below throw."""


def _fail(*_: Any) -> None:
    raise Accident


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("layer", ["0", "2.module.up", "4"])
def test_a_step_after_an_accident_is_clean(where: str, layer: str) -> None:
    model, _, engine = private()
    module = model.get_submodule(layer)
    if where == "forward":
        handle = module.register_forward_hook(_fail)
    else:
        handle = module.register_forward_hook(lambda _module, _args, output: output.register_hook(_fail) and None)
    with pytest.raises(Accident):
        CASE.loss(model, CASE.batch()).mean().backward()
    handle.remove()
    _check_clean_step(model, engine)


def test_an_accident_in_the_loss_leaves_a_clean_engine() -> None:
    model, _, engine = private()
    with pytest.raises(Accident):
        _fail(CASE.loss(model, CASE.batch()))
    _check_clean_step(model, engine)


def _check_clean_step(model: nn.Module, engine: PrivateEngine) -> None:
    CASE.loss(model, CASE.batch()).mean().backward()
    expected = clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan)
    assert_agree(engine.clipped_sums(), expected, TOLERANCE)


@contextmanager
def _accident_in(module: nn.Module, where: str) -> Iterator[None]:
    if where == "forward":
        handle = module.register_forward_hook(_fail)
    else:
        handle = module.register_forward_hook(lambda _module, _args, output: output.register_hook(_fail) and None)
    try:
        with pytest.raises(Accident):
            yield
    finally:
        handle.remove()


def _take(model: nn.Module, start: int, stop: int) -> None:
    CASE.loss(model, part(CASE.batch(), start, stop)).mean().backward()


@pytest.mark.parametrize("layer", ["0", "2.module.up", "4"])
def test_a_batch_taken_again_after_an_accident_counts_every_example_once(layer: str) -> None:
    model, optimizer, engine = private()
    _take(model, 0, 2)
    with _accident_in(model.get_submodule(layer), "backward"):
        _take(model, 2, 3)
    for start in (0, 2):
        _take(model, start, start + 2)
    expected = clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan)
    assert_agree(engine.clipped_sums(), expected, TOLERANCE)
    with seen_by(optimizer, model) as seen:
        optimizer.step()
    assert any(g.any() for g in seen[0].values())


def test_a_step_right_after_an_accident_is_the_step_of_an_empty_batch() -> None:
    model, optimizer, engine = private()
    _take(model, 0, 2)
    with _accident_in(model.get_submodule("2.module.up"), "backward"):
        _take(model, 2, 4)
    with seen_by(optimizer, model) as seen:
        optimizer.step()
    assert not any(g.any() for g in seen[0].values())
    assert engine.steps == 1


def test_a_forward_pass_that_raises_leaves_the_other_micro_batches() -> None:
    model, _, engine = private()
    _take(model, 0, 2)
    with _accident_in(model.get_submodule("2.module.up"), "forward"):
        _take(model, 2, 4)
    _take(model, 2, 4)
    expected = clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan)
    assert_agree(engine.clipped_sums(), expected, TOLERANCE)


@pytest.mark.parametrize("owner", ["model", "optimizer"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_gives_the_logical_batch_up(owner: str, set_to_none: bool) -> None:
    model, optimizer, engine = private()
    _take(model, 0, 4)
    (model if owner == "model" else optimizer).zero_grad(set_to_none=set_to_none)
    _take(model, 1, 3)
    expected = clipped_sums(CASE.model(), part(CASE.batch(), 1, 3), CASE.loss, engine.plan)
    assert_agree(engine.clipped_sums(), expected, TOLERANCE)


def test_zero_grad_between_forward_and_backward_drops_nothing_of_that_pass() -> None:
    model, optimizer, engine = private()
    loss = CASE.loss(model, CASE.batch()).mean()
    optimizer.zero_grad()
    loss.backward()
    expected = clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan)
    assert_agree(engine.clipped_sums(), expected, TOLERANCE)


def test_zero_grad_of_a_copy_of_the_model_is_the_copy_s_own() -> None:
    model, _, engine = private()
    _take(model, 0, 4)
    copy = deepcopy(model)
    for parameter in copy.parameters():
        parameter.grad = torch.ones_like(parameter)
    copy.zero_grad()
    assert all(parameter.grad is None for parameter in copy.parameters())
    expected = clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan)
    assert_agree(engine.clipped_sums(), expected, TOLERANCE)


def test_an_optimizer_that_raises_has_had_its_noise() -> None:
    """The gradient was handed out: it counts as a step, and the next one is clean."""
    model, optimizer, engine = private(noise_multiplier=1.0, sampling_rate=0.5)
    handle = optimizer.register_step_pre_hook(_fail)
    _take(model, 0, 2)
    with pytest.raises(Accident):
        optimizer.step()
    handle.remove()
    assert engine.steps == 1
    assert engine.accountant is not None
    assert engine.accountant.steps == 1
    first = {name: p.grad for name, p in trainable(model).items()}
    _take(model, 0, 4)
    expected = clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan)
    assert_agree(engine.clipped_sums(), expected, TOLERANCE)
    optimizer.step()
    assert engine.steps == 2
    assert all(p.grad is not first[name] for name, p in trainable(model).items())
