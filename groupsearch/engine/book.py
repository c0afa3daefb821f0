"""The book: what open groups keep, and how a group is closed.

``Groups`` is the plan's, ``Progress`` and ``Book`` are those of one forward pass and its backward: several
passes may be open at the same time, and their sites arrive in any order.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from groupsearch.engine.arithmetic import habits_of
from groupsearch.engine.entries import Entry, inner, of_examples
from groupsearch.engine.passes import Arrival, Owed, Pass
from groupsearch.errors import UnsupportedModelError
from groupsearch.plan.trace import Site


class Observer(Protocol):
    """Is told what the book does, for tracing; an engine in training has none."""

    def entered(self, entry: Entry) -> None:
        """An entry was booked and its norm taken."""

    def closing(self, group: int) -> None:
        """A group is about to be closed."""

    def summed(self, entry: Entry) -> None:
        """An entry's clipped sums are formed and it is about to be dropped."""


class Groups:
    """Which group every use of every layer belongs to, by the plan."""

    def __init__(self, sites: Sequence[Site], group_of: Callable[[int], int], groups: int) -> None:
        self._groups_of: dict[str, list[int]] = defaultdict(list)
        for index, site in enumerate(sites):
            self._groups_of[site.name.partition("#")[0]].append(group_of(index))
        self._sizes = Counter(group_of(index) for index in range(len(sites)))
        uses = Counter((group_of(index), name) for index, site in enumerate(sites) for name in site.parameters)
        self._shares: dict[str, list[bool]] = defaultdict(list)
        for index, site in enumerate(sites):
            shares = any(uses[group_of(index), name] > 1 for name in site.parameters)
            self._shares[site.name.partition("#")[0]].append(shares)
        self.count = groups

    def begin(self) -> Progress:
        """A backward pass of which nothing has arrived."""
        return Progress(self._groups_of, self._sizes, self._shares)


class Progress:
    """Assigns the arrivals of one backward pass to groups and knows when a group has all its sites.

    Attributes:
        shares: whether the last arrival shares a parameter with another site of its group.
    """

    def __init__(
        self, groups_of: Mapping[str, Sequence[int]], sizes: Mapping[int, int], shares: Mapping[str, Sequence[bool]]
    ) -> None:
        self.shares = False
        self._groups_of = groups_of
        self._shares = shares
        self._arrived: Counter[str] = Counter()
        self._remaining = dict(sizes)

    def arrive(self, key: str) -> tuple[int, bool]:
        """Group of the next use of a layer, and whether it is the group's last site.

        Raises:
            UnsupportedModelError: when the layer is used more often than the plan knows.
        """
        uses = self._groups_of.get(key, ())
        seen = self._arrived[key]
        if seen >= len(uses):
            raise UnsupportedModelError(
                f"Layer {key!r} was used {seen + 1} times in one pass, but the plan was made for {len(uses)}. Trace "
                "the model again with the batch, mode and settings it is trained with, and make the plan from that."
            )
        self._arrived[key] += 1
        group, self.shares = uses[-1 - seen], self._shares[key][-1 - seen]
        self._remaining[group] -= 1
        return group, self._remaining[group] == 0


