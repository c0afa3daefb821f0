"""Gaussian noise on a clipped sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from groupsearch.errors import GroupSearchError


def add_noise_(tensor: Tensor, std: float, generator: torch.Generator | None) -> Tensor:
    """Adds independent N(0, std^2) noise to every element, in place, and returns the tensor.

    The noise is drawn in the tensor's dtype, but at least in float32: half precision would put it on
    a coarse grid and cut off its tails. A standard deviation of 0 draws nothing and leaves the
    generator where it was.

    Transient memory: one tensor of the same number of elements in the dtype of the draw; adding float32
    noise to a half-precision tensor on the CPU needs another one.

    Args:
        tensor: floating point, any shape, on the generator's device.
        std: standard deviation, finite and not negative.
        generator: source of the noise; None is torch's own generator of that device.

    Raises:
        GroupSearchError: when the standard deviation is negative or not finite, or the tensor is
            not floating point.
    """
    if not (math.isfinite(std) and std >= 0):
        raise GroupSearchError(f"Expected a finite standard deviation >= 0 of the noise, found {std}.")
    if not tensor.is_floating_point():
        raise GroupSearchError(f"Expected a floating point tensor to add noise to, found {tensor.dtype}.")
    if std == 0:
        return tensor
    with torch.no_grad():
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        # empty(shape) and not empty_like: a draw must not depend on the tensor's strides.
        noise = torch.empty(tensor.shape, dtype=dtype, device=tensor.device).normal_(0.0, std, generator=generator)
        # The half-precision sum is formed in the draw, so that it is rounded once and no third copy is made.
        return tensor.add_(noise) if noise.dtype == tensor.dtype else tensor.copy_(noise.add_(tensor))
