"""What fits into a memory: the largest batch, or the longest sequence, of every grouping.

A peak is a maximum of moments, each of them affine in the batch, and the best grouping changes with
the batch: interpolation only says where to look next, and what is named was traced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from groupsearch.documents.rows import FitRow, Poisson, Rate, Timing
from groupsearch.engine.loading import batch_quantile
from groupsearch.errors import BudgetError, GroupSearchError
from groupsearch.fit.sizes import BATCH, BEST, LIMIT, NON_PRIVATE, Sizes, held_on_card, largest_within, length_setting
from groupsearch.measure import measure_peak
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.reserved import on_card
from groupsearch.units import format_bytes, format_count, format_number, format_percent, format_ratio
from groupsearch.verify import held_bytes

__all__ = [
    "BATCH",
    "LIMIT",
    "MARGIN",
    "QUANTILE",
    "Room",
    "Sizes",
    "fit_rows",
    "largest_expected",
    "largest_within",
    "length_setting",
    "poisson_part",
    "summarise",
    "with_rate",
]

MARGIN = 0.005
"""Held back from the memory: estimates were up to 0.32 % below measurements (``profiles/accuracy-cpu.json``)."""
QUANTILE = 0.999
LARGE_POPULATION = 10**9
NEARLY = 0.9
STYLES = ("layer-wise", "block-wise", "uniform:4")


@dataclass(frozen=True)
class Room:
    """What a step may take, and how far to look.

    Attributes:
        memory_bytes: the memory given.
        margin: the share of it that is held back.
        limit: the largest size to try.
        population: examples in the data set, or None for many more than a batch has.
        sampling_rate: of Poisson sampling, where it is decided; it takes a population.
        context_bytes: what a device keeps for itself of it.

    Raises:
        GroupSearchError: when the margin is no share below 1, the rate not within (0, 1] or without a population.
    """

    memory_bytes: int
    margin: float = MARGIN
    limit: int = LIMIT
    population: int | None = None
    sampling_rate: float | None = None
    context_bytes: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 1:
            raise GroupSearchError(f"Expected a margin of at least 0 and below 1, found {self.margin}.")
        if self.sampling_rate is not None and self.population is None:
            raise GroupSearchError(
                "Expected the number of examples with a sampling rate, found none. Give the size of the data set too."
            )
        if self.quantile_batch_size is not None and self.quantile_batch_size < 1:
            raise GroupSearchError(f"Found that a sampling rate of {self.sampling_rate} takes no example. Raise it.")

    @property
    def quantile_batch_size(self) -> int | None:
        """What 99.9 % of the batches at the sampling rate stay within, where there is a rate."""
        if self.population is None or self.sampling_rate is None:
            return None
        return batch_quantile(self.population, self.sampling_rate, QUANTILE)

    @property
    def usable_bytes(self) -> int:
        """What an estimate may come to."""
        return max(0, int(self.memory_bytes * (1 - self.margin)) - self.context_bytes)

    @property
    def held_back(self) -> str:
        """In words what is not given to a step, as in ``80 GiB, 4 % of it and 716.8 MiB for the context held back``."""
        context = f" and {format_bytes(self.context_bytes)} for the context" if self.context_bytes else ""
        return f"{format_bytes(self.memory_bytes)}, {format_percent(self.margin)} of it{context} held back"


def fit_rows(sizes: Sizes, room: Room, groupings: Sequence[str] = (), max_groups: int = 8) -> Iterator[FitRow]:
    """The largest size of non-private training and of every grouping, one row after another.

    First comes non-private training, then ``best``, the largest size that any grouping fits, with the
    fewest groups that fit there, then all-layer.

    Args:
        sizes: traces of the setup; those taken for one row serve the next.
        room: the memory.
        groupings: further ones as text; none for the fixed styles and the best of 2, 3, ... groups, until
            the size of ``best`` is reached.
        max_groups: where the best of a number of groups ends.

    Yields:
        ``boundaries`` and ``groups`` at that size (None without privacy), ``pieces`` (of an expected batch and of its
        99.9 % quantile, where there is a sampling rate), ``next_peak_bytes`` (at one more; None where there is none),
        ``limited_by`` (``memory``, ``limit``, or ``model`` where it refuses one more) and
        ``expected_batch_size`` (see :func:`largest_expected`; None without privacy). Where the
        size is 0 not even 1 fits, and ``peak_bytes`` is None. On a CUDA device what counts is what its allocator
        holds, and ``allocated_bytes`` and ``reserved_bytes`` say what it hands out and holds where it has more room.

    Raises:
        BudgetError: when neither non-private training nor any grouping fits at size 1.
    """
    plain = _row(sizes, room, NON_PRIVATE)
    yield plain
    best = _row(sizes, room, BEST)
    if not plain.size and not best.size:
        raise _nothing_fits(sizes, room)
    yield best
    for text in dict.fromkeys(("all-layer", *(groupings or _styles(sizes)))):
        yield _row(sizes, room, text)
    for groups in range(2, min(max_groups, best.groups or 0) + 1 if not groupings else 0):
        row = _row(sizes, room, f"best:{groups}")
        yield row
        if row.size >= best.size:
            return


def largest_expected(batch_size: int, population: int | None = None) -> int:
    """The largest expected batch whose 99.9 % quantile under Poisson sampling is within a batch size.

    Where the number of examples is not known it is taken to be a thousand million: a batch then varies
    the most, so a smaller data set has room to spare. 0 where not even an expected batch of 1 is.

    >>> largest_expected(1098, 50_000), largest_expected(1)
    (1000, 0)
    """
    size = population or LARGE_POPULATION
    return largest_within(lambda expected: batch_quantile(size, expected / size, QUANTILE), batch_size, size, (1,))


def poisson_part(room: Room, micro_batches: int = 1) -> Poisson:
    """How expected batches are found and, where there is a sampling rate, what batches it makes.

    Args:
        room: says how batches are drawn.
        micro_batches: of the step whose peaks are told.
    """
    quantile = f"{format_percent(QUANTILE)} of all batches"
    of = f"{format_count(room.population)} examples" if room.population else "a data set much larger than a batch"
    rule = f"An expected batch is the largest with which {quantile} fit whole, under Poisson sampling from {of}."
    expected = None
    if room.population is not None and room.sampling_rate is not None:
        expected = room.population * room.sampling_rate
        rule += f" At rate {format_number(room.sampling_rate)} a batch has {format_number(expected, 4)} examples on "
        rule += f"average and {quantile} have at most {room.quantile_batch_size}: pieces are how many physical ones."
    if micro_batches > 1:
        rule += " Peaks are those of a step that accumulates several physical batches, however many."
    return Poisson(
        quantile=QUANTILE,
        dataset_size=room.population,
        sampling_rate=room.sampling_rate,
        rule=rule,
        expected_batch_size=expected,
        quantile_batch_size=room.quantile_batch_size,
    )


def summarise(rows: Sequence[FitRow], vary: str = BATCH) -> str:
    """In one sentence what privacy costs in batch or length, and what grouping buys back.

    Args:
        rows: of :func:`fit_rows`, the first three at least.
        vary: what grew, as in :class:`Sizes`.
    """
    what = "a batch of" if vary == BATCH else "sequences of"
    plain, best, whole = rows[:3]

    def told(row: FitRow) -> str:
        ratio = f" ({format_ratio(row.size / plain.size)})" if plain.size and row is not plain else ""
        return f"{'at least ' if row.limited_by == 'limit' else ''}{row.size}{ratio}"

    cost = f"Non-private training fits {what} {told(plain)}, private training with one group {told(whole)}"
    if best.size <= whole.size:
        return f"{cost}; no grouping fits more."
    most = f"{best.groups} groups {told(best)}, the most that any grouping fits."
    fewer = [row for row in rows[3:] if (row.groups or 0) < (best.groups or 0)]
    few = [row for row in fewer if NEARLY * best.size <= row.size]
    nearly = min(few, key=lambda row: row.groups or 0, default=None)
    return f"{cost}; {nearly.groups} well-placed groups fit {told(nearly)}, {most}" if nearly else f"{cost}; {most}"


def _styles(sizes: Sizes) -> list[str]:
    """The fixed styles that this model has sites for, each distinct one once."""
    length = len(sizes.first.sites)
    found: dict[tuple[int, ...], str] = {}
    for text in STYLES:
        groups = text.partition(":")[2]
        if not groups or int(groups) <= length:
            found.setdefault(Grouping.parse(sizes.first, text).boundaries, text)
    return list(found.values())


def _row(sizes: Sizes, room: Room, text: str) -> FitRow:
    most = sizes.limit(room.limit)
    usable, known = room.usable_bytes, sizes.traced or (sizes.start,)
    size = largest_within(lambda size: sizes.need(text, size, usable), usable, most, known)
    grouping = _grouping(sizes, room, text, size)
    peak_bytes = sizes.peak(text, size) if size else None
    if text == BEST and grouping is not None:
        peak_bytes = sizes.peak(str(grouping), size)  # of the fewest groups that fit, which need not be the floor
    following = sizes.peak(text, size + 1) if size < most else math.inf
    batch_size = size if sizes.vary == BATCH else sizes.setup.loaded.batch_size
    held = _held(sizes, grouping, text, size)
    return FitRow(
        grouping=text,
        boundaries=None if grouping is None else tuple(grouping.boundaries),
        groups=None if grouping is None else grouping.groups,
        size=size,
        batch_size=batch_size,
        expected_batch_size=None if text == NON_PRIVATE else largest_expected(batch_size, room.population),
        pieces=_pieces(room, batch_size if size and text != NON_PRIVATE else 0),
        peak_bytes=None if peak_bytes is None else int(peak_bytes),
        next_peak_bytes=int(following) if math.isfinite(following) else None,
        limited_by="limit" if size == most else "model" if size + 1 in sizes.refused else "memory",
        allocated_bytes=held.get("allocated_bytes"),
        reserved_bytes=held.get("reserved_bytes"),
    )


def _held(sizes: Sizes, grouping: Grouping | None, text: str, size: int) -> dict[str, int]:
    """What a CUDA device without end would hand out and hold at the row's size; nothing of another, or of no size."""
    trace = sizes.at(size) if size else None
    if trace is None or (grouping is None and text != NON_PRIVATE):
        return {}
    return held_bytes(trace, None if grouping is None else grouping.boundaries)


