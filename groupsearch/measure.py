"""The third level: the engine on the device, in a fresh process per number.

Run as a program it is that process: it reads one request as JSON from standard input and writes
one result to standard output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch

from groupsearch.clipping import ClipPlan
from groupsearch.engine import make_private
from groupsearch.errors import GroupSearchError
from groupsearch.grouping import Grouping
from groupsearch.options import EngineOptions
from groupsearch.trace import Site, weights_with_choice
from groupsearch.tracer.profiled import profiled_peak
from groupsearch.tracer.step import Stage, StepSettings, make_stage, real_copy
from groupsearch.workloads import load_workload

CPU_METRIC = "torch.profiler memory events + static tensors"
CUDA_METRIC = "torch.cuda.max_memory_allocated"


@dataclass(frozen=True)
class Measurement:
    """What one process measured.

    Attributes:
        peak_bytes: peak of one step: tensors alive throughout and everything allocated in it.
        step_seconds: median wall-clock time of a step, without the profiler.
        metric: how the peak was taken.
        reserved_bytes: what the caching allocator had reserved, on a GPU; None elsewhere.
    """

    peak_bytes: int
    step_seconds: float
    metric: str
    reserved_bytes: int | None = None


def measure_peak(
    workload: str,
    grouping: Grouping | None,
    *,
    settings: Mapping[str, Any] | None = None,
    options: EngineOptions | None = None,
    optimizer: str = "adam",
    checkpoint: str = "none",
    micro_batches: int = 1,
    autocast: str = "none",
    device: str = "cpu",
    steps: int = 5,
) -> Measurement:
    """Measure one step of a workload on a device, in a fresh process.

    Args:
        workload: text that :func:`groupsearch.load_workload` understands.
        grouping: the groups; None measures non-private training.
        settings: of the workload, ``batch_size`` among them.
        options: of the engine.
        optimizer: name of the optimizer.
        checkpoint: ``none``, ``blocks`` or ``every:K``.
        micro_batches: how many batches are accumulated before the optimizer's step.
        autocast: ``none``, ``bfloat16`` or ``float16``.
        device: a torch device.
        steps: timed steps; the median is reported.

    Raises:
        GroupSearchError: when the process failed; the message ends with what it said.
    """
    step = StepSettings(options or EngineOptions(), optimizer, checkpoint, micro_batches, autocast)
    request = {
        "workload": workload,
        "settings": dict(settings or {}),
        "boundaries": None if grouping is None else list(grouping.boundaries),
        "sites": None if grouping is None else [asdict(site) for site in grouping.sites],
        "step": step.to_json(),
        "device": device,
        "steps": steps,
        "threads": torch.get_num_threads(),
    }
    environment = {**os.environ, "KINETO_LOG_LEVEL": "9"}
    finished = subprocess.run(
        [sys.executable, "-m", "groupsearch.measure"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if finished.returncode:
        said = finished.stderr.strip().splitlines()[-1:] or [f"exit code {finished.returncode}"]
        raise GroupSearchError(
            f"Measuring {workload} with {'no' if grouping is None else grouping.groups} groups on {device} failed: "
            f"{said[0]}. Try a smaller --batch-size, or another --device."
        )
    return Measurement(**json.loads(finished.stdout.splitlines()[-1]))


def main() -> None:
    """Measure what the request on standard input asks for."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    print(json.dumps(asdict(_measure(request))))


def _measure(request: Mapping[str, Any]) -> Measurement:
    workload = load_workload(request["workload"], **request["settings"])
    settings = StepSettings.from_json(request["step"])
    device = torch.device(request["device"])
    model, batch = real_copy(workload.build(), workload.make_batch(workload.batch_size), device, copy_model=False)
    stage = replace(make_stage(model, batch, workload.loss, settings), micro_batches=settings.micro_batches)
    with ExitStack() as stack:
        if request["boundaries"] is not None:
            stack.enter_context(_attach(stage, settings, request, workload.batch_size))
        return _on_cuda(stage, request["steps"]) if device.type == "cuda" else _on_cpu(stage, request["steps"])


def _attach(
    stage: Stage, settings: StepSettings, request: Mapping[str, Any], batch_size: int
) -> AbstractContextManager[None]:
    """Make the stage's step private, for as long as the process lives; within, all passes are of the same examples."""
    sites = tuple(Site(**{**site, "parameters": tuple(site["parameters"])}) for site in request["sites"])
    settings.options.check_weights(weights_with_choice(sites))
    engine = make_private(
        stage.model,
        stage.optimizer,
        ClipPlan(Grouping(tuple(request["boundaries"]), sites)),
        noise_multiplier=settings.noise_multiplier,
        expected_batch_size=batch_size,
        options=settings.options,
    )
    return engine.same_examples()


def _on_cpu(stage: Stage, steps: int) -> Measurement:
    peak_bytes = stage.static.total + profiled_peak(stage.step)
    return Measurement(peak_bytes, _median_seconds(stage.step, steps, lambda: None), CPU_METRIC)


def _on_cuda(stage: Stage, steps: int) -> Measurement:
    stage.step()  # libraries load, workspaces are allocated
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    stage.step()
    torch.cuda.synchronize()
    peak_bytes, reserved_bytes = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return Measurement(
        peak_bytes, _median_seconds(stage.step, steps, torch.cuda.synchronize), CUDA_METRIC, reserved_bytes
    )


def _median_seconds(step: Callable[[], None], steps: int, synchronize: Callable[[], None]) -> float:
    seconds = []
    for _ in range(steps):
        synchronize()
        begin = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


if __name__ == "__main__":
    main()
