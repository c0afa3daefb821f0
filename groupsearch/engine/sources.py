"""Functions of parameters alone, and how a per-example gradient is taken back from them to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from groupsearch.engine.entries import Entry
from groupsearch.engine.layers import Layer
from groupsearch.errors import UnsupportedModelError, is_out_of_memory

Arrive = Callable[[str, Callable[[], Entry]], None]


@dataclass(frozen=True)
class Source:
    """A leaf of a function of parameters: a bare parameter, or the output of a layer that saw no batch.

    Attributes:
        key: name of the site.
        entry: turns the per-example gradient (B, *leaf.shape) of the leaf into a book entry.
        layer: whose parameter it is, or whose output.
        parameter: canonical name, where the leaf is a parameter itself.
    """

    key: str
    leaf: Tensor
    entry: Callable[[Tensor], Entry]
    layer: Layer
    parameter: str | None = None


@dataclass(frozen=True)
class Tracked:
    """A tensor that is a function of sources alone."""

    tensor: Tensor
    sources: tuple[Source, ...]


class Sources:
    """The functions of parameters of one pass, by the identity of their tensor."""

    def __init__(self) -> None:
        self._tracked: dict[int, Tracked] = {}
        self._chaining = False

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self._tracked

    def __len__(self) -> int:
        return len(self._tracked)

    def __getitem__(self, tensor: Tensor) -> Tracked:
        return self._tracked[id(tensor)]

    def of(self, tensors: Sequence[Tensor]) -> list[Tracked]:
        """Those of some tensors that are functions of parameters."""
        return [self._tracked[id(t)] for t in tensors if id(t) in self._tracked]

    def begin(self, source: Source) -> None:
        """Track a leaf; a gradient that autograd gives it raises, unless :meth:`deliver` asked for it.

        Raises:
            UnsupportedModelError: in backward.
        """
        key = source.key  # and not the source in the hook: its leaf would keep itself alive
        layer = source.layer.name

        def stray(g: Tensor) -> None:
            if not self._chaining:
                raise UnsupportedModelError(
                    f"Parameter {key!r} reached the loss through an operation that cannot be followed example "
                    "by example (such as an autograd.Function of your own). Use it in elementwise operations, expand, "
                    "matrix products or a torch.nn layer of its own, or put what uses it into a module of the model "
                    "that takes and returns the batch first; use use_reentrant=False where activation checkpointing is "
                    "on, or freeze it with requires_grad_(False).",
                    layer,
                )

        source.leaf.register_hook(stray)
        self._tracked[id(source.leaf)] = Tracked(source.leaf, (source,))

    def add(self, tensor: Tensor, made_of: Sequence[Tracked]) -> None:
        """Track what was made of others."""
        sources = tuple({id(s): s for t in made_of for s in t.sources}.values())
        self._tracked[id(tensor)] = Tracked(tensor, sources)

    def clear(self) -> None:
        """Track nothing more."""
        self._tracked.clear()

    def deliver(self, tracked: Tracked, instance: Tensor, arrive: Arrive) -> None:
        """Take the per-example gradient (B, *shape) of a function of parameters back to each of them."""
        for source in tracked.sources:
            if source.leaf is tracked.tensor:
                arrive(source.key, partial(source.entry, instance))
                continue
            self._chaining = True
            try:
                chained = _chained(tracked.tensor, source.leaf, instance)
            finally:
                self._chaining = False
            arrive(source.key, partial(source.entry, chained))


def _chained(tensor: Tensor, leaf: Tensor, instance: Tensor) -> Tensor:
    """The gradient (B, *leaf.shape) of a leaf from that of a function of it (B, *tensor.shape)."""
    try:
        return torch.autograd.grad(tensor, leaf, instance, is_grads_batched=True, retain_graph=True)[0]
    except RuntimeError as error:  # an operation that knows no batches of gradients (sparse tensors)
        if is_out_of_memory(error):
            raise
        each = [torch.autograd.grad(tensor, leaf, g, retain_graph=True)[0] for g in instance]
        return torch.stack(each) if each else leaf.new_zeros(0, *leaf.shape)
