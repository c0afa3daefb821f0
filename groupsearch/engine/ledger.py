"""The ledger: the clipped sums of one logical batch, whatever passes it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from groupsearch.engine.arrival import Arrival
from groupsearch.engine.book import Book, Groups, Progress, either
from groupsearch.engine.passes import Pass


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
            page.book.enter(group, arrival.make_entry())
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


def _without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Backward may be called inside autocast, which would round what the engine sums."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
