"""The book: what open groups keep, and how a group is closed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from groupsearch.engine.entries import Entry, inner
from groupsearch.errors import UnsupportedModelError
from groupsearch.trace import Site


class Observer(Protocol):
    """Is told what the book does, for tracing; an engine in training has none."""

    def entered(self, entry: Entry) -> None:
        """An entry was booked and its norm taken."""

    def closing(self, group: int) -> None:
        """A group is about to be closed."""

    def summed(self, entry: Entry) -> None:
        """An entry's clipped sums are formed and it is about to be dropped."""


class Groups:
    """Assigns arrivals to the groups of a plan and knows when a group has all its sites."""

    def __init__(self, sites: Sequence[Site], group_of: Callable[[int], int], groups: int) -> None:
        self._indices: dict[str, list[int]] = defaultdict(list)
        for index, site in enumerate(sites):
            self._indices[site.name.partition("#")[0]].append(index)
        self._group_of = group_of
        self._sizes = Counter(group_of(index) for index in range(len(sites)))
        self.count = groups
        self.begin()

    def begin(self) -> None:
        """A new backward pass: nothing has arrived."""
        self._arrived: Counter[str] = Counter()
        self._remaining = dict(self._sizes)

    def arrive(self, key: str) -> tuple[int, bool]:
        """Group of the next use of a layer, and whether it is the group's last site.

        Raises:
            UnsupportedModelError: when the layer is used more often than the plan knows.
        """
        uses = self._indices.get(key, [])
        seen = self._arrived[key]
        if seen >= len(uses):
            raise UnsupportedModelError(
                f"Layer {key!r} was used {seen + 1} times in one pass, but the plan was made for {len(uses)}. Trace "
                "the model again with the batch, mode and settings it is trained with, and make the plan from that."
            )
        self._arrived[key] += 1
        group = self._group_of(uses[-1 - seen])
        self._remaining[group] -= 1
        return group, self._remaining[group] == 0


class Book:
    """Open groups of one backward pass and the clipped sums of the logical batch so far.

    Args:
        clip: (group, norms (B,)) -> clipping factors (B,).
        observer: for tracing.
    """

    def __init__(self, clip: Callable[[int, Tensor], Tensor], observer: Observer | None = None) -> None:
        self.sums: dict[str, Tensor] = {}
        self.norms: dict[int, Tensor] = {}
        self._clip = clip
        self._observer = observer
        self._entries: dict[int, list[Entry]] = defaultdict(list)
        self._users: dict[int, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
        self._sqnorms: dict[int, Tensor] = {}

    @property
    def open_groups(self) -> tuple[int, ...]:
        """Groups that keep entries."""
        return tuple(self._entries)

    def enter(self, group: int, entry: Entry) -> None:
        """Book an entry and add its squared norm to its group's."""
        sqnorm_B = entry.sqnorm()
        for earlier in self._sharing(group, entry):
            sqnorm_B += 2 * inner(earlier, entry)
        if group in self._sqnorms:
            sqnorm_B = self._sqnorms[group] + sqnorm_B
        self._sqnorms[group] = sqnorm_B
        self._entries[group].append(entry)
        if self._observer is not None:
            self._observer.entered(entry)

    def close(self, group: int, scale: float) -> None:
        """Form the group's clipped sums, dropping each entry as it is consumed.

        Args:
            group: the group.
            scale: what a booked gradient must be multiplied by to be the example's own
                (B for a mean over the micro-batch, 1 for a sum).
        """
        norm_B = self._sqnorms.pop(group).clamp_(min=0).sqrt_().mul_(scale)
        factor_B = self._clip(group, norm_B).mul_(scale)
        self.norms[group] = norm_B
        del self._users[group]
        entries = self._entries.pop(group)
        entries.reverse()
        if self._observer is not None:
            self._observer.closing(group)
        while entries:
            entry = entries.pop()
            self._add(entry.clipped_sums(factor_B))
            if self._observer is not None:
                self._observer.summed(entry)
            del entry

    def abandon(self) -> None:
        """Drop everything: open groups, sums and norms."""
        self.sums.clear()
        self.norms.clear()
        self._entries.clear()
        self._users.clear()
        self._sqnorms.clear()

    def _sharing(self, group: int, entry: Entry) -> list[Entry]:
        """Entries of the group that use a parameter of this one's; it is listed for the next."""
        users = [self._users[group][name] for name in entry.parameters]
        sharing = list({id(earlier): earlier for entries in users for earlier in entries}.values())
        for entries in users:
            entries.append(entry)
        return sharing

    def _add(self, sums: Mapping[str, Tensor]) -> None:
        for name, total in sums.items():
            if name in self.sums:
                self.sums[name] += total
            else:
                self.sums[name] = total
