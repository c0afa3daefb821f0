"""What happens when the optimizer steps: the clipped sums become one noisy gradient.

Apart from the engine, as these are the moments between two logical batches.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from groupsearch.engine.arithmetic import accumulator
from groupsearch.engine.book import Ledger
from groupsearch.engine.mechanism import Mechanism
from groupsearch.engine.ownership import check_covered
from groupsearch.errors import GroupSearchError, UnsupportedModelError

# -- Loss scaling: float16 gradients are clipped at their own size, and no step is skipped ---------
#
# torch's GradScaler looks at ``.grad`` before a step and skips the step when a number is not
# finite. That look is at data: whether a step happens would be a release without noise. Here an
# example whose gradient overflowed adds zero to its groups, every step takes place with its noise,
# and only the scale learns of the overflow.

_CONTRACT = "_step_supports_amp_scaling"  # of GradScaler.step: the optimizer takes the scale out itself


class LossScale:
    """Stands between an optimizer and the GradScaler that the loop has, if it has one."""

    def __init__(self, optimizer: Optimizer, scaler: GradScaler | None) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._optimizer = optimizer
        self._before = vars(optimizer).get(_CONTRACT)
        setattr(optimizer, _CONTRACT, True)
        self._device: torch.device = optimizer.param_groups[0]["params"][0].device
        self.on_found: Callable[[Tensor], None] = lambda found: None  # may change it, before the scaler knows
        if self._scaler is not None and self._scaler._scale is None:
            # made when the first loss is scaled; but the first batch may be empty
            self._scaler._lazy_init_scale_growth_tracker(self._device)

    @property
    def enabled(self) -> bool:
        """Whether there is a scaler that scales."""
        return self._scaler is not None

    def over(self, number: float) -> float | Tensor:
        """A number over what the loss is multiplied by now, which stays on its device: float64, of shape ()."""
        scale = None if self._scaler is None else self._scaler._get_scale_async()
        return number if scale is None else number / scale.double()

    def check(self) -> None:
        """Check that the optimizer steps the way its gradients were made.

        Raises:
            GroupSearchError: when a scaler the engine does not know steps it, or the known one does not.
        """
        stepping = hasattr(self._optimizer, "found_inf")
        if self._scaler is None and stepping:
            raise GroupSearchError(
                "A GradScaler steps the optimizer, but the engine was not told of it and clipped gradients that were "
                "still multiplied by the loss scale. Give make_private(..., grad_scaler=scaler)."
            )
        if self._scaler is not None and not (stepping and id(self._optimizer) in self._scaler._per_optimizer_states):
            raise GroupSearchError(
                "The engine was given a GradScaler that is not the one which steps the optimizer. Call "
                "grad_scaler.step(optimizer) with the scaler that scaled the loss, or disable it."
            )

    def report(self, overflowed: Tensor | None) -> None:
        """Tell the scaler, for its next update, what the engine found; the optimizer has nothing left to unscale."""
        if self._scaler is None:
            return
        found = torch.zeros((), device=self._device)
        if overflowed is not None:
            found.copy_(overflowed, non_blocking=True)
        self.on_found(found)
        state: Any = self._scaler._per_optimizer_states[id(self._optimizer)]
        state["found_inf_per_device"] = {found.device: found}
        for name in ("grad_scale", "found_inf"):
            setattr(self._optimizer, name, None)

    def refused(self) -> None:
        """The step was refused: what the scaler left on the optimizer goes."""
        for name in ("grad_scale", "found_inf"):
            vars(self._optimizer).pop(name, None)

    def detach(self) -> None:
        """The optimizer is as it was."""
        if self._before is None:
            vars(self._optimizer).pop(_CONTRACT, None)
        else:
            setattr(self._optimizer, _CONTRACT, self._before)


# -- step ------------------------------------------------------------------------------------------


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
        optimizer: as given.
        on_check: called before each with the number of examples that were summed; what it raises refuses the step.
        on_release: called after each.
        together: is given the checks before a step, and runs them.
        take: gives the clipped sums by parameter name, as far as there are any, and leaves none.
        add_noise: adds the noise to all of them, in place.
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
        self.together: Callable[[Callable[[], None]], None] = lambda check: check()
        self.take: Callable[[], dict[str, Tensor]] = lambda: _taken(ledger.sums)
        self.add_noise: Callable[[Mapping[str, Tensor]], None] = lambda sums: mechanism.add_noises_(sums)
        self.parameters: Mapping[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._model = model
        self.optimizer = optimizer
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
            self.together(lambda: self._check(args, kwargs))
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
            self._model, self._mechanism.plan, self.optimizer
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
        found = self.take()
        sums = {}
        for name, parameter in self.parameters.items():
            total = found.pop(name, None)
            sums[name] = nothing_yet(parameter) if total is None else total
        del total
        self.add_noise(sums)
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


def _taken(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    found = dict(sums)
    sums.clear()
    return found


def nothing_yet(parameter: Tensor) -> Tensor:
    """The clipped sum of a parameter that no example has reached."""
    return torch.zeros_like(parameter, dtype=accumulator(parameter.dtype))


# -- zero_grad drops what a logical batch has so far, as it does in any other loop -----------------


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


# -- What can be seen of the loop around the engine: libraries that scale losses or shuffle data by themselves


def check_surroundings(*, loss_divisor: float | None, poisson: bool) -> None:
    """Check that no library around this call scales losses, or draws batches, otherwise than the engine was told.

    Args:
        loss_divisor: what the loop was said to divide losses by; None where nothing was said.
        poisson: whether batches of the loop's own were said to be Poisson samples.

    Raises:
        GroupSearchError: naming the library, what it does, and what to say.
    """
    trainer = _running_trainer()
    if loss_divisor is None:
        _refuse_accumulation("accelerate", _accelerate_accumulates())
        if trainer is not None:
            _refuse_accumulation("transformers' Trainer", trainer.args.gradient_accumulation_steps)
    if poisson and trainer is not None and _draws_its_own(trainer):
        raise GroupSearchError(
            "Expected Poisson samples, found transformers' Trainer with its own data loader, which shuffles the data "
            "and cuts them into batches: the epsilon of Poisson sampling is not that of this run. Give "
            "make_private(..., sampling='shuffled') to have its own epsilon, or let get_train_dataloader return "
            "PoissonBatches (see docs/train-with-it.md)."
        )


def _refuse_accumulation(library: str, passes: int) -> None:
    if passes > 1:
        raise GroupSearchError(
            f"Expected losses as they are, found that {library} accumulates gradients over {passes} passes and divides "
            f"the loss of each by {passes} before it is clipped: thresholds would act {passes} times as large. Let it "
            f"not accumulate (PoissonBatches cut a logical batch into passes), or say what losses are divided by with "
            f"make_private(..., loss_divisor={passes}); loss_divisor=1 where this loop divides nothing."
        )


def _accelerate_accumulates() -> int:
    """The passes that accelerate divides losses by; 1 where it is not in use."""
    state: Any = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    return int(state().num_steps) if state is not None and state._shared_state else 1


def _running_trainer() -> Any:
    """The Trainer of transformers that calls this, if one does."""
    trainer_class: Any = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    frame = sys._getframe(1) if trainer_class is not None else None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, trainer_class):
            return owner
        frame = frame.f_back
    return None


def _draws_its_own(trainer: Any) -> bool:
    stock: Any = sys.modules["transformers.trainer"].Trainer
    methods = ("get_train_dataloader", "_get_train_sampler", "_get_dataloader")
    return all(getattr(type(trainer), name, None) is getattr(stock, name, None) for name in methods)
