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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn

from groupsearch.engine import PrivateEngine
from groupsearch.errors import GroupSearchError
from groupsearch.options import EngineOptions
from groupsearch.plan.cards import card_of
from groupsearch.plan.communication import Pace
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import Site
from groupsearch.tracer.allocator import profiled_peak
from groupsearch.tracer.scratch import cpu_scratch
from groupsearch.tracer.step import (
    Loss,
    Stage,
    StepSettings,
    card_stage,
    fake_stage,
    held_interrupts,
    made_private,
    make_stage,
    real_copy,
    real_stage,
)
from groupsearch.workloads import load_workload
from groupsearch.workloads.batches import count_examples

CPU_METRIC = "torch.profiler memory events + static tensors"
CUDA_METRIC = "torch.cuda.max_memory_allocated"


@dataclass(frozen=True)
class Measurement:
    """What one process measured.

    Attributes:
        peak_bytes: peak of one step: tensors alive throughout and everything allocated in it.
        step_seconds: median wall-clock time of a step, without the profiler.
        metric: how the peak was taken.
        reserved_bytes: what the caching allocator had reserved at most, on a GPU; None elsewhere.
        requested_bytes: what tensors and libraries had asked it for at most, before it rounded sizes up and
            gave larger blocks where it had no better one, on a GPU; None elsewhere.
    """

    peak_bytes: int
    step_seconds: float
    metric: str
    reserved_bytes: int | None = None
    requested_bytes: int | None = None

    @property
    def fragmentation_bytes(self) -> int | None:
        """What was reserved beyond the peak of what was allocated; None where the allocator reserves nothing."""
        return None if self.reserved_bytes is None else self.reserved_bytes - self.peak_bytes

    def beside(self) -> dict[str, int]:
        """What a document says of the allocator beside the peak, never mixed with it; nothing on the CPU."""
        found = {
            "reserved_bytes": self.reserved_bytes,
            "fragmentation_bytes": self.fragmentation_bytes,
            "requested_bytes": self.requested_bytes,
        }
        return {name: size for name, size in found.items() if size is not None}


