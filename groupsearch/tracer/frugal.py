"""Operations that allocate their results on the CPU and nothing else, and in which form they do so.

The list is short and positive: what is not on it is probed (:mod:`groupsearch.tracer.scratch`). Every
operation on it is held to its word by a test, over shapes, layouts and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_FULL = frozenset({torch.float32, torch.float64})
Rule = Callable[[list[Tensor]], bool]
"""Whether an operation that is given these tensors allocates its results alone."""

ELEMENTWISE = frozenset(
    {
        *("abs", "neg", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh", "sigmoid", "erf", "relu"),
        *("add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "clamp", "clamp_min", "clamp_max", "lerp"),
        *("addcmul", "addcdiv", "sign", "silu", "silu_backward", "tanh_backward", "sigmoid_backward"),
        *("threshold_backward", "leaky_relu", "leaky_relu_backward", "eq", "ne", "lt", "le", "gt", "ge"),
        *("_fused_adam", "_fused_adamw", "_fused_sgd"),
    }
)
"""Of tensors of one dtype, float32 or float64, in any layout; in place and by lists as well."""
MASKED = frozenset({"where", "masked_fill"})
"""Elementwise as well, of a mask of booleans beside them; all of it contiguous."""
DENSE = frozenset(
    {
        *("gelu", "gelu_backward", "native_layer_norm", "_softmax", "_softmax_backward_data", "_log_softmax"),
        *("_log_softmax_backward_data", "embedding", "embedding_dense_backward", "nll_loss_forward"),
        *("nll_loss_backward", "sum", "mean", "cat", "normal", "uniform"),
    }
)
"""Of contiguous tensors: float32 or float64, with numbers of rows beside them."""
COPIES = frozenset({"clone", "copy", "_to_copy"})
"""From and to tensors without gaps and in one layout, whatever their dtypes."""
PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm"})
"""Of matrices of which rows or columns are contiguous, which is what BLAS takes; others are copied."""
MAKERS = frozenset(
    {
        *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "zeros", "zeros_like", "new_zeros"),
        *("ones", "ones_like", "new_ones", "full", "full_like", "new_full", "scalar_tensor", "fill", "zero"),
        *("arange", "_unsafe_view", "detach", "alias", "lift_fresh", "set", "_local_scalar_dense"),
    }
)
"""Whatever they are given: they make or fill a tensor, or look at one."""


def needs_nothing(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether it is known that an operation allocates its results and no scratch."""
    rule = _rule(func)
    if rule is None or isinstance(rule, bool):
        return bool(rule)
    return rule(_tensors((*args, *kwargs.values())))


@cache
def _rule(func: torch._ops.OpOverload) -> Rule | bool | None:
    """Of an operation: a rule about its tensors, True where none is needed, None where it is not on the list."""
    if func.is_view:
        return True
    space, _, name = func._schema.name.partition("::")
    name = name.removeprefix("_foreach_").rstrip("_")
    if space != "aten" or "out" in func._overloadname:
        return None
    rules: dict[frozenset[str], Rule | bool] = {
        **{MAKERS: True, ELEMENTWISE: _of_one_kind, MASKED: _of_one_kind_but_masks},
        **{DENSE: _contiguous, COPIES: _without_gaps, PRODUCTS: _in_lines},
    }
    return next((rule for names, rule in rules.items() if name in names), None)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, which are nested in lists at most."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _of_one_kind(tensors: list[Tensor]) -> bool:
    kinds = {x.dtype for x in tensors}
    return len(kinds) == 1 and kinds <= _FULL


def _of_one_kind_but_masks(tensors: list[Tensor]) -> bool:
    numbers = [x for x in tensors if x.dtype != torch.bool]
    return _of_one_kind(numbers) and all(x.is_contiguous() for x in tensors)


def _contiguous(tensors: list[Tensor]) -> bool:
    floats = [x for x in tensors if x.dtype != torch.int64]
    return _of_one_kind(floats) and all(x.is_contiguous() for x in tensors)


def _without_gaps(tensors: list[Tensor]) -> bool:
    return all(x.is_contiguous() for x in tensors)


def _in_lines(tensors: list[Tensor]) -> bool:
    return _of_one_kind(tensors) and all(map(_has_lines, tensors))


def _has_lines(matrices: Tensor) -> bool:
    """Whether rows or columns are contiguous and do not overlap; a vector, which is added, is taken as it is."""
    if matrices.dim() < 2:
        return True
    (rows, columns), (down, across) = matrices.shape[-2:], matrices.stride()[-2:]
    return (across == 1 and down >= columns) or (down == 1 and across >= rows)
