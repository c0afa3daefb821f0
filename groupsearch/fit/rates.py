"""Examples per second at the size that fits, from two batches that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from groupsearch.fit.sizes import BATCH, Sizes
from groupsearch.grouping import Grouping
from groupsearch.measure import measure_peak

_OWN = ("workload", "settings", "given")


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


def add_rates(row: dict[str, Any], sizes: Sizes) -> None:
    """Measure a row's grouping at two batches, each in a fresh process, and put its rate into the row.

    Adds ``timings`` (``batch_size``, ``peak_bytes``, ``step_seconds``, ``metric`` of each) and
    ``examples_per_second`` at the row's batch, whose ``source`` is ``measured`` or ``predicted``; a step is of
    all its micro-batches.

    Args:
        row: of :func:`groupsearch.fit.fit_rows`, with a size above 0.
        sizes: the traces it comes from.

    Raises:
        GroupSearchError: when a measurement fails.
    """
    trace = sizes.at(row["size"])
    grouping = None if row["boundaries"] is None or trace is None else Grouping(tuple(row["boundaries"]), trace.sites)
    setup, timings = sizes.setup_at(row["size"]), []
    how = {part.name: getattr(setup, part.name) for part in fields(setup) if part.name not in _OWN}
    for examples in measured_batches(row[BATCH]):
        measured = measure_peak(setup.workload, grouping, settings={**setup.settings, BATCH: examples}, **how)
        timings.append({BATCH: examples, **asdict(measured)})
    row["timings"] = timings
    row["examples_per_second"] = rate(timings, row[BATCH], setup.micro_batches)


def rate(timings: Sequence[Mapping[str, Any]], batch_size: int, micro_batches: int = 1) -> dict[str, Any]:
    """``examples_per_second`` of a row from its timings: the value, the batch it is for, and its source."""
    points = [(timing[BATCH], timing["step_seconds"]) for timing in timings]
    return {
        "value": micro_batches * batch_size / step_seconds(points, batch_size),
        BATCH: batch_size,
        "source": "measured" if batch_size in dict(points) else "predicted",
    }
