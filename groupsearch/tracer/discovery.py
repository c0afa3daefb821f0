"""Where each layer keeps the examples of a batch: found by running two and three of them.

A dimension that grows with the number of examples is theirs. A layer whose rows grow in no fixed
proportion, or are regrouped, has lost them (tokens routed to experts), and the smallest module
around it that has not is then differentiated as one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from groupsearch.engine.layers import Layer
from groupsearch.engine.layout import ONE_ROW
from groupsearch.engine.ownership import owned_layers
from groupsearch.engine.substitutes import SUBSTITUTED
from groupsearch.errors import UnsupportedModelError, is_out_of_memory
from groupsearch.plan.trace import Rows
from groupsearch.tracer.fake import NEEDS_VALUES
from groupsearch.workloads.batches import count_examples, first_examples

# -- Rows that values chose: ``x[mask]``, ``x[order]``, and what is made of them until they are put back
#
# How many there are, and whose, is another matter in every batch; that they are as many as the examples says nothing.

ORDERING = {"sort", "argsort", "msort", "topk", "randperm"}
CHOOSING = {"nonzero", "nonzero_static", "argwhere", "masked_select", "unique", "unique_consecutive"}
_PUTTING = ("__setitem__", "index_put", "index_add", "index_copy", "index_fill", "scatter", "masked_scatter", "copy_")
_PICKING = {"__getitem__", "index_select", "take", "take_along_dim", "gather", "index"}
_TURNING = {"flip", "roll"}
_BATCH = "_groupsearch_of_the_batch"
_ROWS = "_groupsearch_chosen_rows"
_NUMBERS = "_groupsearch_row_numbers"


def note_chosen(func: Any, args: Any, kwargs: Any, out: Any) -> None:
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


def begin_choosing(value: Any) -> None:
    """Mark what the model is given."""
    _mark(_BATCH, _tensors(value))


def forget_chosen(value: Any) -> None:
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


# -- Which layers' parameters a model uses outside of the layers' own forward ----------------------


class Owners:
    """Tells of an operation whose parameters it is given."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._names: dict[int, list[str]] = {}
        for layer in layers:
            for local in layer.trainable:
                self._names.setdefault(id(layer.module.get_parameter(local)), []).append(layer.name)

    def outside(self, func: Any, arguments: tuple[Any, Any], running: Collection[str]) -> set[str]:
        """Layers that own an operand while none of its owners is among the modules that run.

        What is only asked for its shape or dtype, or used without gradients, is not used.
        """
        if getattr(func, "__name__", "") == "__get__" or not torch.is_grad_enabled():
            return set()
        found = [self._names[id(x)] for x in pytree.tree_leaves(arguments) if id(x) in self._names]
        return {names[0] for names in found if not set(names).intersection(running)}


# -- discovery -------------------------------------------------------------------------------------

Loss = Callable[[nn.Module, Any], Tensor]
Shapes = tuple[tuple[int, ...], ...]
_SORTING = {"sort", "argsort", "msort"}
_REPEATING = {"repeat", "tile"}


@dataclass(frozen=True)
class Seen:
    """One call of a module: shapes of the tensors that went in and came out."""

    inputs: Shapes
    outputs: Shapes


@dataclass
class Usage:
    """What two runs, of two and of three examples, did with every module.

    Attributes:
        layouts: of the layers that own trainable parameters, by name.
        keeping: modules that are given and return whole examples, batch first.
        rows: how the model is called with the examples; several of one example are taken to lie side by side.
        outside: layers with parameters that an operation outside of their own forward was given.
        lent: those whose parameters are to be followed there, too.
    """

    layouts: dict[str, str]
    keeping: frozenset[str]
    rows: Rows = ONE_ROW
    outside: frozenset[str] = frozenset()
    lent: frozenset[str] = frozenset()

    @property
    def orders(self) -> tuple[Rows, ...]:
        """What sizes leave open: rows of one example may lie side by side or apart."""
        return (self.rows,) if self.rows.count == 1 else (self.rows, replace(self.rows, apart=True))

    def is_inside_whole(self, layer: str) -> bool:
        """Whether a layer is, or lies in, a module that is differentiated as one."""
        whole = [name for name, layout in self.layouts.items() if layout == "whole"]
        return any(not name or (layer + ".").startswith(name + ".") for name in whole)

    def lend(self, *layers: str) -> bool:
        """Have these layers' parameters, and all used outside, followed there; False where they are already."""
        before, self.lent = self.lent, self.lent.union(self.outside, layers)
        return self.lent != before

    def make_whole(self, layer: str) -> bool:
        """Have the smallest module around a layer differentiated as one; False where there is none but the model."""
        name = layer
        while name and (name not in self.keeping or self.layouts.get(name) == "whole"):
            name = name.rpartition(".")[0]
        if name:
            self.layouts[name] = "whole"
        return bool(name)


