"""Fake copies: a model's structure with tensors that have shapes and no memory."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from groupsearch.cards import Card
from groupsearch.engine.habits import as_on
from groupsearch.errors import UnsupportedModelError
from groupsearch.tracer.allocator import has_storage
from groupsearch.tracer.attention import kernels_of
from groupsearch.tracer.recipes import Recipe, call_key, find_recipe
from groupsearch.workloads.batches import map_tensors
from groupsearch.workloads.copies import copy_of

NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
_DEVICE = torch.ops.prim.device.default
_ONES = ("aten::ones", "aten::ones_like", "aten::new_ones")
_COPIES = ("aten::_to_copy", "aten::clone")
_LIFTED = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift.default)
_GROUPED_MM = torch.ops.aten._grouped_mm.default


class _FakeMode(FakeTensorMode):
    """Fake tensors of which it is known which hold nothing but ones.

    A real tensor that an operation is given was made outside: a constant of the loss, a tensor in a
    closure. In its place the operation gets a fake one, always the same.

    Attributes:
        met: is told of every such fake tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met: Callable[[Tensor], object] = lambda tensor: None
        self._stand_ins: dict[int, tuple[Tensor, Tensor]] = {}
        self._ones: dict[int, weakref.ref[Any]] = {}
        self._recipes: dict[Hashable, Recipe] = {}

    def mark(self, tensor: Tensor) -> None:
        """It is all ones."""
        storage = tensor.untyped_storage()
        key = id(storage)
        self._ones[key] = weakref.ref(storage, lambda _: self._ones.pop(key, None))

    def marked(self, tensor: Tensor | None) -> bool:
        """Whether it is known to be all ones."""
        return tensor is not None and id(tensor.untyped_storage()) in self._ones

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # asked for more often than anything else
            return args[0].fake_device
        kwargs = kwargs or {}
        if func not in _LIFTED:
            args, kwargs = self._with_stand_ins(args, kwargs)
        key = call_key(func, args, kwargs)
        recipe = self._recipes.get(key)
        if recipe is not None:
            out = recipe((*args, *kwargs.values()))
        else:
            out = self._work_out(key, func, types, args, kwargs)
        if self._ones and func._schema.is_mutable:
            for written in pytree.tree_leaves((args, kwargs)):
                if has_storage(written):
                    self._ones.pop(id(written.untyped_storage()), None)
        elif func._schema.name in _ONES or (func._schema.name in _COPIES and self.marked(args[0])):
            self.mark(out)
        return out

    def _with_stand_ins(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        for value in (*args, *kwargs.values()):
            if isinstance(value, list | tuple):
                outside = any(isinstance(x, Tensor) and not isinstance(x, FakeTensor) for x in value)
            else:
                outside = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
            if outside:
                args, kwargs = pytree.tree_map_only(Tensor, self._stand_in, (args, kwargs))
                return args, kwargs
        return args, kwargs

    def _stand_in(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._stand_ins:
            device = torch.device("cpu") if tensor.is_meta else tensor.device
            with self:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            self._stand_ins[id(tensor)] = tensor, fake  # as long as the one is kept no other has its number
            self.met(fake)
        return self._stand_ins[id(tensor)][1]

    def _work_out(self, key: Hashable, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is _GROUPED_MM:  # its own fake kernel knows one type of numbers, the real one several
            return _grouped_product(*args, **kwargs)
        out: Any = super().__torch_dispatch__(func, types, args, kwargs)
        if key is not None and key == call_key(func, args, kwargs):  # it has not changed the form of an argument
            recipe = find_recipe(self, out, (*args, *kwargs.values()))
            if recipe is not None:
                self._recipes[key] = recipe
        return out


def _grouped_product(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """What ``aten._grouped_mm`` allocates: rows, columns or both matrices in groups, rows of 16 bytes and multiples."""
    dtype = out_dtype or a.dtype
    groups = (a.shape[0],) if a.dim() == 3 else offs.shape if offs is not None else ()
    batched = a.dim() == b.dim()
    shape = (*(groups if batched else ()), a.shape[-2], b.shape[-1])
    padded = -(-shape[-1] * dtype.itemsize // 16) * 16 // dtype.itemsize
    return a.new_empty((*shape[:-1], padded), dtype=dtype)[..., : shape[-1]]


class ValuesNeededError(UnsupportedModelError):
    """A model that does not run on fake tensors."""


class FakeTensors:
    """Enter it to compute on fake tensors; may be entered again after it was left.

    Where transformers looks at values to choose a path, fake tensors have none, and it takes the
    dearer one. Inside, a batch counts as one sequence per row, not several packed into one, and for
    an attention mask of ones, made by the model or part of the batch, no dense mask is made, as on real tensors.

    Args:
        card: a CUDA device whose kernels are taken where they keep other things than the CPU's.
    """

    def __init__(self, card: Card | None = None) -> None:
        self.mode = _FakeMode()
        self._card = card
        self._entered: list[ExitStack] = []

    def __enter__(self) -> FakeTensors:
        stack = ExitStack()
        masking = sys.modules.get("transformers.masking_utils")
        if hasattr(masking, "find_packed_sequence_indices"):
            stack.enter_context(patch.object(masking, "find_packed_sequence_indices", lambda position_ids: None))
        for name in ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"):
            if hasattr(masking, name):
                stack.enter_context(patch.object(masking, name, self._reading(getattr(masking, name))))
        stack.enter_context(self.mode)
        if self._card is not None:
            stack.enter_context(kernels_of(self._card))
            stack.enter_context(as_on("cuda"))
        self._entered.append(stack)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trail: object) -> None:
        self._entered.pop().close()
        if isinstance(error, NEEDS_VALUES):
            raise ValuesNeededError(
                "The model's path depends on values (tokens routed to experts, packed sequences, early exits), which "
                "fake tensors do not have. Give it with its weights, not on the meta device; it is then traced and "
                "measured with real tensors, and not simulated."
            ) from error

    def _reading(self, may_skip: Callable[..., bool]) -> Callable[..., bool]:
        """What decides whether a dense mask is needed, told that there is no mask where it would read ones."""

        def skip(padding_mask: Tensor | None, *args: Any, **kwargs: Any) -> bool:
            return may_skip(None if self.mode.marked(padding_mask) else padding_mask, *args, **kwargs)

        return skip


def fake_model(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> nn.Module:
    """A copy of a model with fake tensors on ``device``; ties are kept, no weight is copied.

    Works for models on the meta device as well as for real ones, which are left as they are.

    Raises:
        UnsupportedModelError: when something on the model cannot be copied; it names the attribute.
    """

    def make(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    return copy_of(model, make)


def fake_batch(batch: Any, fake: FakeTensors, device: torch.device) -> Any:
    """A batch of fake tensors with the shapes and dtypes of a real one; what is all ones in it is known to be."""

    def copied(tensor: Tensor) -> Tensor:
        with fake.mode:
            duplicate = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if not tensor.is_meta and bool((tensor == 1).all()):
            fake.mode.mark(duplicate)
        return duplicate

    return map_tensors(copied, batch)
