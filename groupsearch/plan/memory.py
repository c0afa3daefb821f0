"""The peak memory of any grouping, in closed form from one traced step.

A group is a span of sites lo..last; backward enters it at ``last`` and closes it at ``lo``. While it
is open its book keeps storages that autograd has already let go of; when it closes, clipped sums
are formed in the order of backward and the book is dropped as it is consumed (Book-Keeping,
arXiv 2210.00038, with group-wise clipping, arXiv 2310.19215). What a group costs depends on
(lo, last) alone, so all groups fit one L x L table and the peak of a grouping is M look-ups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from groupsearch.errors import DocumentError, GroupSearchError
from groupsearch.plan.trace import Trace

# -- A trace as arrays: when every site's hook runs, and what a book holds that autograd does not --

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


# -- memory ----------------------------------------------------------------------------------------

UNREACHABLE_BYTES = np.iinfo(np.int64).max
_CHUNK_CELLS = 2**20


class Cut(Protocol):
    """Anything with boundaries, such as a :class:`groupsearch.plan.grouping.Grouping`."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Boundary b cuts between site b-1 and site b."""


@dataclass(frozen=True)
class Breakdown:
    """What is alive at one moment, in bytes; the parts sum to the whole exactly.

    ``activations`` is what forward and loss allocated, ``book`` what only the open group's book
    still holds, ``sums`` the clipped sums, ``transients`` the rest (with a device's workspaces).
    """

    weights: int
    buffers: int
    optimizer: int
    batch: int
    activations: int
    transients: int
    book: int
    sums: int


@dataclass(frozen=True)
class PeakEstimate:
    """The peak of one grouping.

    Attributes:
        peak_bytes: the largest number of live bytes in the step.
        site: the site where it happens; -1 in the forward pass and in the optimizer's step.
        where: ``forward and loss``, ``norm of NAME``, ``close at NAME``, ``after NAME`` or ``optimizer step``.
        breakdown: what is alive then. It sums to ``peak_bytes``.
    """

    peak_bytes: int
    site: int
    where: str
    breakdown: Breakdown


@dataclass(frozen=True, eq=False)
class CostTable:
    """What every possible group costs.

    Attributes:
        cost_bytes: int64 [L, L]; ``cost_bytes[lo, last]`` is the largest number of live bytes from
            the hook of site ``last`` to the next group's first hook when sites lo..last are one
            group; ``UNREACHABLE_BYTES`` where last < lo.
        outside_bytes: the same for the forward pass, the loss and the optimizer's step, in any grouping.
    """

    cost_bytes: Bytes
    outside_bytes: int


@lru_cache(maxsize=8)
def cost_table(trace: Trace) -> CostTable:
    """The cost of every group of a trace; kept for the traces used last.

    Takes O(L n) time and memory for n instants.

    Raises:
        DocumentError: when the instants are not those of one backward pass over the sites.
    """
    step = lifetimes(trace)
    book = step.book()
    at_close = step.close_live + book[:, step.close_at] + step.sums_before[:, None]
    opened = _open_bytes(trace, np.maximum.reduceat(step.live + book, step.starts, axis=1)[:, ::-1], at_close)
    closing = np.maximum.accumulate(np.triu((at_close + step.close[:, None]).T), axis=1)
    closed = np.maximum.reduceat(step.live, step.starts)[::-1][::2] + step.sums_before + step.gradient
    cost = np.maximum(np.maximum(opened, closing), closed[:, None])
    cost[np.tril_indices(trace.length, -1)] = UNREACHABLE_BYTES
    cost.setflags(write=False)
    forward_bytes = max((i.live_bytes for i in trace.instants if i.site < 0), default=0)
    return CostTable(cost, max(forward_bytes + trace.carried_bytes, trace.step_bytes))


def _open_bytes(trace: Trace, largest: Bytes, at_close: Bytes) -> Bytes:
    """[lo, last] the largest while the group is open, from [last, 2L] after and in the hook of each site reached."""
    largest = largest + lifetimes(trace).sums_before[:, None]
    reached = np.tril(largest[:, 1::2])
    for term in trace.cross_terms:
        pair = at_close[term.early :, term.late] + term.transient_bytes
        np.maximum(reached[term.early :, term.late], pair, out=reached[term.early :, term.late])
    # What comes after a site's hook finds the group open only where the group reaches the next site.
    np.maximum(reached[:, :-1], np.tril(largest[:, ::2])[:, 1:], out=reached[:, :-1])
    return np.maximum.accumulate(reached[:, ::-1], axis=1)[:, ::-1].T


def peak_memory(trace: Trace, grouping: Cut | Sequence[int]) -> PeakEstimate:
    """The peak of one grouping, where it happens and what is alive then.

    Its ``peak_bytes`` equals what :func:`peaks` gives. Of several equal moments the first counts.

    Args:
        trace: the traced step.
        grouping: a grouping, or its boundaries in increasing order.

    Raises:
        GroupSearchError: when a boundary is outside the model, repeated or out of order.
    """
    peak = max(_moments(trace, _boundaries(trace, grouping)), key=lambda moment: moment.total)
    static, name = trace.static, trace.sites[peak.site].name if peak.site >= 0 else ""
    kept = {"weights": static.weights, "buffers": static.buffers, "optimizer": static.optimizer, "batch": static.batch}
    transients = peak.live - sum(kept.values()) - peak.forward
    breakdown = Breakdown(**kept, activations=peak.forward, transients=transients, book=peak.book, sums=peak.sums)
    return PeakEstimate(peak.total, peak.site, f"{peak.where} {name}".rstrip(), breakdown)


