"""Whether what ``groupsearch fit`` names fits, and 5 % more does not: measured in fresh processes, on real tensors.

Run with ``python -m benchmarks.fit [--output PATH] [--models NAME ...]``. Six models, plain and (where they
have blocks) checkpointed; non-private training, all-layer and the fewest groups that reach the largest batch.
Nothing is random but the weights, whose seed is fixed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groupsearch.documents.rows import FitRow
from groupsearch.fit import BATCH, MARGIN, Room, Sizes, fit_rows
from groupsearch.measure import measure_peak
from groupsearch.plan.grouping import Grouping
from groupsearch.records import document_text, environment
from groupsearch.units import format_bytes, parse_bytes
from groupsearch.verify import Setup

MODELS = {
    "digits-vit": "12MiB",
    "digits-cnn": "24MiB",
    "stdlib-gpt": "96MiB",
    "gpt2": "48MiB",
    "bert": "48MiB",
    "vit": "48MiB",
}
"""The models and the memory each is given."""
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 400, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "bert": {"model_type": "bert", "vocab_size": 400, "hidden_size": 48, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "intermediate_size": 192, "max_position_embeddings": 64},
    "vit": {"model_type": "vit", "image_size": 24, "patch_size": 4, "hidden_size": 48, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "intermediate_size": 192},
}
"""Architectures of transformers, scaled down."""
SETTINGS: dict[str, dict[str, Any]] = {
    "digits-vit": {"width": 16},
    "digits-cnn": {},
    "stdlib-gpt": {"width": 64, "blocks": 3, "context": 64},
    "gpt2": {"sequence_length": 32},
    "bert": {"sequence_length": 32},
    "vit": {},
}
LARGER = 0.05


def setup_of(model: str, checkpoint: str, folder: Path) -> Setup:
    """A model of ``MODELS`` and how its step is taken; ``config.json`` is written below ``folder``."""
    text = model
    if model in CONFIGURATIONS:
        place = folder / model
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps(CONFIGURATIONS[model]))
        text = f"hf:{place}"
    return Setup(text, {**SETTINGS[model], BATCH: 16}, checkpoint=checkpoint)


def check_row(sizes: Sizes, room: Room, row: FitRow) -> dict[str, Any]:
    """The measured peak of a row at the batch it names, and at one 5 % larger, against the memory."""
    trace = sizes.at(row.size)
    assert trace is not None
    grouping = None if row.boundaries is None else Grouping(row.boundaries, trace.sites)
    larger = max(row.size + 1, -int(-row.size * (1 + LARGER) // 1))
    setup = sizes.setup
    found = [
        measure_peak(
            setup.workload, grouping, settings={**setup.settings, BATCH: size}, steps=1, **setup.how
        ).peak_bytes
        for size in (row.size, larger)
    ]
    return {
        **{key: getattr(row, key) for key in ("grouping", "groups", "boundaries", BATCH, "peak_bytes")},
        "checkpoint": setup.checkpoint,
        "memory_bytes": room.memory_bytes,
        "measured_bytes": found[0],
        "within": found[0] <= room.memory_bytes,
        "larger_batch_size": larger,
        "larger_measured_bytes": found[1],
        "larger_within": found[1] <= room.memory_bytes,
    }


def main(arguments: list[str]) -> int:
    """Check every row, print a table, and write the document where asked; 1 when a row is not right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit", description=__doc__)
    parser.add_argument("--output", type=Path, help="where to write the JSON document")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args(arguments)
    begin, rows = time.perf_counter(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            for checkpoint in ("none",) if model == "digits-cnn" else ("none", "blocks"):
                sizes, room = Sizes(setup_of(model, checkpoint, Path(folder))), Room(parse_bytes(MODELS[model]))
                for row in fit_rows(sizes, room, ("all-layer",)):
                    rows.append({"model": model, **check_row(sizes, room, row)})
                    _print_row(rows[-1])
            if options.output is not None:  # after every model, since a later one may fail
                options.output.write_text(document_text(_document(rows, time.perf_counter() - begin)) + "\n")
    summary = _document(rows, 0.0)["summary"]
    print(f"{summary['right']} of {summary['rows']} rows are right")
    return int(summary["right"] < summary["rows"])


def _document(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    right = sum(row["within"] and not row["larger_within"] for row in rows)
    return {
        "schema_version": 1,
        "kind": "fit-benchmark",
        "environment": environment(),
        "configurations": CONFIGURATIONS,
        "settings": SETTINGS,
        "margin": MARGIN,
        "seconds": seconds,
        "summary": {"rows": len(rows), "right": right},
        "rows": rows,
    }


def _print_row(row: Mapping[str, Any]) -> None:
    verdict = "right" if row["within"] and not row["larger_within"] else "WRONG"
    found = f"{row[BATCH]:6d} {format_bytes(row['measured_bytes']):>10}"
    more = f"{row['larger_batch_size']:6d} {format_bytes(row['larger_measured_bytes']):>10}"
    label = f"{row['model']:<11} {row['checkpoint']:<7} {row['grouping']:<12}"
    print(f"{label} {format_bytes(row['memory_bytes']):>9}: {found}, {more}  {verdict}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
