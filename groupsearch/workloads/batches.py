"""What a batch is: tensors in a mapping, a tuple or alone, whose first dimension counts B examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_map

from groupsearch.errors import GroupSearchError, UnsupportedModelError


def count_examples(batch: Any) -> int:
    """B, the common first dimension of the tensors of a batch.

    Raises:
        GroupSearchError: when there are no tensors, or they disagree.

    >>> count_examples({"image": torch.zeros(3, 8), "label": torch.zeros(3)})
    3
    """
    shapes = [tuple(leaf.shape) for leaf in tree_flatten(_plain(batch))[0] if isinstance(leaf, Tensor)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes:
        raise GroupSearchError(
            "Expected a batch to be a tensor, or a mapping or tuple of tensors, that share their first dimension, "
            f"the number of examples; found {f'tensors of shapes {shapes}' if shapes else type(batch).__name__}."
        )
    return next(size for size in sizes if size is not None)


def first_examples(batch: Any, batch_size: int) -> Any:
    """A batch of the first ``batch_size`` examples, starting over when there are not as many.

    >>> first_examples({"label": torch.tensor([5, 6])}, 3)
    {'label': tensor([5, 6, 5])}
    """
    index = torch.arange(batch_size, device="cpu") % count_examples(batch)
    return tree_map(lambda leaf: leaf[index.to(leaf.device)] if isinstance(leaf, Tensor) else leaf, _plain(batch))


def varied_examples(batch: Any, batch_size: int) -> Any:
    """A batch of ``batch_size`` examples in the range of the given ones, but not alike as those may be.

    The first is the first; of the others the floating numbers are shuffled among all, and an example
    that equals an earlier one in something whole (ids, masks) has that rolled along its second dimension.
    Vectors of one number per example stay. Fake tensors are only repeated.

    >>> varied_examples({"ids": torch.tensor([[5, 6]]), "label": torch.tensor([1])}, 2)
    {'ids': tensor([[5, 6],
            [6, 5]]), 'label': tensor([1, 1])}
    """

    def vary(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() < 2 or leaf.is_meta or isinstance(leaf, FakeTensor):
            return leaf
        if leaf.is_floating_point():
            order = torch.randperm(leaf.numel(), generator=torch.Generator().manual_seed(0)).to(leaf.device)
            return torch.cat([leaf[:1], leaf.flatten()[order].view(leaf.shape)[1:]])
        rows = list(leaf)
        for i, row in enumerate(rows):
            if any(torch.equal(row, earlier) for earlier in rows[:i]):
                rows[i] = row.roll(i, 0)
        return torch.stack(rows)

    return tree_map(vary, first_examples(batch, batch_size))


def check_loss(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> Tensor:
    """The losses of a batch, after checking that there is one per example.

    Works on real and on fake tensors, with whatever gradient mode is set. It looks at the shape;
    that the loss of one example does not depend on the others, it cannot see.

    Returns:
        ``loss(model, batch)``, of shape (B,).

    Raises:
        UnsupportedModelError: when that is not a floating tensor of shape (B,).
    """
    examples = count_examples(batch)
    losses = loss(model, batch)
    if not isinstance(losses, Tensor):
        raise UnsupportedModelError(
            f"Expected loss(model, batch) to return a tensor of shape ({examples},), one loss per example, found "
            f"{type(losses).__name__}. Compute it from the model's output with reduction='none'."
        )
    if tuple(losses.shape) != (examples,) or not losses.is_floating_point():
        remedy = "use reduction='none' instead of a mean or sum over the batch"
        if losses.ndim > 1 and losses.shape[0] == examples:
            remedy = "keep reduction='none' and average over the further dimensions, as in .flatten(1).mean(1)"
        elif losses.ndim == 1:
            remedy = (
                "use reduction='none' and, for a loss per position, average within each example: .view(B, -1).mean(1)"
            )
        raise UnsupportedModelError(
            f"Expected loss(model, batch) to return floating numbers of shape ({examples},), one loss per example, "
            f"found {losses.dtype} of shape {tuple(losses.shape)}. Clipping needs every example's gradient: {remedy}."
        )
    return losses


def _plain(batch: Any) -> Any:
    """Mappings of other classes (such as a tokenizer's output) as dict, which pytrees know."""
    return dict(batch) if isinstance(batch, Mapping) else batch
