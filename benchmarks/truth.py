"""What the truth check costs before a training, and the watch within it.

Run with ``python -m benchmarks.truth [--output PATH] [--models NAME ...] [--device cuda]``. Every model has a
process of its own: first a plain step on the batch, then ``make_private`` with a sample (the check) and, taking turns,
steps that are all looked at and steps that never are. Seconds are those of the process. The watch's share is that of
its default rate.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.bench_step import environment
from groupsearch.engine import make_private
from groupsearch.engine.loading import PoissonBatches
from groupsearch.engine.private import PrivateEngine
from groupsearch.engine.truth.watch import MOST_BATCHES, RATE
from groupsearch.options import EngineOptions
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.records import document_text, write_text
from groupsearch.tracer.sites import sites_of
from groupsearch.workloads import load_workload
from groupsearch.workloads.workload import Workload

MODELS: dict[str, dict[str, Any]] = {
    "digits-vit": {"batch_size": 64},
    "hf:gpt2": {"batch_size": 4, "sequence_length": 100},
    "hf:gpt2 with LoRA": {"batch_size": 4, "sequence_length": 100},
}


def load(name: str) -> tuple[Workload, nn.Module]:
    """The workload and its model, with adapters of rank 8 on a frozen base where the name says so."""
    workload = load_workload(name.split()[0], **MODELS[name])
    model = workload.build()
    if name.endswith("LoRA"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True))  # type: ignore[assignment]
    return workload, model.train()


def clocked(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds by the clock and of the process."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def peak(device: str) -> int:
    """The most bytes so far: of the device, or of the process where that is the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def private(workload: Workload, model: nn.Module, batch: Any, **settings: Any) -> tuple[PrivateEngine, Any]:
    """A private engine on an all-layer plan, and its optimizer."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    plan = ClipPlan(Grouping((), sites_of(model, batch, workload.loss, EngineOptions())))
    return make_private(model, optimizer, plan, noise_multiplier=1.0, **settings), optimizer


def watched_steps(name: str, device: str, steps: int) -> dict[str, float]:
    """Process seconds of a step that is looked at and of one that is not: medians of steps that take turns."""

    def loop(watch: float) -> Callable[[], float]:
        workload, model = load(name)
        model.to(device)
        batch = workload.make_batch(workload.batch_size)
        many = workload.make_batch(8 * workload.batch_size)
        sampled = PoissonBatches(many, expected_batch_size=workload.batch_size, steps=steps)
        _, optimizer = private(workload, model, batch, batches=sampled, loss=workload.loss, watch=watch)
        drawn = iter(sampled)

        def step() -> float:
            optimizer.zero_grad()
            begin = time.process_time()
            count = 0
            for rows in next(drawn):
                count += len(next(iter(rows.values())))
                workload.loss(model, {key: value.to(device) for key, value in rows.items()}).mean().backward()
            optimizer.step()
            return (time.process_time() - begin) / max(count, 1)

        return step

    sides = {"looked_at": loop(1.0), "plain": loop(0.0)}
    seen: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(steps):
        for side, step in sides.items():
            seconds = step() * MODELS[name]["batch_size"]
            if number:
                seen[side].append(seconds)
    return {side: statistics.median(values) for side, values in seen.items()}


def bench(name: str, device: str, steps: int) -> dict[str, Any]:
    """One model's row."""
    workload, model = load(name)
    model.to(device)
    batch = {key: value.to(device) for key, value in workload.make_batch(workload.batch_size).items()}

    def plain() -> None:
        model.zero_grad()
        workload.loss(model, batch).mean().backward()

    plain()
    step, before = clocked(plain), peak(device)
    model.zero_grad()
    bare = clocked(lambda: private(workload, model, batch, expected_batch_size=4)[0].detach())
    traced = peak(device)
    settings = {"expected_batch_size": 4, "loss": workload.loss, "sample": batch}
    whole = clocked(lambda: private(workload, model, batch, **settings)[0].detach())
    after = peak(device)
    looks = watched_steps(name, device, steps)
    return {
        "model": {"name": name, **MODELS[name]},
        "plain_step": step,
        "check": {key: whole[key] - bare[key] for key in whole},
        "peak_bytes": {"plain step": before, "trace": traced, "check": after},
        "step_cpu_seconds": looks,
        "watch_share": RATE * min(looks["looked_at"] / looks["plain"] - 1, MOST_BATCHES),
    }


def report(row: Mapping[str, Any]) -> None:
    """One row, as lines."""
    check, step, peaks = row["check"], row["plain_step"], row["peak_bytes"]
    print(row["model"]["name"], {key: value for key, value in row["model"].items() if key != "name"})
    print(
        f"  check {check['wall_seconds']:.1f} s ({check['cpu_seconds']:.1f} s of the process), "
        f"{check['cpu_seconds'] / step['cpu_seconds']:.0f} plain steps of that batch"
    )
    print("  peak so far: " + ", ".join(f"{what} {bytes_ / 2**30:.2f} GiB" for what, bytes_ in peaks.items()))
    print(f"  the watch at its rate of {RATE}: {100 * row['watch_share']:.1f} % of a step", flush=True)


def main(arguments: list[str]) -> None:
    """Measure, print, and write the document where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.truth", description=__doc__)
    parser.add_argument("--output", type=Path, help="where to write the JSON document")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--device", default="cpu", help="a torch device: cpu, cuda, cuda:1")
    parser.add_argument("--steps", type=int, default=12, help="steps of either side for the watch")
    parser.add_argument("--child", choices=list(MODELS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(bench(options.child, options.device, options.steps)))
        return
    document = {"schema_version": 1, "kind": "truth-benchmark", "rows": [], "environment": environment(options.device)}
    command = [
        sys.executable,
        "-m",
        "benchmarks.truth",
        "--device",
        options.device,
        "--steps",
        str(options.steps),
    ]
    for name in options.models:
        done = subprocess.run([*command, "--child", name], stdout=subprocess.PIPE, text=True, check=True)
        document["rows"].append(json.loads(done.stdout.splitlines()[-1]))
        report(document["rows"][-1])
        if options.output is not None:
            write_text(options.output, document_text(document) + "\n", force=True)


if __name__ == "__main__":
    main(sys.argv[1:])
