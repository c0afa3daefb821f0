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
