"""Reading: how the engine reads a model, as one value that whoever attaches a Capture passes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from groupsearch.engine.arrival import Receiver
from groupsearch.engine.capture import Capture
from groupsearch.engine.layout import Layouts
from groupsearch.options import EngineOptions


@dataclass(frozen=True)
class Reading:
    """What a :class:`~groupsearch.engine.capture.Capture` is told besides the model and its receiver.

    Attributes:
        options: decide the norm method per site.
        layouts: where layers keep the examples of a batch.
    """

    options: EngineOptions = field(default_factory=EngineOptions)
    layouts: Layouts = field(default_factory=Layouts)

    def capture(self, model: nn.Module, receive: Receiver) -> Capture:
        """A capture whose forward passes, until the next backward, are of the same examples."""
        capture = Capture(model, receive, self.options, self.layouts)
        capture.passes.policy = "same"  # a batch is one set of examples, however often the loss calls the model
        return capture

    @contextmanager
    def attached(self, model: nn.Module, receive: Receiver) -> Iterator[None]:
        """A capture for a while."""
        capture = self.capture(model, receive)
        try:
            yield
        finally:
            capture.remove()
