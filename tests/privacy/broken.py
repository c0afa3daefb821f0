"""Engines broken on purpose, each by the least change to the real one: what the privacy tests must catch.

A damage is a function that is handed a freshly attached engine and spoils one part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from groupsearch.engine import PrivateEngine
from groupsearch.engine.book import Book
from groupsearch.engine.entries import Entry, InstanceEntry, MatrixEntry
from groupsearch.engine.mechanism import Gaussians, Mechanism
from groupsearch.engine.passes import Owed, Pass

Damage = Callable[[PrivateEngine], None]
KNOWN_SEED = 0


def none(engine: PrivateEngine) -> None:
    """The real engine."""


def unclipped(name: str) -> Damage:
    """A parameter counts in the norm but is summed without its clipping factor."""

    class Unclipped(_Wrapped):
        def clipped_sums(self, factor_B: Tensor) -> Mapping[str, Tensor]:
            sums = dict(self.entry.clipped_sums(factor_B))
            if name in sums:
                sums[name] = self.entry.clipped_sums(torch.full_like(factor_B, self.scale))[name]
            return sums

    return _wrapping(Unclipped)


def short_of_bias(engine: PrivateEngine) -> None:
    """The norm of a linear or convolution layer leaves its bias out."""

    class Short(_Wrapped):
        def sqnorm(self) -> Tensor:
            entry = self.entry
            if isinstance(entry, MatrixEntry):
                return replace(entry, bias=None).sqnorm()
            if isinstance(entry, InstanceEntry):
                weights = {name: x for name, x in entry.instances.items() if not name.endswith("bias")}
                return replace(entry, instances=weights).sqnorm()
            return entry.sqnorm()

    _wrapping(Short)(engine)


def norms_of_a_part(rank: int, size: int) -> Damage:
    """The norm of an example is that of its gradient in every size-th layer, as if the others were elsewhere."""

    def spoil(book: Book, scale: float) -> None:
        enter, counted = book.enter, [-1]

        class Elsewhere(_Wrapped):
            def sqnorm(self) -> Tensor:
                return self.entry.sqnorm() * 0.0

        def entered(group: int, entry: Entry, owed: Owed | None) -> None:
            counted[0] += 1
            enter(group, entry if counted[0] % size == rank else Elsewhere(entry, scale), owed)

        book.enter = entered  # type: ignore[method-assign]

    return lambda engine: _in_every_book(engine, spoil)


def tied_term_dropped(engine: PrivateEngine) -> None:
    """Uses of one parameter in one group count as if they were different parameters."""

    def spoil(book: Book, scale: float) -> None:
        sharing = book._sharing
        book._sharing = lambda group, entry: sharing(group, entry)[:0]  # type: ignore[method-assign]

    _in_every_book(engine, spoil)


def silent(names: Collection[str]) -> Damage:
    """The parameters of one group get no noise."""

    class Silent(Mechanism):
        def add_noises_(self, sums: Mapping[str, Tensor]) -> None:
            super().add_noises_({name: total for name, total in sums.items() if name not in names})

    return _with_mechanism(Silent)


def noise_kept_for_two_steps(engine: PrivateEngine) -> None:
    """Noise is drawn in every second step, and added again in the step that follows."""

    class Kept(Mechanism):
        steps = 0

        def add_noises_(self, sums: Mapping[str, Tensor]) -> None:
            if self.steps % 2 == 0:
                self.drawn = {name: torch.zeros_like(total) for name, total in sums.items()}
                super().add_noises_(self.drawn)
            for name, total in sums.items():
                total.add_(self.drawn[name])

        def end_step(self) -> None:
            super().end_step()
            self.steps += 1

    _with_mechanism(Kept)(engine)


def noise_from_a_known_seed(engine: PrivateEngine) -> None:
    """Noise comes from a seed that everybody tries first."""
    engine.mechanism.source = torch.Generator().manual_seed(KNOWN_SEED)
    engine.mechanism._gaussians = Gaussians(engine.mechanism.source)


def noise_used_twice(engine: PrivateEngine) -> None:
    """Every step begins where the first one did, as branches of one checkpoint do that are resumed exactly."""
    state = engine.mechanism.state_dict(exact=True)

    class Branching(Mechanism):
        def end_step(self) -> None:
            super().end_step()
            self.load_state_dict(state, exact=True)

    _with_mechanism(Branching)(engine)


class _Wrapped:
    """An entry that does everything as another, but for what a subclass says; ``scale`` as in ``Book.close``."""

    def __init__(self, entry: Entry, scale: float) -> None:
        self.entry = entry
        self.scale = scale

    def __getattr__(self, name: str) -> Any:
        return getattr(self.entry, name)


def _wrapping(wrapper: type[_Wrapped]) -> Damage:
    def spoil(book: Book, scale: float) -> None:
        enter = book.enter
        book.enter = lambda group, entry, owed: enter(group, wrapper(entry, scale), owed)  # type: ignore[method-assign]

    return lambda engine: _in_every_book(engine, spoil)


def _in_every_book(engine: PrivateEngine, spoil: Callable[[Book, float], None]) -> None:
    """Every backward pass opens a book of its own."""
    opened = engine._ledger._open

    def open_spoiled(source: Pass) -> Any:
        page = opened(source)
        spoil(page.book, page.scale)
        return page

    engine._ledger._open = open_spoiled  # type: ignore[method-assign]


def _with_mechanism(kind: type[Mechanism]) -> Damage:
    def damage(engine: PrivateEngine) -> None:
        engine.mechanism.__class__ = kind  # its plan, noise multiplier and generator stay

    return damage
