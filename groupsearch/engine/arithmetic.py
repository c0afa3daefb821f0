"""How the engine computes: where a GPU asks for other habits, sums at least in float32, products in IEEE float32."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

# -- What the engine does otherwise on a GPU, where launching work is dear and asking for its result dearer
#
# On a CPU copies are cut small, to stay in its cache, and the engine looks whether an example's gradient is finite. A
# program that looks at a number on a GPU waits until all that was launched is done; so nothing is looked at there,
# and an example that is not finite is masked by its factor of zero, which copies what the product reads, slice by
# slice.


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


# -- Half-precision operands are widened to float32, a few examples at a time ----------------------
#
# A norm that is rounded to eight bits clips to something else than the threshold, and Gram
# matrices of scaled float16 gradients overflow. So nothing is summed in half precision; what is
# kept in the book stays as it came. A product of two half-precision numbers is exact in float32, and
# rounded up by no more than what adding such products up may lose.

HALF = (torch.float16, torch.bfloat16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that numbers of this one are summed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def is_half(*tensors: Tensor) -> bool:
    """Whether any of them has half precision."""
    return any(tensor.dtype in HALF for tensor in tensors)


def widened(tensor: Tensor) -> Tensor:
    """A tensor of half precision in float32, any other as it is."""
    return tensor.float() if tensor.dtype in HALF else tensor


def example_slices(*operands: Tensor) -> list[slice]:
    """Slices of examples in which no operand once widened is larger than the device's slices (one example at least)."""
    examples = operands[0].shape[0]
    size = max(x.numel() * (4 if x.dtype in HALF else x.element_size()) for x in operands)
    width = max(1, habits_of(operands[0]).slice_bytes // max(1, size // max(1, examples)))
    return [slice(start, start + width) for start in range(0, examples, width)] or [slice(0, 0)]


def widening(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute a result per example, (B, ...), in float32 and slice by slice where an operand has half precision."""

    @wraps(function)
    def compute(*args: Any, **kwargs: Any) -> Tensor:
        operands = [x for x in args if isinstance(x, Tensor)]
        if not is_half(*operands):
            return function(*args, **kwargs)
        result: Tensor | None = None
        for rows in example_slices(*operands):
            part = function(*[widened(x[rows]) if isinstance(x, Tensor) else x for x in args], **kwargs)
            if result is None:
                result = part.new_empty((operands[0].shape[0], *part.shape[1:]))
            result[rows] = part
        assert result is not None
        return result

    return compute


# -- Products in IEEE float32, whatever precision the user lets matrix units have ------------------
#
# Norms and the sums that they bound must be of the same numbers. A matrix unit that reads operands as TF32 cuts them to
# 10 bits; where the gradients of positions cancel, what is left may then be longer than its norm, by up to 2^-9 of the
# sizes that were added. A norm rounded up by as much would clip a long sequence by several per cent more than asked
# for. So these products are not cut. torch has two interfaces to say so, which raise where both were used; both are
# set, and put back.

_set: Callable[[str, str, str], object] = torch._C._set_fp32_precision_setter
_get: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
_EXACT = ("none", "ieee")
Function = TypeVar("Function", bound=Callable[..., Any])


class _Settings:
    """Some of the process's settings.

    Put aside by the first that asks for IEEE where they are less, and put back by the last (threads overlap).
    """

    def __init__(self, *kinds: str) -> None:
        self._operations = tuple((backend, kind) for backend in ("cuda", "mkldnn") for kind in kinds)
        self._legacy = "matmul" in kinds
        self._lock = threading.Lock()
        self._users = 0
        self._before: tuple[list[str], str] | None = None

    def enter(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1 and not self._are_exact():
                before = [_get(*operation) for operation in self._operations]
                for operation in self._operations:
                    _set(*operation, "ieee")
                # raises where the two interfaces disagree; now they cannot
                self._before = before, torch.get_float32_matmul_precision()
                if self._legacy:
                    torch.set_float32_matmul_precision("highest")

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users and self._before is not None:
                settings, legacy = self._before
                if self._legacy:
                    torch.set_float32_matmul_precision(legacy)
                for operation, before in zip(self._operations, settings, strict=True):
                    _set(*operation, "none")  # what is as the backend's own setting goes on following that
                    if _get(*operation) != before:
                        _set(*operation, before)
                self._before = None

    def are_exact(self) -> bool:
        """Whether there is nothing to set and nobody has set anything: asked at every layer of every step."""
        return not self._users and self._are_exact()

    def _are_exact(self) -> bool:
        for operation in self._operations:
            if _get(*operation) not in _EXACT:
                return False
        return not self._legacy or torch.get_float32_matmul_precision() == "highest"


_PRODUCTS, _OTHERS = _Settings("matmul"), _Settings("conv", "rnn")


@contextmanager
def ieee() -> Iterator[None]:
    """Inside ``with``: products, convolutions and recurrent layers of the process in IEEE float32."""
    with _of(_PRODUCTS), _of(_OTHERS):
        yield


@contextmanager
def _of(settings: _Settings) -> Iterator[None]:
    settings.enter()
    try:
        yield
    finally:
        settings.leave()


def in_ieee(function: Function) -> Function:
    """The function, whose products are matrix products, run in IEEE float32."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if _PRODUCTS.are_exact():
            return function(*args, **kwargs)
        _PRODUCTS.enter()
        try:
            return function(*args, **kwargs)
        finally:
            _PRODUCTS.leave()

    return run  # type: ignore[return-value]
