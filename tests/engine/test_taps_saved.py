"""Inputs are saved through autograd, so what packs, moves or recomputes saved tensors does so with them too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from tests.engine.loop import TOLERANCE, plan_of, private
from tests.engine.test_parity import assert_agree
from tests.support.cases import EVERY_CASE, Case, plain
from tests.support.reference import clipped_sums

CASES = [
    EVERY_CASE[name]
    for name in ("residual-mlp-3d", "tied-embedding-head", "class-token", "conv2d-groups", "checkpoint-non-reentrant")
] + [EVERY_CASE["checkpoint-reentrant"], EVERY_CASE["gpt2"]]


class Disk:
    """Packs every saved tensor into a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packed = 0
        self.fetched = 0

    def pack(self, tensor: Tensor) -> Path:
        """The file that holds it now."""
        self.packed += 1
        path = self.folder / f"{self.packed}.pt"
        torch.save(tensor.detach(), path)
        return path

    def unpack(self, path: Path) -> Tensor:
        """What the file holds."""
        self.fetched += 1
        return torch.load(path, weights_only=True)


def _check(case: Case, context: Callable[[], AbstractContextManager[Any]]) -> None:
    model, _, engine = private(case, plan_of(case, (1,) if case.name != "conv2d-groups" else ()))
    for _ in range(2):
        with context():
            loss = case.loss(model, case.batch()).mean()
        loss.backward()
    expected = clipped_sums(plain(case.model()), case.batch(), case.loss, engine.plan)
    twice = {name: 2 * total for name, total in expected.items()}
    assert_agree(engine.clipped_sums(), twice, TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_saved_tensors_may_be_kept_on_the_cpu(case: Case) -> None:
    _check(case, lambda: save_on_cpu(pin_memory=False))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_saved_tensors_may_be_kept_on_disk(case: Case, tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    _check(case, lambda: saved_tensors_hooks(disk.pack, disk.unpack))
    assert disk.packed >= disk.fetched > 0


def test_inputs_go_through_the_hooks_and_nothing_else_holds_them(tmp_path: Path) -> None:
    """Of the input of every layer only what the hook packed is left when forward is over."""
    case = EVERY_CASE["linear-3d"]
    model, _, engine = private(case, plan_of(case, ()))
    kept: list[Any] = []
    handle = model[2].register_forward_pre_hook(lambda module, args: kept.append(args[0].untyped_storage()._weak_ref()))
    disk = Disk(tmp_path)
    with saved_tensors_hooks(disk.pack, disk.unpack):
        loss = case.loss(model, case.batch()).mean()
    assert torch.UntypedStorage._expired(kept[0]), "the second layer's input is still alive"
    handle.remove()
    loss.backward()
    assert_agree(engine.clipped_sums(), clipped_sums(case.model(), case.batch(), case.loss, engine.plan), TOLERANCE)


def test_without_hooks_the_input_lives_until_backward() -> None:
    """The other way round: the test above can fail."""
    case = EVERY_CASE["linear-3d"]
    model, _, _ = private(case, plan_of(case, ()))
    kept: list[Any] = []
    model[2].register_forward_pre_hook(lambda module, args: kept.append(args[0].untyped_storage()._weak_ref()))
    with nullcontext():
        loss = case.loss(model, case.batch()).mean()
    assert not torch.UntypedStorage._expired(kept[0])
    loss.backward()
