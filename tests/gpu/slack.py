"""How much of a card's memory ``groupsearch fit`` must leave free: what it names is run under a real limit.

Run with ``python -m tests.gpu.slack OUTPUT [--device DEVICE] [--memory SIZE]``. For 1, 2, 5 and 10 % of the limit left
to the allocator's segments: the largest batch that is estimated to fit, and whether two steps of it run. The smallest
share with which all run is the margin that a CUDA device asks for. A line is written after every run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from benchmarks.fit import setup_of
from groupsearch.fit import BATCH, Room, Sizes, fit_rows
from groupsearch.units import parse_bytes
from groupsearch.verify import Setup
from tests.gpu.limited_step import RAN, step_under_limit
from tests.gpu.lines import Lines

SLACK = (0.01, 0.02, 0.05, 0.1)
MODELS = {"stdlib-gpt": {"context": 256, "width": 256, "blocks": 4}, "vit": {}}
SMALL = {"digits-vit": {}}
CHECKPOINT = {"stdlib-gpt": "blocks", "vit": "none", "digits-vit": "none"}


def main(arguments: Sequence[str]) -> int:
    """Run what is not there; 1 where a batch did not run though a tenth was left free."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.slack", description=__doc__)
    parser.add_argument("output", type=Path, help="one line a run; what is there is not run again")
    parser.add_argument("--device", default="cuda", help="a torch device; on the CPU there is no limit")
    parser.add_argument("--memory", type=parse_bytes, default="4GiB", help="the limit")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no run begins after that")
    parser.add_argument("--small", action="store_true", help="a small model and one share, as a rehearsal")
    options = parser.parse_args(arguments)
    lines, begin = Lines(options.output, ("model", "grouping", "slack"), options.device), time.monotonic()
    models, shares = (SMALL, SLACK[-1:]) if options.small else (MODELS, SLACK)
    with tempfile.TemporaryDirectory() as folder:
        for model, larger in models.items():
            small = setup_of(model, CHECKPOINT[model], Path(folder))
            settings = {**small.settings, **larger, BATCH: 8 if options.small else 64}
            setup = Setup(small.workload, settings, checkpoint=CHECKPOINT[model], device=options.device)
            sizes = Sizes(setup)
            for slack in reversed(shares):
                if time.monotonic() - begin > options.seconds:
                    return 0
                room = Room(options.memory, margin=slack, **({"limit": 12} if options.small else {}))
                _run(lines, model, sizes, room, most=2 if options.small else None)
    worst = [row for row in lines.rows if row["slack"] == max(shares)]
    return int(any(row["outcome"] != RAN for row in worst))


def _run(lines: Lines, model: str, sizes: Sizes, room: Room, most: int | None) -> None:
    for row in islice(fit_rows(sizes, room, ("all-layer",)), most):
        key = {"model": model, "grouping": row.grouping, "slack": room.margin}
        if lines.has(**key) or not row.size:
            continue
        begin, setup = time.monotonic(), sizes.setup
        how = {"boundaries": row.boundaries, "optimizer": "adam", "checkpoint": setup.checkpoint}
        settings = {**setup.settings, BATCH: row.size}
        outcome = step_under_limit(room.memory_bytes, setup.workload, settings, device=setup.device, **how)
        figures = {"batch_size": row.size, "estimate_bytes": row.peak_bytes, "memory_bytes": room.memory_bytes}
        lines.add({**key, **figures, "outcome": outcome, "seconds": round(time.monotonic() - begin, 2)})
        print(f"{model:<11} {row.grouping:<12} {room.margin:5.1%} free: batch {row.size:>5} {outcome}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
