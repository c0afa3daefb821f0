"""The mechanism: what clips an example's gradient and what hides the sum, apart from any model."""

from __future__ import annotations

import torch
from torch import Tensor

from groupsearch.clipping import AUTO_S_GAMMA, ClipPlan
from groupsearch.engine.noise import add_noise_


def clip_factors(rule: str, norm_B: Tensor, threshold: float) -> Tensor:
    """Clipping factor of every example (B,), by the rule as :class:`~groupsearch.clipping.ClipPlan` states it."""
    if rule == "abadi":
        return (threshold / norm_B).clamp(max=1.0)  # a norm of zero gives inf, clamped to one
    if rule == "auto-s":
        return threshold / (norm_B + AUTO_S_GAMMA)
    return torch.where(norm_B > 0, threshold / norm_B, 0.0)


class Mechanism:
    """Clips by a plan and adds the noise its sensitivity asks for.

    Attributes:
        plan: groups, thresholds and clip rule.
        noise_multiplier: sigma, relative to the plan's sensitivity.
    """

    def __init__(self, plan: ClipPlan, noise_multiplier: float, generator: torch.Generator | None) -> None:
        self.plan = plan
        self.noise_multiplier = noise_multiplier
        self._generator = generator

    def clip(self, group: int, norm_B: Tensor) -> Tensor:
        """Clipping factors (B,) of the examples whose gradients have these norms in a group."""
        return clip_factors(self.plan.rule, norm_B, self.plan.thresholds[group])

    def add_noise_(self, name: str, total: Tensor) -> Tensor:
        """Add to the clipped sum of a parameter the noise of one logical batch, in place."""
        return add_noise_(total, self.noise_multiplier * self.plan.sensitivity, self._generator)

    def end_step(self) -> None:
        """The noise of a logical batch is drawn; the next one begins."""
