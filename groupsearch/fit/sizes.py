"""One setup at many sizes: the batch or the length of a sequence varies, every size is traced once.

Apart from the rows, as a search for a size is of use for whatever grows with it.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch

from groupsearch.errors import GroupSearchError, is_out_of_memory
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import peak_memory
from groupsearch.plan.partition import floor_bytes, front
from groupsearch.plan.reserved import held_within, on_card
from groupsearch.plan.trace import Trace
from groupsearch.verify import Setup
from groupsearch.workloads import Workload
from groupsearch.workloads.batches import count_examples, tensors_of

NON_PRIVATE = "non-private"
BEST = "best"
BATCH = "batch_size"
LENGTHS = ("sequence_length", "context")
"""What workloads call the length of a sequence."""
LIMIT = 2**16
"""The largest size that is tried where nobody says otherwise."""
BATCH_LIMIT_BYTES = 2 * 2**30
"""A batch whose own tensors would take more than this is not made."""


@dataclass(frozen=True, eq=False)
class Sizes:
    """Traces of one setup at any batch size, or at any value of the setting that is its sequence length.

    Attributes:
        setup: the rest of what a step depends on, and the size to start from.
        vary: ``batch_size``, or the name of the setting that varies.
        refused: why a size cannot be had, by size: the model does not take it, or the device has no room to trace it.
    """

    setup: Setup
    vary: str = BATCH
    refused: dict[int, str] = field(default_factory=dict)
    _traces: dict[int, Trace] = field(default_factory=dict)
    _peaks: dict[tuple[str, int], float] = field(default_factory=dict)
    _needs: dict[tuple[str, int, int], int] = field(default_factory=dict)

    @property
    def start(self) -> int:
        """The size of the setup itself."""
        return self.setup.loaded.batch_size if self.vary == BATCH else int(self.setup.loaded.settings[self.vary])

    @property
    def first(self) -> Trace:
        """The trace of the setup itself.

        Raises:
            GroupSearchError: when its step cannot be traced.
        """
        trace = self.at(self.start)
        assert trace is not None, "a refusal at the start is raised"
        return trace

    @property
    def traced(self) -> tuple[int, ...]:
        """The sizes that were traced, in increasing order."""
        return tuple(sorted(self._traces))

    def setup_at(self, size: int) -> Setup:
        """The setup with another size."""
        return replace(self.setup, settings={**self.setup.settings, self.vary: size})

    def limit(self, most: int) -> int:
        """The largest size to try: ``most``, or fewer examples where their own tensors would take 2 GiB.

        Raises:
            GroupSearchError: when ``most`` is below the size to start from.
        """
        if self.vary == BATCH:
            one = self.setup.loaded.make_batch(1)
            example_bytes = sum(t.nbytes for t in tensors_of(one))
            most = min(most, BATCH_LIMIT_BYTES // max(example_bytes, 1))
        if most < self.start:
            raise GroupSearchError(
                f"Expected to start at no more than {most}, the limit of the search, found {self.vary} {self.start}. "
                "Start lower, or raise --limit."
            )
        return most

    def at(self, size: int) -> Trace | None:
        """The trace at a size; None where the size cannot be had, and then ``refused`` says why.

        Raises:
            GroupSearchError: when the model cannot take a step at a size no larger than the start.
        """
        if size not in self._traces and size not in self.refused:
            try:
                self._traces[size] = self._trace(size)
            except _Refusal as refusal:
                if size <= self.start:
                    raise GroupSearchError(str(refusal)) from refusal
                self.refused[size] = str(refusal)
        return self._traces.get(size)

    def peak(self, text: str, size: int) -> float:
        """Estimated peak bytes at a size; infinite where the size cannot be had.

        Args:
            text: a grouping, ``non-private``, or ``best`` for the least peak of any grouping.
            size: batch or length.

        Raises:
            GroupSearchError: when the text is no grouping of this model.
        """
        key = (text, size)
        if key not in self._peaks:
            trace = self.at(size)
            self._peaks[key] = math.inf if trace is None else _peak(trace, text)
        return self._peaks[key]

    def need(self, text: str, size: int, usable_bytes: int) -> float:
        """What a step takes of ``usable_bytes``: more than that where it does not fit; infinite where it cannot be had.

        On the CPU the estimated peak. On a CUDA device what its allocator holds when it has no more than that, as it
        gives back what it had cached before it has no room.

        Raises:
            GroupSearchError: when the text is no grouping of this model.
        """
        trace = self.at(size)
        if trace is None or not on_card(trace):
            return self.peak(text, size)
        key = (text, size, usable_bytes)
        if key not in self._needs:
            self._needs[key] = held_on_card(trace, text, usable_bytes)[0]
        return self._needs[key]

    def _trace(self, size: int) -> Trace:
        """Load and trace as :mod:`groupsearch.measure` loads and measures: with the size as a setting."""
        setup = self.setup_at(size)
        try:
            workload = setup.loaded
        except GroupSearchError as error:
            raise _Refusal(str(error)) from error
        if self.vary == BATCH:
            for found in (workload.batch_size, count_examples(workload.make_batch(size))):
                if found != size:
                    raise GroupSearchError(
                        f"Expected {setup.workload} to make batches of any size, found {found} examples where {size} "
                        "were asked for. Let batch_size, or make_batch's argument, decide how many there are."
                    )
        try:
            return setup.trace()
        except GroupSearchError:
            raise
        except Exception as error:  # whatever a model raises on a batch that it was not written for
            if is_out_of_memory(error):
                raise _Refusal(
                    f"{setup.device} has no room to trace {setup.workload} at {self.vary} {size}."
                ) from error
            raise _Refusal(
                f"{setup.workload} takes no step at {self.vary} {size} (where every model is also tried with 3 "
                f"examples): {type(error).__name__}: {error}. Let it take batches of any size."
            ) from error
        finally:
            if setup.device != "cpu":  # leave the device to what is traced or measured next
                gc.collect()
                torch.cuda.empty_cache()


def held_on_card(trace: Trace, text: str, usable_bytes: int) -> tuple[int, Grouping | None]:
    """What a CUDA device with so much memory holds in a step, and with which grouping (None without privacy).

    ``best`` is of the least peaks with 1, 2, ... groups the first that fits, or else the one that needs least.
    """
    if text == NON_PRIVATE:
        return held_within(trace, None, usable_bytes), None
    if text != BEST:
        grouping = Grouping.parse(trace, text)
        return held_within(trace, grouping.boundaries, usable_bytes), grouping
    found: list[tuple[int, Grouping]] = []
    for boundaries, _ in front(trace):
        held = held_within(trace, boundaries, usable_bytes), Grouping.from_boundaries(trace, boundaries)
        if held[0] <= usable_bytes:
            return held
        found.append(held)
    return min(found, key=lambda held: held[0])


def _peak(trace: Trace, text: str) -> int:
    if text == NON_PRIVATE:
        return trace.nonprivate_peak_bytes
    return floor_bytes(trace) if text == BEST else peak_memory(trace, Grouping.parse(trace, text)).peak_bytes


class _Refusal(GroupSearchError):
    """A size that the model or the device does not take."""


def length_setting(workload: Workload) -> str:
    """What a workload calls the length of its sequences: of :data:`LENGTHS` the one that it has, else the first."""
    return next((name for name in LENGTHS if name in workload.settings), LENGTHS[0])


_GROWTH = 8
_PATIENCE = 3


@dataclass
class Bracket:
    """The largest size known to fit (0: none) and the smallest known not to (the limit + 1: none)."""

    budget: float
    high: int
    low: int = 0
    seen: dict[int, float] = field(default_factory=dict)
    _fits: bool = False
    _repeats: int = 0

    def note(self, size: int, peak: float) -> None:
        """Take in one answer."""
        fits = peak <= self.budget
        self.seen[size] = peak
        self._repeats = self._repeats + 1 if fits is self._fits else 1
        self._fits = fits
        self.low, self.high = (size, self.high) if fits else (self.low, size)

    def guess(self) -> int:
        """Where to look next: where a straight line through two answers meets the budget, else half way.

        The chord across the bracket moves one end only where peaks bend: after two moves of the same end
        the line through two answers on that side is taken, after three the middle.
        """
        below = sorted(size for size, peak in self.seen.items() if size <= self.low and math.isfinite(peak))
        above = sorted(size for size, peak in self.seen.items() if size >= self.high and math.isfinite(peak))
        if self.low and self.high not in self.seen:
            size = self._further(self._meets(below[-2:], 2 * self.low))
        elif not (below and above):
            size = (self.low + self.high) // 2 if self._repeats > 2 else self._meets(above[:2], self.high // 2)
        elif self._repeats > 2:
            size = (self.low + self.high) // 2
        else:
            side = below[-2:] if self._fits else above[:2]
            size = self._meets(side if self._repeats == 2 else below[-1:] + above[:1], (self.low + self.high) // 2)
        return min(max(size, self.low + 1), self.high - 1)

    def _further(self, size: int) -> int:
        """Upwards into the unknown: at most 8 times as far, at least twice where lines fell short again and again."""
        short = self._repeats > _PATIENCE and (size > self.low + 1 or self._repeats > 2 * _PATIENCE)
        return min(max(size, 2 * self.low) if short else size, _GROWTH * self.low)

    def _meets(self, line: list[int], otherwise: int) -> int:
        if len(line) < 2:
            return otherwise
        one, other = line
        slope = (self.seen[other] - self.seen[one]) / (other - one)
        if slope <= 0:
            return otherwise
        return math.floor(min(one + (self.budget - self.seen[one]) / slope, self.high))


def largest_within(peak: Callable[[int], float], budget: float, limit: int, known: Iterable[int] = (1,)) -> int:
    """The largest size from 1 to ``limit`` whose peak is within the budget; 0 where 1 is not.

    The size that is named was asked for and is within; one more was asked for and is not, unless
    it is beyond the limit. For peaks that never fall as the size grows that is the largest; nothing
    else is assumed of them.

    Args:
        peak: of a size; infinite where the size cannot be had.
        budget: in the unit of the peak.
        limit: the largest size to ask for.
        known: sizes to ask for first, at least one.
    """
    bracket = Bracket(budget, limit + 1)
    first = sorted({min(max(size, 1), limit) for size in known})
    while bracket.high - bracket.low > 1:
        size = first.pop() if first else bracket.guess()
        if bracket.low < size < bracket.high:
            bracket.note(size, peak(size))
    return bracket.low
