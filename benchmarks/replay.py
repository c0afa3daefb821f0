"""What replay buys and costs: peaks at the sizes that people train, simulated, and steps of small models, timed.

``python -m benchmarks.replay --output profiles/replay-cpu.json [--rounds N] [--only peaks|steps]``

All models checkpoint every block. Peaks are those of the engine on fake tensors (``simulate_peak``), relative to the
same step without privacy. Steps take turns in one process, so that a busy machine slows them alike: medians of the
ratios to the step with the book, of processor and of wall-clock time, and each step's measured peak.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from groupsearch.engine import make_private
from groupsearch.options import EngineOptions
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.records import document_text, write_text
from groupsearch.tracer import trace_model
from groupsearch.tracer.allocator import profiled_peak
from groupsearch.units import format_bytes, format_ratio
from groupsearch.verify import Setup
from groupsearch.workloads import load_workload
from groupsearch.workloads.blocks import checkpoint_blocks, find_blocks

REAL: dict[str, dict[str, Any]] = {
    "hf:google/vit-base-patch16-224": {"batch_size": 50},
    "hf:roberta-base": {"batch_size": 40, "sequence_length": 256},
    "hf:gpt2-medium": {"batch_size": 8, "sequence_length": 512},
}
SMALL: dict[str, dict[str, Any]] = {
    "digits-vit": {"blocks": 8, "width": 128, "batch_size": 64},
    "stdlib-gpt": {"blocks": 6, "width": 256, "context": 128, "batch_size": 8},
}
GROUPINGS = ("all-layer", "best:4")


@dataclass(frozen=True)
class Peak:
    """A simulated peak, and its ratio to that of the same step without privacy."""

    model: str
    batch: int
    grouping: str
    replay: str
    peak_bytes: int
    ratio: float


@dataclass(frozen=True)
class Step:
    """A timed step: medians of ratios of times to all-layer with the book, and that of its peak to no privacy."""

    model: str
    batch: int
    step: str
    processor: float
    wall: float
    peak: float


def peaks(name: str, settings: dict[str, Any]) -> list[Peak]:
    """All-layer and four groups, with the book and with all blocks replayed."""
    setup = Setup(name, settings, checkpoint="blocks")
    trace, found = setup.trace(), []
    for text in GROUPINGS:
        grouping = Grouping.parse(trace, text)
        for replay in ("none", "all"):
            with_it = setup.with_options(EngineOptions(replay=replay))
            peak_bytes = with_it.simulate(text, grouping, trace.nonprivate_peak_bytes).peak_bytes
            ratio = round(peak_bytes / trace.nonprivate_peak_bytes, 4)
            found.append(Peak(name, setup.loaded.batch_size, text, replay, peak_bytes, ratio))
    return found


def steps(name: str, settings: dict[str, Any], rounds: int) -> list[Step]:
    """Without privacy, with the book, replayed in both forms, and layer-wise."""
    workload = load_workload(name, **settings)
    batch, model = workload.make_batch(workload.batch_size), workload.build()
    trace = trace_model(model, batch, workload.loss)

    def side(grouping: Grouping | None, replay: Any = "none") -> Callable[[], None]:
        own = copy.deepcopy(model)
        checkpoint_blocks(own)
        optimizer = torch.optim.Adam(own.parameters(), lr=1e-4)
        if grouping is not None:
            options = EngineOptions(replay=replay)
            size = workload.batch_size
            make_private(
                own, optimizer, ClipPlan(grouping), noise_multiplier=1.0, expected_batch_size=size, options=options
            )

        def step() -> None:
            optimizer.zero_grad()
            workload.loss(own, batch).mean().backward()
            optimizer.step()

        return step

    whole = Grouping.all_layer(trace)
    sides = {
        "no privacy": side(None),
        "all-layer": side(whole),
        "all-layer, replay": side(whole, "all"),
        "all-layer, replay-forward": side(whole, dict.fromkeys(find_blocks(model), "replay-forward")),
        "layer-wise": side(Grouping.layer_wise(trace)),
    }
    seconds: dict[str, list[tuple[float, float]]] = {each: [] for each in sides}
    for number in range(rounds + 1):
        for each, step in sides.items():
            begin = time.process_time(), time.perf_counter()
            step()
            if number:  # the first of each is not like the others
                seconds[each].append((time.process_time() - begin[0], time.perf_counter() - begin[1]))
    peak_bytes = {each: profiled_peak(step) for each, step in sides.items()}
    return [
        Step(
            name,
            workload.batch_size,
            each,
            *(
                round(median(a[kind] / b[kind] for a, b in zip(seconds[each], seconds["all-layer"], strict=True)), 3)
                for kind in (0, 1)
            ),
            round(peak_bytes[each] / peak_bytes["no privacy"], 3),
        )
        for each in sides
    ]


def main() -> None:
    """Measure, print as it goes, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["peaks", "steps"])
    asked = parser.parse_args()
    found: dict[str, Any] = {"kind": "replay-benchmark", "torch": torch.__version__, "machine": platform.machine()}
    found |= {"rounds": asked.rounds, "threads": torch.get_num_threads(), "peaks": [], "steps": []}
    for name, settings in REAL.items() if asked.only != "steps" else ():
        for peak in peaks(name, settings):
            found["peaks"].append(asdict(peak))
            told = f"{format_bytes(peak.peak_bytes)}, {format_ratio(peak.ratio)} of no privacy"
            print(f"{name} {peak.grouping} replay={peak.replay}: {told}", file=sys.stderr, flush=True)
    for name, settings in SMALL.items() if asked.only != "peaks" else ():
        for step in steps(name, settings, asked.rounds):
            found["steps"].append(asdict(step))
            print(
                f"{name} {step.step}: {step.processor:.2f} of the processor time with the book "
                f"({step.wall:.2f} of wall-clock), peak {step.peak:.2f} of no privacy",
                file=sys.stderr,
                flush=True,
            )
    if asked.output:
        write_text(asked.output, document_text(found) + "\n", force=True)
    else:
        print(document_text(found))


if __name__ == "__main__":
    main()