def _pieces(room: Room, batch_size: int) -> tuple[int, ...] | None:
    """In how many physical batches an expected batch and its 99.9 % quantile are taken."""
    if not batch_size or room.population is None or room.sampling_rate is None:
        return None
    logical = (room.population * room.sampling_rate, float(room.quantile_batch_size or 0))
    return tuple(max(1, math.ceil(examples / batch_size)) for examples in logical)


def _grouping(sizes: Sizes, room: Room, text: str, size: int) -> Grouping | None:
    trace = sizes.at(size) if size else None
    if trace is None or text == NON_PRIVATE:
        return None
    if on_card(trace):
        return held_on_card(trace, text, room.usable_bytes)[1]
    return Grouping.parse(trace, f"within:{room.usable_bytes}" if text == BEST else text)


def _nothing_fits(sizes: Sizes, room: Room) -> BudgetError:
    trace = sizes.at(1)
    assert trace is not None
    least = min(sizes.need(text, 1, room.usable_bytes) for text in (NON_PRIVATE, BEST))
    static = trace.static
    kept = format_bytes(static.weights + static.buffers + static.optimizer)
    context = f" and {format_bytes(room.context_bytes)} for the device's context" if room.context_bytes else ""
    return BudgetError(
        f"Expected a memory of at least {format_bytes((least + room.context_bytes) / (1 - room.margin))} "
        f"({format_percent(room.margin)} of it{context} held back), what a step of {sizes.setup.workload} at "
        f"{sizes.vary} 1 takes, {kept} of it weights and optimizer state; found {format_bytes(room.memory_bytes)}. "
        "Give more memory, turn activation checkpointing on, or take an optimizer with less state."
    )


