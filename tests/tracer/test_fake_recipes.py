"""Recipes give what torch works out, and are used."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from groupsearch.tracer import fake, trace_model
from groupsearch.tracer.fake import FakeTensors
from tests.support.cases import EVERY_CASE

Form = tuple[Any, ...]
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "elementwise": lambda x: x + 1,
    "in place": lambda x: x.mul_(2.0),
    "matrix product": lambda x: x @ x.mT,
    "view": lambda x: x.view(2, 12),
    "slice": lambda x: x[:, 1:, ::2],
    "view of a slice": lambda x: x[1:].mT,
    "several views": lambda x: x.split([1, 3], 2),
    "several tensors": lambda x: x.max(1),
    "layer norm": lambda x: torch.nn.functional.layer_norm(x, (4,)),
    "list in place": lambda x: torch._foreach_add_([x, x.clone()], 1.0),
    "list": lambda x: torch._foreach_mul([x, x[0]], 2.0),
    "concatenated": lambda x: torch.cat([x, x], 1),
    "into another": lambda x: torch.mul(x, x[:1], out=x.new_empty(0)),
    "into this one": lambda x: torch.sin(x, out=x),
    "dimension taken from itself": lambda x: x[:1].squeeze_(0),
    "resized": lambda x: x.clone().resize_(5),
    "another dtype": lambda x: x.to(torch.bfloat16),
    "the same dtype": lambda x: x.to(torch.float32),
    "complex": lambda x: torch.view_as_real(x * 1j),
    "boolean": lambda x: x > 0,
    "drawn": lambda x: x.normal_(),
    "expanded": lambda x: x[:1].expand(5, 3, 4).sum(0),
    "detached": lambda x: x.detach(),
    "alike": lambda x: torch.zeros_like(x.mT),
}


def form(value: Any, given: Tensor) -> list[Form]:
    """What is to be known of every tensor: its place in memory, its storage, and whether that is the given one's."""
    return [
        (x is given, x.shape, x.stride(), x.storage_offset(), x.dtype, x.device, x.untyped_storage().nbytes(),
         x.untyped_storage() is given.untyped_storage())
        for x in pytree.tree_leaves(value)
        if isinstance(x, Tensor)
    ]  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_recipe_gives_what_torch_gives(name: str) -> None:
    call, found = CALLS[name], []
    with FakeTensorMode():
        x = torch.empty(2, 3, 4)
        expected = form(call(x), x)
    with FakeTensors():
        for _ in range(3):
            x = torch.empty(2, 3, 4)
            found.append(form(call(x), x))
    assert found == [expected] * 3


def test_what_has_run_before_is_not_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    worked_out: list[str] = []
    before = FakeTensorMode.dispatch

    def dispatch(self: Any, func: Any, *rest: Any) -> Any:
        worked_out.append(str(func))
        return before(self, func, *rest)

    monkeypatch.setattr(FakeTensorMode, "dispatch", dispatch)
    with FakeTensors():
        x = torch.empty(2, 3)
        (x @ x.mT).relu_().view(-1).sum()
        assert {"aten.mm.default", "aten.relu_.default", "aten.view.default"} < set(worked_out)
        worked_out.clear()
        for _ in range(3):
            (x @ x.mT).relu_().view(-1).sum()
        assert not worked_out
        torch.empty(2, 3, 1).sum(1)
    assert "aten.sum.dim_IntList" in worked_out


def test_numbers_that_are_equal_are_told_apart_by_their_type() -> None:
    with FakeTensors():
        whole = torch.empty(3, dtype=torch.int64)
        assert [(whole * factor).dtype for factor in (2, 2.0, 2)] == [torch.int64, torch.float32, torch.int64]
        torch.set_default_dtype(torch.float64)
        try:
            assert (whole * 2.0).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_number_that_is_known_stays_known() -> None:
    with FakeTensors():
        unknown = torch.empty(())
        for step in range(1, 4):
            count = torch.tensor(0.0)
            for _ in range(step):
                unknown += 1
                count += 1
            assert count.item() == step
        with pytest.raises(fake.NEEDS_VALUES):
            unknown.item()


def test_a_recipe_keeps_no_tensor_alive() -> None:
    with FakeTensors() as tensors:
        x = torch.empty(2, 3)
        out = x.view(3, 2).exp()
        freed: list[int] = []
        watched = [weakref.finalize(t.untyped_storage(), freed.append, 0) for t in (x, out)]
        assert isinstance(out, FakeTensor)
        assert tensors.mode._recipes
        del x, out
        assert len(freed) == len(watched)


@pytest.mark.parametrize(
    "name", ["attention", "checkpoint-non-reentrant", "embedding-repeated", "conv2d-groups", "tied-embedding-head"]
)
def test_a_trace_is_the_same_without_recipes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = EVERY_CASE[name]

    def traced() -> dict[str, Any]:
        model, batch = case.model(torch.float32), case.batch(torch.float32)
        return trace_model(model, batch, case.loss).to_json()

    followed = traced()
    monkeypatch.setattr(fake, "call_key", lambda func, args, kwargs: None)
    assert traced() == followed
