"""Squared per-example gradient norms and inner products: pure functions on tensors.

Shapes: B examples, G channel groups of a convolution (1 elsewhere), T positions, d inputs,
p outputs, V rows of an embedding. Source: Book-Keeping, arXiv 2210.00038, section 3. Half-precision
operands are widened (:mod:`~groupsearch.engine.widening`); results are float32 or float64.

Inner products are rounded up. Where the gradients of positions (or of two uses of a weight) cancel,
what is left of their sum may be smaller than the rounding of its terms, and a norm that is too short
clips too little. So each inner product is enlarged by ``ROUNDING`` units of rounding of the sizes that
were added, S = sum over positions of |a_t| |g_t|: the largest error seen, over random, cancelling and
aligned operands up to 768 x 3072 and 512 positions, was 1.1 of these units. Products are of IEEE float32
(:mod:`~groupsearch.engine.ieee`), whatever matrix units are allowed elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groupsearch.engine.ieee import in_ieee
from groupsearch.engine.widening import accumulator, widening

ROUNDING = 3


@in_ieee
@widening
def matrix_sqnorm(a_BGTd: Tensor, g_BGTp: Tensor, bias: bool) -> Tensor:
    """Ghost norm: squared norm per example of the weight gradient g^T a, without forming it.

    With ``bias`` the squared norm of the bias gradient (sum of g over T) is included: a bias
    is a weight on a constant input of one, which adds one to every entry of a a^T.

    Returns:
        Tensor (B,). Needs 2 B G T^2 numbers for T > 1.
    """
    if a_BGTd.shape[2] == 1:
        a_BG = _squares(a_BGTd, (2, 3))
        return ((a_BG + 1 if bias else a_BG) * _squares(g_BGTp, (2, 3))).sum(1)
    gram_BGTT = a_BGTd @ a_BGTd.mT
    if bias:
        gram_BGTT += 1
    gram_BGTT *= g_BGTp @ g_BGTp.mT
    total_B = gram_BGTT.sum((1, 2, 3), dtype=accumulator(gram_BGTT.dtype))
    size_BG = gram_BGTT.diagonal(dim1=2, dim2=3).clamp(min=0).sqrt_().sum(2)  # |a_t| |g_t| of every position
    return total_B.add_(size_BG.square().sum(1), alpha=rounding_unit(g_BGTp))


@in_ieee
@widening
def matrix_inner(a_BGTd: Tensor, g_BGTp: Tensor, b_BGSd: Tensor, h_BGSp: Tensor, bias: bool) -> Tensor:
    """Inner product per example of the gradients g^T a and h^T b of one shared weight (and bias).

    Returns:
        Tensor (B,).
    """
    gram_BGTS = a_BGTd @ b_BGSd.mT
    if bias:
        gram_BGTS += 1
    gram_BGTS *= g_BGTp @ h_BGSp.mT
    total_B = gram_BGTS.sum((1, 2, 3), dtype=accumulator(gram_BGTS.dtype))
    del gram_BGTS
    size_BG = matrix_size(a_BGTd, g_BGTp, bias) * matrix_size(b_BGSd, h_BGSp, bias)
    return total_B.add_(size_BG.sum(1), alpha=rounding_unit(g_BGTp))


@in_ieee
@widening
def embedding_inner(ids_BT: Tensor, g_BTd: Tensor, ids_BS: Tensor, h_BSd: Tensor) -> Tensor:
    """Inner product per example of two embedding gradients: pairs of positions with the same row.

    A negative index marks a position without gradient.

    Returns:
        Tensor (B,).
    """
    gram_BTS = g_BTd @ h_BSd.mT
    other_row = (ids_BT.unsqueeze(2) != ids_BS.unsqueeze(1)) | (ids_BT < 0).unsqueeze(2)
    gram_BTS.masked_fill_(other_row, 0)
    total_B = gram_BTS.sum((1, 2), dtype=accumulator(gram_BTS.dtype))
    torch.mul(_lengths(g_BTd).unsqueeze(2), _lengths(h_BSd).unsqueeze(1), out=gram_BTS)
    gram_BTS.masked_fill_(other_row, 0)
    return total_B.add_(gram_BTS.sum((1, 2)), alpha=rounding_unit(g_BTd))


@in_ieee
@widening
def embedding_matrix_inner(ids_BT: Tensor, g_BTd: Tensor, b_BSd: Tensor, h_BSV: Tensor) -> Tensor:
    """Inner product per example of an embedding gradient and the gradient h^T b of a tied output layer.

    Returns:
        Tensor (B,).
    """
    gram_BST = b_BSd @ g_BTd.mT
    picked_BST = h_BSV.gather(2, ids_BT.clamp(min=0).unsqueeze(1).expand(-1, h_BSV.shape[1], -1))
    picked_BST.masked_fill_((ids_BT < 0).unsqueeze(1), 0)
    gram_BST *= picked_BST
    total_B = gram_BST.sum((1, 2), dtype=accumulator(gram_BST.dtype))
    size_BST = picked_BST.abs_().mul_(_lengths(b_BSd).unsqueeze(2)).mul_(_lengths(g_BTd).unsqueeze(1))
    return total_B.add_(size_BST.sum((1, 2)), alpha=rounding_unit(g_BTd))


@widening
def instance_inner(one: Tensor, other: Tensor) -> Tensor:
    """Inner product per example of two per-example gradients (B, ...).

    Returns:
        Tensor (B,).
    """
    total_B = (one * other).unsqueeze(1).flatten(1).sum(1)
    return total_B.add_((instance_sqnorm(one) * instance_sqnorm(other)).sqrt(), alpha=rounding_unit(one))


def instance_sqnorm(instance: Tensor) -> Tensor:
    """Squared norm per example of a per-example gradient (B, ...), without a second copy of it.

    Returns:
        Tensor (B,).
    """
    flat = instance.unsqueeze(1).flatten(1)
    return torch.linalg.vector_norm(flat, dim=1, dtype=accumulator(flat.dtype)).square()


def matrix_size(a_BGTd: Tensor, g_BGTp: Tensor, bias: bool) -> Tensor:
    """S, the sum over positions of |a_t| |g_t|, (B, G); with ``bias`` the input has a further constant of one."""
    lengths_BGT = _lengths(a_BGTd)
    if bias:
        lengths_BGT = torch.hypot(lengths_BGT, torch.ones_like(lengths_BGT))
    return (lengths_BGT * _lengths(g_BGTp)).sum(2)


def _lengths(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=accumulator(x.dtype))


def rounding_unit(x: Tensor) -> float:
    """What an inner product of such numbers is enlarged by, per unit of size."""
    return ROUNDING * torch.finfo(accumulator(x.dtype)).eps


def _squares(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(tensor, dim=dims, dtype=accumulator(tensor.dtype)).square()