def measured_batches(batch_size: int) -> tuple[int, ...]:
    """The two batches to measure for the sake of a larger one: a quarter and a half of it, or all there are.

    >>> [measured_batches(size) for size in (1, 2, 3, 100)]
    [(1,), (1, 2), (1, 3), (25, 50)]
    """
    chosen = {max(1, batch_size // 4), max(1, batch_size // 2)}
    return tuple(sorted(chosen if len(chosen) == 2 else chosen | {batch_size}))


def step_seconds(points: Sequence[tuple[int, float]], batch_size: int) -> float:
    """Seconds of a step at a batch size, on the straight line through two measured points.

    Never less than what a smaller batch took: where noise makes the line fall, that is the prediction.

    >>> step_seconds([(10, 2.0), (20, 3.0)], 40)
    5.0
    >>> step_seconds([(10, 2.0), (20, 1.9)], 40)
    2.0
    """
    known = dict(points)
    if batch_size in known:
        return known[batch_size]
    (one, first), (other, second) = points
    line = first + (batch_size - one) * (second - first) / (other - one)
    return max(line, *(seconds for size, seconds in points if size < batch_size), 0.0)


def with_rate(row: FitRow, sizes: Sizes) -> FitRow:
    """The row with its rate: its grouping is measured at two batches, each in a fresh process.

    Its ``timings`` tell of both, and ``examples_per_second`` is at the row's batch, ``measured`` or ``predicted``; a
    step is of all its micro-batches.

    Args:
        row: of :func:`groupsearch.fit.fit_rows`, with a size above 0.
        sizes: the traces it comes from.

    Raises:
        GroupSearchError: when a measurement fails.
    """
    trace, setup = sizes.at(row.size), sizes.setup_at(row.size)
    grouping = None if row.boundaries is None or trace is None else Grouping(row.boundaries, trace.sites)
    timings = []
    for examples in measured_batches(row.batch_size):
        measured = measure_peak(setup.workload, grouping, settings={**setup.settings, BATCH: examples}, **setup.how)
        timings.append(Timing.from_json({BATCH: examples, **asdict(measured)}))
    found = rate(timings, row.batch_size, setup.micro_batches)
    return replace(row, timings=tuple(timings), examples_per_second=found)


def rate(timings: Sequence[Timing], batch_size: int, micro_batches: int = 1) -> Rate:
    """Examples per second from a row's timings: the value, the batch it is for, and its source."""
    points = [(timing.batch_size, timing.step_seconds) for timing in timings]
    value = micro_batches * batch_size / step_seconds(points, batch_size)
    return Rate(value=value, batch_size=batch_size, source="measured" if batch_size in dict(points) else "predicted")
