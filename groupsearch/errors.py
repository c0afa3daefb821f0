"""The one base error of the package; the command line turns it into an exit code."""

from __future__ import annotations


class GroupSearchError(Exception):
    """A request that cannot be honoured.

    The message is one paragraph that says what was found, what was expected and
    what to do. ``exit_code`` is what a command ends with: 1 when a tolerance or a
    budget was missed, 2 when the request itself was wrong.
    """

    exit_code = 2


class UnsupportedModelError(GroupSearchError):
    """A trainable parameter, layer or loss that the engine cannot make private.

    Attributes:
        layer: name of the layer whose inside cannot be followed, where differentiating it as one may help.
    """

    def __init__(self, message: str, layer: str | None = None) -> None:
        super().__init__(message)
        self.layer = layer


class OutsideUseError(UnsupportedModelError):
    """A parameter that is used outside of the forward of its layer, where nothing follows it."""


class BudgetError(GroupSearchError):
    """A memory budget that no grouping can meet."""


class DocumentError(GroupSearchError):
    """A document that is truncated, foreign or of a schema that is not read here."""


class ToleranceError(GroupSearchError):
    """A difference that is larger than the caller allows."""

    exit_code = 1


class TruthError(UnsupportedModelError):
    """The engine's gradients are not those of plain autograd on one example alone."""
