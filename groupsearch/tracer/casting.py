"""What autocast casts on a CUDA device, on tensors of the CPU, where it casts less to float32.

The lists are those of ``aten/src/ATen/autocast_mode.h``; what is cast to the lower type is the same on both, as far as
models use it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_KEY = "AutocastCPU"
_LOWER = (torch.float16, torch.bfloat16)
_IN_FLOAT32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh"),
    *("tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm"),
    *("group_norm", "cosine_similarity", "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d"),
    *("hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss"),
    *("multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss", "dist", "pdist"),
    *("binary_cross_entropy_with_logits", "cdist", "renorm", "logsumexp"),
)
_TO_FLOAT32 = (
    *("prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "sum", "sum.dim_IntList"),
)
"""These are told to return float32, which kernels may do without a copy of what they are given."""


def cast_as_cuda(library: torch.library.Library) -> None:
    """Register in a library of ``aten`` what a CUDA device casts to float32 and the CPU does not."""
    for names, wrap in ((_IN_FLOAT32, _in_float32), (_TO_FLOAT32, _to_float32)):
        for name in names:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", _KEY):
                library.impl(name, wrap(_overload(name)), _KEY)


def _overload(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return found


def _in_float32(operation: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.float() if x.dtype in _LOWER else x, (args, kwargs))
            return operation(*args, **kwargs)

    return run


def _to_float32(operation: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("dtype") or next((a for a in args if isinstance(a, torch.dtype)), None)
        if given is None and x.dtype in _LOWER:
            args = tuple(a for a in args if a is not None)
            kwargs = {**kwargs, "dtype": torch.float32}
        with torch.autocast("cpu", enabled=False):
            return operation(x, *args, **kwargs)

    return run
