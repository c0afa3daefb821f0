"""Loss scaling: float16 gradients are clipped at their own size, and no step is skipped.

torch's GradScaler looks at ``.grad`` before a step and skips the step when a number is not
finite. That look is at data: whether a step happens would be a release without noise. Here an
example whose gradient overflowed adds zero to its groups, every step takes place with its noise,
and only the scale learns of the overflow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from groupsearch.errors import GroupSearchError

_CONTRACT = "_step_supports_amp_scaling"  # of GradScaler.step: the optimizer takes the scale out itself


class LossScale:
    """Stands between an optimizer and the GradScaler that the loop has, if it has one."""

    def __init__(self, optimizer: Optimizer, scaler: GradScaler | None) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._optimizer = optimizer
        self._before = vars(optimizer).get(_CONTRACT)
        setattr(optimizer, _CONTRACT, True)
        self._device: torch.device = optimizer.param_groups[0]["params"][0].device
        if self._scaler is not None and self._scaler._scale is None:
            # made when the first loss is scaled; but the first batch may be empty
            self._scaler._lazy_init_scale_growth_tracker(self._device)

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
