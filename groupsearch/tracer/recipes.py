"""What an operation on fake tensors returns, remembered by what it was given.

A network repeats itself: most operations of a step have run before on tensors of the same shapes.
Working out anew what they return was most of the time a trace took.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils import _pytree as pytree

Recipe = Callable[[Sequence[Any]], Any]
"""Given an operation's arguments, those by name last: what it returns."""
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})


class _UnclearError(Exception):
    """What is returned depends on more than can be written into a key."""


def call_key(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """Equal for calls that return tensors of the same form; None where that cannot be said."""
    if type(func) is not torch._ops.OpOverload or torch.is_inference_mode_enabled():
        return None
    try:
        named = tuple([(name, _outline(value)) for name, value in kwargs.items()])
        return (func, torch.get_default_dtype(), _outline(args), named)
    except _UnclearError:
        return None


def find_recipe(mode: FakeTensorMode, out: Any, args: Sequence[Any]) -> Recipe | None:
    """How to make once more what an operation returned, for arguments of the same key; None if unknown.

    It is known for what is, or is a view of, one of the arguments, and for tensors of their own storage.
    """
    if out is None:
        return lambda args: None
    if isinstance(out, FakeTensor):
        return _tensor_recipe(mode, out, args)
    if type(out) not in (tuple, list):
        return None
    kind, parts = type(out), [find_recipe(mode, part, args) for part in out]
    storages = [id(part.untyped_storage()) for part in out if isinstance(part, Tensor)]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len(set(storages)) < len(storages):
        return None
    return lambda args: kind([part(args) for part in known])


def _outline(value: Any) -> Hashable:
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.layout is not torch.strided or value.dtype.is_complex:
            raise _UnclearError
        return (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
    if kind in _PLAIN:
        return (kind, value)  # 1 and 1.0 are equal, and do not give the same dtype
    if kind is tuple or kind is list:
        return (kind, *[_outline(part) for part in value])
    if kind is torch.Generator:
        return (kind,)
    raise _UnclearError


def _tensor_recipe(mode: FakeTensorMode, out: FakeTensor, args: Sequence[Any]) -> Recipe | None:
    if out.constant is not None or out.layout is not torch.strided or out.dtype.is_complex or out.requires_grad:
        return None
    for place, value in enumerate(args):
        if value is out:
            return itemgetter(place)
    shape, stride, offset = out.shape, out.stride(), out.storage_offset()
    dtype, device, storage = out.dtype, out.fake_device, out.untyped_storage()
    places = [i for i, value in enumerate(args) if isinstance(value, Tensor) and value.untyped_storage() is storage]

    def fresh(args: Sequence[Any]) -> FakeTensor:
        with in_kernel_invocation_manager(mode):
            made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return FakeTensor(mode, made, device)

    def view(args: Sequence[Any]) -> FakeTensor:
        with in_kernel_invocation_manager(mode):
            made = torch.empty(0, dtype=dtype, device="meta")
            made.set_(args[places[0]].untyped_storage(), offset, shape, stride)
        return FakeTensor(mode, made, device)

    if places:
        return view
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    alone = not offset and all(leaf.untyped_storage() is not storage for leaf in tensors)
    return fresh if alone and fresh(args).untyped_storage().nbytes() == storage.nbytes() else None
