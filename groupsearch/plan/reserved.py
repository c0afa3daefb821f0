"""What a step of any grouping holds of a CUDA device: its births and deaths replayed through the caching allocator.

:func:`groupsearch.plan.memory.peak_memory` adds up what tensors take. The allocator hands out blocks that may be
larger, and holds segments of which parts lie idle: how much depends on the order of all requests, so they are gone
through.
"""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from groupsearch.errors import GroupSearchError
from groupsearch.plan.memory import Cut
from groupsearch.plan.trace import StepEvents, Trace

# -- What PyTorch's caching allocator for CUDA makes of a sequence of requests: a model of it, without torch
#
# Sizes are rounded up to multiples of 512 bytes. Blocks of at most 1 MiB come from segments of 2 MiB (the small pool),
# larger ones from segments of 20 MiB, or of their own size in multiples of 2 MiB from 10 MiB on (the large pool). The
# smallest free block that is large enough is taken, of equals the one at the lowest address; what is left of it becomes
# a free block where it is worth it, else the whole of it counts as allocated. A freed block is merged with free
# neighbours of its segment. Segments stay reserved until the card has no room for a new one. The rules are those of
# ``c10/cuda/CUDACachingAllocator.cpp``, for one stream.

KIB, MIB = 2**10, 2**20
MIN_BLOCK = 512
SMALL = MIB
SMALL_SEGMENT, LARGE_SEGMENT, SEGMENT_UNIT = 2 * MIB, 20 * MIB, 2 * MIB
LARGE_REQUEST = 10 * MIB
ADDRESS_SPACE = 2**50


class NoRoomError(GroupSearchError):
    """The card has no room for a request, after everything cached was given back to it."""


@dataclass(frozen=True)
class Rules:
    """What can be set of the allocator, as in ``PYTORCH_ALLOC_CONF``.

    Attributes:
        expandable: one segment for each pool that grows page by page (``expandable_segments:True``).
        max_split_bytes: larger blocks are never split, nor given for smaller requests; None for no limit.
        divisions: requests are rounded up to one of so many steps between powers of two; at most 1 for none.
        capacity_bytes: of the card, for this allocator; None for no end.
    """

    expandable: bool = False
    max_split_bytes: int | None = None
    divisions: int = 0
    capacity_bytes: int | None = None

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The rules that torch would go by here; settings that do not matter to one stream are passed over.

        Raises:
            GroupSearchError: for a value that is none.
        """
        text = environment.get("PYTORCH_ALLOC_CONF") or environment.get("PYTORCH_CUDA_ALLOC_CONF") or ""
        found = dict(part.split(":", 1) for part in text.replace(" ", "").split(",") if ":" in part)
        try:
            split = found.get("max_split_size_mb")
            return cls(
                expandable=found.get("expandable_segments", "False") == "True",
                max_split_bytes=None if split is None else int(split) * MIB,
                divisions=int(found.get("roundup_power2_divisions", "0")),
            )
        except ValueError as error:
            raise GroupSearchError(
                f"Expected PYTORCH_ALLOC_CONF with whole numbers for max_split_size_mb and "
                f"roundup_power2_divisions, found {text!r}. Write one number each, or leave them away."
            ) from error

    def rounded(self, size_bytes: int) -> int:
        """What is handed out at least for a request.

        >>> Rules().rounded(1), Rules().rounded(513), Rules(divisions=4).rounded(1200 * 1024) // 1024
        (512, 1024, 1280)
        """
        if size_bytes <= MIN_BLOCK or self.divisions <= 1 or size_bytes <= MIN_BLOCK * self.divisions:
            return max(MIN_BLOCK, -(-size_bytes // MIN_BLOCK) * MIN_BLOCK)
        step = (1 << (size_bytes.bit_length() - 1)) >> (self.divisions.bit_length() - 1)
        return -(-size_bytes // step) * step


class Block:
    """A stretch of a segment; ``free`` ones are cached, ``mapped`` ones have memory behind them."""

    __slots__ = ("address", "after", "before", "free", "mapped", "pool", "size")

    def __init__(self, pool: _Pool, address: int, size: int, mapped: bool = True) -> None:
        self.pool, self.address, self.size, self.mapped = pool, address, size, mapped
        self.free = True
        self.before: Block | None = None
        self.after: Block | None = None

    def cut(self, size: int) -> Block:
        """Keep the first ``size`` bytes; what comes after them, as a block of its own."""
        rest = Block(self.pool, self.address + size, self.size - size, self.mapped)
        rest.before, rest.after = self, self.after
        if self.after is not None:
            self.after.before = rest
        self.after, self.size = rest, size
        return rest

    def swallow(self) -> None:
        """Take in the block after it."""
        gone = self.after
        assert gone is not None
        self.size += gone.size
        self.after = gone.after
        if gone.after is not None:
            gone.after.before = self

    @property
    def reach(self) -> int:
        """Its size, with the unmapped one after it that it may grow into."""
        return self.size + (self.after.size if self.after is not None and not self.after.mapped else 0)


class _Pool:
    """The free blocks of one pool, by size and then address, and the arena of an expandable one."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.page = SMALL_SEGMENT if small else LARGE_SEGMENT
        self.arena: Block | None = None
        self._order: list[tuple[int, int]] = []
        self._blocks: dict[int, Block] = {}

    def add(self, block: Block) -> None:
        insort(self._order, (block.size, block.address))
        self._blocks[block.address] = block

    def remove(self, block: Block) -> None:
        del self._order[bisect_left(self._order, (block.size, block.address))]
        del self._blocks[block.address]

    def from_size(self, size: int) -> list[Block]:
        """Free blocks of at least a size, the smallest first."""
        return [self._blocks[address] for _, address in self._order[bisect_left(self._order, (size, 0)) :]]

    def best(self, size: int) -> Block | None:
        """The smallest free block of at least a size; of expandable ones, that which can grow least."""
        at = bisect_left(self._order, (size, 0))
        if at == len(self._order):
            return None
        found = self._blocks[self._order[at][1]]
        while self.arena is not None and at + 1 < len(self._order):
            at += 1
            following = self._blocks[self._order[at][1]]
            if following.reach >= found.reach:
                break
            found = following
        return found


