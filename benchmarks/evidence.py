"""What grouping buys for the models that people train: estimates at real sizes, without their weights.

Run with ``python -m benchmarks.evidence [--output PATH] [--models NAME ...] [--autocast DTYPE ...]``. Every
number comes from one traced step on fake tensors; a document that is there already keeps the rows that are not named.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.accuracy import environment
from benchmarks.realistic import MODELS
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import peak_memory
from groupsearch.plan.partition import floor_bytes, front
from groupsearch.plan.trace import Trace
from groupsearch.records import document_text, write_text
from groupsearch.report.finding import NEAR_FLOOR, finding, parts

OUTPUT = Path("profiles/evidence-cpu.json")
AUTOCAST = ("none", "bfloat16")
CHECKPOINT = ("none", "blocks")
GROUPS = (2, 4, 8)
KEYS = ("model", "autocast", "checkpoint")
Row = Mapping[str, Any]


def rows_of(part: tuple[str, str]) -> list[dict[str, Any]]:
    """One row for each checkpointing of a model in one precision."""
    return [row_of(*part, checkpoint) for checkpoint in CHECKPOINT]


def row_of(name: str, autocast: str, checkpoint: str) -> dict[str, Any]:
    """What the groupings of one model need when its step is taken in one way."""
    model = MODELS[name]
    begin, cpu = time.perf_counter(), time.process_time()
    setup = model.setup(autocast, checkpoint)
    trace = setup.trace()
    row = {
        "model": name,
        "workload": model.workload,
        "batch_size": model.batch_size,
        "given": model.given,
        "autocast": autocast,
        "checkpoint": checkpoint,
        "parameters": setup.describe_model()["parameters"],
        **figures(trace),
        "unprobed": list(trace.unprobed),
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }
    print(f"{name:<26} {autocast:<9} {checkpoint:<7} {row['cpu_seconds']:6.1f} s  {finding(trace)}", flush=True)
    return row


def figures(trace: Trace) -> dict[str, Any]:
    """Peaks of the groupings worth naming, and what they mean."""
    floor, best = floor_bytes(trace), front(trace)
    whole = peak_memory(trace, Grouping.all_layer(trace))
    fewest = next(cuts for cuts, peak_bytes in best if peak_bytes <= NEAR_FLOOR * floor)
    left = peak_memory(trace, fewest)
    within = {str(m): min(peak for _, peak in best[:m]) for m in GROUPS}
    return {
        "sites": trace.length,
        "nonprivate_peak_bytes": trace.nonprivate_peak_bytes,
        "all_layer_bytes": whole.peak_bytes,
        "layer_wise_bytes": peak_memory(trace, Grouping.layer_wise(trace)).peak_bytes,
        "layers": len(trace.layer_boundaries) + 1,
        "at_most_groups_bytes": within,
        "floor_bytes": floor,
        "groups_at_floor": len(fewest) + 1,
        "boundaries_at_floor": list(fewest),
        "where": {"all-layer": whole.where, "floor": left.where},
        "largest_at_floor": [part.name for part in parts(trace, left) if part.size_bytes >= left.peak_bytes / 10],
    }


def merged(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The rows with those in ``new`` replaced or added, in the order of :func:`wanted`."""
    found = {_key(row): row for row in (*rows, *new)}
    return [found[key] for key in wanted() if key in found]


def wanted() -> list[tuple[str, ...]]:
    """(model, autocast, checkpoint) of every row of a whole document."""
    return list(product(MODELS, AUTOCAST, CHECKPOINT))


def write(path: Path, new: Sequence[Row]) -> None:
    """Renew some rows of a document, and list those that it does not have."""
    rows = merged(json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else [], new)
    missing = set(wanted()) - {_key(row) for row in rows}
    document = {
        "schema_version": 1,
        "kind": "evidence-benchmark",
        "level": "estimate from one step traced on fake tensors",
        "optimizer": "adam",
        "environment": environment(),
        "left_out": [dict(zip(KEYS, key, strict=True)) for key in wanted() if key in missing],
        "rows": rows,
    }
    write_text(path, document_text(document) + "\n", force=True)


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[key] for key in KEYS)


def main(arguments: list[str]) -> int:
    """Trace every model and write the document, after each of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"the document; {OUTPUT} if not given")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--autocast", nargs="+", choices=AUTOCAST, default=AUTOCAST)
    options = parser.parse_args(arguments)
    # A process for each part: what one has probed is not counted as probed for the next.
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for rows in pool.imap(rows_of, product(options.models, options.autocast)):
            write(options.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
