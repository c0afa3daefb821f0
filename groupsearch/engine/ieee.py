"""Products in IEEE float32, whatever precision the user lets matrix units have.

Norms and the sums that they bound must be of the same numbers. A matrix unit that reads operands as TF32 cuts them to
10 bits; where the gradients of positions cancel, what is left may then be longer than its norm, by up to 2^-9 of the
sizes that were added. A norm rounded up by as much would clip a long sequence by several per cent more than asked for.
So these products are not cut. torch has two interfaces to say so, which raise where both were used; both are set, and
put back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch

_OPERATIONS = tuple((backend, kind) for backend in ("cuda", "mkldnn") for kind in ("matmul", "conv", "rnn"))
_set: Callable[[str, str, str], object] = torch._C._set_fp32_precision_setter
_get: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
Function = TypeVar("Function", bound=Callable[..., Any])


class _Settings:
    """The process's settings: put aside by the first that asks for IEEE, put back by the last (threads overlap)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._legacy = ""
        self._before: list[str] = []

    def enter(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._before = [_get(*operation) for operation in _OPERATIONS]
                for operation in _OPERATIONS:
                    _set(*operation, "ieee")
                self._legacy = torch.get_float32_matmul_precision()  # raises where the two disagree; now they cannot
                torch.set_float32_matmul_precision("highest")

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                torch.set_float32_matmul_precision(self._legacy)
                for operation, before in zip(_OPERATIONS, self._before, strict=True):
                    _set(*operation, "none")  # what is as the backend's own setting goes on following that
                    if _get(*operation) != before:
                        _set(*operation, before)


_SETTINGS = _Settings()


@contextmanager
def ieee() -> Iterator[None]:
    """Inside ``with``: products, convolutions and recurrent layers of the process in IEEE float32."""
    _SETTINGS.enter()
    try:
        yield
    finally:
        _SETTINGS.leave()


def in_ieee(function: Function) -> Function:
    """The function, run in IEEE float32."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with ieee():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