def timeline(trace: Trace, grouping: Cut | Sequence[int]) -> list[tuple[int, int]]:
    """(site, live bytes) in order of time, from the forward pass (site -1) to the optimizer's step (-1).

    Its largest entry is the peak.

    Raises:
        GroupSearchError: when a boundary is outside the model, repeated or out of order.
    """
    return [(moment.site, moment.total) for moment in _moments(trace, _boundaries(trace, grouping))]


def peaks(trace: Trace, many: npt.NDArray[np.bool_] | Sequence[Cut | Sequence[int]]) -> Bytes:
    """The peaks of many groupings at once.

    Args:
        trace: the traced step.
        many: groupings or tuples of boundaries; or a bool array [N, L-1] whose column b-1 says
            whether boundary b is cut.

    Returns:
        int64 [N].

    Raises:
        GroupSearchError: when a boundary is outside the model, or the array is of another form.
    """
    table = cost_table(trace)
    cuts = many if isinstance(many, np.ndarray) else _cut_mask(trace, many)
    if cuts.dtype != np.bool_ or cuts.ndim != 2 or cuts.shape[1] != trace.length - 1:
        raise GroupSearchError(
            f"Expected a bool array of shape (N, {trace.length - 1}), one column for each boundary of "
            f"{trace.length} sites, found {cuts.dtype} {cuts.shape}. Pass groupings or boundaries instead."
        )
    rows = max(1, _CHUNK_CELLS // trace.length)
    found = [_chunk_peaks(table, cuts[at : at + rows]) for at in range(0, len(cuts), rows)]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _chunk_peaks(table: CostTable, cuts: npt.NDArray[np.bool_]) -> Bytes:
    length = len(table.cost_bytes)
    starts_group = np.ones((len(cuts), length), np.bool_)
    starts_group[:, 1:] = cuts
    lo = np.flatnonzero(starts_group) % length
    # A group ends before the next one starts; after a row's last group comes site 0 of the next
    # row, and last = -1 is site L-1 to numpy too.
    last = np.append(lo[1:], 0) - 1
    group_bytes = table.cost_bytes[lo, last]
    return np.maximum(np.maximum.reduceat(group_bytes, np.flatnonzero(lo == 0)), table.outside_bytes)


def _cut_mask(trace: Trace, many: Sequence[Cut | Sequence[int]]) -> npt.NDArray[np.bool_]:
    boundaries = [_boundaries(trace, grouping) for grouping in many]
    cuts = np.zeros((len(boundaries), trace.length - 1), np.bool_)
    rows = np.repeat(np.arange(len(boundaries)), [len(b) for b in boundaries])
    cuts[rows, np.fromiter(chain.from_iterable(boundaries), np.int64) - 1] = True
    return cuts


def _boundaries(trace: Trace, grouping: Cut | Sequence[int]) -> tuple[int, ...]:
    boundaries = tuple(grouping) if isinstance(grouping, Sequence) else grouping.boundaries
    edges = (0, *boundaries, trace.length)
    if any(left >= right for left, right in pairwise(edges)):
        raise GroupSearchError(
            f"Expected boundaries between 1 and {trace.length - 1} (the trace has {trace.length} sites), in "
            f"increasing order without repeats, found {boundaries}. Make the grouping from this trace."
        )
    return boundaries


class _Moment(NamedTuple):
    site: int
    where: str
    live: int
    forward: int
    book: int = 0
    sums: int = 0

    @property
    def total(self) -> int:
        return self.live + self.book + self.sums


def _moments(trace: Trace, boundaries: tuple[int, ...]) -> Iterator[_Moment]:
    for i in trace.instants:
        if i.site < 0:
            yield _Moment(-1, "forward and loss", i.live_bytes, i.forward_bytes, 0, trace.carried_bytes)
    for lo, hi in reversed(list(pairwise((0, *boundaries, trace.length)))):
        yield from _group_moments(trace, lo, hi - 1)
    sums = trace.carried_bytes + sum(site.gradient_bytes for site in trace.sites)
    yield _Moment(-1, "optimizer step", trace.step_bytes - sums, 0, 0, sums)


def _group_moments(trace: Trace, lo: int, last: int) -> Iterator[_Moment]:
    step, instants = lifetimes(trace), trace.instants
    book, sums = step.book_from(last), int(step.sums_before[last])
    for site in range(last, lo - 1, -1):
        hook_at, close_at, end = (int(at[site]) for at in (step.hook_at, step.close_at, step.end_at))
        for t in range(hook_at, close_at + 1):
            yield _Moment(site, "norm of", instants[t].live_bytes, instants[t].forward_bytes, book[t], sums)
        at_close, forward = trace.sites[site].close_live_bytes, instants[close_at].forward_bytes
        for term in trace.cross_terms:
            if term.late == site and term.early <= last:
                yield _Moment(site, "norm of", at_close + term.transient_bytes, forward, book[close_at], sums)
        if site == lo:
            left = step.book_left(close_at)
            for k in range(last, lo - 1, -1):
                peak = at_close + trace.sites[k].close_bytes
                yield _Moment(lo, "close at", peak, forward, left[k], int(step.sums_before[k]))
            sums, book = int(step.sums_before[lo] + step.gradient[lo]), [0] * len(book)
        for t in range(close_at + 1, end):
            yield _Moment(site, "after", instants[t].live_bytes, instants[t].forward_bytes, book[t], sums)
