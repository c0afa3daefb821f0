"""Several views of every example in one step: their mean loss is the example's, and it is clipped once.

Augmentation multiplicity (De et al., arXiv 2204.13650, section 3): of what helps training with differential
privacy among what costs the most time and no privacy at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from groupsearch.errors import GroupSearchError
from groupsearch.workloads.workload import PerExample, Workload

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
                "Make them by PoissonBatches(views=K), or with groupsearch.workloads.views.repeat_views."
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
