"""Random draws that are the same for every example: so that dropout can stay on while examples are compared.

What is drawn depends on nothing but the place in the last dimension, which of two or more is never the examples':
masks differ between features (or keys, or columns of an image), and are the same for all rows, runs and batch sizes. Functions are
replaced, and no mode of torch is entered: those are not in force in hooks of a backward pass.
"""

# ruff: noqa: E501
from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_GOLDEN = 0.6180339887498949
_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")


@contextmanager
def alike() -> Iterator[None]:
    """Draw alike for all examples, in torch, numpy, random and where transformers masks spans of a spectrum."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    with ExitStack() as stack:
        for owner, name, replacement in _replacements():
            stack.enter_context(patch.object(owner, name, replacement))
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def _replacements() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    for name in _DROPOUTS:
        yield F, name, _dropped
    yield torch, "dropout", _dropped
    yield F, "scaled_dot_product_attention", _attending(F.scaled_dot_product_attention)
    for name in ("rand", "rand_like", "randn", "randn_like"):
        yield torch, name, _drawn(getattr(torch, name), "randn" in name)
    yield torch, "bernoulli", lambda p, **_: _chosen(p, p)
    yield Tensor, "bernoulli_", lambda x, p=0.5, **_: x.copy_(_chosen(x, p))
    yield torch, "multinomial", lambda p, count, *_, **__: p.topk(count).indices
    yield Tensor, "exponential_", lambda x, lambd=1.0, **_: x.copy_(-(1 - _pattern(x)).log() / lambd)
    yield Tensor, "uniform_", lambda x, low=0.0, high=1.0, **_: x.copy_(_pattern(x) * (high - low) + low)
    yield Tensor, "normal_", lambda x, mean=0.0, std=1.0, **_: x.copy_(_pattern(x, True) * std + mean)
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("transformers.models.") and "_compute_mask_indices" in vars(module):
            yield module, "_compute_mask_indices", _for_all(module._compute_mask_indices)


def _for_all(spans: Callable[..., Any]) -> Callable[..., Any]:
    """Masks for one example, given to all: from a state that is put back."""

    def made(shape: tuple[int, int], *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("attention_mask", None)
        state = np.random.get_state()
        np.random.seed(7)
        one = spans((1, shape[1]), *args, **kwargs)
        np.random.set_state(state)
        return np.repeat(one, shape[0], 0)

    return made


def _attending(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any = None, dropout_p: float = 0.0, *args: Any, **kwargs: Any) -> Tensor:  # fmt: skip
        mask = kwargs.pop("attn_mask", mask)
        return attention(query, key, value, mask, 0.0, *args, **kwargs)

    return attend


def _drawn(draw: Callable[..., Tensor], normal: bool) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: _pattern(draw(*args, **kwargs), normal)


def _chosen(x: Tensor, p: Any) -> Tensor:
    return (_pattern(x) < p).to(x.dtype)


def _dropped(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not p:
        return input
    kept = (_pattern(input) >= p).to(input.dtype) / max(1 - p, 1e-6)
    return input.mul_(kept) if inplace else input * kept


def _pattern(like: Tensor, normal: bool = False) -> Tensor:
    """Numbers in (0, 1), or normal ones, that depend on the place in the last dimension alone."""
    with torch._C.DisableTorchFunction():
        length = like.shape[-1] if like.dim() else 1
        row = (torch.arange(1, length + 1, device=like.device, dtype=torch.float64) * _GOLDEN) % 1.0
        if normal:
            row = torch.erfinv(2 * row - 1) * 2**0.5
        dtype = like.dtype if like.is_floating_point() else torch.float32
        row = row.to(dtype)
        return (row if like.dim() > 1 else row[0]).expand(like.shape).clone()
