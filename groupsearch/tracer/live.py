"""Counts live bytes as operations allocate and free storages, on real or fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Scratch = Callable[[Any, Any, Any, Any], int]


class LiveBytes(TorchDispatchMode):
    """Keeps the log of every storage that is allocated while it is active.

    Storages that were there before are not counted; name them with :meth:`ignore`.

    Attributes:
        live_bytes: bytes alive now.
        peak_bytes: the most that were ever alive.
        log: for every allocation and release the bytes alive after it; a release comes as the
            storage's number, an allocation of in-kernel scratch as -1.
        births, deaths: position in the log by storage number.
        sizes: bytes by storage number.
    """

    def __init__(self, scratch: Scratch | None = None) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.log: list[int] = []
        self.births: list[int] = []
        self.deaths: dict[int, int] = {}
        self.sizes: list[int] = []
        self._numbers: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._scratch = scratch

    def ignore(self, tensors: Iterable[Tensor]) -> int:
        """Do not count these tensors' storages; returns their bytes, each storage once."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) not in self._references:
                self._references[id(storage)] = weakref.ref(storage, self._forgetter(id(storage)))
                total += storage.nbytes()
        return total

    def number(self, tensor: Tensor) -> int | None:
        """Number of the storage of a tensor; None when it is not counted."""
        return self._numbers.get(id(tensor.untyped_storage()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._scratch is not None:
            scratch_bytes = self._scratch(func, args, kwargs, out)
            if scratch_bytes:
                self._record(self.live_bytes + scratch_bytes)
        for value in pytree.tree_leaves(out):
            if isinstance(value, Tensor):
                self._see(value)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._references:
            return
        size = storage.nbytes()
        number = len(self.sizes)
        self._references[key] = weakref.ref(storage, self._releaser(key, number))
        self._numbers[key] = number
        self.sizes.append(size)
        self.births.append(len(self.log))
        self.live_bytes += size
        self._record(self.live_bytes)

    def _record(self, live_bytes: int) -> None:
        self.peak_bytes = max(self.peak_bytes, live_bytes)
        self.log.append(live_bytes)

    def _forgetter(self, key: int) -> Callable[[Any], None]:
        return lambda reference: self._references.pop(key, None) and None

    def _releaser(self, key: int, number: int) -> Callable[[Any], None]:
        def release(reference: Any) -> None:
            del self._references[key], self._numbers[key]
            self.live_bytes -= self.sizes[number]
            self.deaths[number] = len(self.log)
            self.log.append(self.live_bytes)

        return release


