"""Optimizers by name, and their state before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from groupsearch.errors import GroupSearchError

_FACTORIES: dict[str, Callable[[list[nn.Parameter], float], Optimizer]] = {
    "sgd": lambda parameters, rate: SGD(parameters, lr=rate),
    "momentum": lambda parameters, rate: SGD(parameters, lr=rate, momentum=0.9),
    "adam": lambda parameters, rate: Adam(parameters, lr=rate),
    "adamw": lambda parameters, rate: AdamW(parameters, lr=rate),
}
OPTIMIZERS = tuple(_FACTORIES)


def make_optimizer(name: str, parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimizer:
    """The torch optimizer of that name over the parameters that ask for gradients.

    ``sgd`` is plain, ``momentum`` is SGD with momentum 0.9, ``adam`` and ``adamw`` have torch's defaults.

    Raises:
        GroupSearchError: for an unknown name, a learning rate that is not positive, or when no
            parameter is trainable.
    """
    if name not in _FACTORIES:
        raise GroupSearchError(f"Expected optimizer to be one of {', '.join(OPTIMIZERS)}, found {name!r}.")
    if not 0 < learning_rate < float("inf"):
        raise GroupSearchError(f"Expected a finite learning_rate > 0, found {learning_rate}.")
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise GroupSearchError(
            "Expected at least one trainable parameter to optimize, found none. Set requires_grad on what is to be "
            "trained."
        )
    return _FACTORIES[name](trainable, learning_rate)


def warm_state(optimizer: Optimizer) -> None:
    """Allocates the optimizer's state, as its first step would, and leaves everything else as it was.

    One step with zero gradients at learning rate zero, after which step counters are put back to zero:
    the parameters are unchanged and, for the optimizers of :func:`make_optimizer`, the next step is
    what it would have been. Works on fake tensors. Gradients are None afterwards, also those that were
    there before. To be called before the optimizer is made private.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].zero_()
