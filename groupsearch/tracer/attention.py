"""The kernels that torch would take on a CUDA device, run on fake tensors of the CPU: attention and dropout.

``scaled_dot_product_attention`` chooses by device, dtype and mask, and what it keeps for the backward pass differs. On
fake tensors of the CPU it would choose the CPU's; here it is told which one by the rules of
``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``, with the preparations that those kernels need. Dropout keeps
a mask of one byte for each number there, where the CPU keeps one as large as its input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda

from groupsearch.cards import Card
from groupsearch.tracer.casting import cast_as_cuda

_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten
_entered: list[Card] = []


def attention_kernel(
    card: Card, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, shared_heads: bool = False
) -> str:
    """``cudnn``, ``flash``, ``efficient`` or ``math``: what a card takes for such an attention.

    Hopper prefers cuDNN, in half precision. Flash takes no mask and half precision on compute capability 8.0 and
    later; the memory-efficient kernel takes masks and float32; what none of them takes is computed step by step.

    Args:
        card: the card.
        query: (B, H, T, D).
        key: (B, H, T, D), or of fewer heads.
        value: as the key.
        mask: what is added to, or allowed of, the scores.
        shared_heads: whether several heads of the query share one of key and value.
    """
    fits = {"cudnn": _fits_cudnn, "flash": _fits_flash, "efficient": _fits_efficient}
    allowed = {
        "cudnn": cuda.cudnn_sdp_enabled() and card.capability == (9, 0),
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
    }
    if query.dim() != 4 or len({query.dtype, key.dtype, value.dtype}) > 1 or 0 in query.shape:
        return "math"
    asked = (card, query, key, value, mask)
    return next((name for name in fits if allowed[name] and fits[name](*asked, shared_heads)), "math")


def _fits_cudnn(card: Card, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shared_heads: bool) -> bool:
    width = max(q.shape[-1], v.shape[-1])
    return q.dtype in _HALF and width <= 128 and q.shape[-1] % 8 == v.shape[-1] % 8 == 0 and q.shape[-2] > 1


def _fits_flash(card: Card, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shared_heads: bool) -> bool:
    width = q.shape[-1]
    if mask is not None or q.dtype not in _HALF or card.capability < (8, 0) or not width == k.shape[-1] == v.shape[-1]:
        return False
    small = card.capability in ((8, 6), (8, 9)) and q.requires_grad and 192 < width <= 224
    return width <= 256 and not small


def _fits_efficient(card: Card, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shared_heads: bool) -> bool:
    if q.dtype not in (torch.float32, *_HALF) or (q.dtype is torch.bfloat16 and card.capability < (8, 0)):
        return False
    unit = 4 if q.dtype is torch.float32 else 8
    return q.shape[-1] % unit == v.shape[-1] % unit == 0 and not (shared_heads and mask is not None)


@contextmanager
def kernels_of(card: Card) -> Iterator[None]:
    """Inside, attention, dropout and what autocast casts are on tensors of the CPU as on a card, whoever calls them.

    It holds for the whole process: step on fake tensors inside, and on nothing else. Inside another one for the same
    card nothing changes.
    """
    if _entered:
        assert _entered[-1] == card, f"inside the kernels of {_entered[-1].name} those of {card.name} cannot be had"
        yield
        return
    _entered.append(card)
    library = torch.library.Library("aten", "IMPL")
    try:
        for key in ("CPU", "AutogradCPU"):
            library.impl("scaled_dot_product_attention", partial(_attend, card), key)
            library.impl("dropout", _dropout, key)
        cast_as_cuda(library)
        yield
    finally:
        library._destroy()
        _entered.clear()


def _attend(
    card: Card,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    kernel = attention_kernel(card, query, key, value, attn_mask, enable_gqa)
    if kernel == "math":
        mask = attn_mask if attn_mask is None or attn_mask.dtype is not torch.bool else _additive(attn_mask, query)
        found: Tensor = _aten._scaled_dot_product_attention_math(
            query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
        return found
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if kernel == "flash":
        return _flash(query, key, value, dropout_p, is_causal, scale)
    kept = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    if kernel == "cudnn":
        found = _aten._scaled_dot_product_cudnn_attention(
            query, key, value, bias, kept, dropout_p, is_causal, False, scale=scale
        )[0]
        return found
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    found = _aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, kept, dropout_p, is_causal, scale=scale
    )[0]
    return found


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    if not train or p == 0 or not input.numel():
        return input
    if p == 1:
        return input * torch.zeros_like(input)
    found: Tensor = _aten.native_dropout(input, p, True)[0]
    return found


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout: float, is_causal: bool, scale: float) -> Tensor:
    """Heads whose width is no multiple of 8 are padded to one."""
    width = query.shape[-1]
    if width % 8:
        query, key, value = (F.pad(x, (0, 8 - width % 8)) for x in (query, key, value))
    out: Tensor = _aten._scaled_dot_product_flash_attention(query, key, value, dropout, is_causal, False, scale=scale)[
        0
    ]
    return out[..., :width]


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as the kernels take it: of the query's type, with rows of a multiple of 16, for all examples and heads."""
    if mask.dtype is torch.bool:
        mask = _additive(mask, query)
    length = mask.shape[-1]
    if length % 16:
        mask = F.pad(mask, (0, 16 - length % 16))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """What is allowed, as what is added to the scores."""
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)
