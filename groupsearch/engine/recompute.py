"""Norms from per-example gradients that are not kept: a few examples at a time, formed again when sums are.

Costs two products B T d p where the ghost norm costs B T^2 (d + p) and one of them, and needs the
space of one slice where that needs 2 B T^2 numbers; the book keeps what it keeps for the ghost norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from groupsearch.engine import grads, norms
from groupsearch.engine.entries import MatrixEntry
from groupsearch.engine.habits import habits_of
from groupsearch.engine.ieee import in_ieee
from groupsearch.engine.widening import accumulator, widened


@dataclass(frozen=True)
class RecomputeEntry(MatrixEntry):
    """A matrix site kept as its input and output gradient, its norm taken from instances that are dropped."""

    def sqnorm(self) -> Tensor:
        """Squared gradient norm per example, (B,)."""
        return sliced_sqnorm(*self.operands(self.a, self.g), bias=self.bias is not None)


def sliced_sqnorm(a_BGTd: Tensor, g_BGTp: Tensor, bias: bool) -> Tensor:
    """Squared norm per example of the weight gradient g^T a, and of the bias gradient with ``bias``, (B,).

    As many instances are alive at once as fit into a slice of the device, one at least. Rounded up as the
    ghost norm is: the clipped sum comes from another product, whose rounding is not that of the instance.
    """
    return torch.cat(
        [_sqnorm(widened(a_BGTd[rows]), widened(g_BGTp[rows]), bias) for rows in _instance_slices(a_BGTd, g_BGTp)]
    )


@in_ieee
def _sqnorm(a_BGTd: Tensor, g_BGTp: Tensor, bias: bool) -> Tensor:
    total_B = norms.instance_sqnorm(grads.matrix_instance(a_BGTd, g_BGTp))
    if bias:
        total_B += norms.instance_sqnorm(g_BGTp.sum(2))
    size_BG = norms.matrix_size(a_BGTd, g_BGTp, bias)
    return total_B.add_(size_BG.square().sum(1), alpha=norms.rounding_unit(g_BGTp))


def _instance_slices(a_BGTd: Tensor, g_BGTp: Tensor) -> list[slice]:
    examples, groups = a_BGTd.shape[:2]
    example_bytes = groups * a_BGTd.shape[3] * g_BGTp.shape[3] * accumulator(g_BGTp.dtype).itemsize
    width = max(1, habits_of(g_BGTp).slice_bytes // max(1, example_bytes))
    return [slice(start, start + width) for start in range(0, examples, width)] or [slice(0, 0)]