class CachingAllocator:
    """Hands out blocks as torch does on a CUDA device.

    Attributes:
        allocated_bytes: of the blocks handed out now, as ``torch.cuda.memory_allocated`` counts them.
        reserved_bytes: of the segments held now, as ``torch.cuda.memory_reserved`` counts them.
        peak_allocated_bytes, peak_reserved_bytes: the most there ever was of either.
        retries: how often everything cached had to be given back for a request.
    """

    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self.retries = 0
        self._small, self._large = _Pool(small=True), _Pool(small=False)
        self._next_address = 0

    def allocate(self, size_bytes: int) -> Block | None:
        """A block for so many bytes; None for none.

        Raises:
            NoRoomError: when the card has no room for it; nothing is allocated then.
        """
        if size_bytes <= 0:
            return None
        size = self.rules.rounded(size_bytes)
        pool = self._small if size <= SMALL else self._large
        block = self._cached(pool, size) or self._new(pool, size)
        if block is None and self._release_oversized(pool, size):
            block = self._new(pool, size)
        if block is None:
            self._release_cached()
            self.retries += 1
            block = self._new(pool, size)
        if block is None:
            raise NoRoomError(
                f"Found no room for {size} bytes beside {self.allocated_bytes} allocated ones on a card of "
                f"{self.rules.capacity_bytes}. Take a smaller batch, or a grouping that needs less."
            )
        self._hand_out(block, size)
        return block

    def free(self, block: Block | None) -> None:
        """Take a block back and merge it with free neighbours."""
        if block is not None:
            self.allocated_bytes -= block.size
            block.free = True
            block.pool.add(self._merged(block))

    def _hand_out(self, block: Block, size: int) -> None:
        rest = block.size - size
        if block.pool.small or self.rules.expandable:
            split = rest >= MIN_BLOCK
        else:
            split = rest > SMALL and (self.rules.max_split_bytes is None or size < self.rules.max_split_bytes)
        if split:
            block.pool.add(block.cut(size))
        block.free = False
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)

    def _cached(self, pool: _Pool, size: int) -> Block | None:
        """The best free block, out of its pool; None where there is none for such a request."""
        block, limit = pool.best(size), self.rules.max_split_bytes
        if block is None:
            return None
        if limit is not None:
            if size < limit <= block.size:  # too large a block for a small request
                return None
            if size >= limit and block.size >= size + LARGE_SEGMENT:
                return None
        pool.remove(block)
        return block

    def _new(self, pool: _Pool, size: int) -> Block | None:
        """A block from the card, not in its pool; None where there is no room."""
        if self.rules.expandable:
            return self._grown(pool, size)
        segment = SMALL_SEGMENT if pool.small else LARGE_SEGMENT
        if size >= LARGE_REQUEST:
            segment = -(-size // SEGMENT_UNIT) * SEGMENT_UNIT
        if not self._reserve(segment):
            return None
        block = Block(pool, self._next_address, segment)
        self._next_address += segment
        return block

    def _reserve(self, size: int) -> bool:
        capacity = self.rules.capacity_bytes
        if capacity is not None and self.reserved_bytes + size > capacity:
            return False
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return True

    def _release_oversized(self, pool: _Pool, size: int) -> bool:
        """Give back blocks that are never split, enough for a request: the smallest that is, else the largest few."""
        limit = self.rules.max_split_bytes
        if limit is None or self.rules.expandable:
            return False
        wanted = max(size, limit)
        enough, released = pool.from_size(wanted), 0
        for block in enough[:1] or reversed(pool.from_size(limit)):
            if released < wanted:
                released += block.size
                self._release(block)
        return released >= wanted

    def _release_cached(self) -> None:
        """Give back every segment that is free as a whole, and every free page of expandable ones."""
        for pool in (self._large, self._small):
            for block in pool.from_size(0):
                if pool.arena is not None:
                    self._unmap(block)
                else:
                    self._release(block)

    def _release(self, block: Block) -> None:
        if block.before is None and block.after is None:
            block.pool.remove(block)
            self.reserved_bytes -= block.size

    def _grown(self, pool: _Pool, size: int) -> Block | None:
        """The first free stretch of an arena that is, or may grow, large enough, mapped as far as it must be."""
        if pool.arena is None:
            pool.arena = Block(pool, self._next_address, ADDRESS_SPACE, mapped=False)
            self._next_address += ADDRESS_SPACE
        block = _stretch(pool.arena, size)
        if block.mapped:
            pool.remove(block)
        while not block.mapped or block.size < size:
            unmapped = block.after if block.mapped else block
            assert unmapped is not None
            if not self._map(unmapped, size - (block.size if block.mapped else 0)):
                if block.mapped:
                    pool.add(block)
                return None
            while block.after is not None and block.after.free and block.after.mapped and block.mapped:
                if block.after is not unmapped:
                    pool.remove(block.after)
                block.swallow()
        return block

    def _map(self, block: Block, size: int) -> bool:
        """Put memory behind at least ``size`` bytes of a block, or all of it: whole pages."""
        pages = -(-min(size, block.size) // block.pool.page) * block.pool.page
        if not self._reserve(min(pages, block.size)):
            return False
        if pages < block.size:
            block.cut(pages)
        block.mapped = True
        return True

    def _unmap(self, block: Block) -> None:
        """Give back the pages that lie within a free block."""
        pool, page = block.pool, block.pool.page
        assert pool.arena is not None
        start = pool.arena.address
        begin = -(-(block.address - start) // page) * page + start
        end = (block.address + block.size - start) // page * page + start
        if begin >= end:
            return
        pool.remove(block)
        if end < block.address + block.size:
            pool.add(block.cut(end - block.address))
        if begin > block.address:
            rest = block.cut(begin - block.address)
            pool.add(block)
            block = rest
        block.mapped = False
        self.reserved_bytes -= block.size
        self._merged(block)

    def _merged(self, block: Block) -> Block:
        """A block that is in no pool, with its free neighbours of the same kind."""
        for first in (block, block.before):
            other = None if first is None else first.after
            if first is None or other is None or not (first.free and other.free and first.mapped is other.mapped):
                continue
            if first.mapped:
                block.pool.remove(other if first is block else first)
            first.swallow()
            block = first
        return block


def _stretch(block: Block, size: int) -> Block:
    """The first run of free blocks of an arena, the last of them unmapped, that has so many bytes: its first block."""
    here: Block | None = block
    while here is not None:
        if not here.mapped:
            first = here.before if here.before is not None and here.before.free else here
            if _room(first, size) >= size:
                return first
        here = here.after
    raise AssertionError("the end of an arena is never reached")


def _room(block: Block | None, enough: int) -> int:
    """Bytes of the free blocks from one on, counted until they are enough."""
    room = 0
    while block is not None and block.free and room < enough:
        room, block = room + block.size, block.after
    return room


# -- reserved --------------------------------------------------------------------------------------

CONTEXT_BYTES = 7 * 2**30 // 10
"""What a CUDA context and its kernels take beside the allocator: others report 0.3 to 0.7 GiB, nothing is measured."""
CARD_MARGIN = 0.04
"""Held back from a card: the best published estimator of what a device holds errs by 3.6 % in the median (xMem)."""
STEPS = 2
"""The first step makes the allocator reserve, the second one is what every later one is like."""


@dataclass(frozen=True)
class Holding:
    """What the allocator holds at most in a step after the first.

    Attributes:
        allocated_bytes: peak of the blocks handed out, as ``torch.cuda.max_memory_allocated`` tells it.
        reserved_bytes: peak of the segments held, as ``torch.cuda.max_memory_reserved`` tells it.
        retries: how often the card had no room until everything cached was given back.
    """

    allocated_bytes: int
    reserved_bytes: int
    retries: int = 0


def on_card(trace: Trace) -> bool:
    """Whether the step was traced as one of a CUDA device."""
    return str(trace.settings.get("device", "cpu")) != "cpu"


def holding(trace: Trace, boundaries: Sequence[int] | None) -> Holding | None:
    """:func:`replay_memory`; None on the CPU, which reserves nothing, and where births and deaths are not known."""
    return replay_memory(trace, boundaries) if on_card(trace) and trace.events is not None else None


def held_within(trace: Trace, boundaries: Sequence[int] | None, capacity_bytes: int) -> int:
    """What a card with so much memory holds in a grouping's step; what one without end does where it has no room."""
    rules = Rules.of_environment()
    try:
        return replay_memory(trace, boundaries, replace(rules, capacity_bytes=capacity_bytes)).reserved_bytes
    except NoRoomError:
        return replay_memory(trace, boundaries, rules).reserved_bytes


def replay_memory(trace: Trace, grouping: Cut | Sequence[int] | None, rules: Rules | None = None) -> Holding:
    """Replay a grouping's step.

    Args:
        trace: of the step, traced in this process.
        grouping: a grouping, or its boundaries in increasing order; None for the step without privacy.
        rules: of the allocator; by default those of this process's environment.

    Raises:
        GroupSearchError: when the trace does not know births and deaths: documents do not hold them.
        NoRoomError: when the rules say of a capacity that is not enough.
    """
    events = trace.events
    if events is None:
        raise GroupSearchError(
            "Expected a trace with the births and deaths of its step, found one from a document or of norm methods "
            "chosen per weight. Trace the model again."
        )
    boundaries = grouping if grouping is None or isinstance(grouping, Sequence) else grouping.boundaries
    terms = [(c.early, c.late, len(events.sizes) + n) for n, c in enumerate(trace.cross_terms)]
    sizes = (*events.sizes, *(c.transient_bytes for c in trace.cross_terms))
    sequence = tuple(events.ungrouped() if boundaries is None else events.grouped(boundaries, terms))
    allocator = CachingAllocator(Rules.of_environment() if rules is None else rules)
    _keep(allocator, events, trace.static.workspaces)
    for _ in range(STEPS):
        allocator.peak_allocated_bytes = allocator.allocated_bytes
        _step(allocator, sizes, sequence)
    return Holding(allocator.peak_allocated_bytes, allocator.peak_reserved_bytes, allocator.retries)


def _keep(allocator: CachingAllocator, events: StepEvents, workspaces: int) -> None:
    for size in (*events.kept, workspaces):
        allocator.allocate(size)


def _step(allocator: CachingAllocator, sizes: Sequence[int], sequence: Iterable[int]) -> None:
    """One step; what it leaves alive the next one would find, and does not allocate again: it is freed."""
    alive: dict[int, Block | None] = {}
    for event in sequence:
        if event >= 0:
            alive[event] = allocator.allocate(sizes[event])
        elif ~event in alive:
            allocator.free(alive.pop(~event))
    for block in alive.values():
        allocator.free(block)
