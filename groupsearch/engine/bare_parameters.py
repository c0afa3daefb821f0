"""Parameters without a layer rule, or used outside of their layer: per-example gradients, operation by operation.

Until it meets the batch, a function of parameters alone is the same for all examples. At the
operation where it does, an elementwise one sees a copy expanded over the examples, whose
gradient *is* the per-example gradient; any other operation is differentiated example by
example through ``torch.func``. Both are then taken back to the parameter. Whatever reaches the
parameter by another way raises: nothing is left out in silence.

Whether a tensor keeps the examples where the layer that is running keeps them is not read from
its size alone, for another dimension may have that size. Every layer's output asks for gradients,
so what asks for them comes from the batch; what comes from it without gradients (ids, masks) is
marked as it is made.

Apart from the capture, as what is followed here needs no layer at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from groupsearch.engine.layers import Layer, Matrix, linear_operands, matrix_entry
from groupsearch.engine.layout import Expansions
from groupsearch.engine.passes import Pass
from groupsearch.engine.substitutes import SUBSTITUTES, Arrive, Source, Sources, Tracked
from groupsearch.engine.taps import Autocast, Take, with_gradient
from groupsearch.errors import UnsupportedModelError, is_out_of_memory
from groupsearch.options import EngineOptions

_ELEMENTWISE = {
    stem.format(name)
    for name in ("add", "sub", "mul", "div", "true_divide")
    for stem in ("{}", "{}_", "__{}__", "__r{}__", "__i{}__")
} | {"subtract", "multiply", "divide", "rsub", "__truediv__", "__rtruediv__", "__itruediv__", "pow", "__pow__"}
_EXPANDING = {"expand", "expand_as", "broadcast_to", "repeat", "tile"}
_FILLING = {f"{stem}{name}" for stem in ("", "new_") for name in ("zeros", "ones", "full", "empty")}
_CASTING = {"to", "type_as"}
_COPYING = _CASTING | {"contiguous", "clone", "detach", "long", "int", "bool", "float", "double", "half", "bfloat16"}
_PUTTING = {f"index_{stem}{end}" for stem in ("put", "add", "copy") for end in ("", "_")} | {
    "scatter",
    "scatter_",
    "__setitem__",
}
_MARK = "_groupsearch_rows_of"
_FILLED = "_groupsearch_filled"
ANY = ("first", "folded", "second")


T = TypeVar("T")


class Meeting(TorchFunctionMode):
    """Watches functions of bare parameters until they meet the batch.

    Args:
        running: gives the pass that is under way.
        arrive: gives what is called in backward with the key of a site and a maker of its book entry.
        options: decides the norm method of matrix sites.
        expansions: tells which expansions of parameters are over the examples; by their size if not given.
    """

    def __init__(
        self,
        running: Callable[[], Pass],
        arrive: Callable[[], Arrive],
        options: EngineOptions | None = None,
        expansions: Expansions | None = None,
    ) -> None:
        super().__init__()
        self.running = running
        self.arrival = arrive
        self.options = options or EngineOptions()
        self.expansions = expansions or Expansions({})
        self._tracked = Sources()
        self._expanded: dict[tuple[int, int, int], Tensor] = {}
        self._given: dict[tuple[str, tuple[torch.Size, ...]], list[tuple[str, ...]]] = {}
        self._running: list[Layer] = []
        self._seen_as: str | None = None
        self._depth = 0

    def track(self, source: Source) -> Tensor:
        """Begin to watch a source; its leaf is what the model should use."""
        self._tracked.begin(source)
        return source.leaf

    def is_tracked(self, tensor: object) -> bool:
        """Whether a tensor is a function of parameters alone."""
        return tensor in self._tracked

    @property
    def watching(self) -> bool:
        """Whether operations are watched now."""
        return self._depth > 0

    @property
    def layer(self) -> Layer | None:
        """The layer without a rule that is running."""
        return self._running[-1] if self._running else None

    def enter(self, layer: Layer | None = None) -> None:
        """Watch operations, those of a layer if it is given, until :meth:`leave` was called as often."""
        if not self._depth:
            self.__enter__()
        self._depth += 1
        if layer is not None:
            self._running.append(layer)

    def leave(self, layer: Layer | None = None) -> None:
        """Undo one :meth:`enter`."""
        self._depth -= 1
        if layer is not None and layer in self._running:
            self._running.remove(layer)
        if not self._depth:
            self._running.clear()
            self.__exit__(None, None, None)

    @contextmanager
    def seeing(self, layout: str, *tensors: Tensor) -> Iterator[None]:
        """For a while parameters meet examples in this layout, which these tensors are known to have."""
        for tensor in tensors:
            if not tensor.requires_grad:
                self.mark(tensor, (layout,))
        before, self._seen_as = self._seen_as, layout
        try:
            yield
        finally:
            self._seen_as = before

    def apply(self, func: Callable[..., Any], *args: Any) -> Any:
        """An operation, followed if it uses something that is watched."""
        return self._follow(func, args, {}) if any(self.is_tracked(t) for t in args) else func(*args)

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
        self._given.clear()
        self.expansions.forget()

    def mark(self, value: Any, layouts: tuple[str, ...] = ("first",)) -> None:
        """Note that tensors come from the batch, in one of these layouts, although they ask for no gradients."""
        source = self.running()
        for part in value if isinstance(value, list | tuple) else (value,):
            if (
                isinstance(part, Tensor)
                and not part.requires_grad
                and any(source.rows_of(part, layout) is not None for layout in layouts)
            ):
                setattr(part, _MARK, tuple(x for x in layouts if source.rows_of(part, x) is not None))

    def given(self, layer: Layer, value: Any, again: bool) -> None:
        """Note what a layer is given; ``again``, in a recomputation, mark it as it was marked then.

        What a checkpointed block is given anew, and makes of it between its layers, bears no marks.
        """
        tensors = [part for part in pytree.tree_leaves(value) if isinstance(part, Tensor)]
        key = layer.name, tuple(tensor.shape for tensor in tensors)  # a layer may be given constants, too
        if again:
            for tensor, layouts in zip(tensors, self._given.get(key, ()), strict=False):
                if layouts and tensor not in self._tracked:
                    self.mark(tensor, layouts)
            return
        marks: list[tuple[str, ...]] = [getattr(tensor, _MARK, ()) for tensor in tensors]
        if self._given.setdefault(key, marks) != marks:
            self._given[key] = []

    def from_batch(self, tensor: Tensor) -> bool:
        """Whether a tensor comes from the batch (and is no function of parameters alone)."""
        return (tensor.requires_grad or hasattr(tensor, _MARK)) and tensor not in self._tracked

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in SUBSTITUTES and self._running and any(self.from_batch(t) for t in _tensors(args, kwargs)):
            return SUBSTITUTES[func](self, *args, **kwargs)
        used = self._tracked and torch.is_grad_enabled()  # without, nothing can be asked of it
        if used and any(t in self._tracked for t in _tensors(args, kwargs)):
            return self._follow(func, args, kwargs)
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        # most results ask for gradients or are no tensors (but x.mT is), and need no mark
        if out.requires_grad if isinstance(out, Tensor) else name == "__get__":
            return out
        # a tensor cast like another one, or expanded to its size, takes no values from it
        tensors = _tensors(args, kwargs)
        deciding = tensors[:1] if name in _CASTING else tensors
        if any(self.from_batch(t) for t in deciding):
            self.mark(out, self._kept(name, args))
        elif name in _FILLING or name in _EXPANDING:
            along = name in _EXPANDING and isinstance(args[0], Tensor) and args[0].shape[1:2] == (1,)
            self.mark(out, (*self._filled(), "second") if along else self._filled())
        if name in _FILLING or self._is_made_of_filled(out, tensors):
            setattr(out, _FILLED, True)
        return out

    def _is_made_of_filled(self, out: Any, tensors: Sequence[Tensor]) -> bool:
        """Whether the values of a result come from no tensor but filled ones."""
        if not isinstance(out, Tensor) or not any(hasattr(t, _FILLED) for t in tensors):
            return False
        return not any(self.from_batch(t) and not hasattr(t, _FILLED) for t in tensors)

    def _filled(self) -> tuple[str, ...]:
        """The layouts of what is made for as many examples, or rows of them, as the model was called with."""
        return ("first",) if self.running().rows.count == 1 else ("first", "folded")

    def _kept(self, name: str, args: Sequence[Any]) -> tuple[str, ...]:
        """The layouts that the result of an operation on something of the batch may have."""
        had: tuple[str, ...] = getattr(args[0], _MARK, ANY) if args else ANY
        if name == "__getitem__" and _takes_part(args[1]):  # of the first dimension: no longer the examples
            return tuple(layout for layout in had if layout == "second")
        return had if name in _COPYING else ANY

    def _layout(self, tracked: Tracked) -> str:
        """Where a function of parameters will meet the examples: where the layer of the first one keeps them."""
        return self._seen_as or tracked.sources[0].layer.layout

    def _is_row(self, value: Any, layout: str) -> bool:
        rows = isinstance(value, Tensor) and self.running().rows_of(value, layout) is not None
        return rows and self.from_batch(value)

    def _follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        tensors = _tensors(args, kwargs)
        tracked, name = self._tracked.of(tensors), getattr(func, "__name__", "")
        if name in _PUTTING and self._is_constant(name, args, tensors):
            delattr(args[0], _MARK)
        rank, layout = max(t.dim() for t in tensors), self._layout(tracked[0])
        rows = [t for t in tensors if self._is_row(t, layout)]
        from_batch = [t for t in tensors if self.from_batch(t)]
        if rows and all(hasattr(t, _FILLED) for t in from_batch) and not self._is_over(tracked, rows[0], layout, True):
            rows = from_batch = []
        if name in _ELEMENTWISE and any(t.dim() == rank for t in rows):
            longest = max(t.shape[0] for t in rows if t.dim() == rank)
            swap = {id(t.tensor): self._expand(t, layout, rank, longest) for t in tracked}
            args, kwargs = pytree.tree_map(lambda x: swap.get(id(x), x), (tuple(args), dict(kwargs)))
            return func(*args, **kwargs)
        if name == "__setitem__" and self._sets_rows(layout, *args):
            return self._set_rows(func, layout, *args)
        if from_batch:
            if func is functional.linear and self._is_matrix_site(layout, *args, **kwargs):
                return self._matrix_site(layout, *args, **kwargs)
            if name == "__setitem__" and self._is_row(args[0], layout) and args[2] in self._tracked:
                return self._write(args[0], args[1], self._tracked[args[2]], layout)
            return self._function_site(func, args, kwargs, layout)
        for filled in (t for t in tensors if hasattr(t, _FILLED) and not rows):
            self._is_over(tracked, filled, layout, False)
        with saved_tensors_hooks(Tensor.detach, _as_it_is):  # small, and nothing for checkpointing to make again
            out = func(*args, **kwargs)
        if name in _EXPANDING and self._expands(tracked[0], out, layout):
            return self._meet(tracked[0], out.detach(), layout)
        for part in pytree.tree_leaves((out, args[0]) if _writes(name) else out):
            if isinstance(part, Tensor) and part.requires_grad:
                self._tracked.add(part, tracked)
        return out

    def _write(self, rows: Tensor, index: Any, value: Tracked, layout: str) -> None:
        """``rows[index] = value`` of a function of parameters: every example is written a copy of its own."""
        shape = value.tensor.shape
        if layout == "second" or len(shape) > rows.dim() - _indexed(index, rows.dim()):
            raise UnsupportedModelError(
                f"Parameter {value.sources[0].key!r} of shape {tuple(shape)} is written into a part of a tensor of "
                f"shape {tuple(rows.shape)} in a way that is not followed. Use torch.where or torch.cat, batch first, "
                "or freeze the parameter with requires_grad_(False).",
                value.sources[0].layer.name,
            )
        copies = self._expand(value, layout, rows.dim(), rows.shape[0])
        rows[index] = copies.expand(rows.shape)[index]

    def _is_constant(self, name: str, args: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
        """Whether what parameters are put into was filled with one number, and only its size made it look like rows."""
        if not (hasattr(args[0], _FILLED) and hasattr(args[0], _MARK)) or any(map(self.from_batch, tensors[1:])):
            return False
        return name != "__setitem__" or args[2].dim() > args[0].dim() - _indexed(args[1], args[0].dim())

    def _expands(self, tracked: Tracked, out: Tensor, layout: str) -> bool:
        """Whether an expansion gave every example its own copy."""
        tensor = tracked.tensor
        if layout == "second":
            free = tensor.dim() < out.dim() - 1 or (tensor.dim() == out.dim() and tensor.shape[1] == 1)
        else:
            free = _leads_free(tensor, out.dim())
        fits = self.running().rows_of(out, layout) is not None
        return free and bool(out.dim()) and self._is_over([tracked], out, layout, fits)

    def _is_over(self, tracked: Sequence[Tracked], out: Tensor, layout: str, fits: bool) -> bool:
        """Whether what functions of parameters are expanded to, or filled tensors that they meet, are the examples."""
        keys = [source.key for t in tracked for source in t.sources]
        size = out.shape[1 if layout == "second" else 0] if out.dim() > (layout == "second") else 1
        return self.expansions.over_examples(keys, out.dim(), size, fits)

    def _expand(self, tracked: Tracked, layout: str, rank: int, longest: int) -> Tensor:
        source = self.running()
        size = source.batch_size
        key = (id(tracked.tensor), rank, longest)
        if key in self._expanded:
            return self._expanded[key]
        tensor = tracked.tensor.detach()
        aligned = tensor.reshape(*[1] * (rank - tensor.dim()), *tensor.shape)
        second = layout == "second"
        if aligned.shape[1 if second else 0] != 1:
            raise UnsupportedModelError(
                f"Parameter {tracked.sources[0].key!r} of shape {tuple(tensor.shape)} meets the batch in its "
                f"{'second' if second else 'first'} dimension, so that each example has a parameter of its own. Give "
                "it a size of 1 there.",
                tracked.sources[0].layer.name,
            )
        if second:
            second_size = size * source.rows.count
            met = self._meet(tracked, aligned.expand(aligned.shape[0], second_size, *aligned.shape[2:]), layout)
        elif longest == size or rank < 1:
            met = self._meet(tracked, aligned.expand(size, *aligned.shape[1:]), layout)
        else:  # rows folded with the examples: each row sees a copy
            rows = aligned.expand(size, longest // size, *aligned.shape[1:]).flatten(0, 1)
            met = self._meet(tracked, rows, layout)
        self._expanded[key] = met
        return met

    def _meet(self, tracked: Tracked, expanded: Tensor, layout: str) -> Tensor:
        shape, arrive, source = tracked.tensor.shape, self.arrival(), self.running()

        def pull(g: Tensor, take: Take) -> None:
            self._tracked.deliver(tracked, _sum_to(_split(source, layout, g), shape), arrive)

        return with_gradient(source, expanded, pull)

    def _sets_rows(self, layout: str, x: Any, index: Any, value: Any) -> bool:
        """Whether a function of parameters is put where a mask of the batch says (a mask embedding)."""
        masks = isinstance(index, Tensor) and index.dtype == torch.bool and index.shape == x.shape[: index.dim()]
        return bool(masks) and value in self._tracked and self._is_row(x, layout)

    def _set_rows(self, func: Any, layout: str, x: Tensor, index: Tensor, value: Tensor) -> Any:
        met = self._expand(self._tracked[value], layout, x.dim(), x.shape[0])
        return func(x, index, met.expand_as(x)[index])

    def _is_matrix_site(self, layout: str, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        asking = [x for x in (weight, bias) if x is not None and x.requires_grad]
        own = self._tracked.of(asking)  # others would lose their gradient
        return (
            self._is_row(input, layout)
            and len(own) == len(asking)
            and all(x.sources[0].leaf is x.tensor and x.sources[0].parameter is not None for x in own)
        )

    def _matrix_site(self, layout: str, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``functional.linear`` with parameters as weight and bias, of an input that keeps the examples."""
        source, arrive, options = self.running(), self.arrival(), self.options
        by_weight, by_bias = (
            self._tracked[x].sources[0] if x is not None and x in self._tracked else None for x in (weight, bias)
        )
        out = functional.linear(input, weight.detach(), None if bias is None else bias.detach())
        matrix = (
            Matrix(by_weight.parameter or "", by_bias.parameter if by_bias else None, weight.shape)
            if by_weight
            else None
        )

        def pull(g: Tensor, take: Take) -> None:
            g = source.by_example(g, layout)
            if matrix is not None and by_weight is not None:
                x = source.by_example(self.during(take)[0], layout)
                arrive(by_weight.key, lambda: matrix_entry(matrix, x, g, linear_operands, options))
            elif by_bias is not None:
                arrive(by_bias.key, lambda: by_bias.entry(g.flatten(1, -2).sum(1) if g.dim() > 2 else g))

        return with_gradient(source, out, pull, (input,) if matrix else ()) if by_weight or by_bias else out

    def _function_site(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], layout: str) -> Any:
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        source, arrive = self.running(), self.arrival()
        shared = [i for i, x in enumerate(leaves) if x in self._tracked]
        tracked = [self._tracked[leaves[i]] for i in shared]
        rows = [i for i, x in enumerate(leaves) if self._is_row(x, layout)]
        for i in shared:
            leaves[i] = leaves[i].detach()
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        out = func(*args, **kwargs)
        left = any(isinstance(x, Tensor) and self.from_batch(x) and not self._is_row(x, layout) for x in leaves)
        if left or not isinstance(out, Tensor) or source.rows_of(out, layout) is None:
            raise UnsupportedModelError(
                f"Parameter {tracked[0].sources[0].key!r} meets the batch in {getattr(func, '__name__', func)!r}, "
                "where its operands or its result do not lead with the examples of the batch. Use a "
                "torch.nn layer that does, batch first, or freeze the parameter with requires_grad_(False).",
                tracked[0].sources[0].layer.name,
            )
        saved, autocast = tuple(leaves[i] for i in rows), Autocast.now(out.device.type)
        constants = [None if i in rows else x for i, x in enumerate(leaves)]

        def pull(g: Tensor, take: Take) -> None:
            xs = self.during(take)

            def example(g_i: Tensor, *xs_i: Tensor) -> Any:
                def value(*parameters: Tensor) -> Any:
                    filled = list(constants)
                    for i, x in (*zip(shared, parameters, strict=True), *zip(rows, xs_i, strict=True)):
                        filled[i] = x
                    call_args, call_kwargs = pytree.tree_unflatten(filled, spec)
                    return func(*call_args, **call_kwargs)

                return torch.func.vjp(value, *[t.tensor.detach() for t in tracked])[1](g_i)

            with warnings.catch_warnings(), _one_by_one(tracked[0].sources[0]), autocast.again():
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                instances = _of_each(example, [_split(source, layout, x.detach()) for x in (g, *xs)])
            for t, instance in zip(tracked, instances, strict=True):
                self._tracked.deliver(t, instance, arrive)

        return with_gradient(source, out, pull, saved)


