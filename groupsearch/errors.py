"""The one base error of the package; the command line turns it into an exit code."""

from __future__ import annotations


class GroupSearchError(Exception):
    """A request that cannot be honoured.

    The message is one paragraph that says what was found, what was expected and
    what to do. ``exit_code`` is what a command ends with: 1 when a tolerance or a
    budget was missed, 2 when the request itself was wrong.
    """

    exit_code = 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or a library on it, had no memory left.

    torch raises ``torch.OutOfMemoryError`` for its own allocator on a GPU, and a plain RuntimeError for that of the CPU
    and for libraries. It tells nothing of the model: whoever turns errors into a refusal lets it through.

    >>> is_out_of_memory(RuntimeError("CUDA error: out of memory")), is_out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "STATUS_ALLOC_FAILED")


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


class LostRankError(GroupSearchError):
    """Another process of a training on several ended, was killed or hangs."""

    exit_code = 1


class TruthError(UnsupportedModelError):
    """The engine's gradients are not those of plain autograd on one example alone."""
