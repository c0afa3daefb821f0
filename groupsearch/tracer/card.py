"""What operations on a named card need inside themselves, as far as that is known without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_aten = torch.ops.aten
_FLASH_BACKWARD = _aten._scaled_dot_product_flash_attention_backward.default
_UNKNOWN = {
    _aten.convolution.default,
    _aten.convolution_backward.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_cudnn_attention_backward.default,
}


def card_scratch(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[Any, int | None]:
    """A probe, as :class:`groupsearch.tracer.live.LiveBytes` asks for one, that runs nothing.

    The backward pass of flash attention adds the query's gradient up in float32 and keeps a number for every row, with
    rows and columns rounded up to its tiles (``flash_api.cpp``). What cuDNN takes is for cuDNN to say: not known.
    """
    if func in _UNKNOWN:
        return out, None
    if func is not _FLASH_BACKWARD:
        return out, 0
    query = args[1]
    rows = query.shape[0] * query.shape[1] * -(-query.shape[2] // 128) * 128
    columns = -(-query.shape[3] // 32) * 32
    results = sum(x.nbytes for x in out if isinstance(x, torch.Tensor))
    return out, results + 4 * rows * (columns + 1)
