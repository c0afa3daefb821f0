"""What a step of any grouping holds of a CUDA device: its births and deaths replayed through the caching allocator.

:func:`groupsearch.memory.peak_memory` adds up what tensors take. The allocator hands out blocks that may be larger, and
holds segments of which parts lie idle: how much depends on the order of all requests, so they are gone through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from groupsearch.errors import GroupSearchError
from groupsearch.events import StepEvents
from groupsearch.memory import Cut
from groupsearch.segments import Block, CachingAllocator, NoRoomError, Rules
from groupsearch.trace import Trace

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
