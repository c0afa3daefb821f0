"""What an allocator makes of the estimates: births and deaths of real models replayed for a card that is not there.

Run with ``python -m benchmarks.reserved [--output PATH] [--models NAME ...]``, then
``python -m tests.support.memory_page`` for the table of docs/memory.md. Every number comes from one step traced on fake
tensors as ``--device cuda:h100`` traces it (Adam by lists), and from the model of torch's caching allocator; nothing
was run on a GPU. A document that is there already keeps the rows that are not named.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import environment
from benchmarks.evidence import MODELS as EVIDENCE
from groupsearch.plan.grouping import named_groupings
from groupsearch.plan.memory import peak_memory
from groupsearch.plan.partition import front
from groupsearch.plan.reserved import Rules, replay_memory
from groupsearch.plan.trace import Trace
from groupsearch.records import document_text, write_text
from groupsearch.verify import Setup

OUTPUT = Path("profiles/reserved-cpu.json")
DEVICE = "cuda:h100"
MODELS = {
    "GPT-2 small": ("GPT-2 small", "none"),
    "RoBERTa base": ("RoBERTa base", "none"),
    "ViT-B/16, checkpointed": ("ViT-B/16", "blocks"),
    "ResNet-50 with GroupNorm": ("ResNet-50 with GroupNorm", "none"),
}
RULES = {"segments": Rules(), "expandable": Rules(expandable=True)}
Row = Mapping[str, Any]


def setup_of(name: str) -> Setup:
    """The step of one row."""
    model, checkpoint = MODELS[name]
    found = EVIDENCE[model]
    length = {} if found.sequence_length is None else {"sequence_length": found.sequence_length}
    settings = {"batch_size": found.batch_size, **length}
    return Setup(found.workload, settings, checkpoint=checkpoint, device=DEVICE)


def figures(trace: Trace) -> dict[str, Any]:
    """Per grouping the estimate, and what an allocator hands out and holds, with segments and with expandable ones."""
    groupings: dict[str, Sequence[int] | None] = {"non-private": None}
    groupings |= {name: found.boundaries for name, found in named_groupings(trace, (4,)).items()}
    groupings |= {"floor": front(trace)[-1][0]}
    return {"groupings": list(_rows(trace, groupings)), "sites": trace.length, "unprobed": list(trace.unprobed)}


def _rows(trace: Trace, groupings: Mapping[str, Sequence[int] | None]) -> Iterator[dict[str, Any]]:
    for name, boundaries in groupings.items():
        peak = trace.nonprivate_peak_bytes if boundaries is None else peak_memory(trace, boundaries).peak_bytes
        held = {kind: replay_memory(trace, boundaries, rules) for kind, rules in RULES.items()}
        found = {f"{kind}_{part}_bytes": getattr(h, f"{part}_bytes") for kind, h in held.items() for part in PARTS}
        yield {"grouping": name, "estimate_bytes": peak, **found}


PARTS = ("allocated", "reserved")


def write(path: Path, name: str, row: Row) -> None:
    """Renew one row of the document."""
    rows = {r["model"]: r for r in json.loads(path.read_text(encoding="utf-8"))["rows"]} if path.exists() else {}
    rows[name] = row
    document = {
        "schema_version": 1,
        "kind": "reserved-benchmark",
        "level": f"one step traced on fake tensors for {DEVICE}, replayed through a model of torch's caching allocator",
        "command": "python -m benchmarks.reserved",
        "optimizer": "adam:foreach",
        "environment": environment(),
        "rows": [rows[name] for name in MODELS if name in rows],
    }
    write_text(path, document_text(document) + "\n", force=True)


def main(arguments: list[str]) -> int:
    """Trace and replay every model, and write the document after each of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reserved", description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"the document; {OUTPUT} if not given")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args(arguments)
    for name in options.models:
        begin, setup = time.perf_counter(), setup_of(name)
        row = {"model": name, "batch_size": setup.loaded.batch_size, **figures(setup.trace())}
        write(options.output, name, row)
        print(f"{name:<26} {time.perf_counter() - begin:5.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