def _of_each(example: Callable[..., tuple[Tensor, ...]], rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results of a function of every example's rows, stacked."""
    try:
        return torch.func.vmap(example)(*rows)
    except RuntimeError as error:  # an operation that vmap does not know
        if is_out_of_memory(error):
            raise
        return tuple(torch.stack(found) for found in zip(*[example(*x) for x in zip(*rows, strict=True)], strict=True))


@contextmanager
def _one_by_one(source: Source) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"Parameter {source.key!r} meets the batch in an operation that does not run on one example alone: {error}",
            source.layer.name,
        ) from error


def _writes(name: str) -> bool:
    """Whether an operation changes its first operand."""
    return name == "__setitem__" or (name.endswith("_") and not name.startswith("__"))


def _takes_part(index: Any) -> bool:
    """Whether an index takes a part of the first dimension, by numbers that stand in the program."""
    first = index[0] if isinstance(index, tuple) and index else index
    return isinstance(first, int) or (isinstance(first, slice) and first != slice(None))


def _indexed(index: Any, rank: int) -> int:
    """How many leading dimensions an index speaks of; all where it speaks of the last ones."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(part is Ellipsis or part is None for part in parts):
        return rank
    return sum(x.dim() if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) else 1 for x in parts)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _split(source: Pass, layout: str, tensor: Tensor) -> Tensor:
    """A tensor in a layout as (B, rows of an example, ...), for ``second`` as (B, T, rows of an example, ...)."""
    if layout != "second":
        return source.by_example(tensor, "folded")
    split = source.by_example(tensor, "second")
    return split.unsqueeze(2) if source.rows.count == 1 else split.transpose(1, 2)


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
