"""What noise costs: nanoseconds a number by several ways of drawing it, and a whole training step before and after.

Run with ``python -m benchmarks.bench_noise [--output PATH] [--rounds N] [--device cuda]``. A step is the
all-layer step of ``bench_step``; "float32" is the noise of earlier versions, one ``normal_`` in float32. All sides take
turns in one process, and seconds of the process's own time stand beside those of the clock, so that a busy machine
disturbs them less; medians of the ratio of neighbours are what to read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.bench_step import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    MODELS,
    NOISE_MULTIPLIER,
    SMALL,
    Step,
    environment,
)
from groupsearch.engine import make_private, mechanism
from groupsearch.engine.mechanism import Gaussians, add_noise_
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.randomness import SecureStream, secret_generator
from groupsearch.records import document_text, write_text
from groupsearch.tracer.sites import observe_sites
from groupsearch.workloads import load_workload
from groupsearch.workloads.workload import Workload

LIMIT = 1.05
NUMBERS = 2**18


def float32_noise(tensor: Tensor, std: float, gaussians: Gaussians) -> Tensor:
    """Noise as earlier versions drew it."""
    noise = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
    return tensor.add_(noise.normal_(0.0, std, generator=gaussians.source))


def float64_normal(tensor: Tensor, std: float, gaussians: Gaussians) -> Tensor:
    """Torch's own in float64: 53 bits, up to 8.57 deviations."""
    noise = torch.empty(tensor.shape, dtype=torch.float64, device=tensor.device)
    return tensor.add_(noise.normal_(0.0, std, generator=gaussians.source))


def four_float32(tensor: Tensor, std: float, gaussians: Gaussians) -> Tensor:
    """The sum of four Gaussians that Opacus' secure mode draws (Holohan and Braghin, arXiv 2107.10138)."""
    noise = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
    for _ in range(4):
        noise += torch.empty_like(noise).normal_(0.0, std / 2, generator=gaussians.source)
    return tensor.add_(noise)


def float32_noises(tensors: Sequence[Tensor], stds: Sequence[float], gaussians: Gaussians) -> None:
    """The same for several tensors."""
    for tensor, std in zip(tensors, stds, strict=True):
        float32_noise(tensor, std, gaussians)


def step_of(workload: Workload, batch: Mapping[str, Tensor], secure: bool) -> Step:
    """An all-layer private step."""
    model = workload.build().to(next(iter(batch.values())).device).train()
    plan = ClipPlan(Grouping((), tuple(observe_sites(model, batch, workload.loss))), MAX_GRAD_NORM)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    size = len(next(iter(batch.values())))
    make_private(model, optimizer, plan, noise_multiplier=NOISE_MULTIPLIER, expected_batch_size=size, secure=secure)

    def step() -> None:
        optimizer.zero_grad()
        workload.loss(model, batch).mean().backward()
        optimizer.step()

    return step


def as_before(step: Step) -> Step:
    """The step with float32 noise."""

    def run() -> None:
        with patch.object(mechanism, "add_noises_", float32_noises):
            step()

    return run


def in_turns(sides: Mapping[str, Step], rounds: int, synchronize: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """Seconds of every side by the clock and of the process, and their median ratios to the first side."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds + 2):
        for name, step in sides.items():
            synchronize()
            begin = time.perf_counter(), time.process_time()
            step()
            synchronize()
            if number >= 2:
                seen[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    first = next(iter(seen.values()))
    return {
        name: {
            kind: {
                "median_seconds": statistics.median(row[index] for row in rows),
                "least_seconds": min(row[index] for row in rows),
                "ratio": statistics.median(a[index] / b[index] for a, b in zip(rows, first, strict=True)),
                "ratio_of_least": min(row[index] for row in rows) / min(row[index] for row in first),
            }
            for index, kind in enumerate(("wall", "cpu"))
        }
        for name, rows in seen.items()
    }


def bench_numbers(rounds: int, device: str, synchronize: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """Adding noise to one large tensor."""
    total = torch.zeros(NUMBERS, device=device)
    secret, cipher = Gaussians(secret_generator(device)), Gaussians(SecureStream(device))
    ways: dict[str, tuple[Callable[[Tensor, float, Gaussians], Tensor], Gaussians]] = {
        "float32": (float32_noise, secret),
        "ours": (add_noise_, secret),
        "ours, secure": (add_noise_, cipher),
        "normal_ in float64": (float64_normal, secret),
        "four in float32": (four_float32, secret),
    }
    sides = {name: lambda way=way, source=source: way(total, 1.0, source) for name, (way, source) in ways.items()}
    return in_turns(sides, rounds, synchronize)


def bench_model(name: str, rounds: int, device: str, synchronize: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """One model's steps."""
    workload = load_workload(name, **MODELS[name])
    batch = {key: tensor.to(device) for key, tensor in workload.make_batch(workload.batch_size).items()}
    ours, secure = (step_of(workload, batch, secure) for secure in (False, True))
    return in_turns({"float32": as_before(ours), "ours": ours, "ours, secure": secure}, rounds, synchronize)


def report(title: str, found: Mapping[str, Mapping[str, Any]], numbers: int | None = None) -> None:
    """One table."""
    print(title)
    for side, row in found.items():
        each = f"{row['cpu']['least_seconds'] / numbers * 1e9:6.1f} ns each, " if numbers else ""
        print(
            f"  {side:<20} {each}{row['cpu']['median_seconds'] * 1e3:8.2f} ms of the process, "
            f"{row['cpu']['ratio']:5.3f}x; {row['wall']['median_seconds'] * 1e3:8.2f} ms, {row['wall']['ratio']:5.3f}x"
        )


def main(arguments: list[str]) -> None:
    """Measure, print, and write the document where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_noise", description=__doc__)
    parser.add_argument("--output", type=Path, help="where to write the JSON document")
    parser.add_argument("--rounds", type=int, default=25, help="measured steps of every side")
    parser.add_argument("--models", nargs="*", choices=list(SMALL), default=list(SMALL))
    parser.add_argument("--device", default="cpu", help="a torch device: cpu, cuda, cuda:1")
    options = parser.parse_args(arguments)
    synchronize = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
    rows = {"numbers": bench_numbers(4 * options.rounds, options.device, synchronize)}
    report(f"{NUMBERS} numbers", rows["numbers"], NUMBERS)
    for name in options.models:
        rows[name] = bench_model(name, options.rounds, options.device, synchronize)
        report(name, rows[name])
        ratio = rows[name]["ours"]["cpu"]["ratio"]
        print(f"  a step within {LIMIT}x of one with float32 noise: {'yes' if ratio <= LIMIT else 'NO'}")
    if options.output is not None:
        document = {
            "schema_version": 1,
            "kind": "noise-benchmark",
            "rows": rows,
            "environment": environment(options.device),
        }
        document["load_average"] = os.getloadavg()[0]
        write_text(options.output, document_text(document) + "\n", force=True)


if __name__ == "__main__":
    main(sys.argv[1:])
