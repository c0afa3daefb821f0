"""What the inner products of sites that share a parameter cost, which no trace of single sites shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from groupsearch.engine.entries import Dimensions, Entry, InstanceEntry, inner
from groupsearch.engine.whole import WholeEntry
from groupsearch.trace import CrossTerm
from groupsearch.tracer.allocator import Allocator
from groupsearch.tracer.live import LiveBytes
from groupsearch.tracer.sites import Observed


def blueprint(entry: Entry) -> Callable[[], Entry]:
    """A maker of entries of the same shapes on the meta device; keeps no tensor of the entry."""
    if isinstance(entry, WholeEntry):
        whole: Any = _Whole({name: entry.outline(name) for name in entry.parameters}, entry.dimensions)
        return lambda: whole
    cls = type(entry)
    outlines = {f.name: _outline(getattr(entry, f.name)) for f in fields(entry)}  # type: ignore[arg-type]
    return lambda: cls(**{name: make() for name, make in outlines.items()})


def cross_terms(
    arrivals: Sequence[Observed], blueprints: Sequence[Callable[[], Entry]], granularity_bytes: int = 1
) -> tuple[CrossTerm, ...]:
    """For every two sites on one parameter the bytes that their inner product takes.

    Args:
        arrivals: in the order backward reached the sites.
        blueprints: of their entries.
        granularity_bytes: what every storage is rounded up to a multiple of.
    """
    allocator = Allocator(granularity_bytes)
    last = len(arrivals) - 1
    users: dict[str, list[int]] = {}
    for step, seen in enumerate(arrivals):
        for name in seen.parameters:
            users.setdefault(name, []).append(step)
    pairs = sorted({pair for steps in users.values() for pair in combinations(steps, 2)})
    return tuple(
        CrossTerm(last - early, last - late, _transient(blueprints[early], blueprints[late], allocator))
        for early, late in pairs
    )


def _transient(early: Callable[[], Entry], late: Callable[[], Entry], allocator: Allocator) -> int:
    with _disable_current_modes():
        one, other = early(), late()
        live = LiveBytes(allocator=allocator)
        live.ignore((*one.booked, *other.booked))
        with torch.no_grad(), live:
            inner(one, other)
    return live.peak_since(0)


@dataclass(frozen=True)
class _Whole:
    """A module's call that is not run again, for its parameters have values: its gradients alone are allocated.

    Attributes:
        outlines: makers of every parameter's gradients, (B, *shape), without values.
        dimensions: as the entry's.
    """

    outlines: dict[str, Callable[[], Tensor]]
    dimensions: Dimensions
    booked: tuple[Tensor, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.outlines)

    def alone(self, kept_B: slice) -> InstanceEntry:
        return InstanceEntry({name: make() for name, make in self.outlines.items()}, self.dimensions)


def _outline(value: Any) -> Callable[[], Any]:
    if isinstance(value, Tensor):
        shape, dtype = value.shape, value.dtype
        return lambda: torch.empty(shape, dtype=dtype, device="meta")
    if isinstance(value, dict):
        parts = {key: _outline(part) for key, part in value.items()}
        return lambda: {key: make() for key, make in parts.items()}
    return lambda: value
