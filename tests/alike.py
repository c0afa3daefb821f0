"""Random draws that are the same for every example: so that dropout can stay on while examples are compared.

What is drawn depends on nothing but the length of the last dimension, which is never the examples': masks differ
between features (or keys, or columns of an image), and are the same for all rows, runs and batch sizes.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_GOLDEN = 0.6180339887498949
_DROPOUTS = {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout"}  # fmt: skip
_UNIFORM = {"rand", "rand_like"}
_NORMAL = {"randn", "randn_like"}


@contextmanager
def alike() -> Iterator[None]:
    """Draw alike for all examples, in torch, numpy and where transformers masks spans of a spectrum."""
    spans = [m for name, m in sys.modules.items() if name.startswith("transformers.models.") and "_compute_mask_indices" in vars(m)]  # fmt: skip
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        with _Alike():
            patches = [patch.object(m, "_compute_mask_indices", _for_all(m._compute_mask_indices)) for m in spans]
            for one in patches:
                one.start()
            try:
                yield
            finally:
                for one in patches:
                    one.stop()
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _for_all(spans: Any) -> Any:
    """Masks for one example, given to all: from a state that is put back."""

    def made(shape: tuple[int, int], *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("attention_mask", None)
        state = np.random.get_state()
        np.random.seed(7)
        one = spans((1, shape[1]), *args, **kwargs)
        np.random.set_state(state)
        return np.repeat(one, shape[0], 0)

    return made


class _Alike(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _DROPOUTS:
            return _dropped(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return func(*args[:4], *((0.0,) if len(args) > 4 else ()), *args[5:], **{**kwargs, **({"dropout_p": 0.0} if "dropout_p" in kwargs else {})})  # fmt: skip
        if name == "multi_head_attention_forward":
            kwargs = {**kwargs, "dropout_p": 0.0} if "dropout_p" in kwargs else kwargs
            return func(*args[:11], 0.0, *args[12:], **kwargs) if len(args) > 11 else func(*args, **kwargs)
        if name in _UNIFORM | _NORMAL:
            return _pattern(func(*args, **kwargs), name in _NORMAL)
        if name in ("bernoulli", "bernoulli_"):
            given = args[1] if len(args) > 1 else kwargs.get("p", args[0])
            drawn = (_pattern(torch.empty_like(args[0])) < given).to(args[0].dtype)
            return args[0].copy_(drawn) if name == "bernoulli_" else drawn
        if name in ("uniform_", "normal_", "exponential_"):
            return args[0].copy_(_pattern(torch.empty_like(args[0]), name == "normal_"))
        return func(*args, **kwargs)


def _dropped(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not p:
        return x
    kept = (_pattern(torch.empty_like(x[..., :1].expand_as(x))) >= p).to(x.dtype) / (1 - p) if p < 1 else x * 0
    return x.mul_(kept) if inplace else x * kept


def _pattern(like: Tensor, normal: bool = False) -> Tensor:
    """Numbers in (0, 1), or normal ones, that depend on the place in the last dimension alone."""
    length = like.shape[-1] if like.dim() else 1
    row = (torch.arange(1, length + 1, device=like.device, dtype=torch.float64) * _GOLDEN) % 1.0
    if normal:
        row = torch.erfinv(2 * row - 1) * 2**0.5
    return row.to(like.dtype).expand(like.shape).clone() if like.dim() else row[0].to(like.dtype)


