"""What adding up clipped sums over several processes costs in time, and how much of it backward hides by groups.

A group's sums can be on their way when the last site of it, and of all groups before, is closed. One reduction follows
the other on the link while backward goes on; the step waits for the last. With M groups, closed at t_{M-1} <= ... <=
t_0, whose reductions take c_m,

    end_m = max(t_m, end_{m+1}) + c_m        step = alone + max(0, end_0 - t_0)

where ``alone`` is the step without communication. All-layer clipping has one t, at the end of backward: it hides
nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from groupsearch.errors import GroupSearchError
from groupsearch.plan.trace import Trace


@dataclass(frozen=True)
class Link:
    """Between processes in a ring, as gloo and nccl reduce over it.

    Attributes:
        processes: W >= 2.
        bytes_per_second: that each can send, and receive at the same time.
        latency_seconds: of a message from one to the next.

    Raises:
        GroupSearchError: for a number outside its range.
    """

    processes: int
    bytes_per_second: float
    latency_seconds: float = 5e-5

    def __post_init__(self) -> None:
        if self.processes < 2 or not self.bytes_per_second > 0 or self.latency_seconds < 0:
            raise GroupSearchError(
                f"Expected at least 2 processes, a bandwidth > 0 and a latency >= 0, found {self.processes}, "
                f"{self.bytes_per_second} and {self.latency_seconds}."
            )

    def sent_bytes(self, size_bytes: float) -> float:
        """What each process sends to add up tensors of so many bytes: 2 (W - 1) / W times that."""
        return 2 * (self.processes - 1) / self.processes * size_bytes

    def seconds(self, size_bytes: float) -> float:
        """How long that takes: 2 (W - 1) messages one after the other; nothing for no bytes."""
        if not size_bytes:
            return 0.0
        return self.sent_bytes(size_bytes) / self.bytes_per_second + 2 * (self.processes - 1) * self.latency_seconds


@dataclass(frozen=True)
class Pace:
    """When the sites of a step that nobody waits in are closed.

    Attributes:
        step_seconds: of the whole step.
        closes_seconds: of every site, in order, from the beginning of the step.
    """

    step_seconds: float
    closes_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Overlap:
    """A step with communication.

    Attributes:
        size_bytes: of the clipped sums.
        starts_seconds: when each group's reduction can start, by group; the last group is closed first.
        link_seconds: that all reductions take, one after the other.
        step_seconds: of the whole step.
        alone_seconds: of the step without communication.
    """

    size_bytes: int
    starts_seconds: tuple[float, ...]
    link_seconds: float
    step_seconds: float
    alone_seconds: float

    @property
    def hidden(self) -> float:
        """The part of the communication that the step does not wait for."""
        if not self.link_seconds:
            return 1.0
        return max(0.0, 1 - (self.step_seconds - self.alone_seconds) / self.link_seconds)


def bucket_bytes(trace: Trace, boundaries: Sequence[int]) -> tuple[int, ...]:
    """Bytes of the clipped sums that are sent when each group closes.

    A site that shares a parameter counts to the last group closed of those that use it, whole.
    """
    last: dict[str, int] = {}
    for index, site in enumerate(trace.sites):
        for name in site.parameters:
            last[name] = min(last.get(name, len(boundaries)), bisect_right(boundaries, index))
    found, seen = [0] * (len(boundaries) + 1), set[str]()
    for site in reversed(trace.sites):
        if not seen.issuperset(site.parameters):
            # Sums of several micro-batches are no site's; they have 4 bytes a number.
            size = 4 * site.parameter_count if trace.carried_bytes else site.gradient_bytes
            found[min(last[name] for name in site.parameters)] += size
            seen.update(site.parameters)
    return tuple(found)


def overlap(trace: Trace, boundaries: Sequence[int], pace: Pace, link: Link) -> Overlap:
    """The step with a grouping and a link between the processes.

    Raises:
        GroupSearchError: when the pace is that of another number of sites.
    """
    if len(pace.closes_seconds) != trace.length:
        raise GroupSearchError(
            f"Expected when each of {trace.length} sites is closed, found {len(pace.closes_seconds)} instants. Measure "
            "the step of the model that was traced."
        )
    sizes = bucket_bytes(trace, boundaries)
    starts, ready = [], 0.0
    for first in reversed((0, *boundaries)):
        ready = max(ready, pace.closes_seconds[first])
        starts.append(ready)
    starts.reverse()
    end = 0.0
    for start, size in zip(reversed(starts), reversed(sizes), strict=True):
        end = max(start, end) + link.seconds(size)
    link_seconds = sum(map(link.seconds, sizes))
    step_seconds = pace.step_seconds + max(0.0, end - starts[0])
    return Overlap(sum(sizes), tuple(starts), link_seconds, step_seconds, pace.step_seconds)
