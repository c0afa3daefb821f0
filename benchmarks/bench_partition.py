"""Time of the memory model and the partition solver: ``python -m benchmarks.bench_partition``.

Every row is the median of several runs, as seconds and as a ratio to its target; a ratio above one is a
missed target. Traces and groupings are random with fixed seeds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from groupsearch.plan.memory import cost_table, lifetimes, peak_memory, peaks
from groupsearch.plan.partition import fewest_groups, floor_bytes, least_peak
from groupsearch.records import document_text, write_text
from groupsearch.units import format_count, format_ratio, format_seconds
from tests.support.strategies import random_trace

MILLION = 1_000_000


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of one call, with nothing kept from the call before."""
    seconds = []
    for _ in range(repeats):
        cost_table.cache_clear()
        lifetimes.cache_clear()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def cases() -> list[tuple[str, float, Callable[[], object]]]:
    """(what, target in seconds, the work); the table is made anew in every one."""
    small, large = random_trace(100, seed=1), random_trace(1000, seed=1)
    rng = np.random.default_rng(0)
    sparse, dense = rng.random((MILLION, 99)) < 0.05, rng.random((MILLION, 99)) < 0.5
    floor = floor_bytes(large)
    return [
        ("table of 100 sites", 0.1, lambda: cost_table(small)),
        ("table of 1,000 sites", 3.0, lambda: cost_table(large)),
        ("one estimate with its breakdown, 100 sites, all-layer", 0.1, lambda: peak_memory(small, ())),
        (f"peaks of {format_count(MILLION)} groupings of 100 sites, one cut in 20", 5.0, lambda: peaks(small, sparse)),
        (f"peaks of {format_count(MILLION)} groupings of 100 sites, one cut in 2", 5.0, lambda: peaks(small, dense)),
        ("least peak of 1 to 20 groups of 1,000 sites", 2.0, lambda: [least_peak(large, m) for m in range(1, 21)]),
        ("fewest groups at the floor of 1,000 sites", 2.0, lambda: fewest_groups(large, floor)),
    ]


def main() -> None:
    """Print every row and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="runs per row; the median counts")
    parser.add_argument("--output", type=Path, help="write the rows as JSON to this file")
    arguments = parser.parse_args()
    rows = []
    for name, target_seconds, work in cases():
        seconds = median_seconds(work, arguments.repeats)
        ratio = seconds / target_seconds
        rows.append({"name": name, "seconds": seconds, "target_seconds": target_seconds, "ratio": ratio})
        print(
            f"{name}: {format_seconds(seconds)}, {format_ratio(ratio)} of {format_seconds(target_seconds)}", flush=True
        )
    if arguments.output:
        environment = {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
        write_text(arguments.output, document_text({"environment": environment, "rows": rows}) + "\n", force=True)


if __name__ == "__main__":
    main()
