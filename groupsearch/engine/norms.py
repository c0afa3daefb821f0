"""Squared per-example gradient norms and inner products: pure functions on tensors.

Shapes: B examples, G channel groups of a convolution (1 elsewhere), T positions, d inputs,
p outputs, V rows of an embedding. Source: Book-Keeping, arXiv 2210.00038, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    return matrix_inner(a_BGTd, g_BGTp, a_BGTd, g_BGTp, bias)


def matrix_inner(a_BGTd: Tensor, g_BGTp: Tensor, b_BGSd: Tensor, h_BGSp: Tensor, bias: bool) -> Tensor:
    """Inner product per example of the gradients g^T a and h^T b of one shared weight (and bias).

    Returns:
        Tensor (B,).
    """
    gram_BGTS = a_BGTd @ b_BGSd.mT
    if bias:
        gram_BGTS += 1
    gram_BGTS *= g_BGTp @ h_BGSp.mT
    return gram_BGTS.sum((1, 2, 3), dtype=_accumulator(gram_BGTS))


def embedding_inner(ids_BT: Tensor, g_BTd: Tensor, ids_BS: Tensor, h_BSd: Tensor) -> Tensor:
    """Inner product per example of two embedding gradients: pairs of positions with the same row.

    A negative index marks a position without gradient.

    Returns:
        Tensor (B,).
    """
    gram_BTS = g_BTd @ h_BSd.mT
    other_row = (ids_BT.unsqueeze(2) != ids_BS.unsqueeze(1)) | (ids_BT < 0).unsqueeze(2)
    gram_BTS.masked_fill_(other_row, 0)
    return gram_BTS.sum((1, 2), dtype=_accumulator(gram_BTS))


def embedding_matrix_inner(ids_BT: Tensor, g_BTd: Tensor, b_BSd: Tensor, h_BSV: Tensor) -> Tensor:
    """Inner product per example of an embedding gradient and the gradient h^T b of a tied output layer.

    Returns:
        Tensor (B,).
    """
    gram_BST = b_BSd @ g_BTd.mT
    gram_BST *= h_BSV.gather(2, ids_BT.clamp(min=0).unsqueeze(1).expand(-1, h_BSV.shape[1], -1))
    gram_BST.masked_fill_((ids_BT < 0).unsqueeze(1), 0)
    return gram_BST.sum((1, 2), dtype=_accumulator(gram_BST))


def instance_sqnorm(instance: Tensor) -> Tensor:
    """Squared norm per example of a per-example gradient (B, ...), without a second copy of it.

    Returns:
        Tensor (B,).
    """
    flat = instance.unsqueeze(1).flatten(1)
    return torch.linalg.vector_norm(flat, dim=1, dtype=_accumulator(flat)).square()


def _squares(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(tensor, dim=dims, dtype=_accumulator(tensor)).square()


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
