"""NaN in one example, which must reach no other: a product with zero hides a mixture from numbers, but not from NaN."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from groupsearch.engine.truth.rows import whole_numbered
from groupsearch.workloads.batches import count_examples, map_tensors, tensors_of

_CASTING = {"to", "type_as", "expand_as", "view_as", "reshape_as"}


def poisoned(batch: Any) -> tuple[Any, bool]:
    """A batch with NaN wherever its last example has numbers, and whether it has any.

    Whole numbers in a tensor that has others too are left: they may be categories. So is, on a GPU, a tensor
    of nothing else: NaN as an index there takes the whole process down.
    """
    places = iter(whole_numbered(batch))
    changed = False

    def poison(tensor: Tensor) -> Tensor:
        nonlocal changed
        whole = next(places)
        if not tensor.is_floating_point() or (whole is None and tensor.device.type != "cpu"):
            return tensor
        changed = True
        tensor = tensor.clone()
        last = tensor[-1:]
        tensor[-1:] = torch.full_like(last, torch.nan) if whole is None else torch.where(whole, last, torch.nan)
        return tensor

    return map_tensors(poison, batch), changed


class PoisonedIds(TorchFunctionMode):
    """Inside, embeddings of the last example's ids are NaN. What is made of ids is followed.

    Attributes:
        reached: whether there were any.
    """

    def __init__(self, batch: Any) -> None:
        super().__init__()
        self.reached = False
        self._size = count_examples(batch)
        self._ids: dict[int, weakref.ref[Tensor]] = {}
        for tensor in tensors_of(batch):
            self._follow(tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if func is functional.embedding:
            ids = args[0] if args else kwargs["input"]
            return self._poisoned(out, ids) if self._is_followed(ids) else out
        name = getattr(func, "__name__", "")
        deciding = tensors[:1] if name in _CASTING else tensors
        if any(self._is_followed(t) for t in deciding):
            for part in out if isinstance(out, list | tuple) else (out,):
                if isinstance(part, Tensor):
                    self._follow(part)
        return out

    def _is_followed(self, tensor: Tensor) -> bool:
        reference = self._ids.get(id(tensor))
        return reference is not None and reference() is tensor

    def _follow(self, tensor: Tensor) -> None:
        if (
            tensor.dim()
            and tensor.shape[0] == self._size
            and not tensor.is_floating_point()
            and not tensor.is_complex()
        ):
            self._ids[id(tensor)] = weakref.ref(tensor)

    def _poisoned(self, out: Tensor, ids: Tensor) -> Tensor:
        self.reached = True
        last = torch.zeros(self._size, dtype=torch.bool, device=out.device)
        last[-1] = True
        return torch.where(last.view(-1, *[1] * (out.dim() - 1)), torch.nan, out)
