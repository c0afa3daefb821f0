"""Half-precision operands are widened to float32, a few examples at a time.

A norm that is rounded to eight bits clips to something else than the threshold, and Gram
matrices of scaled float16 gradients overflow. So nothing is summed in half precision; what is
kept in the book stays as it came. A product of two half-precision numbers is exact in float32, and
rounded up by no more than what adding such products up may lose.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from groupsearch.engine.habits import habits_of

HALF = (torch.float16, torch.bfloat16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that numbers of this one are summed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def is_half(*tensors: Tensor) -> bool:
    """Whether any of them has half precision."""
    return any(tensor.dtype in HALF for tensor in tensors)


def widened(tensor: Tensor) -> Tensor:
    """A tensor of half precision in float32, any other as it is."""
    return tensor.float() if tensor.dtype in HALF else tensor


def example_slices(*operands: Tensor) -> list[slice]:
    """Slices of examples in which no operand once widened is larger than the device's slices (one example at least)."""
    examples = operands[0].shape[0]
    size = max(x.numel() * (4 if x.dtype in HALF else x.element_size()) for x in operands)
    width = max(1, habits_of(operands[0]).slice_bytes // max(1, size // max(1, examples)))
    return [slice(start, start + width) for start in range(0, examples, width)] or [slice(0, 0)]


def widening(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute a result per example, (B, ...), in float32 and slice by slice where an operand has half precision."""

    @wraps(function)
    def compute(*args: Any, **kwargs: Any) -> Tensor:
        operands = [x for x in args if isinstance(x, Tensor)]
        if not is_half(*operands):
            return function(*args, **kwargs)
        result: Tensor | None = None
        for rows in example_slices(*operands):
            part = function(*[widened(x[rows]) if isinstance(x, Tensor) else x for x in args], **kwargs)
            if result is None:
                result = part.new_empty((operands[0].shape[0], *part.shape[1:]))
            result[rows] = part
        assert result is not None
        return result

    return compute