class Book:
    """Open groups of one backward pass, and the clipped sums they are added to.

    Args:
        clip: (group, norms (B,)) -> clipping factors (B,).
        observer: for tracing.
        sums: what clipped sums are added to, by parameter name; by default a dictionary of its own.

    Attributes:
        sums: as given; in float32 at least, whatever the model's precision.
        norms: of every closed group, (B,); infinite where an example's gradient was not finite.
        overflowed: on the device, whether the gradient of an example was not finite; None before a group is closed.
    """

    def __init__(
        self,
        clip: Callable[[int, Tensor], Tensor],
        observer: Observer | None = None,
        sums: dict[str, Tensor] | None = None,
    ) -> None:
        self.sums: dict[str, Tensor] = {} if sums is None else sums
        self.norms: dict[int, Tensor] = {}
        self.overflowed: Tensor | None = None
        self._clip = clip
        self._observer = observer
        self._entries: dict[int, list[Entry | list[Owed]]] = defaultdict(list)
        self._owing: dict[int, set[str]] = defaultdict(set)
        self._users: dict[int, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
        self._sqnorms: dict[int, Tensor] = {}

    @property
    def open_groups(self) -> tuple[int, ...]:
        """Groups that keep entries."""
        return tuple(self._entries)

    def enter(self, group: int, entry: Entry, owed: Owed | None = None) -> None:
        """Book an entry, or what stands for one that shares no parameter, and add its squared norm to its group's."""
        if self._owing and not self._owing.get(group, set()).isdisjoint(entry.parameters):
            raise UnsupportedModelError(
                f"Parameter {entry.parameters[0]!r} is used by two sites of a group, of which the plan knows one, and "
                "the first was left to replay. Trace the model again as it is trained, or leave replay off."
            )
        sqnorm_B = entry.sqnorm()
        for earlier in self._sharing(group, entry) if owed is None else ():
            sqnorm_B += 2 * inner(earlier, entry)
        if group in self._sqnorms:
            sqnorm_B = self._sqnorms[group] + sqnorm_B
        self._sqnorms[group] = sqnorm_B
        if owed is None:
            self._entries[group].append(entry)
        else:
            self._owe(group, entry, owed)
        if self._observer is not None:
            self._observer.entered(entry)

    def close(self, group: int, scale: float | Tensor) -> None:
        """Form the group's clipped sums, dropping each entry as it is consumed.

        An example whose gradient in this group is not finite adds nothing at all: there is no
        factor that would bound it, and infinity times zero is not zero.

        Args:
            group: the group.
            scale: what a booked gradient must be multiplied by to be the example's own
                (B for a mean over the micro-batch, 1 for a sum; over the loss scale), a number or of shape ().
        """
        if isinstance(scale, Tensor):
            scale = scale.to(self._sqnorms[group].device, non_blocking=True)
        norm_B = self._sqnorms.pop(group).clamp_(min=0).sqrt_().mul_(scale).nan_to_num_(nan=math.inf, posinf=math.inf)
        factor_B = self._clip(group, norm_B).mul_(scale)
        finite_B = norm_B.isfinite()
        kept_B = _if_not_all(finite_B)
        self.overflowed = either(self.overflowed, finite_B.all().logical_not_())
        self.norms[group] = norm_B
        self._users.pop(group, None)
        self._owing.pop(group, None)
        entries = self._entries.pop(group)
        entries.reverse()
        if self._observer is not None:
            self._observer.closing(group)
        if kept_B is not None:
            factor_B = factor_B[kept_B]

        consume = partial(self._consume, factor_B, kept_B)
        while entries:
            entry = entries.pop()
            if not isinstance(entry, list):
                consume(entry)
            elif len(factor_B):
                entry[0].call.deliver(entry, consume)
            del entry

    def _consume(self, factor_B: Tensor, kept_B: Tensor | None, entry: Entry) -> None:
        if kept_B is None:
            self._add(entry.clipped_sums(factor_B))
        elif len(factor_B):
            self._add(of_examples(entry, kept_B).clipped_sums(factor_B))
        if self._observer is not None:
            self._observer.summed(entry)

    def _owe(self, group: int, entry: Entry, owed: Owed) -> None:
        """What one call of a module owes to a group is delivered at once, when the first of it would be consumed."""
        entries = self._entries[group]
        last = next((x for x in reversed(entries) if isinstance(x, list)), None)
        if last is not None and last[0].call is owed.call:
            last.append(owed)
        else:
            entries.append([owed])
        self._owing[group].update(entry.parameters)

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


def either(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Whether one or the other flag is set, on the device of one; None is not set."""
    if one is None or other is None:
        return other if one is None else one
    return one | other.to(one.device, non_blocking=True)


def _if_not_all(finite_B: Tensor) -> Tensor | None:
    """Which examples are finite, or None where all are: the usual case must not copy the book.

    Also None where the engine does not look: the others have a factor of zero.
    """
    if isinstance(finite_B, FakeTensor) or not habits_of(finite_B).looks:
        return None
    return None if finite_B.all() else finite_B


# -- The ledger: the clipped sums of one logical batch, whatever passes it is made of --------------


@dataclass(frozen=True)
class _Page:
    """What is kept of a pass until its groups are closed; ``scale`` as in :meth:`Book.close`."""

    progress: Progress
    book: Book
    scale: float | Tensor


class Ledger:
    """Sums over any number of forward and backward passes, each with a book of its own.

    A backward that raised is found by :meth:`settle`; then everything that was summed since the
    last :meth:`abandon` or since the sums were last taken is dropped, that of earlier
    micro-batches too: nobody knows which of the failed micro-batch's examples are in the sums, so a loop that
    takes the logical batch again from its beginning counts every example once.

    Args:
        groups: of the plan.
        clip: (group, norms (B,)) -> clipping factors (B,).
        scale_of: batch size -> what a booked gradient is multiplied by.
        newest: the forward pass that began last.
        abandoned: told that the sums so far were dropped.

    Attributes:
        sums: clipped sums by parameter name, float32 or float64.
        examples: how many examples the sums are of; one that was not finite counts, too.
        norms: of every closed group, (B,): of the newest forward pass that backward has reached.
        on_close: told of a group whose clipped sums are formed, and whether no other pass is open.
    """

    def __init__(
        self,
        groups: Groups,
        clip: Callable[[int, Tensor], Tensor],
        scale_of: Callable[[int], float | Tensor],
        newest: Callable[[], Pass | None],
        abandoned: Callable[[], None],
    ) -> None:
        self.sums: dict[str, Tensor] = {}
        self.examples = 0
        self.norms: dict[int, Tensor] = {}
        self._groups = groups
        self._clip = clip
        self._scale_of = scale_of
        self._newest = newest
        self._abandoned = abandoned
        self._pages: dict[Pass, _Page] = {}
        self._shown: Pass | None = None
        self._overflowed: Tensor | None = None
        self.on_close: Callable[[int, bool], None] = lambda group, alone: None

    @property
    def empty(self) -> bool:
        """Whether nothing has been summed or booked."""
        return not self.sums and not self._pages

    def receive(self, arrival: Arrival) -> None:
        """Book a site and close its group if it is the last one."""
        source = arrival.source_pass
        if source not in self._pages:
            self._pages[source] = self._open(source)
        page = self._pages[source]
        group, last = page.progress.arrive(arrival.key)
        with _without_autocast(next(arrival.layer.module.parameters()).device.type):
            entry = arrival.make_entry()
            may_owe = arrival.owe is not None and not (last or page.progress.shares)
            page.book.enter(group, entry, arrival.owe(entry) if may_owe and arrival.owe is not None else None)
            del entry
            if last:
                self._close(page, group)

    def settle(self, open_passes: Iterable[Pass]) -> None:
        """Close what finished backward passes left open: groups with a layer that took no part in the loss.

        To be called between backward passes. One that raised half-way is abandoned, see above.
        """
        if torch._C._current_graph_task_id() != -1:  # asked for by a hook of a backward that goes on
            return
        reached = [source for source in open_passes if source.begun]
        if any(source.raised for source in reached):
            self.abandon()
        for page in self._pages.values():
            for group in page.book.open_groups:
                self._close(page, group)
        self._pages.clear()
        for source in reached:
            source.finished = True

    def abandon(self) -> None:
        """Drop the logical batch so far; its passes take no more backward."""
        for source in self._pages:
            source.finished = True
        self._pages.clear()
        self.sums.clear()
        self.examples = 0
        self._overflowed = None
        self._abandoned()

    def take_overflow(self) -> Tensor | None:
        """On the device, whether an example's gradient was not finite since this was last asked; None: none was."""
        overflowed, self._overflowed = self._overflowed, None
        return overflowed

    def _open(self, source: Pass) -> _Page:
        self.examples += source.batch_size
        page = _Page(self._groups.begin(), Book(self._clip, sums=self.sums), self._scale_of(source.batch_size))
        if self._shown is None or self._shown.finished or source is self._newest():
            self._shown, self.norms = source, page.book.norms
        return page

    def _close(self, page: _Page, group: int) -> None:
        page.book.close(group, page.scale)
        self._overflowed = either(self._overflowed, page.book.overflowed)
        self.on_close(group, len(self._pages) == 1)


def _without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Backward may be called inside autocast, which would round what the engine sums."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
