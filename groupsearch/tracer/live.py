"""Counts live bytes as operations allocate and free storages, on real or fake tensors.

Autograd adds the gradients that meet at one input in place when nobody else holds the first of
them, and some of its formulas scatter a gradient in place; while operations are watched it never does. So that the
bytes are those of a step by itself, such an operation of autograd's own whose first operand is released at once
counts as the in-place operation it stands for.

Activation checkpointing keeps the state of the random generator for every block. No operation
allocates it, so whoever asks torch for it is overheard.

How many bytes a storage takes is the allocator's to say: a multiple of 512 on a CUDA device, where
tensors of the CPU count for nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from groupsearch.tracer.allocator import Allocator

_DEVICE = torch.ops.prim.device.default
_aten = torch.ops.aten
_LIFT = _aten.lift_fresh.default
_IN_PLACE = {
    _aten.add.Tensor: _aten.add_.Tensor,
    _aten.scatter.src: _aten.scatter_.src,
    _aten.scatter_add.default: _aten.scatter_add_.default,
    _aten.index_add.default: _aten.index_add_.default,
    _aten.index_put.default: _aten._index_put_impl_.default,
}
# Their gradients' formulas depend on whether there are zeros, and while operations are watched the dearer one is taken.
_BY_VALUES = {_aten.prod.default, _aten.prod.dim_int, _aten.cumprod.default}
Scratch = Callable[[Any, Any, Any, Any], tuple[Any, int | None]]
"""Given an operation, its arguments, keyword arguments and what it returned: the latter in the form it really has,
and the most bytes allocated at any time inside, results included; 0 where that is the results alone, None where
it is not known."""


class LiveBytes(TorchDispatchMode):
    """Keeps the log of every storage that is allocated while it is active.

    Storages that were there before are not counted; name them with :meth:`ignore`. One that is not named is known by
    an operation being given it that none has made: a constant of the model or the loss.

    Args:
        scratch: says what an operation allocates inside itself, where that is probed.
        allocator: how bytes are counted; as they were asked for if not given.

    Attributes:
        allocator: how bytes are counted.
        live_bytes: bytes alive now.
        log: for every allocation and release the bytes alive after it, and for an operation with
            scratch of its own the most inside it.
        births, deaths: position in the log by storage number.
        sizes: bytes by storage number.
        constant_bytes: of the storages that were there before and were not named.
        unprobed: operations of which it is not known what they allocate beside their results.
        kept: bytes of the storages that were there before, in the order in which they became known.
        heirs: by number of a storage that takes over another's memory, as what is changed in place does, the other's.
        insides: of every operation that allocates more than its results: the positions in the log where it began and
            was done, and how many bytes more.
    """

    def __init__(self, scratch: Scratch | None = None, allocator: Allocator | None = None) -> None:
        super().__init__()
        self.allocator = allocator or Allocator()
        self.live_bytes = 0
        self.log: list[int] = []
        self.births: list[int] = []
        self.deaths: dict[int, int] = {}
        self.sizes: list[int] = []
        self.constant_bytes = 0
        self.unprobed: set[str] = set()
        self.kept: list[int] = []
        self.heirs: dict[int, int] = {}
        self.insides: list[tuple[int, int, int]] = []
        self._numbers: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._scratch = scratch
        self._added: int | None = None
        self._inside = 0
        self._node = -1
        self._node_began = 0
        self._asked_state = torch.get_rng_state
        self._overhearing = patch.object(torch, "get_rng_state", self._random_state)

    def __enter__(self) -> LiveBytes:
        self._overhearing.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._overhearing.stop()

    def ignore(self, tensors: Iterable[Tensor], *, elsewhere: bool = False) -> int:
        """Do not count these tensors' storages; returns their bytes, each storage once; 0 of what is ``elsewhere``."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) not in self._references:
                self._references[id(storage)] = weakref.ref(storage, self._forgetter(id(storage)))
                self.kept.append(0 if elsewhere else self.allocator.bytes_of(tensor))
                total += self.kept[-1]
        return total

    def peak_since(self, position: int) -> int:
        """The most bytes alive from a position in the log on."""
        return max(self.log[max(0, position - 1) :], default=0)

    def number(self, tensor: Tensor) -> int | None:
        """Number of the storage of a tensor; None when it is not counted."""
        return self._numbers.get(id(tensor.untyped_storage()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:  # allocates nothing, and is asked for more often than anything else
            return func(*args, **kwargs)
        if func is not _LIFT:
            self._meet(args)
        if func in _BY_VALUES and torch.is_grad_enabled() and args[0].is_floating_point():
            self.unprobed.add(func._schema.name)
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        if number != self._node:
            self._node, self._node_began = number, len(self.sizes)
        in_place = _in_place_of(func, args, node)
        if func is _aten.add.Tensor and self._is_within(node, args[0]):
            in_place = None
        born, began = len(self.sizes), len(self.log)
        out = self._run(func, args, kwargs) if in_place is None else func(*args, **kwargs)
        if in_place is not None and self._scratch is not None:
            self._note(in_place, self._scratch(in_place, args, kwargs, args[0])[1])
        self._added = None
        for value in (out,) if isinstance(out, Tensor) else pytree.tree_leaves(out):
            if isinstance(value, Tensor):
                self._see(value)
        if in_place is not None:
            self._added = self.number(args[0])
        beyond = self._inside - (0 if in_place is not None else sum(self.sizes[born:]))
        if self._inside and beyond > 0:
            self.insides.append((began, len(self.log), beyond))
        self._inside = 0
        return out

    def _is_within(self, node: Any, old: Any) -> bool:
        """Whether a sum is a term of a node's formula: what is added was made by it, and is not what it returns."""
        if node is None or not isinstance(old, Tensor) or (self.number(old) or 0) < self._node_began:
            return False
        return not _meets_itself(node)

    def _meet(self, values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                if self.allocator.counts(value) and id(value.untyped_storage()) not in self._references:
                    self.constant_bytes += self.ignore([value])
            elif isinstance(value, list | tuple):
                self._meet(value)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        inside_bytes: int | None = 0
        if self.allocator.watch is not None:
            out, inside_bytes = self.allocator.watch(lambda: func(*args, **kwargs))
        else:
            out = func(*args, **kwargs)
            if self._scratch is not None:
                out, inside_bytes = self._scratch(func, args, kwargs, out)
        self._note(func, inside_bytes)
        return out

    def _note(self, func: Any, inside_bytes: int | None) -> None:
        if inside_bytes is None:
            self.unprobed.add(func._schema.name)
        elif inside_bytes:
            self._inside = self.allocator.rounded(inside_bytes)
            self.log.append(self.live_bytes + self._inside)

    def _random_state(self) -> Tensor:
        state = self._asked_state()
        if self.allocator.card is None:
            self._see(state)
        return state

    def _see(self, tensor: Tensor) -> None:
        if not self.allocator.counts(tensor):
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._references:
            return
        size = self.allocator.bytes_of(tensor)
        number = len(self.sizes)
        self._references[key] = weakref.ref(storage, self._releaser(key, number))
        self._numbers[key] = number
        self.sizes.append(size)
        self.births.append(len(self.log))
        self.live_bytes += size
        self.log.append(self.live_bytes)

    def _forgetter(self, key: int) -> Callable[[Any], None]:
        def forget(reference: Any) -> None:
            self._references.pop(key, None)

        return forget

    def _releaser(self, key: int, number: int) -> Callable[[Any], None]:
        def release(reference: Any) -> None:
            del self._references[key], self._numbers[key]
            self.live_bytes -= self.sizes[number]
            if self._added == number and len(self.log) == self.births[-1] + 1:
                self.log[-1] -= self.sizes[number]
                self.heirs[len(self.sizes) - 1] = number
            self._added = None
            self.deaths[number] = len(self.log)
            self.log.append(self.live_bytes)

        return release


def _in_place_of(func: Any, args: Any, node: Any) -> Any:
    """What autograd itself runs unwatched where it is seen to run ``func``; None where that is what it runs."""
    in_place = _IN_PLACE.get(func)
    if in_place is None or torch.is_grad_enabled() or torch._C._current_graph_task_id() == -1:
        return None
    old, new = args[:2]
    if not isinstance(old, Tensor) or old.untyped_storage().nbytes() != old.nbytes or old._is_view():
        return None  # a view holds its base, whose storage is then not its own to overwrite
    if func is _aten.add.Tensor:
        alike = isinstance(new, Tensor) and old.shape == new.shape and old.dtype == new.dtype
        return in_place if alike and _are_received(node, old) else None
    return None if node is None or isinstance(node, BackwardCFunction) else in_place


def _are_received(node: Any, gradient: Tensor) -> bool:
    """Whether some input of the nodes after this one takes such a gradient; many at once are never added in place."""
    after = [edge for edge in (() if node is None else node.next_functions) if edge[0] is not None]
    return not after or any(tuple(edge[0]._input_metadata[edge[1]].shape) == gradient.shape for edge in after)


def _meets_itself(node: Any) -> bool:
    """Whether two gradients that one node returns are of the same thing, as those of a square are."""
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    return len(set(edges)) < len(edges)
