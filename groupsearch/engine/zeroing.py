"""zero_grad drops what a logical batch has so far, as it does in any other loop."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn
from torch.optim import Optimizer


class ZeroGrad:
    """Stands in for the ``zero_grad`` of a model or an optimizer and tells of its calls.

    A loop that begins a batch anew (it ran out of memory on the way, say) calls zero_grad first. Sums that outlived
    that would hold an example twice.
    """

    def __init__(self, owner: nn.Module | Optimizer, called: Callable[[], None]) -> None:
        self._owner = owner
        self._called = called
        vars(owner)["zero_grad"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """The class's own zero_grad, and the call it stands in for."""
        self._called()
        type(self._owner).zero_grad(self._owner, *args, **kwargs)  # type: ignore[arg-type]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The plain method: a copy of the model has no engine."""
        copy = memo.get(id(self._owner), self._owner)
        return MethodType(type(copy).zero_grad, copy)

    def __reduce__(self) -> Any:
        """The plain method: a saved model has no engine."""
        return getattr, (self._owner, "zero_grad")

    def remove(self) -> None:
        """The owner's own zero_grad again."""
        if vars(self._owner).get("zero_grad") is self:
            del vars(self._owner)["zero_grad"]
