"""Hooks that belong to one model and do not go with its copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Hook:
    """A hook of the engine. In a copy of the model, or one that was saved, it does nothing: a copy has no engine."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the hook does."""
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        """A hook that does nothing."""
        return no_hook

    def __reduce__(self) -> Any:
        """A hook that does nothing."""
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return no_hook


def no_hook(*args: Any, **kwargs: Any) -> None:
    """Leaves everything as it is."""
