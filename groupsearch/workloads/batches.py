"""What a batch is: tensors in mappings and tuples, however nested, whose first dimension counts B examples.

Arrays of numpy count as the tensors they become; None, numbers and texts stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._pytree import tree_leaves, tree_map_only

from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.workloads.workload import PerExample, Workload


def map_tensors(change: Callable[[Tensor], Any], batch: Any) -> Any:
    """A batch with every tensor changed; mappings stay of their class, such as a tokenizer's output.

    >>> map_tensors(len, ({"label": torch.zeros(3)}, None))
    ({'label': 3}, None)
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = torch.as_tensor(value)
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, Mapping):
            return _like(value, {key: map_tensors(change, part) for key, part in value.items()})
        return value

    return pytree.tree_map(leaf, batch)


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, batch)
    return iter(found)


def count_examples(batch: Any) -> int:
    """B, the common first dimension of the tensors of a batch.

    Raises:
        GroupSearchError: when there are no tensors, or they disagree.

    >>> count_examples({"image": torch.zeros(3, 8), "label": torch.zeros(3)})
    3
    """
    shapes = [tuple(tensor.shape) for tensor in tensors_of(batch)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes:
        raise GroupSearchError(
            "Expected a batch to be a tensor, or a mapping or tuple of tensors, that share their first dimension, "
            f"the number of examples; found {f'tensors of shapes {shapes}' if shapes else type(batch).__name__}."
        )
    return next(size for size in sizes if size is not None)


def take_examples(batch: Any, examples: Sequence[int]) -> Any:
    """A batch of some of the examples, whole and in this order; one may be named twice.

    >>> take_examples({"label": torch.tensor([5, 6])}, (1, 0, 1))
    {'label': tensor([6, 5, 6])}
    """
    index = torch.tensor(tuple(examples), dtype=torch.long, device="cpu")
    return map_tensors(lambda tensor: tensor[index.to(tensor.device)], batch)


def first_examples(batch: Any, batch_size: int) -> Any:
    """A batch of the first ``batch_size`` examples, starting over when there are not as many.

    >>> first_examples({"label": torch.tensor([5, 6])}, 3)
    {'label': tensor([5, 6, 5])}
    """
    count = count_examples(batch)
    return take_examples(batch, [i % count for i in range(batch_size)])


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
        if losses.ndim == 0 and examples == 1:
            remedy = "keep the dimension of the batch also where it has one example, which squeeze() takes away"
        elif losses.ndim > 1 and losses.shape[0] == examples:
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


def _like(mapping: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """The values in a mapping of the same class, where one can be made; else as a dict."""
    if not isinstance(mapping, MutableMapping):
        return values
    try:
        same = copy.copy(mapping)
        same.update(values)
    except Exception:
        return values
    return same


# -- Several views of every example in one step: their mean loss is the example's, and it is clipped once
#
# Augmentation multiplicity (De et al., arXiv 2204.13650, section 3): of what helps training with differential
# privacy among what costs the most time and no privacy at all.

Augment = Callable[[Any], Any]


def repeat_views(batch: Any, views: int, augment: Augment | None = None) -> Any:
    """A batch of B examples as one of K views of each: every tensor (B, ...) as (B, K, ...).

    Args:
        batch: tensors that lead with the examples.
        views: K.
        augment: is given the batch with every row repeated K times, side by side, and changes row by row.

    >>> import torch
    >>> repeat_views({"x": torch.tensor([1.0, 2.0])}, 2)
    {'x': tensor([[1., 1.],
            [2., 2.]])}
    """
    rows = tree_map_only(Tensor, lambda x: x.repeat_interleave(views, 0), batch)
    return group_views(rows if augment is None else augment(rows), views)


def group_views(rows: Any, views: int) -> Any:
    """Rows (B K, ...) of K views side by side as (B, K, ...).

    Raises:
        GroupSearchError: when a tensor's rows do not divide by K.
    """

    def grouped(x: Tensor) -> Tensor:
        if not x.dim() or x.shape[0] % views:
            raise GroupSearchError(
                f"Expected {views} views of every example, found a tensor of shape {tuple(x.shape)}. Let what augments "
                "or collates return as many rows as it is given."
            )
        return x.unflatten(0, (x.shape[0] // views, views))

    return tree_map_only(Tensor, grouped, rows)


def mean_over_views(loss: PerExample) -> PerExample:
    """A loss of batches of views: each example's loss is the mean over its views, which ``loss`` sees as examples.

    ``loss(model, batch)`` with tensors (B K, ...) gives (B K,); what is returned takes tensors (B, K, ...), gives (B,)
    and calls the model with all views at once.
    """

    def over_views(model: nn.Module, batch: Any) -> Tensor:
        shapes = [tuple(x.shape) for x in tree_leaves(batch) if isinstance(x, Tensor)]
        counts = {shape[:2] if len(shape) > 1 else () for shape in shapes}
        if len(counts) != 1 or () in counts:
            raise GroupSearchError(
                f"Expected tensors that begin with the examples and their views, (B, K, ...), found shapes {shapes}. "
                "Make them by PoissonBatches(views=K), or with groupsearch.workloads.batches.repeat_views."
            )
        losses = loss(model, tree_map_only(Tensor, lambda x: x.flatten(0, 1), batch))
        return losses.unflatten(0, next(iter(counts))).mean(1)

    return over_views


def with_views(workload: Workload, views: int, augment: Augment | None = None) -> Workload:
    """The workload trained with K views of every example; it is judged on the examples as they are.

    Args:
        workload: its loss sees rows, be they examples or views of some.
        views: K >= 1.
        augment: see :func:`repeat_views`; it draws from torch's global generator.

    Raises:
        GroupSearchError: when there are no views, or the workload has several already.
    """
    if views < 1 or workload.views != 1:
        raise GroupSearchError(
            f"Expected at least one view of every example, of a workload that has one; found {views} of one that has "
            f"{workload.views}."
        )
    plain, dims = workload.loss, _dims(workload.make_batch(1))
    over_views = mean_over_views(plain)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (plain if _dims(batch) == dims else over_views)(model, batch)

    return replace(
        workload,
        make_batch=lambda examples: repeat_views(workload.make_batch(examples), views, augment),
        loss=loss,
        views=views,
        augment=augment,
        settings={**workload.settings, "views": views},
    )


def _dims(batch: Any) -> Mapping[int, int]:
    return {i: x.dim() for i, x in enumerate(tree_leaves(batch)) if isinstance(x, Tensor)}
