"""What makes a forward pass observable and leaves its values alone.

Inputs are saved *through autograd*, so that activation checkpointing, saved-tensor hooks and
offloading apply to them as to any saved tensor, and none is held twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("the saving node is never part of a loss")


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)  # not returned as a view of itself: in-place operations may follow
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None


class Saved:
    """Tensors saved for backward; :meth:`take` hands them out once and lets them go."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._node: Any = _Save.apply(_anchor(), *tensors).grad_fn if tensors else None

    def take(self) -> tuple[Tensor, ...]:
        """The tensors, recomputed or fetched where a saved-tensor hook says so."""
        tensors = () if self._node is None else self._node.saved_tensors
        self._node = None
        return tensors


@dataclass(frozen=True)
class Autocast:
    """What autocast was set to at some moment, to be set again when an operation is repeated."""

    device_type: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        """The present setting of a kind of device."""
        return cls(device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))

    def again(self) -> AbstractContextManager[Any]:
        """That setting for a while."""
        if torch.is_autocast_enabled(self.device_type) == self.enabled and not self.enabled:
            return nullcontext()
        return torch.autocast(self.device_type, self.dtype, self.enabled)


def with_gradient(output: Tensor, arrive: Callable[[Tensor], None]) -> Tensor:
    """The output, with ``arrive(g)`` called when backward has its whole gradient g.

    An output that autograd would not track (an embedding's, or the first layer's, now that
    weights ask for no gradient) is made to.
    """
    if not output.requires_grad:
        output = _Anchor.apply(output.data, _anchor())
    output.register_hook(arrive)
    return output


def _anchor() -> Tensor:
    return torch.empty(0, requires_grad=True)