def find_layouts(model: nn.Module, batch: Any, loss: Loss) -> Usage:
    """Run a model on two and on three examples of a batch of at least three and see where its layers keep them.

    Raises:
        UnsupportedModelError: when a layer has lost the examples and nothing around it keeps them, or
            when the model's path depends on values that fake tensors do not have.
    """
    layers = owned_layers(model)
    runs = [_watched_run(model, layers, first_examples(batch, examples), loss) for examples in (2, 3)]
    two, three = runs
    regrouping = two.regrouping | three.regrouping
    calls = {name: _paired(two.calls.get(name, []), three.calls.get(name, [])) for name, _ in model.named_modules()}
    partial = two.partial | three.partial
    keeping = frozenset(
        name for name, pairs in calls.items() if pairs and all(map(_keeps, pairs)) and name not in partial
    )
    passes = two.passes if two.passes == three.passes else 1
    rows = replace(_rows(calls[""]), calls=max(passes, 1))
    usage = Usage({}, keeping, rows, two.outside | three.outside)
    if "" in keeping and any(_is_the_models_own(layer.name, partial, keeping) for layer in layers):
        usage.layouts[""] = "whole"
    for layer in layers:
        if isinstance(layer.module, SUBSTITUTED) or usage.is_inside_whole(layer.name):
            continue  # knows by itself, or is taken care of
        around = [name for name in regrouping if (layer.name + ".").startswith(name + ".")]
        layout = "mixed" if around or layer.name in partial else _layout_around(layer.name, calls)
        if layout == "mixed" and not usage.make_whole(min((*around, layer.name), key=len)):
            where = (
                f"layer {layer.name!r}"
                if layer.name
                else f"the model itself, which holds {', '.join(layer.trainable)},"
            )
            raise UnsupportedModelError(
                f"In {where} no dimension belongs to the examples of the batch, and no module around it "
                "but the model itself takes and returns them batch first. Put it into a module of its own that does, "
                "or freeze it with requires_grad_(False)."
            )
        if layout not in ("mixed", "first"):
            usage.layouts[layer.name] = layout
    return usage


def _is_the_models_own(layer: str, partial: Collection[str], keeping: Collection[str]) -> bool:
    """Whether a layer sees rows that values chose, and nothing but the model itself has whole examples around it."""
    around = [name for name in keeping if name and (layer + ".").startswith(name + ".")]
    return layer in partial and not around


def _watched_run(model: nn.Module, layers: Sequence[Layer], examples: Any, loss: Loss) -> _Watch:
    watch = _Watch(model, layers, count_examples(examples))
    try:
        with watch:
            loss(model, examples)
    except NEEDS_VALUES:
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"A step on {count_examples(examples)} examples failed: {error}. Make the model and the loss run on "
            "batches of any size."
        ) from error
    return watch


Pairs = Sequence[tuple[Seen, Seen]] | None


def _paired(two: list[Seen], three: list[Seen]) -> Pairs:
    return list(zip(two, three, strict=True)) if len(two) == len(three) else None


def _grown(two: tuple[int, ...], three: tuple[int, ...]) -> str:
    """The layout of a tensor with these shapes for two and three examples; ``none`` where they are equal."""
    if two == three:
        return "none"
    if len(two) == len(three):
        if two[1:] == three[1:] and 3 * two[0] == 2 * three[0]:
            return "first" if two[0] == 2 else "folded"
        if two[0] == three[0] and two[2:] == three[2:] and (two[1], three[1]) == (2, 3):
            return "second"
    return "mixed"


def _layout(pairs: Pairs) -> str:
    if pairs is None:
        return "mixed"
    each = [_grown(*shapes) for two, three in pairs for shapes in zip(two.outputs, three.outputs, strict=False)]
    found = [layout for layout in each if layout != "none"]
    if not found or "mixed" in found:
        return "mixed" if found else "none"
    if set(found) <= {"first", "folded"}:
        return "folded" if "folded" in found else "first"
    return found[0]  # what a module returns in several layouts, it works on in that of the first


def _layout_around(name: str, calls: Mapping[str, Pairs]) -> str:
    """The layout of a module, or of the module nearest around it that sees examples."""
    while True:
        layout = _layout(calls[name])
        if layout != "none" or not name:
            return "first" if layout == "none" else layout
        name = name.rpartition(".")[0]


