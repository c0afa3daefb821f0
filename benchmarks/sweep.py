"""The two-group boundary at every position: peak memory of this engine and of fastDP's buffers by formula.

Run with ``python -m benchmarks.sweep [--output PATH] [--models NAME ...]``. The sizes are those of the memory
figures of arXiv 2310.19215: RoBERTa on QNLI (256 tokens, micro-batches of 40) and ViT on CIFAR (224 x 224,
micro-batches of 50), here in float32 with Adam on fake CPU tensors.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.accuracy import environment
from benchmarks.buffers import held_by, peak_bytes
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import cost_table, peaks
from groupsearch.plan.partition import floor_bytes
from groupsearch.plan.trace import Trace
from groupsearch.records import document_text, write_text
from groupsearch.verify import Setup

OUTPUT = Path("profiles/sweep-cpu.json")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "RoBERTa base": ("hf:roberta-base", {"batch_size": 40, "sequence_length": 256, "num_labels": 2}),
    "RoBERTa large": ("hf:roberta-large", {"batch_size": 40, "sequence_length": 256, "num_labels": 2}),
    "ViT-B/16": ("hf:google/vit-base-patch16-224", {"batch_size": 50}),
    "ViT-L/16": ("hf:google/vit-large-patch16-224", {"batch_size": 50}),
}
ATTENTION = ("sdpa", "eager")
CHECKPOINT = ("none", "blocks")


def curve(name: str, attention: str, checkpoint: str) -> tuple[list[str], dict[str, Any]]:
    """Names of one model's sites, and its peaks at every position of the boundary."""
    text, settings = MODELS[name]
    setup = Setup(text, {**settings, "attn_implementation": attention}, checkpoint=checkpoint)
    begin = time.process_time()
    trace = setup.trace()
    held = held_by(setup.loaded, trace)
    cuts = [(b,) for b in range(1, trace.length)]
    print(f"{name:<14} {attention:<6} {checkpoint:<7} {time.process_time() - begin:6.1f} s", flush=True)
    one_hot_bytes = max(site.one_hot_bytes for site in held)
    without = [peak_bytes(trace, held, cut, one_hot=False) for cut in cuts] if one_hot_bytes else []
    return [site.name for site in trace.sites], {
        "model": name,
        "workload": text,
        "settings": settings,
        "attention": attention,
        "checkpoint": checkpoint,
        "block_boundaries": block_edges(trace),
        "nonprivate_peak_bytes": trace.nonprivate_peak_bytes,
        "outside_bytes": cost_table(trace).outside_bytes,
        "floor_bytes": floor_bytes(trace),
        "one_hot_bytes": one_hot_bytes,
        "all_layer_bytes": whole(trace),
        "ours_bytes": [int(b) for b in peaks(trace, cuts)],
        "fastdp_all_layer_bytes": peak_bytes(trace, held, ()),
        "fastdp_bytes": [peak_bytes(trace, held, cut) for cut in cuts],
        **({"fastdp_without_one_hot_bytes": without} if without else {}),
    }


def whole(trace: Trace) -> int:
    """The peak of all-layer clipping."""
    return int(peaks(trace, [Grouping.all_layer(trace)])[0])


def block_edges(trace: Trace) -> list[int]:
    """The boundary before the first site of each repeated block: entry k is the boundary below block k."""
    edges = [0, *trace.block_boundaries]
    return [b for b in edges if trace.sites[b].block != trace.sites[b].layer]


def main(arguments: list[str]) -> int:
    """Sweep every model and write the document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"the document; {OUTPUT} if not given")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args(arguments)
    sites: dict[str, list[str]] = {}
    curves: list[dict[str, Any]] = []
    for name in options.models:
        for how in ATTENTION:
            for again in CHECKPOINT:
                sites[name], found = curve(name, how, again)
                curves.append(found)
    document = {
        "schema_version": 1,
        "kind": "sweep-benchmark",
        "level": "estimate from one step traced on fake tensors; fastdp by formula",
        "optimizer": "adam",
        "environment": environment(),
        "sites": sites,
        "curves": curves,
    }
    write_text(options.output, document_text(document) + "\n", force=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
