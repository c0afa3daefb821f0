"""What the engine does otherwise on a GPU, where launching work is dear and asking for its result dearer.

On a CPU copies are cut small, to stay in its cache, and the engine looks whether an example's gradient is finite. A
program that looks at a number on a GPU waits until all that was launched is done; so nothing is looked at there, and an
example that is not finite is masked by its factor of zero, which copies what the product reads, slice by slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Habits:
    """How the engine works on a kind of device.

    Attributes:
        slice_bytes: the most that a copy of some examples may take (one example at least).
        looks: whether it looks at numbers while a step is under way.
    """

    slice_bytes: int
    looks: bool


CPU = Habits(8 * 2**20, looks=True)
CUDA = Habits(128 * 2**20, looks=False)
_KNOWN = {"cpu": CPU, "cuda": CUDA}
_forced: list[Habits] = []


def habits_of(tensor: Tensor) -> Habits:
    """The habits on a tensor's device."""
    if _forced:
        return _forced[-1]
    return _KNOWN["cpu" if tensor.is_cpu else "cuda"]


@contextmanager
def as_on(device_type: str) -> Iterator[None]:
    """Inside ``with``: work as on that kind of device, wherever tensors are; for traces, and tests on a CPU."""
    _forced.append(_KNOWN[device_type])
    try:
        yield
    finally:
        _forced.pop()