def measure_peak(  # noqa: PLR0913 - settings by name, each with a default
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
    return Measurement(**_in_fresh_process(_request(workload, grouping, settings, step, device, steps)))


def measure_pace(
    workload: str, sites: Sequence[Site], settings: Mapping[str, Any], step: StepSettings, device: str, steps: int = 7
) -> Pace:
    """When each site of a step is closed if it is a group of its own, in a fresh process: medians over the steps.

    Raises:
        GroupSearchError: when the process failed; the message ends with what it said.
    """
    grouping = Grouping(tuple(range(1, len(sites))), tuple(sites))
    found = _in_fresh_process({**_request(workload, grouping, settings, step, device, steps), "pace": True})
    return Pace(found["step_seconds"], tuple(found["closes_seconds"]))


def _request(
    workload: str,
    grouping: Grouping | None,
    settings: Mapping[str, Any] | None,
    step: StepSettings,
    device: str,
    steps: int,
) -> dict[str, Any]:
    return {
        "workload": workload,
        "settings": dict(settings or {}),
        "boundaries": None if grouping is None else list(grouping.boundaries),
        "sites": None if grouping is None else [site.to_json() for site in grouping.sites],
        "step": step.to_json(),
        "device": device,
        "steps": steps,
        "threads": torch.get_num_threads(),
    }


def _in_fresh_process(request: Mapping[str, Any]) -> dict[str, Any]:
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
        groups = "no" if request["boundaries"] is None else len(request["boundaries"]) + 1
        said = finished.stderr.strip().splitlines()[-1:] or [f"exit code {finished.returncode}"]
        raise GroupSearchError(
            f"Measuring {request['workload']} with {groups} groups on {request['device']} failed: "
            f"{said[0]}. Try a smaller --batch-size, or another --device."
        )
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure what the request on standard input asks for."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    print(json.dumps(asdict(_measure(request))))


def _measure(request: Mapping[str, Any]) -> Measurement | Pace:
    workload = load_workload(request["workload"], **request["settings"])
    settings = StepSettings.from_json(request["step"])
    device = torch.device(request["device"])
    model, batch = real_copy(workload.build(), workload.make_batch(workload.batch_size), device, copy_model=False)
    stage = replace(make_stage(model, batch, workload.loss, settings), micro_batches=settings.micro_batches)
    with ExitStack() as stack:
        if request["boundaries"] is not None:
            grouping = Grouping(tuple(request["boundaries"]), tuple(map(Site.from_json, request["sites"])))
            engine = stack.enter_context(made_private(stage, settings, grouping, workload.batch_size))
            if request.get("pace"):
                return pace_of(stage, engine, device, request["steps"])
        return measure_step(stage, device, request["steps"])


def measure_step(stage: Stage, device: torch.device, steps: int = 5) -> Measurement:
    """Measure one step of a stage in this process, as it is: private where it was made so.

    On a CUDA device the peaks are those of everything that the process holds there, so it should hold nothing else.

    Args:
        stage: on the device.
        device: where it is.
        steps: timed steps; the median is reported.
    """
    return _on_cuda(stage, device, steps) if device.type == "cuda" else _on_cpu(stage, steps)


def pace_of(stage: Stage, engine: PrivateEngine, device: torch.device, steps: int) -> Pace:
    """The pace of a stage whose every site is a group; one that no backward pass closes by itself is closed with it."""
    sites = engine.plan.grouping.groups
    on_gpu, taken = device.type == "cuda", []
    for number in range(steps + 1):
        marks: dict[int, Any] = {}

        def mark() -> Any:
            if not on_gpu:
                return time.perf_counter()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        def closed(group: int, marks: dict[int, Any] = marks) -> None:
            marks[group] = mark()

        engine.on_close(closed)
        begin = mark()
        stage.step()
        end = mark()
        if on_gpu:
            torch.cuda.synchronize(device)
        instants = [_seconds(begin, marks[site]) if site in marks else 0.0 for site in range(sites)]
        if number:  # libraries load in the first
            taken.append((_seconds(begin, end), instants))
    closes = [median(instants[site] for _, instants in taken) for site in range(sites)]
    return Pace(median(step for step, _ in taken), tuple(each or max(closes) for each in closes))


def _seconds(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def _on_cpu(stage: Stage, steps: int) -> Measurement:
    peak_bytes = stage.static.total + profiled_peak(stage.step)
    return Measurement(peak_bytes, _median_seconds(stage.step, steps, lambda: None), CPU_METRIC)


def _on_cuda(stage: Stage, device: torch.device, steps: int) -> Measurement:
    stage.step()  # libraries load, workspaces are allocated
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    stage.step()
    torch.cuda.synchronize(device)
    statistics = torch.cuda.memory_stats(device)
    return Measurement(
        peak_bytes=statistics["allocated_bytes.all.peak"],
        step_seconds=_median_seconds(stage.step, steps, lambda: torch.cuda.synchronize(device)),
        metric=CUDA_METRIC,
        reserved_bytes=statistics["reserved_bytes.all.peak"],
        requested_bytes=statistics["requested_bytes.all.peak"],
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


# -- The second level: the real engine on fake tensors, with the grouping that is asked about ------


@held_interrupts()
def simulate_peak(  # noqa: PLR0913 - settings by name, each with a default
    model: nn.Module,
    batch: Any,
    loss: Loss,
    grouping: Grouping,
    *,
    options: EngineOptions | None = None,
    optimizer: str = "adam",
    checkpoint: str = "none",
    micro_batches: int = 1,
    autocast: str = "none",
    device: str | None = None,
) -> int:
    """Peak bytes of one private step, from the engine itself on fake tensors (CPU).

    Costs about as much time as a trace and no memory; the model is left as it is. Bytes are
    those of tensors (weights, optimizer state, batch and everything an operation allocates), and
    of scratch inside operations as :mod:`groupsearch.tracer.scratch` probes it.

    For a card that is not there (``cuda:h100``) fake tensors stand in, as for a trace. With another ``device`` the step
    is taken there on real tensors, by a copy of the model, and its bytes are counted as :func:`groupsearch.trace_model`
    counts them there.

    Raises:
        UnsupportedModelError: as :func:`groupsearch.make_private`.
        GroupSearchError: when the device is not there.
    """
    settings = StepSettings(options or EngineOptions(), optimizer, checkpoint, micro_batches, autocast)
    card = card_of(device)
    if device is not None and card is None:
        stage = real_stage(model, batch, loss, settings, torch.device(device), cpu_scratch)
        return private_peak(stage, settings, grouping, count_examples(batch))
    if card is None:
        fake, stage = fake_stage(model, batch, loss, settings, cpu_scratch)
    else:
        fake, stage = card_stage(model, batch, loss, settings, card)
    with fake:
        return private_peak(stage, settings, grouping, count_examples(batch))


def private_peak(stage: Stage, settings: StepSettings, grouping: Grouping, examples: int) -> int:
    """Peak bytes of one private step of a stage, static ones included.

    Raises:
        GroupSearchError: when the options name a method for a weight that no site chooses one for.
    """
    with made_private(stage, settings, grouping, examples):
        return stage.counted_step()
