"""Values for a probe: whatever an operation may take, so that it can be run at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_WHOLE = (0, 1)  # 0 is a place in everything; lengths and counts are 1 at least


def attempts(values: Sequence[Any]) -> Iterator[list[Any]]:
    """Arguments of an operation again and again, every time of other values; shapes, strides and dtypes stay.

    Numbers are ones, then a matrix like the unit matrix (which has an inverse and a root), then numbers between
    0 and 1; whole numbers are 0, then 1. Later ones are for operations that refuse those before.
    A generator becomes a new one, which nobody misses.
    """
    fills = (_ones, _unit, _between)
    for whole in _WHOLE if any(_is_whole(value) for value in values) else _WHOLE[:1]:
        for fill in fills:
            yield [_made(value, fill, whole) for value in values]


def _is_whole(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return False
    return not (value.is_floating_point() or value.is_complex())


def _made(value: Any, fill: Any, whole: int) -> Any:
    if isinstance(value, torch.Generator):
        return torch.Generator()
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    if value.dtype == torch.bool:
        return made.fill_(True)
    made = made.fill_(whole) if _is_whole(value) else fill(made)
    made = made.conj() if value.is_conj() else made
    return made._neg_view() if value.is_neg() else made


def _ones(made: Tensor) -> Tensor:
    return made.fill_(1)


def _unit(made: Tensor) -> Tensor:
    made.fill_(1 / 64)
    if made.dim() > 1:
        made.diagonal(dim1=-2, dim2=-1).fill_(2)
    return made


def _between(made: Tensor) -> Tensor:
    return made.fill_(0.5)
