"""The forward passes that wait for backward, and what several of them at once may mean."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from groupsearch.engine.entries import Entry
from groupsearch.engine.layers import Layer
from groupsearch.engine.layout import ONE_ROW, by_example, rows_per_example
from groupsearch.errors import UnsupportedModelError
from groupsearch.plan.trace import Rows


@dataclass(eq=False)
class Pass:
    """One forward pass of a micro-batch of ``batch_size`` examples, and the backward that follows it.

    Attributes:
        rows: how the model is called with them.
        shared: whether further forward passes of the same examples may belong to it.
        calls: of the model, so far.
        begun: whether a gradient has come to an output of one of its sites.
        arrivals: sites that backward has reached.
        in_backward: whether backward has begun and not come to its end; stays true when it raised.
        finished: whether its sums are complete and nothing more may arrive.
    """

    batch_size: int
    rows: Rows = ONE_ROW
    shared: bool = False
    calls: int = 1
    begun: bool = False
    arrivals: int = 0
    in_backward: bool = False
    finished: bool = False

    def rows_of(self, tensor: Tensor, layout: str) -> int | None:
        """Rows per example of a tensor that keeps these examples in a layout, None of one that does not."""
        return rows_per_example(tensor, layout, self.batch_size, self.rows)

    def by_example(self, tensor: Tensor, layout: str) -> Tensor:
        """A tensor in a layout with the examples in the first dimension, see :func:`layout.by_example`."""
        return by_example(tensor, layout, self.batch_size, self.rows)

    @property
    def raised(self) -> bool:
        """Whether a backward pass through it raised; to be asked between backward passes."""
        return not self.finished and (self.in_backward or (self.begun and not self.arrivals))

    def begin_backward(self, g: Tensor) -> None:
        """A gradient has come to an output of one of its sites."""
        self.begun = True

    def pass_by(self, kept: bool) -> None:
        """A gradient that is not the loss's went through it, and its graph was kept or not."""
        self.begun = False
        if not (kept or self.shared):
            self.finished = True


class Passes:
    """Knows the pass that runs, and the open ones.

    Attributes:
        current: the forward pass that began last.
        policy: what several forward passes before one backward are: refused (``one``), of the ``same``
            examples in the same order, or of ``different`` ones.
        on_begin: called before a forward pass begins.
    """

    def __init__(self) -> None:
        self.current: Pass | None = None
        self.policy = "one"
        self.on_begin: Callable[[], None] = lambda: None
        self._open: weakref.WeakSet[Pass] = weakref.WeakSet()

    @property
    def open(self) -> tuple[Pass, ...]:
        """The passes that still wait for backward, or for its end."""
        return tuple(p for p in self._open if not p.finished)

    def begin(self, batch_size: int, rows: Rows = ONE_ROW) -> bool:
        """A forward pass of so many examples; False where it goes on with the one before.

        It does where passes of the same examples were announced, and as often as the loss was seen to call the model.

        Raises:
            UnsupportedModelError: when passes of the same examples have another number of them.
        """
        current = self.current
        waits = current is not None and not current.arrivals and not current.finished
        if current is not None and waits and (self.policy == "same" or current.calls < current.rows.calls):
            if current.batch_size != batch_size:
                raise UnsupportedModelError(
                    "Forward passes are of the same examples, as was announced or seen when the model was traced, but "
                    "one had another number of them than the next. Give row i of every pass to example i."
                )
            current.calls += 1
            return False
        self.on_begin()
        self.current = Pass(batch_size, rows, shared=self.policy == "same" or rows.calls > 1)
        self._open.add(self.current)
        return True

    def fail(self) -> None:
        """The running forward pass raised: nothing will come of it, unless something has already."""
        if self.current is not None and not self.current.arrivals:
            self.current.finished = True

    def running(self) -> Pass:
        """The pass that a layer is run in, by forward or again in backward.

        Raises:
            UnsupportedModelError: when there is none, or it cannot be told which.
        """
        if self.current is None:
            raise UnsupportedModelError(
                "A layer ran with gradients before the model itself was called. Call the model that was given to "
                "the engine, not one of its parts, or use torch.no_grad()."
            )
        if in_backward() and self.policy == "different" and len(self.open) > 1:
            raise UnsupportedModelError(
                "A part of the model runs again in backward (activation checkpointing) while several forward passes "
                "are open, so that it cannot be told whose examples it has. Run backward after each forward pass."
            )
        return self.current

    def arrive(self, source: Pass, at_end: Callable[[], None]) -> None:
        """Backward has reached a site of a pass; ``at_end`` is called when this backward ends.

        Raises:
            UnsupportedModelError: when an example could take part in two passes, or twice in one.
        """
        others = [p for p in self.open if p is not source]
        if (others and self.policy != "different") or source.finished:
            raise UnsupportedModelError(
                "Backward reached a forward pass while another one is still open (or ran twice through the same one): "
                "an example that takes part in both would be clipped twice and exceed the sensitivity. Run forward "
                "and backward of one micro-batch before the next forward, evaluate under torch.no_grad(), or say "
                "which examples the passes have: `with engine.same_examples():` where row i of every pass is the "
                "same example, `with engine.different_examples():` where no example is in two of them."
            )
        source.arrivals += 1
        if source.in_backward:
            return
        source.in_backward = True

        def end() -> None:
            source.in_backward = False
            at_end()

        torch.autograd.Variable._execution_engine.queue_callback(end)


def in_backward() -> bool:
    """Whether autograd runs backward in this thread."""
    return torch._C._current_graph_task_id() != -1


# -- What a backward pass delivers: sites, one after the other -------------------------------------


class Unit(Protocol):
    """One call of a module that is run again at the close of a group, see :mod:`groupsearch.engine.replay`."""

    def deliver(self, owed: list[Owed], consume: Callable[[Entry], None]) -> None:
        """Run again, and hand over the entries of these sites, in any order; empties the list."""


@dataclass(frozen=True, eq=False)
class Owed:
    """A site that is not booked, as a call of a module gives it again.

    Attributes:
        call: of the module.
        key: of the site's arrival.
        number: how many arrivals of that key the call had before.
        ruled: whether it came by the layer's rule.
        print_B: (B,), what tells whether what comes back is what the norm was taken of.
        make: the entry, of what the layer saved; None where it comes from another backward pass.
    """

    call: Unit
    key: str
    number: int
    ruled: bool
    print_B: Tensor
    make: Callable[[tuple[Tensor, ...]], Entry] | None = None


@dataclass(frozen=True)
class Arrival:
    """A site whose output gradient is there.

    Attributes:
        key: the layer's name, or ``layer.parameter`` for a bare parameter.
        layer: the layer.  kind: of the site.
        make_entry: forms the book entry (this is where norms by instantiation cost memory).
        source_pass: the forward pass it belongs to.
        expansions: what it was expanded to, if it is a parameter or a layer that saw no batch.
        of_saved: forms the entry of what the layer saved, where that and the output gradient are all it needs.
        owe: what stands for an entry that need not be booked; None where it must be, or nothing is replayed.
    """

    key: str
    layer: Layer
    kind: str
    make_entry: Callable[[], Entry] = field(repr=False)
    source_pass: Pass = field(repr=False)
    expansions: tuple[tuple[int, int], ...] | None = None
    of_saved: Callable[[tuple[Tensor, ...]], Entry] | None = field(default=None, repr=False)
    owe: Callable[[Entry], Owed | None] | None = field(default=None, repr=False)


Receiver = Callable[[Arrival], None]
