"""Parameters without a layer rule: their per-example gradients, operation by operation.

Until it meets the batch, a function of parameters alone is the same for all examples. At the
operation where it does, an elementwise one sees a copy expanded over the examples, whose
gradient *is* the per-example gradient; any other operation is differentiated example by
example through ``torch.func``. Both are then taken back to the parameter. Whatever reaches the
parameter by another way raises: nothing is left out in silence.

Whether a tensor's first dimension is the batch is not read from its size alone, for another
dimension may have that size. Every layer's output asks for gradients, so what asks for them comes
from the batch; what comes from it without gradients (ids, masks) is marked as it is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from groupsearch.engine.entries import Entry
from groupsearch.engine.taps import Saved, with_gradient
from groupsearch.errors import UnsupportedModelError

_ELEMENTWISE = {
    stem.format(name)
    for name in ("add", "sub", "mul", "div", "true_divide")
    for stem in ("{}", "{}_", "__{}__", "__r{}__", "__i{}__")
} | {"subtract", "multiply", "divide", "rsub", "__truediv__", "__rtruediv__", "__itruediv__", "pow", "__pow__"}
_EXPANDING = {"expand", "expand_as", "broadcast_to", "repeat", "tile"}
_FILLING = {f"{stem}{name}" for stem in ("", "new_") for name in ("zeros", "ones", "full", "empty")}
_CASTING = {"to", "type_as"}
_MARK = "_groupsearch_rows_of"


@dataclass(frozen=True)
class Source:
    """A leaf of a function of parameters: a bare parameter, or the output of a layer that saw no batch.

    Attributes:
        key: name of the site.
        entry: turns the per-example gradient (B, *leaf.shape) of the leaf into a book entry.
    """

    key: str
    leaf: Tensor
    entry: Callable[[Tensor], Entry]


@dataclass(frozen=True)
class Tracked:
    """A tensor that is a function of sources alone."""

    tensor: Tensor
    sources: tuple[Source, ...]


Arrive = Callable[[Source, Tensor], None]
T = TypeVar("T")


class Meeting(TorchFunctionMode):
    """Watches functions of bare parameters until they meet the batch.

    Args:
        batch_size: gives B of the pass that is under way.
        arrive: called in backward with a source and its per-example gradient (B, *shape).
    """

    def __init__(self, batch_size: Callable[[], int], arrive: Callable[[], Arrive]) -> None:
        super().__init__()
        self._batch_size = batch_size
        self._arrival = arrive
        self._tracked: dict[int, Tracked] = {}
        self._expanded: dict[tuple[int, int], Tensor] = {}
        self._chaining = False
        self._depth = 0

    def track(self, source: Source) -> Tensor:
        """Begin to watch a source; its leaf is what the model should use."""
        key = source.key  # and not the source in the hook: its leaf would keep itself alive

        def stray(g: Tensor) -> None:
            if not self._chaining:
                raise UnsupportedModelError(
                    f"Parameter {key!r} reached the loss through an operation that cannot be followed example "
                    "by example. Use it in elementwise operations, expand, matrix products or a torch.nn layer of its "
                    "own, or freeze it with requires_grad_(False)."
                )

        source.leaf.register_hook(stray)
        self._tracked[id(source.leaf)] = Tracked(source.leaf, (source,))
        return source.leaf

    def is_tracked(self, tensor: object) -> bool:
        """Whether a tensor is a function of parameters alone."""
        return id(tensor) in self._tracked

    @property
    def watching(self) -> bool:
        """Whether operations are watched now."""
        return self._depth > 0

    def enter(self) -> None:
        """Watch operations until :meth:`leave` was called as often."""
        if not self._depth:
            self.__enter__()
        self._depth += 1

    def leave(self) -> None:
        """Undo one :meth:`enter`."""
        self._depth -= 1
        if not self._depth:
            self.__exit__(None, None, None)

    def during(self, work: Callable[[], T]) -> T:
        """Watch while backward does some work: a checkpointed block may run again in it, as it ran before."""
        self.enter()
        try:
            return work()
        finally:
            self.leave()

    def forget(self) -> None:
        """Stop watching: the pass is over. Until then a recomputation may need to know."""
        self._tracked.clear()
        self._expanded.clear()

    def mark(self, value: Any) -> None:
        """Note that tensors come from the batch although they ask for no gradients."""
        size = self._batch_size()
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, Tensor) and not part.requires_grad and part.dim() and part.shape[0] == size:
                setattr(part, _MARK, size)

    def from_batch(self, tensor: Tensor) -> bool:
        """Whether a tensor comes from the batch (and is no function of parameters alone)."""
        return (tensor.requires_grad or hasattr(tensor, _MARK)) and id(tensor) not in self._tracked

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._tracked and any(id(t) in self._tracked for t in _tensors(args, kwargs)):
            return self._follow(func, args, kwargs)
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        # most results ask for gradients or are no tensors, and need no mark
        if name == "__get__" or (isinstance(out, Tensor) and out.requires_grad):
            return out
        # a tensor cast like another one, or expanded to its size, takes no values from it
        tensors = _tensors(args, kwargs)
        deciding = tensors[:1] if name in _CASTING else tensors
        if name in _FILLING or name in _EXPANDING or any(self.from_batch(t) for t in deciding):
            self.mark(out)
        return out

    def _is_row(self, value: Any) -> bool:
        rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self._batch_size()
        return rows and self.from_batch(value)

    def _follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        tensors = _tensors(args, kwargs)
        tracked = [self._tracked[id(t)] for t in tensors if id(t) in self._tracked]
        rank = max(t.dim() for t in tensors)
        rows = [t for t in tensors if self._is_row(t)]
        name = getattr(func, "__name__", "")
        if name in _ELEMENTWISE and any(t.dim() == rank for t in rows):
            swap = {id(t.tensor): self._expand(t, rank) for t in tracked}
            args, kwargs = pytree.tree_map(lambda x: swap.get(id(x), x), (tuple(args), dict(kwargs)))
            return func(*args, **kwargs)
        if any(self.from_batch(t) for t in tensors):
            return self._function_site(func, args, kwargs)
        with saved_tensors_hooks(_as_it_is, _as_it_is):  # small, and not to be recomputed by activation checkpointing
            out = func(*args, **kwargs)
        sources = tuple({id(s): s for t in tracked for s in t.sources}.values())
        if name in _EXPANDING and out.shape[0] == self._batch_size() and _leads_free(tracked[0].tensor, out.dim()):
            return self._meet(tracked[0], out.detach())
        for part in pytree.tree_leaves(out):
            if isinstance(part, Tensor) and part.requires_grad:
                self._tracked[id(part)] = Tracked(part, sources)
        return out

    def _expand(self, tracked: Tracked, rank: int) -> Tensor:
        key = (id(tracked.tensor), rank)
        if key not in self._expanded:
            tensor = tracked.tensor.detach()
            if not _leads_free(tensor, rank):
                raise UnsupportedModelError(
                    f"Parameter {tracked.sources[0].key!r} of shape {tuple(tensor.shape)} meets the batch in its first "
                    "dimension, so that each example has a parameter of its own. Give it a first dimension of 1."
                )
            aligned = tensor.reshape(*[1] * (rank - tensor.dim()), *tensor.shape)
            self._expanded[key] = self._meet(tracked, aligned.expand(self._batch_size(), *aligned.shape[1:]))
        return self._expanded[key]

    def _meet(self, tracked: Tracked, expanded: Tensor) -> Tensor:
        shape, arrive = tracked.tensor.shape, self._arrival()
        return with_gradient(expanded, lambda g: self._arrive(tracked, _sum_to(g, shape), arrive))

    def _function_site(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        size, arrive = self._batch_size(), self._arrival()
        shared = [i for i, x in enumerate(leaves) if id(x) in self._tracked]
        tracked = [self._tracked[id(leaves[i])] for i in shared]
        rows = [i for i, x in enumerate(leaves) if self._is_row(x)]
        for i in shared:
            leaves[i] = leaves[i].detach()
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        out = func(*args, **kwargs)
        folded = any(isinstance(x, Tensor) and self.from_batch(x) and not self._is_row(x) for x in leaves)
        if folded or not isinstance(out, Tensor) or not out.dim() or out.shape[0] != size:
            raise UnsupportedModelError(
                f"Parameter {tracked[0].sources[0].key!r} meets the batch in {getattr(func, '__name__', func)!r}, "
                f"where its operands or its result do not lead with the batch of {size} examples. Use a torch.nn layer "
                "that does, batch first, or freeze the parameter with requires_grad_(False)."
            )
        saved = Saved(tuple(leaves[i] for i in rows))
        constants = [None if i in rows else x for i, x in enumerate(leaves)]

        def pull(g: Tensor) -> None:
            xs = self.during(saved.take)

            def example(g_i: Tensor, *xs_i: Tensor) -> Any:
                def value(*parameters: Tensor) -> Any:
                    filled = list(constants)
                    for i, x in (
                        *zip(shared, parameters, strict=True),
                        *zip(rows, [x[None] for x in xs_i], strict=True),
                    ):
                        filled[i] = x
                    call_args, call_kwargs = pytree.tree_unflatten(filled, spec)
                    return func(*call_args, **call_kwargs)

                return torch.func.vjp(value, *[t.tensor.detach() for t in tracked])[1](g_i[None])

            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                instances = torch.func.vmap(example)(g, *[x.detach() for x in xs])
            for t, instance in zip(tracked, instances, strict=True):
                self._arrive(t, instance, arrive)

        return with_gradient(out, pull)

    def _arrive(self, tracked: Tracked, instance: Tensor, arrive: Arrive) -> None:
        for source in tracked.sources:
            if source.leaf is tracked.tensor:
                arrive(source, instance)
                continue
            self._chaining = True
            try:
                (chained,) = torch.autograd.grad(
                    tracked.tensor, source.leaf, instance, is_grads_batched=True, retain_graph=True
                )
            finally:
                self._chaining = False
            arrive(source, chained)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _leads_free(tensor: Tensor, rank: int) -> bool:
    return tensor.dim() < rank or (tensor.dim() == rank and tensor.shape[0] == 1)


def _sum_to(g: Tensor, shape: torch.Size) -> Tensor:
    """Gradient (B, ...) of an expansion, summed to (B, *shape)."""
    aligned = [1] * (g.dim() - len(shape)) + list(shape)
    dims = [i for i in range(1, g.dim()) if aligned[i] == 1 and g.shape[i] != 1]
    return (g.sum(dims) if dims else g).reshape(g.shape[0], *shape)


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    found = []
    for arg in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, list | tuple):
            found.extend(x for x in arg if isinstance(x, Tensor))
    return found