def _rows(pairs: Pairs) -> Rows:
    """How the calls of the model tell the number of examples: by the first tensor that grows with it.

    Raises:
        UnsupportedModelError: when none does, or two calls tell it in different ways.
    """
    found = dict.fromkeys(map(_rows_of_call, pairs or ()))
    if len(found) == 1 and None not in found:
        return next(rows for rows in found if rows is not None)
    said = "no tensor grows in proportion to the examples of the batch" if None in found else "calls differ in that"
    raise UnsupportedModelError(
        "Which rows of the model's inputs belong to one example cannot be told"
        + (f": {said}. " if found else ": the loss does not call the model itself. ")
        + "Call the model with tensors that hold the same number of rows for every example, each time it is called, "
        "in their first (or second) dimension."
    )


def _rows_of_call(pair: tuple[Seen, Seen]) -> Rows | None:
    shapes = [(two, three) for two, three in zip(pair[0].inputs, pair[1].inputs, strict=False) if two]
    for leaf, (two, three) in enumerate(shapes):
        layout = _grown(two, three)
        if layout in ("first", "folded") and two[0] % 2 == 0:
            return Rows(leaf, 0, two[0] // 2)
        if layout == "second":
            return Rows(leaf, 1)
    return None


def _keeps(pair: tuple[Seen, Seen]) -> bool:
    two, three = pair
    inputs = {_grown(*shapes) for shapes in zip(two.inputs, three.inputs, strict=False)}
    outputs = {_grown(*shapes) for shapes in zip(two.outputs, three.outputs, strict=False)}
    whole = {"first", "folded"}
    return inputs <= whole | {"none"} and bool(inputs & whole) and bool(outputs) and outputs <= whole


class _Watch(TorchFunctionMode):
    """Notes the shapes of every call of every module.

    Attributes:
        calls: by module, in order.
        regrouping: modules, but not the model itself, that choose, sort or repeat rows.
        partial: modules that were given rows that values chose.
        passes: calls of the model itself that may take gradients.
        outside: layers with parameters that an operation outside of their own forward was given.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], examples: int) -> None:
        super().__init__()
        self._examples = examples
        self.calls: dict[str, list[Seen]] = {}
        self.regrouping: set[str] = set()
        self.partial: set[str] = set()
        self.passes = 0
        self.outside: frozenset[str] = frozenset()
        self._owners = Owners(layers)
        self._model = model
        self._running: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> _Watch:
        for name, module in self._model.named_modules():
            self._watch(name, module)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._running and self._running[-1] and _regroups(func, args, kwargs, self._examples):
            self.regrouping.add(self._running[-1])
        self.outside |= self._owners.outside(func, (args, kwargs), self._running)
        out = func(*args, **(kwargs or {}))
        note_chosen(func, args, kwargs, out)
        return out

    def _watch(self, name: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._running.append(name)
            if not name:
                begin_choosing((args, kwargs))
            if are_chosen((args, kwargs)):
                self.partial.add(name)
            self.passes += not name and torch.is_grad_enabled()

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._running.pop()
            # a module that is given whole examples and learns is differentiated as one, with what it chooses inside
            learns = name and name not in self.partial and any(p.requires_grad for p in module.parameters())
            if learns and _leading((args, kwargs)) >= _leading(output):
                forget_chosen(output)
            self.calls.setdefault(name, []).append(Seen(_shapes((args, kwargs)), _shapes(output)))

        handles = (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True, always_call=True),
        )
        for handle in handles:
            self._stack.callback(handle.remove)


def _regroups(func: Any, args: Any, kwargs: Any, examples: int) -> bool:
    """Whether an operation takes out as many rows as their values say, sorts or repeats them block after block."""
    name = getattr(func, "__name__", "")
    if name in _SORTING:
        return _led_by(args[0], examples) and _sorted_dim(name, args, kwargs) % max(args[0].dim(), 1) == 0
    if name in _REPEATING:  # (k B, ...) with the examples not in one piece
        times = args[1] if isinstance(args[1], list | tuple) else args[1:]
        return _led_by(args[0], examples) and len(times) == args[0].dim() and int(times[0]) > 1
    if name == "__getitem__":
        first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        return isinstance(first, Tensor) and first.dtype == torch.bool
    return name in CHOOSING or (name == "where" and len(args) == 1)


def _led_by(tensor: Any, examples: int) -> bool:
    """Whether the rows of a tensor may be those of the examples."""
    return isinstance(tensor, Tensor) and bool(tensor.dim()) and tensor.shape[0] > 0 and tensor.shape[0] % examples == 0


def _sorted_dim(name: str, args: Any, kwargs: Any) -> int:
    if name == "msort":
        return 0
    given = [x for x in args[1:] if isinstance(x, int) and not isinstance(x, bool)]
    return int(given[0] if given else (kwargs or {}).get("dim", -1))


def _leading(value: Any) -> set[int]:
    return {shape[0] for shape in _shapes(value) if shape}


def _shapes(value: Any) -> Shapes:
    return tuple(tuple(leaf.shape) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
