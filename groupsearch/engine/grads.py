"""Clipped sums and per-example gradients: pure functions on tensors (shapes as in :mod:`norms`).

``factor_B`` is the clipping factor of every example; where the engine does not look at numbers
(:mod:`~groupsearch.engine.habits`), one of zero says that an example adds nothing, whatever its numbers
are. A factor is folded into the smaller
operand, a few examples at a time, so that no second copy of a large operand is ever made.
Half-precision operands are widened (:mod:`~groupsearch.engine.widening`): sums and per-example
gradients come in float32 or float64. Sums are of IEEE float32, as the norms that bound them; an instance is not, since
its norm and its sum are both taken of the instance itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groupsearch.engine.habits import habits_of
from groupsearch.engine.ieee import in_ieee
from groupsearch.engine.widening import accumulator, example_slices, is_half, widened, widening


@widening
def matrix_instance(a_BGTd: Tensor, g_BGTp: Tensor) -> Tensor:
    """Per-example weight gradients g^T a, (B, G, p, d)."""
    return g_BGTp.mT @ a_BGTd


@in_ieee
def matrix_clipped_sum(a_BGTd: Tensor, g_BGTp: Tensor, factor_B: Tensor) -> Tensor:
    """Sum over examples of factor * g^T a, (G, p, d), as one matrix product per slice of examples."""
    scale_a = a_BGTd.shape[3] <= g_BGTp.shape[3]
    masks = not habits_of(g_BGTp).looks
    both = masks or is_half(a_BGTd, g_BGTp)
    copied = (a_BGTd, g_BGTp) if both else (a_BGTd if scale_a else g_BGTp,)
    total: Tensor | None = None
    for rows in example_slices(*copied):
        a, g = widened(a_BGTd[rows]), widened(g_BGTp[rows])
        factor = factor_B[rows].to(a.dtype)[:, None, None, None]
        scaled, other = (a * factor, g) if scale_a else (g * factor, a)
        if masks:  # 0 times infinity is not 0
            scaled, other = scaled.masked_fill_(factor == 0, 0), other.masked_fill(factor == 0, 0)
        a, g = (scaled, other) if scale_a else (other, scaled)
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
    masks = not habits_of(g_BTd).looks
    total = g_BTd.new_zeros(rows, g_BTd.shape[2], dtype=accumulator(g_BTd.dtype))
    for part in example_slices(g_BTd):
        scaled = g_BTd[part] * factor_B[part].to(total.dtype)[:, None, None]
        scaled.masked_fill_((ids_BT[part] < 0).unsqueeze(2), 0)
        if masks:
            scaled.masked_fill_((factor_B[part] == 0)[:, None, None], 0)
        total.index_add_(0, ids_BT[part].clamp(min=0).flatten(), scaled.flatten(0, 1))
    return total


@widening
def embedding_instance(ids_BT: Tensor, g_BTd: Tensor, rows: int) -> Tensor:
    """Per-example embedding gradients, (B, V, d)."""
    instance = g_BTd.new_zeros(g_BTd.shape[0], rows, g_BTd.shape[2])
    g_BTd = g_BTd.masked_fill((ids_BT < 0).unsqueeze(2), 0)
    return instance.scatter_add_(1, ids_BT.clamp(min=0).unsqueeze(2).expand(g_BTd.shape), g_BTd)


@in_ieee
def instance_clipped_sum(instance: Tensor, factor_B: Tensor) -> Tensor:
    """Sum over examples of factor times the per-example gradient (B, ...), of shape (...)."""
    flat = instance.unsqueeze(1).flatten(1)
    masks = not habits_of(flat).looks
    total: Tensor | None = None
    for rows in example_slices(flat) if masks or is_half(flat) else [slice(None)]:
        factor, part = factor_B[rows].to(accumulator(flat.dtype)), widened(flat[rows])
        if masks:
            part = part.masked_fill((factor == 0).unsqueeze(1), 0)
        total = factor @ part if total is None else total.add_(factor @ part)
    assert total is not None
    return total.view(instance.shape[1:])


def _addmm(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    total[0].addmm_(left, right)
    return total
