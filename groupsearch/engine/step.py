"""What happens when the optimizer steps: the clipped sums become one noisy gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from groupsearch.engine.coverage import check_covered
from groupsearch.engine.ledger import Ledger
from groupsearch.engine.mechanism import Mechanism
from groupsearch.engine.scaling import LossScale
from groupsearch.engine.widening import accumulator
from groupsearch.errors import GroupSearchError, UnsupportedModelError


class PrivateStep:
    """Hooks of ``optimizer.step()`` that write ``.grad`` before it runs, until :meth:`remove`.

    Args:
        model: the model.
        optimizer: the optimizer that holds its trainable parameters.
        mechanism: adds the noise.
        ledger: has the clipped sums.
        divisor: what the noisy sums are divided by.
        loss_scale: checked, and told of overflows.
        settle: called when no more is to come for this step.

    Attributes:
        count: noisy gradients handed to the optimizer.
        on_check: called before each with the number of examples that were summed; what it raises refuses the step.
        on_release: called after each.
    """

    def __init__(  # noqa: PLR0913 - the parts it is put together from
        self,
        model: nn.Module,
        optimizer: Optimizer,
        mechanism: Mechanism,
        ledger: Ledger,
        divisor: float,
        loss_scale: LossScale,
        settle: Callable[[], None],
    ) -> None:
        self.count = 0
        self.on_check: Callable[[int], None] = lambda examples: None
        self.on_release: Callable[[], None] = lambda: None
        self.parameters: Mapping[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._model = model
        self._optimizer = optimizer
        self._mechanism = mechanism
        self._ledger = ledger
        self._divisor = divisor
        self._loss_scale = loss_scale
        self._settle = settle
        self._given: dict[str, weakref.ref[Tensor]] = {}  # weak: zero_grad must be able to free them
        self._stepping = False
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """The optimizer steps on whatever ``.grad`` holds."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._stepping and self._ledger.empty and all(self._is_given(name) for name in self.parameters):
            return  # a step that calls the step of its parent class: the gradient is there
        try:
            self._check(args, kwargs)
        except BaseException:
            self._loss_scale.refused()
            raise
        self._loss_scale.report(self._ledger.take_overflow())
        self._release()

    def _check(self, args: Any, kwargs: Any) -> None:
        if any(x is not None for x in (*args[1:], *kwargs.values())):
            raise GroupSearchError(
                "optimizer.step was given a closure, which would run backward after the gradient was made private. "
                "Call backward before step, and step without a closure."
            )
        check_covered(
            self._model, self._mechanism.plan, self._optimizer
        )  # nothing may have been unfrozen or added since
        self._loss_scale.check()
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and not self._is_given(name):
                raise UnsupportedModelError(
                    f"Parameter {name!r} holds a gradient that the engine did not make. Let only the engine write "
                    "gradients: no second backward, no other hook that fills .grad."
                )

        self._settle()
        self.on_check(self._ledger.examples)

    @property
    def numbers(self) -> int:
        """How many numbers get noise in a step."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def _is_given(self, name: str) -> bool:
        given = self._given.get(name, lambda: None)()
        return given is not None and self.parameters[name].grad is given

    def _release(self) -> None:
        """Hand the optimizer the noisy sums; from here on they are out, whatever the optimizer does with them."""
        self._stepping = True
        sums = {}
        for name, parameter in self.parameters.items():
            total = self._ledger.sums.pop(name, None)
            sums[name] = nothing_yet(parameter) if total is None else total
        del total
        self._mechanism.add_noises_(sums)
        torch._foreach_div_(list(sums.values()), self._divisor)
        for name, parameter in self.parameters.items():
            parameter.grad = sums.pop(name).to(parameter.dtype)  # rounded once, with its noise
            self._given[name] = weakref.ref(parameter.grad)
        self._ledger.examples = 0
        self._mechanism.end_step()
        self.count += 1
        self.on_release()

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepping = False


def nothing_yet(parameter: Tensor) -> Tensor:
    """The clipped sum of a parameter that no example has reached."""
    return torch.zeros_like(parameter, dtype=accumulator(parameter.dtype))
