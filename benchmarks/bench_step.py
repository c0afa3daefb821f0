"""Seconds of one training step: ours, all-layer and layer-wise, against non-private and Opacus' ghost mode.

Run with ``python -m benchmarks.bench_step [--output PATH] [--rounds N] [--device cuda] [--autocast bfloat16]``.
All sides take turns in one process, so that a busy machine slows them alike; medians and their ratios are what to
read. Each side has its own copy of the model, Adam, the same batch and, where it is private, the same threshold and
noise. On a GPU a further side looks at the numbers of every group, as the engine does on a CPU: what waiting costs. One
more step of every side, after the clock has stopped, is profiled for how much it launches. The document is written
after every model, and a model that it has is not timed again. What a machine lacks (Opacus) is told and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.accuracy import version_of
from groupsearch.engine import make_private
from groupsearch.engine.arithmetic import as_on
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.records import document_text, write_text
from groupsearch.tracer.sites import observe_sites
from groupsearch.workloads import load_workload
from groupsearch.workloads.workload import Workload

MODELS: dict[str, dict[str, Any]] = {
    "digits-vit": {},
    "stdlib-gpt": {"blocks": 4},
    "hf:gpt2": {"batch_size": 8, "sequence_length": 512},
    "hf:google/vit-base-patch16-224": {"batch_size": 50},
}
SMALL = ("digits-vit", "stdlib-gpt")
"""What a CPU times; on a GPU they show Python's speed and not the card's."""
NOISE_MULTIPLIER, MAX_GRAD_NORM, LEARNING_RATE = 1.0, 1.0, 1e-3
LIMIT = 1.6
Step = Callable[[], None]


def casting(workload: Workload, autocast: str) -> Workload:
    """The workload with its loss cast."""
    if autocast == "none":
        return workload

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(next(iter(batch.values())).device.type, getattr(torch, autocast)):
            return workload.loss(model, batch)

    return replace(workload, loss=loss)


def plain_step(workload: Workload, batch: Mapping[str, Tensor]) -> Step:
    """The step without privacy."""
    model = _model(workload, batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        workload.loss(model, batch).mean().backward()
        optimizer.step()

    return step


def our_step(workload: Workload, batch: Mapping[str, Tensor], layer_wise: bool) -> Step:
    """The same loop with the engine attached."""
    model = _model(workload, batch)
    sites = tuple(observe_sites(model, batch, workload.loss))
    cuts = tuple(b for b in range(1, len(sites)) if sites[b].layer != sites[b - 1].layer)
    plan = ClipPlan(Grouping(cuts if layer_wise else (), sites), MAX_GRAD_NORM)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    make_private(model, optimizer, plan, noise_multiplier=NOISE_MULTIPLIER, expected_batch_size=_batch_size(batch))

    def step() -> None:
        optimizer.zero_grad()
        workload.loss(model, batch).mean().backward()
        optimizer.step()

    return step


def looking(step: Step) -> Step:
    """The step with the habits of a CPU: whether every group is finite is looked at, and copies are small."""

    def run() -> None:
        with as_on("cpu"):
            step()

    return run


def launches(step: Step, device: str) -> dict[str, int]:
    """Calls of CUDA's runtime in one step, by name; on a CPU the operations there were."""
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.startswith("cuda") else [])]
    with profile(activities=activities) as profiler:
        step()
    names = [event.name() for event in profiler.profiler.kineto_results.events()]
    found = Counter(name for name in names if name.startswith(("cuda", "cuLaunch")))
    return dict(found) if device.startswith("cuda") else {"aten": sum(name.startswith("aten::") for name in names)}


def opacus_step(workload: Workload, batch: Mapping[str, Tensor], adapted: bool) -> Step:
    """Opacus' ghost mode: two backward passes, flat clipping.

    Args:
        workload: the model and its loss.
        batch: one batch.
        adapted: expand ids that an Embedding gets as one row for all examples, which Opacus
            cannot take; the model computes the same.
    """
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    model = _model(workload, batch)
    size = _batch_size(batch)
    if adapted:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(lambda _, args: (args[0].expand(size, -1).contiguous(),))
    wrapped: Any = GradSampleModuleFastGradientClipping(
        model, batch_first=True, loss_reduction="mean", max_grad_norm=MAX_GRAD_NORM, use_ghost_clipping=True
    )
    optimizer: Any = DPOptimizerFastGradientClipping(
        torch.optim.Adam(model.parameters(), lr=LEARNING_RATE),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=MAX_GRAD_NORM,
        expected_batch_size=size,
    )

    def step() -> None:
        optimizer.zero_grad()
        losses = workload.loss(wrapped, batch)
        DPTensorFastGradientClipping(wrapped, optimizer, losses, "mean").backward()
        optimizer.step()

    return step


