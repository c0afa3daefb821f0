"""The repeated blocks of a model, and activation checkpointing of all or some of them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.options import checkpoint_interval


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


def checkpoint_blocks(model: nn.Module, use_reentrant: bool = False, every: int = 1) -> None:
    """Recompute the inside of blocks in the backward pass instead of keeping their activations.

    With ``every`` K it is one block in K: the first, the one K further on, and so on, in the order of
    :func:`find_blocks`. The blocks between them keep their activations; how a model calls its blocks
    is its own affair, so no K of them can be recomputed as one.

    Module identity, parameter names and the state dict stay as they are; keyword arguments and
    outputs of any structure pass through; without gradients the block runs as it did. Losses and
    gradients are those of the model before.

    Args:
        model: changed in place; a block that is already checkpointed here is left alone.
        use_reentrant: which kind of :func:`torch.utils.checkpoint.checkpoint`. The reentrant kind
            gives a block no gradients when none of its inputs asks for one, and knows only outputs
            that are a tensor or a flat tuple.
        every: K >= 1.

    Raises:
        UnsupportedModelError: when the model has no repeated blocks.
        GroupSearchError: when ``every`` is less than 1.
    """
    if every < 1:
        raise GroupSearchError(f"Expected every >= 1, one block in so many, found {every}.")
    names = find_blocks(model)
    if not names:
        raise UnsupportedModelError(
            f"Found no repeated blocks to checkpoint in {type(model).__name__}: expected an nn.ModuleList or "
            "nn.Sequential with two or more blocks of one class. Checkpoint inside the model's own forward, "
            "or leave activation checkpointing off."
        )
    for name in names[::every]:
        block = model.get_submodule(name)
        if not isinstance(block.forward, CheckpointedForward):
            # As an instance attribute it hides the method of the class, and hooks of the module stay outside.
            block.forward = CheckpointedForward(block.forward, use_reentrant)


def checkpoint_as(model: nn.Module, setting: str) -> None:
    """Checkpoint a model's blocks as a setting says: ``none``, ``blocks`` or ``every:K``.

    Raises:
        UnsupportedModelError: when blocks are to be checkpointed and the model has none.
        GroupSearchError: when the setting is none of these.
    """
    interval = checkpoint_interval(setting)
    if interval:
        checkpoint_blocks(model, every=interval)


class CheckpointedForward:
    """A block's forward behind a checkpoint; a class and no closure, so that a copied model calls its own blocks.

    Attributes:
        inside: a context for every run of the forward itself, also when it is run again in backward; the
            module's own hooks run outside the checkpoint, once.
    """

    def __init__(self, forward: Callable[..., Any], use_reentrant: bool) -> None:
        self.inside: Callable[[], AbstractContextManager[None]] = nullcontext
        self._plain_forward = forward
        self._use_reentrant = use_reentrant

    def __getstate__(self) -> dict[str, Any]:
        """Without what somebody put around the runs: a copy of the block is not watched."""
        return {**vars(self), "inside": nullcontext}

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.inside():
            return self._plain_forward(*args, **kwargs)

    def unchecked(self, *args: Any, **kwargs: Any) -> Any:
        """What the forward returns, its activations kept."""
        return self._forward(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the forward returns."""
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        forward = self._forward
        if any(map(_is_cache, (*args, *kwargs.values()))):
            forward = _SameCaches(forward, args, kwargs)
        if not self._use_reentrant:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        # The reentrant kind sees positional tensors only: hand it every leaf as one.
        leaves, structure = tree_flatten((args, kwargs))

        def run(*inputs: Any) -> Any:
            positional, named = tree_unflatten(inputs, structure)
            return forward(*positional, **named)

        return checkpoint(run, *leaves, use_reentrant=True)


class _SameCaches:
    """A forward that adds to the caches it is given, as blocks of transformers do; run again, it finds them as before.

    Such are given where ``use_cache`` is on, and by prefix tuning, whose keys and values lie in one.
    """

    def __init__(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._forward = forward
        self._before = {id(x): _as_it_is_now(x) for x in (*args, *kwargs.values()) if _is_cache(x)}
        self._ran = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._ran:
            self._ran = True
            return self._forward(*args, **kwargs)
        return self._forward(*map(self._found, args), **{key: self._found(x) for key, x in kwargs.items()})

    def _found(self, value: Any) -> Any:
        return _as_it_is_now(self._before.get(id(value), value))


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and hasattr(value, "update") and not isinstance(value, type)


def _as_it_is_now(value: Any) -> Any:
    """A copy of a cache, of its parts and of what lists them; the tensors themselves are shared."""
    if isinstance(value, list):
        return [_as_it_is_now(part) for part in value]
    if isinstance(value, dict):
        return {key: _as_it_is_now(part) for key, part in value.items()}
    if not _is_cache(value):
        return value
    made = copy.copy(value)
    vars(made).update({key: _as_it_is_now(part) for key, part in vars(value).items()})
    return made


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
