"""Rows that values chose: ``x[mask]``, ``x[order]``, and what is made of them until they are put back.

How many there are, and whose, is another matter in every batch; that they are as many as the examples says nothing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

ORDERING = {"sort", "argsort", "msort", "topk", "randperm"}
CHOOSING = {"nonzero", "nonzero_static", "argwhere", "masked_select", "unique", "unique_consecutive"}
_PUTTING = ("__setitem__", "index_put", "index_add", "index_copy", "index_fill", "scatter", "masked_scatter", "copy_")
_PICKING = {"__getitem__", "index_select", "take", "take_along_dim", "gather", "index"}
_TURNING = {"flip", "roll"}
_BATCH = "_groupsearch_of_the_batch"
_ROWS = "_groupsearch_chosen_rows"
_NUMBERS = "_groupsearch_row_numbers"


def note(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Mark the results of an operation that are, or number, rows that values chose."""
    name = getattr(func, "__name__", "")
    if name == "__get__" and not isinstance(out, Tensor):
        return
    # what is put somewhere is in its place again, where the first operand has it
    given = _tensors(args[:1] if name.startswith(_PUTTING) else (args, kwargs))
    results = _tensors(out)
    if any(hasattr(x, _BATCH) for x in given):
        _mark(_BATCH, results)
    if name in ORDERING or name in CHOOSING or (name == "where" and len(args) == 1):
        _mark(_NUMBERS, results)
    picked = name == "masked_select" or (name in _PICKING and _picks(name, args, kwargs)) or _turns(name, args, kwargs)
    if picked or are_chosen(given):
        _mark(_ROWS, results)
    elif any(hasattr(x, _NUMBERS) for x in given) and not any(x.is_floating_point() for x in results):
        _mark(_NUMBERS, results)


def begin(value: Any) -> None:
    """Mark what the model is given."""
    _mark(_BATCH, _tensors(value))


def forget(value: Any) -> None:
    """They are in their places again."""
    for tensor in _tensors(value):
        if hasattr(tensor, _ROWS):
            delattr(tensor, _ROWS)


def are_chosen(value: Any) -> bool:
    """Whether any tensor in it holds chosen rows."""
    return any(hasattr(x, _ROWS) for x in _tensors(value))


def _picks(name: str, args: Any, kwargs: Any) -> bool:
    """Whether rows of the batch are picked: by a mask, by numbers that values gave, or by a tensor of numbers alone."""
    if name != "__getitem__":
        dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 and isinstance(args[1], int) else 0)
        return dim == 0 and hasattr(args[0], _BATCH)
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    first = index[0] if index else None
    if not isinstance(first, Tensor):
        return False
    alone = first.dim() > 0 and sum(isinstance(x, Tensor) for x in index) == 1  # not one position of every example
    return str(first.dtype) == "torch.bool" or hasattr(first, _NUMBERS) or (alone and hasattr(args[0], _BATCH))


def _turns(name: str, args: Any, kwargs: Any) -> bool:
    """Whether the rows of the batch change places."""
    if name not in _TURNING or not hasattr(args[0], _BATCH):
        return False
    dims = (kwargs or {}).get("dims", args[-1] if len(args) > 1 else 0)
    return 0 in (dims if isinstance(dims, list | tuple) else (dims,))


def _mark(what: str, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        setattr(tensor, what, True)


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
