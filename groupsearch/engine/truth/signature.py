"""Signatures of gradients: short vectors that add up as gradients do, so that no gradient needs to be kept.

A gradient is multiplied by random signs and summed into buckets, twice with other signs. The
length of the difference of two signatures estimates that of the gradients' difference.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from groupsearch.engine.widening import widened

BUCKETS = 64
_TIMES = 2
_ROW = 4096


def signature(gradient: Tensor) -> Tensor:
    """The signature (64,) of a gradient of any shape, in float32 at least. It is linear in the gradient."""
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
    flat = widened(gradient.detach().reshape(-1))
    if flat.numel() <= BUCKETS:
        return torch.nn.functional.pad(flat, (0, BUCKETS - flat.numel()))
    rows, rest = divmod(flat.numel(), _ROW)
    total = flat.new_zeros(_TIMES, _ROW)
    if rows:
        total += _signs(rows, 1, flat.device, flat.dtype) @ flat[: rows * _ROW].view(rows, _ROW)
    if rest:
        total[:, :rest] += flat[rows * _ROW :]
    signed = total * _signs(_ROW, 2, flat.device, flat.dtype)
    return signed.view(_TIMES, -1, BUCKETS // _TIMES).sum(1).flatten() / math.sqrt(_TIMES)


@lru_cache(maxsize=64)
def _signs(count: int, salt: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Signs (2, count) from a hash of the place: no random draw, for these are made alike meanwhile."""
    x = torch.arange(_TIMES * count, dtype=torch.int64, device="cpu") * 0x9E3779B1 + salt * 0x85EBCA77
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    x = ((x ^ (x >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return (1 - 2 * ((x ^ (x >> 15)) & 1)).view(_TIMES, count).to(device=device, dtype=dtype)


def forget_signs() -> None:
    """Let go of the signs, which lie on the devices that gradients had lain on."""
    _signs.cache_clear()
