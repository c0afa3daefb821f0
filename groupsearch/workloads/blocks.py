"""The repeated blocks of a model, and activation checkpointing of each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from groupsearch.errors import UnsupportedModelError


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Qualified names of the repeated blocks, such as ``transformer.h.0``, in order of registration.

    A block is an element of an ``nn.ModuleList`` or ``nn.Sequential`` that owns parameters, is made of
    further modules (a single layer is no block) and shares its class with another such element of
    the list. Only the outermost lists count: nothing inside a block is a block.

    >>> layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)) for _ in range(2))
    >>> find_blocks(nn.ModuleDict({"layers": layers, "head": nn.Linear(2, 2)}))
    ('layers.0', 'layers.1')
    """
    return tuple(_blocks_below(model, ""))


def checkpoint_blocks(model: nn.Module, use_reentrant: bool = False) -> None:
    """Recompute the inside of every block in the backward pass instead of keeping its activations.

    Module identity, parameter names and the state dict stay as they are; keyword arguments and
    outputs of any structure pass through; without gradients the block runs as it did. Losses and
    gradients are those of the model before.

    Args:
        model: changed in place; a block that is already checkpointed here is left alone.
        use_reentrant: which kind of :func:`torch.utils.checkpoint.checkpoint`. The reentrant kind
            gives a block no gradients when none of its inputs asks for one, and knows only outputs
            that are a tensor or a flat tuple.

    Raises:
        UnsupportedModelError: when the model has no repeated blocks.
    """
    names = find_blocks(model)
    if not names:
        raise UnsupportedModelError(
            f"Found no repeated blocks to checkpoint in {type(model).__name__}: expected an nn.ModuleList or "
            "nn.Sequential with two or more blocks of one class. Checkpoint inside the model's own forward, "
            "or leave activation checkpointing off."
        )
    for name in names:
        block = model.get_submodule(name)
        if not isinstance(block.forward, _CheckpointedForward):
            # As an instance attribute it hides the method of the class, and hooks of the module stay outside.
            block.forward = _CheckpointedForward(block.forward, use_reentrant)


class _CheckpointedForward:
    """A block's forward behind a checkpoint; a class and no closure, so that a copied model calls its own blocks."""

    def __init__(self, forward: Callable[..., Any], use_reentrant: bool) -> None:
        self._forward = forward
        self._use_reentrant = use_reentrant

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        if not self._use_reentrant:
            return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)
        # The reentrant kind sees positional tensors only: hand it every leaf as one.
        leaves, structure = tree_flatten((args, kwargs))

        def run(*inputs: Any) -> Any:
            positional, named = tree_unflatten(inputs, structure)
            return self._forward(*positional, **named)

        return checkpoint(run, *leaves, use_reentrant=True)


def _blocks_below(module: nn.Module, prefix: str) -> list[str]:
    repeated = _repeated_children(module) if isinstance(module, (nn.ModuleList, nn.Sequential)) else set()
    names: list[str] = []
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        names += [path] if name in repeated else _blocks_below(child, path)
    return names


def _repeated_children(module: nn.Module) -> set[str]:
    """Names of the children that own parameters, hold further modules and share their class with another."""
    owners = {
        name: type(child)
        for name, child in module.named_children()
        if any(True for _ in child.children()) and any(True for _ in child.parameters())
    }
    count = Counter(owners.values())
    return {name for name, kind in owners.items() if count[kind] >= 2}
