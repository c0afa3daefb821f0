"""Optimizers by name, and their state before the first step."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from groupsearch.errors import GroupSearchError

_CLASSES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {}),
    "momentum": (SGD, {"momentum": 0.9}),
    "adam": (Adam, {}),
    "adamw": (AdamW, {}),
}
_VARIANTS = {
    "loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
OPTIMIZERS = tuple(_CLASSES)
OPTIMIZER_VARIANTS = tuple(_VARIANTS)


def make_optimizer(name: str, parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimizer:
    """The torch optimizer of that name over the parameters that ask for gradients.

    ``sgd`` is plain, ``momentum`` is SGD with momentum 0.9, ``adam`` and ``adamw`` have torch's
    defaults. They differ in what their step allocates: ``adam:loop`` updates one parameter after
    another, ``adam:foreach`` all at once by lists of operations, which takes another copy of the
    weights, ``adam:fused`` in one kernel; without a variant torch chooses (the loop on the CPU, foreach on CUDA).

    Raises:
        GroupSearchError: for an unknown name, a learning rate that is not positive, or when no
            parameter is trainable.
    """
    kind, colon, variant = name.partition(":")
    if kind not in OPTIMIZERS or (colon and variant not in OPTIMIZER_VARIANTS):
        raise GroupSearchError(
            f"Expected optimizer to be one of {', '.join(OPTIMIZERS)}, alone or followed by "
            f"{', '.join(':' + v for v in OPTIMIZER_VARIANTS)}, found {name!r}."
        )
    if not 0 < learning_rate < float("inf"):
        raise GroupSearchError(f"Expected a finite learning_rate > 0, found {learning_rate}.")
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise GroupSearchError(
            "Expected at least one trainable parameter to optimize, found none. Set requires_grad on what is to be "
            "trained."
        )
    cls, settings = _CLASSES[kind]
    make: Any = cls
    return make(trainable, lr=learning_rate, **settings, **_VARIANTS.get(variant, {}))


def warm_state(optimizer: Optimizer) -> None:
    """Allocates the optimizer's state, as its first step would, and leaves everything else as it was.

    One step with zero gradients at learning rate zero, after which step counters are put back to zero:
    the parameters are unchanged and, for the optimizers of :func:`make_optimizer`, the next step is
    what it would have been. One parameter of every form takes it, and the others get copies of its
    state. Works on fake tensors. Gradients are None afterwards, also those that were there before. To be
    called before the optimizer is made private.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.zero_grad(set_to_none=True)
    alike = _alike(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for first in alike:
        first.grad = torch.zeros_like(first)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for first, others in alike.items():
        state = optimizer.state.get(first, {})
        if isinstance(state.get("step"), Tensor):
            state["step"].zero_()
        for other in others if state else ():
            optimizer.state[other] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def _alike(optimizer: Optimizer) -> dict[Tensor, list[Tensor]]:
    """Of parameters whose state has the same form the first, and the others."""
    found: dict[Hashable, list[Tensor]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter.requires_grad:
                form = (index, parameter.shape, parameter.stride(), parameter.dtype, parameter.device)
                found.setdefault(form, []).append(parameter)
    return {first: others for first, *others in found.values()}