def seconds_of(sides: Mapping[str, Step], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of every step, the sides taking turns; two unmeasured rounds come first."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for number in range(rounds + 2):
        for name, step in sides.items():
            synchronize()
            begin = time.perf_counter()
            step()
            synchronize()
            if number >= 2:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def bench(name: str, rounds: int, device: str = "cpu", autocast: str = "none") -> dict[str, Any]:
    """One model's row: medians, ratios, and whether the limit is kept."""
    workload = casting(load_workload(name, **MODELS[name]), autocast)
    batch = {key: tensor.to(device) for key, tensor in workload.make_batch(workload.batch_size).items()}
    sides = {
        "non-private": plain_step(workload, batch),
        "all-layer": our_step(workload, batch, layer_wise=False),
        "layer-wise": our_step(workload, batch, layer_wise=True),
    }
    if device.startswith("cuda"):
        sides["layer-wise, looking"] = looking(sides["layer-wise"])
    ghost, note = _working_ghost_step(workload, batch)
    if ghost is not None:
        sides["opacus-ghost"] = ghost
    seconds = seconds_of(sides, rounds, device)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "model": {"name": name, "batch_size": workload.batch_size, **dict(workload.settings)},
        "median_seconds": medians,
        "least_seconds": {side: min(values) for side, values in seconds.items()},
        "ratio_to_non_private": {side: value / medians["non-private"] for side, value in medians.items()},
        "autocast": autocast,
        "launches": {side: launches(step, device) for side, step in sides.items() if side != "layer-wise, looking"},
        "opacus_note": note,
        "seconds": seconds,
    }


def _working_ghost_step(workload: Workload, batch: Mapping[str, Tensor]) -> tuple[Step | None, str]:
    """Opacus' step on the model as it is, else adapted, else none; and what happened."""
    failures = []
    for adapted in (False, True):
        try:
            step = opacus_step(workload, batch, adapted)
            step()
        except Exception as error:  # whatever a foreign engine raises is part of the result
            failures.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        if failures:
            return step, f"ran with ids expanded over the batch; on the model as it is: {failures[0]}"
        return step, "ran on the model as it is"
    return None, f"does not run: {'; '.join(failures)}"


def _model(workload: Workload, batch: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model, made where the batch is."""
    device = next(iter(batch.values())).device
    with device:
        return workload.build().to(device).train()


def _batch_size(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def environment(device: str) -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opacus": version_of("opacus"),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _report(row: Mapping[str, Any]) -> None:
    print(f"{row['model']['name']} (batch {row['model']['batch_size']}); Opacus {row['opacus_note']}")
    for side, median in row["median_seconds"].items():
        ratio = row["ratio_to_non_private"][side]
        print(f"  {side:<12} {median * 1e3:8.1f} ms  {ratio:5.2f}x non-private")
    ours, ghost = row["ratio_to_non_private"]["all-layer"], row["ratio_to_non_private"].get("opacus-ghost")
    print(f"  all-layer within {LIMIT}x: {'yes' if ours <= LIMIT else 'NO'}", end="")
    print(f"; launches {row['launches']}", end="")
    print("" if ghost is None else f"; faster than Opacus' ghost mode: {'yes' if ours < ghost else 'NO'}")


def main(arguments: list[str]) -> None:
    """Measure, print, and write the document where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_step", description=__doc__)
    parser.add_argument("--output", type=Path, help="where to write the JSON document")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of every side")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(SMALL))
    parser.add_argument("--autocast", choices=("none", "bfloat16"), default="none", help="what forward is cast to")
    parser.add_argument("--device", default="cpu", help="a torch device: cpu, cuda, cuda:1")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    document = {"schema_version": 1, "kind": "step-benchmark", "rows": []}
    document["environment"] = environment(options.device)
    if options.output is not None and options.output.exists():
        found = json.loads(options.output.read_text())
        document = found if found["environment"] == document["environment"] else document
    done = [(row["model"]["name"], row.get("autocast", "none")) for row in document["rows"]]
    for name in options.models:
        if (name, options.autocast) in done:
            continue
        document["rows"].append(bench(name, options.rounds, options.device, options.autocast))
        _report(document["rows"][-1])
        if options.output is not None:
            write_text(options.output, document_text(document) + "\n", force=True)


if __name__ == "__main__":
    main(sys.argv[1:])
