"""A trace as arrays: when every site's hook runs, and what a book holds that autograd does not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from groupsearch.errors import DocumentError
from groupsearch.trace import Trace

Bytes = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Lifetimes:
    """Bytes and times of one trace, for n instants, L sites and U booked storages.

    Attributes:
        live: [n], of every instant, without book and clipped sums.
        starts: [2L], index of the first instant of every run of them, in order of time: in the hook
            of site L-1, after it, in the hook of site L-2, ...
        gradient: [L], of the clipped sums a site leaves behind.
        sums_before: [L], of the clipped sums of all sites that backward reaches before a site, and of
            earlier micro-batches.
        close: [L], on top while a site's sums are formed.
        close_live: [L], alive when a group closes at a site.
        booked: [U, 3], a storage's size, the site that books it last, the index of the first
            instant at which autograd no longer holds it.
    """

    live: Bytes
    starts: Bytes
    gradient: Bytes
    sums_before: Bytes
    close: Bytes
    close_live: Bytes
    booked: Bytes

    @property
    def hook_at(self) -> Bytes:
        """Index of the first instant in the hook of every site."""
        return self.starts[::2][::-1]

    @property
    def close_at(self) -> Bytes:
        """Index of the last instant in the hook of every site."""
        return self.starts[1::2][::-1] - 1

    @property
    def end_at(self) -> Bytes:
        """Index past the last instant before the hook of the next site."""
        return np.append(self.starts[2::2], len(self.live))[::-1]

    def book(self) -> Bytes:
        """[L, n] bytes that only the book holds at instant t when the open group began at site f."""
        size, last_site, released = self.booked.T
        held = np.zeros((len(self.close), len(self.live) + 1), np.int64)
        np.add.at(held, (last_site, released), size)
        np.cumsum(held, axis=0, out=held)
        np.cumsum(held, axis=1, out=held)
        return held[:, :-1]

    def book_from(self, first: int) -> list[int]:
        """Row ``first`` of :meth:`book`."""
        size, _, released = self.booked[self.booked[:, 1] <= first].T
        held = np.zeros(len(self.live) + 1, np.int64)
        np.add.at(held, released, size)
        return [int(b) for b in np.cumsum(held)]

    def book_left(self, close_at: int) -> list[int]:
        """Column ``close_at`` of :meth:`book`: what is left when only site f and later ones remain."""
        size, last_site, _ = self.booked[self.booked[:, 2] <= close_at].T
        held = np.zeros(len(self.close), np.int64)
        np.add.at(held, last_site, size)
        return [int(b) for b in np.cumsum(held)]


@lru_cache(maxsize=8)
def lifetimes(trace: Trace) -> Lifetimes:
    """The arrays of a trace; kept for the traces used last.

    Raises:
        DocumentError: when the instants are not those of one backward pass over the sites, or a
            storage is booked by sites or released at an instant that the trace does not have.
    """
    length, last_key = trace.length, 2 * trace.length
    runs = np.array([2 * i.site + i.in_hook if i.site >= 0 else last_key for i in trace.instants], np.int64)
    if np.any(np.diff(runs) > 0) or set(runs.tolist()) - {last_key} != set(range(last_key)):
        raise DocumentError(
            f"Expected instants in the hook and after the hook of each of {length} sites, from the last site to "
            f"the first, found another order. Trace the model again with `groupsearch profile`."
        )
    pairs = [(b.first_site, b.last_site) for b in trace.booked] + [(c.early, c.late) for c in trace.cross_terms]
    if any(not 0 <= late <= early < length for early, late in pairs) or any(
        not 0 <= b.released <= len(runs) for b in trace.booked
    ):
        raise DocumentError(
            f"Expected booked storages and cross terms of {length} sites and {len(runs)} instants, found some beyond "
            f"them. Trace the model again with `groupsearch profile`."
        )
    gradient = np.array([site.gradient_bytes for site in trace.sites], np.int64)
    return Lifetimes(
        live=np.array([i.live_bytes for i in trace.instants], np.int64),
        starts=np.searchsorted(-runs, -np.arange(last_key)[::-1]),
        gradient=gradient,
        sums_before=trace.carried_bytes + gradient.sum() - np.cumsum(gradient),
        close=np.array([site.close_bytes for site in trace.sites], np.int64),
        close_live=np.array([site.close_live_bytes for site in trace.sites], np.int64),
        booked=np.array([(b.size_bytes, b.last_site, b.released) for b in trace.booked], np.int64).reshape(-1, 3),
    )
