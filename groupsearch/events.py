"""The births and deaths of one step in order of time, and the order that another grouping puts them in.

A step is traced with every site a group of its own. With another grouping the same happens at other times: a site's
clipped sums are formed when its group closes, and what the book holds lives until then.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Close:
    """Where in the sequence one site's clipped sums are formed when every site is a group of its own.

    Attributes:
        site: its number.
        begin, end: the first of the sequence that belongs to it, and the first that does not.
        booked: numbers of the storages that the site books.
    """

    site: int
    begin: int
    end: int
    booked: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class StepEvents:
    """What one step allocates and frees. A storage number n in a sequence says that n is born, ~n that it dies.

    Attributes:
        kept: sizes of what is alive throughout, in the order of allocation.
        sizes: bytes of every storage, by number.
        private: the private step, every site a group of its own.
        plain: the same step without privacy.
        closes: of the private step, in order of time; a step of several micro-batches has one per site and batch.
        heirs: by number of a storage the number of another, which it is the changed form of: it takes over that one's
            memory unless the book still holds it.
    """

    kept: tuple[int, ...]
    sizes: tuple[int, ...]
    private: tuple[int, ...]
    plain: tuple[int, ...]
    closes: tuple[Close, ...]
    heirs: Mapping[int, int]

    def ungrouped(self) -> Iterator[int]:
        """The sequence of the step without privacy: births and deaths of memory."""
        return _Order(self.plain, self.heirs).outside(0, len(self.plain))

    def grouped(self, boundaries: Sequence[int], cross_terms: Iterable[tuple[int, int, int]] = ()) -> Iterator[int]:
        """The private step's sequence with this grouping: births and deaths of memory.

        Args:
            boundaries: of the grouping, sorted.
            cross_terms: numbers of two sites that use one parameter, the one that backward reaches first in
                front, and the number of a storage that the later one needs where they share a group.
        """
        last, order, at = {0, *boundaries}, _Order(self.private, self.heirs), 0
        for close in self.closes:
            yield from order.outside(at, close.begin)
            for early, late, storage in cross_terms:
                if late == close.site and bisect_right(boundaries, early) == bisect_right(boundaries, late):
                    yield from (storage, ~storage)
            yield from order.book(close, is_last=close.site in last)
            at = close.end
        yield from order.outside(at, len(self.private))


class _Order:
    """Tells the sequence anew with what belongs to closes put off until the group's."""

    def __init__(self, sequence: Sequence[int], heirs: Mapping[int, int]) -> None:
        self._sequence, self._heirs = sequence, heirs
        self._open: list[Close] = []
        self._holders: Counter[int] = Counter()
        self._late: set[int] = set()
        self._alive: set[int] = set()
        self._done: set[int] = set()
        self._names: dict[int, int] = {}

    def book(self, close: Close, is_last: bool) -> Iterator[int]:
        """A site's entry is in the book. The last one's group closes; else the close is put off.

        What the site would have needed for its own close and nothing else (norms, clipping factors) is given up then:
        a group needs it once.
        """
        self._open.append(close)
        self._holders.update(close.booked)
        if is_last:
            yield from self._close()
            return
        for event in self._sequence[close.begin : close.end]:
            if event < 0 and ~event in self._alive and not self._holders[~event]:
                yield from self._die(~event)
                self._done.add(~event)

    def _close(self) -> Iterator[int]:
        """The group closes: its sites' sums are formed in the order of backward, each dropping its entry."""
        for close in self._open:
            self._holders.subtract(close.booked)
            yield from self.outside(close.begin, close.end)
            for number in close.booked:
                if number in self._late and not self._holders[number]:
                    yield from self._die(number)
        self._open.clear()
        for number in sorted(self._late & self._alive):  # died before its late birth
            yield from self._die(number)

    def outside(self, begin: int, end: int) -> Iterator[int]:
        """A stretch of the sequence, without the deaths of what the book holds or is still to be born."""
        for event in self._sequence[begin:end]:
            if event >= 0:
                yield from self._bear(event)
            elif ~event in self._done:
                self._done.discard(~event)
            elif self._holders[~event] or ~event not in self._alive:
                self._late.add(~event)
            else:
                yield from self._die(~event)

    def _bear(self, number: int) -> Iterator[int]:
        self._alive.add(number)
        old = self._heirs.get(number)
        if old is None or old not in self._alive or self._holders[old]:
            yield number
        else:
            self._alive.discard(old)
            self._done.add(old)
            self._names[number] = self._names.pop(old, old)

    def _die(self, number: int) -> Iterator[int]:
        self._late.discard(number)
        self._alive.discard(number)
        yield ~self._names.pop(number, number)
