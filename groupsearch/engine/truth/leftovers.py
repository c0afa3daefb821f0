"""What a forward pass leaves behind on a model: buffers, attributes of modules, generators of its own.

What is remembered is put back, so that every pass of the check begins from the same model, and the
model is afterwards as it was.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from groupsearch.engine.truth.comparison import forget_signs

# what nn.Module keeps for itself, other than its mode
_OWN = frozenset(vars(nn.Module())) - {"training"}
_DEPTH = 4


@dataclass(frozen=True)
class _Slot:
    """One thing that a pass may change: how it was, whether it is so still, and how to put it back."""

    name: str
    is_same: Callable[[], bool]
    put_back: Callable[[], None]


class ModelMemory:
    """Remembers the state of a model.

    Attributes:
        buffers: names of its buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.buffers = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
        self._slots: list[_Slot] = []
        seen: set[int] = set()
        for path, module in model.named_modules():
            prefix = f"{path}." if path else ""
            self._remember_attributes(prefix, module, seen)

    def put_back(self, only: Collection[str] | None = None) -> None:
        """Put everything back, or what has one of these names."""
        with torch.no_grad():
            for slot in self._slots:
                if (only is None or slot.name in only) and not slot.is_same():
                    slot.put_back()

    def changed(self) -> tuple[str, ...]:
        """Names of what is not as it was."""
        return tuple(dict.fromkeys(slot.name for slot in self._slots if not slot.is_same()))

    def value(self, name: str) -> Any:
        """What a buffer or attribute holds now: a copy of a tensor, a number or text; else like nothing else."""
        path, _, last = name.rpartition(".")
        found = getattr(self._model.get_submodule(path), last, None)
        if isinstance(found, Tensor) and not found.is_meta:
            return found.detach().clone()
        return found if isinstance(found, bool | int | float | str) else object()

    def _remember_attributes(self, prefix: str, module: nn.Module, seen: set[int]) -> None:
        for is_buffers, holder in ((False, vars(module)), (True, module._buffers)):
            names = [name for name in holder if is_buffers or name not in _OWN]
            held = {name: holder[name] for name in names}
            for name, value in held.items():
                self._slots.append(_attribute(prefix + name, holder, name, value))
                self._remember_inside(prefix + name, value, seen, 0)
            if not is_buffers:
                self._slots.append(_no_others(prefix, holder, frozenset(names)))
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
        ):  # a model may put its own on when it first runs
            slot = _container(f"{prefix}(hooks)", hooks)
            assert slot is not None
            self._slots.append(slot)

    def _remember_inside(self, name: str, value: Any, seen: set[int], depth: int) -> None:
        if id(value) in seen or depth > _DEPTH:
            return
        seen.add(id(value))
        slot = _inside(name, value)
        if slot is not None:
            self._slots.append(slot)
        for part in _parts(value):
            self._remember_inside(name, part, seen, depth + 1)


def _attribute(name: str, holder: Any, key: str, value: Any) -> _Slot:
    def is_same() -> bool:
        return key in holder and (holder[key] is value or _plainly_equal(holder[key], value))

    return _Slot(name, is_same, lambda: holder.__setitem__(key, value))


def _no_others(prefix: str, holder: Any, names: frozenset[str]) -> _Slot:
    """No attribute may have come."""

    def others() -> list[str]:
        return [name for name in holder if name not in names and name not in _OWN]

    def drop() -> None:
        for name in others():
            del holder[name]

    return _Slot(f"{prefix}(new attributes)", lambda: not others(), drop)


def _plainly_equal(one: Any, other: Any) -> bool:
    return type(one) is type(other) and isinstance(one, bool | int | float | str | type(None)) and one == other


def _inside(name: str, value: Any) -> _Slot | None:
    """A slot for what may change inside a value, while it stays the same object."""
    if isinstance(value, Tensor):
        if value.is_meta or isinstance(value, nn.Parameter):
            return None
        held = value.detach().clone()
        return _Slot(name, lambda: same_values(value, held), lambda: _write(value, held))
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return _Slot(name, lambda: torch.equal(value.get_state(), state), lambda: _set(value.set_state, state))
    if isinstance(value, np.random.Generator):
        bits, words = value.bit_generator, value.bit_generator.state
        return _Slot(name, lambda: repr(bits.state) == repr(words), lambda: setattr(bits, "state", words))
    if isinstance(value, np.random.RandomState):
        legacy = value.get_state()
        return _Slot(name, lambda: repr(value.get_state()) == repr(legacy), lambda: value.set_state(legacy))
    if isinstance(value, random.Random):
        own = value.getstate()
        return _Slot(name, lambda: value.getstate() == own, lambda: value.setstate(own))
    if isinstance(value, np.ndarray):
        copied = value.copy()
        return _Slot(name, lambda: np.array_equal(value, copied), lambda: value.__setitem__(..., copied))
    return _container(name, vars(value) if _is_object(value) else value)


def _is_object(value: Any) -> bool:
    """Whether a value keeps attributes of its own that a forward pass may change."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, nn.Module | Tensor | type | ModuleType)
        and not callable(value)
    )


def _parts(value: Any) -> list[Any]:
    if isinstance(value, list | tuple | deque):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    return list(vars(value).values()) if _is_object(value) else []


def _container(name: str, value: Any) -> _Slot | None:
    if isinstance(value, dict):
        items = dict(value)

        def refill() -> None:
            value.clear()
            value.update(items)

        return _Slot(name, lambda: list(value) == list(items) and _all_same(value.values(), items.values()), refill)
    if isinstance(value, set):
        members = set(value)

        def readmit() -> None:
            value.clear()
            value.update(members)

        return _Slot(name, lambda: value == members, readmit)
    if isinstance(value, list | deque):
        parts = list(value)

        def restock() -> None:
            value.clear()
            value.extend(parts)

        return _Slot(name, lambda: len(value) == len(parts) and _all_same(value, parts), restock)
    return None


def _all_same(one: Any, other: Any) -> bool:
    return all(a is b or _plainly_equal(a, b) for a, b in zip(one, other, strict=True))


def same_values(one: Any, other: Any) -> bool:
    """Whether two tensors, or two other values, are the same; NaN counts as equal to NaN."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return _plainly_equal(one, other)
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    equal = one == other
    return bool((equal | ((one != one) & (other != other))).all())


def _write(value: Tensor, held: Tensor) -> None:
    value.data.copy_(held)


def _set(setter: Callable[[Any], Any], state: Any) -> None:
    setter(state)


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[ModelMemory]:
    """The memory of a model, put back in the end, also after an exception. Nothing else stays on its device."""
    memory = ModelMemory(model)
    try:
        yield memory
    finally:
        memory.put_back()
        forget_signs()
