"""What makes a forward pass observable and leaves its values alone.

A tensor learns its gradient from an operation of its own in the graph, an identity through which
everything that follows goes. A hook on the tensor would stay behind when an in-place operation gives a
view of it another history, and says nothing of which gradient is being taken. Inputs are saved by that
operation *through autograd*, so that activation checkpointing, saved-tensor hooks and offloading apply
to them as to any saved tensor, and none is held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groupsearch.engine.passes import Pass
from groupsearch.errors import UnsupportedModelError

Take = Callable[[], tuple[Tensor, ...]]
"""Hands out what was saved, recomputed or fetched where a saved-tensor hook says so, and lets it go."""


class _Tell(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, source: Pass, arrive: Callable[..., None], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors[count:])
        ctx.set_materialize_grads(False)
        ctx.source, ctx.arrive, ctx.saved_count = source, arrive, len(tensors) - count
        # No views, which in-place operations could not change; but their versions are counted together.
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedModelError(
                "A gradient was taken through the private model with create_graph=True (a gradient penalty, a "
                "meta-gradient): what it adds to the gradients of the weights cannot be clipped example by example. "
                "Take it without create_graph, or of a copy of the model that has no engine."
            )
        anchor = ctx.next_functions[0][0]
        if not torch._C._will_engine_execute_node(anchor):  # torch.autograd.grad of something else than the weights
            ctx.source.pass_by(torch._C._autograd._get_current_graph_task_keep_graph())
        elif any(g is not None for g in grads):
            ctx.arrive(grads, partial(_take, ctx))
        return None, None, None, None, *grads, *[None] * ctx.saved_count


def _take(ctx: Any) -> tuple[Tensor, ...]:
    saved: tuple[Tensor, ...] = ctx.saved_tensors
    ctx.maybe_clear_saved_tensors()
    return _cut_off(saved)


def _cut_off(saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a node saved, without the graph before it.

    Whoever keeps what it is handed is known to the graph's nodes, a circle that goes through C++ and is never
    collected.
    """
    with torch._C.DisableTorchFunction():  # it is not the model's doing
        return tuple(tensor.detach() for tensor in saved)


class _Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("the saving node is never part of a loss")


class Saved:
    """Tensors saved for backward apart from any output; :meth:`take` hands them out once and lets them go."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._node: Any = _Save.apply(_anchor(), *tensors).grad_fn if tensors else None

    def take(self) -> tuple[Tensor, ...]:
        """The tensors, recomputed or fetched where a saved-tensor hook says so."""
        saved = () if self._node is None else self._node.saved_tensors
        self._node = None
        return _cut_off(saved)


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


def with_gradient(
    source: Pass, output: Tensor, arrive: Callable[[Tensor, Take], None], saved: tuple[Tensor, ...] = ()
) -> Tensor:
    """The output, with ``arrive(g, take)`` called when the loss's backward has its whole gradient g.

    See :func:`with_gradients`.
    """
    (told,) = with_gradients(source, (output,), lambda grads, take: arrive(grads[0], take), saved)
    return told


def with_gradients(
    source: Pass,
    outputs: Sequence[Tensor],
    arrive: Callable[[tuple[Any, ...], Take], None],
    saved: tuple[Tensor, ...] = (),
) -> tuple[Tensor, ...]:
    """The outputs, with ``arrive(gradients, take)`` called when the loss's backward has all their gradients.

    The gradient of an output that backward does not reach is None. All outputs ask for gradients, also those that
    autograd would not track (an embedding's, or the first layer's, now that weights ask for none); in-place
    operations on them are as good as on any other tensor. A gradient that somebody takes of something
    else (``torch.autograd.grad`` of an attack) goes through and is not told.

    Args:
        source: the forward pass they belong to.
        outputs: floating tensors that the model goes on with only in the form that is returned.
        arrive: is told, once in a backward pass.
        saved: what ``take`` will hand out.

    Raises:
        UnsupportedModelError: in backward, for a gradient that can be differentiated again.
    """
    told: tuple[Tensor, ...] = _Tell.apply(_anchor(), source, arrive, len(outputs), *outputs, *saved)
    for tensor in told:  # before any hook of the user's: what that raises is an accident, too
        tensor.register_hook(source.begin_backward)
    return told


def _anchor() -> Tensor:
    return torch.empty(0, requires_grad=True)


# -- Hooks that belong to one model and do not go with its copies ----------------------------------


class Hook:
    """A hook of the engine. In a copy of the model, or one that was saved, it does nothing: a copy has no engine."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the hook does."""
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        """A hook that does nothing."""
        return no_hook

    def __reduce__(self) -> Any:
        """A hook that does nothing."""
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return no_hook


def no_hook(*args: Any, **kwargs: Any) -> None:
    """Leaves everything as it is."""
