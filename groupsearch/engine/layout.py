"""Where a layer keeps the examples of a batch, and how to see its tensors example by example.

``first``: (B, ...). ``folded``: (B k, ...), the k rows of an example side by side, as windows of
an image or frames of a film are. ``second``: (T, B, ...), as recurrent layers have it. ``whole``:
inside the module rows have left their examples (routed tokens); only what goes in and out is
first or folded.
"""

from __future__ import annotations

from torch import Tensor

LAYOUTS = ("first", "folded", "second", "whole")


def rows_per_example(tensor: Tensor, layout: str, batch_size: int) -> int | None:
    """K of a tensor that keeps ``batch_size`` examples in this layout, None of one that does not.

    1 for ``first`` and ``second``.
    """
    shape = tensor.shape
    if layout == "second":
        return 1 if len(shape) > 1 and shape[1] == batch_size else None
    if not shape or (layout == "first" and shape[0] != batch_size):
        return None
    if batch_size == 0:
        return 1 if shape[0] == 0 else None
    return shape[0] // batch_size if shape[0] and shape[0] % batch_size == 0 else None


def by_example(tensor: Tensor, layout: str, batch_size: int) -> Tensor:
    """A view with the examples in the first dimension: (B, ...), for ``folded`` (B, k, ...)."""
    if layout == "second":
        return tensor.transpose(0, 1)
    if layout == "folded":
        return unfold_rows(tensor, batch_size)
    return tensor


def unfold_rows(tensor: Tensor, batch_size: int) -> Tensor:
    """(B k, ...) as (B, k, ...)."""
    return tensor.unflatten(0, (batch_size, tensor.shape[0] // batch_size if batch_size else 1))
