"""Clipped sums and per-example gradients: pure functions on tensors (shapes as in :mod:`norms`).

``factor_B`` is the clipping factor of every example. A factor is folded into the smaller
operand, a few examples at a time, so that no second copy of a large operand is ever made.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALED_COPY_BYTES = 8 * 2**20


def matrix_instance(a_BGTd: Tensor, g_BGTp: Tensor) -> Tensor:
    """Per-example weight gradients g^T a, (B, G, p, d)."""
    return g_BGTp.mT @ a_BGTd


def matrix_clipped_sum(a_BGTd: Tensor, g_BGTp: Tensor, factor_B: Tensor) -> Tensor:
    """Sum over examples of factor * g^T a, (G, p, d), as one matrix product per slice of examples."""
    smaller = a_BGTd if a_BGTd.shape[3] <= g_BGTp.shape[3] else g_BGTp
    total: Tensor | None = None
    for rows in _slices(smaller):
        a, g, factor = a_BGTd[rows], g_BGTp[rows], factor_B[rows].to(smaller.dtype)[:, None, None, None]
        a, g = (a * factor, g) if smaller is a_BGTd else (a, g * factor)
        if a.shape[1] == 1:
            left, right = g.flatten(0, 2).mT, a.flatten(0, 2)
            total = (left @ right).unsqueeze(0) if total is None else _addmm(total, left, right)
        else:
            part = torch.einsum("bgtp,bgtd->gpd", g, a)
            total = part if total is None else total.add_(part)
    assert total is not None
    return total


def embedding_clipped_sum(ids_BT: Tensor, g_BTd: Tensor, factor_B: Tensor, rows: int) -> Tensor:
    """Sum over examples of factor times the embedding gradient, (V, d) with V = ``rows``; indices < 0 count nothing."""
    total = g_BTd.new_zeros(rows, g_BTd.shape[2])
    for part in _slices(g_BTd):
        scaled = g_BTd[part] * factor_B[part].to(g_BTd.dtype)[:, None, None]
        scaled.masked_fill_((ids_BT[part] < 0).unsqueeze(2), 0)
        total.index_add_(0, ids_BT[part].clamp(min=0).flatten(), scaled.flatten(0, 1))
    return total


def embedding_instance(ids_BT: Tensor, g_BTd: Tensor, rows: int) -> Tensor:
    """Per-example embedding gradients, (B, V, d)."""
    instance = g_BTd.new_zeros(g_BTd.shape[0], rows, g_BTd.shape[2])
    g_BTd = g_BTd.masked_fill((ids_BT < 0).unsqueeze(2), 0)
    return instance.scatter_add_(1, ids_BT.clamp(min=0).unsqueeze(2).expand(g_BTd.shape), g_BTd)


def instance_clipped_sum(instance: Tensor, factor_B: Tensor) -> Tensor:
    """Sum over examples of factor times the per-example gradient (B, ...), of shape (...)."""
    return (factor_B.to(instance.dtype) @ instance.unsqueeze(1).flatten(1)).view(instance.shape[1:])


def _slices(operand: Tensor) -> list[slice]:
    examples = operand.shape[0]
    per_example_bytes = max(1, operand.nbytes // max(1, examples))
    width = max(1, SCALED_COPY_BYTES // per_example_bytes)
    return [slice(start, start + width) for start in range(0, examples, width)] or [slice(0, 0)]


def _addmm(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    total[0].addmm_(left, right)
    return total
