"""Estimates and measurements of one model's groupings on a device, several in one process.

Run as ``python -m tests.gpu.grid_part`` with a :class:`Part` as JSON on standard input; prints one row as JSON per
line as soon as it is measured. A fresh process per number is what the tool itself does; here a trace and many
measurements share one, and after each of them what is held on the device must be, to the byte, what was before.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from groupsearch.errors import GroupSearchError
from groupsearch.measure import measure_peak, measure_step
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import peak_memory
from groupsearch.plan.partition import front
from groupsearch.plan.reserved import holding
from groupsearch.plan.trace import Trace
from groupsearch.tracer import trace_model
from groupsearch.tracer.allocator import workspace_bytes
from groupsearch.tracer.step import Stage, made_private, make_stage, real_copy
from groupsearch.verify import Setup
from groupsearch.workloads import Workload

NON_PRIVATE = "non-private"
NAMED = ("all-layer", "best:2", "best:4", "layer-wise")
FRESH = "all-layer"
"""The grouping that is also measured in a process of its own, where asked for."""
STEPS = 2


@dataclass(frozen=True)
class Part:
    """What one process is to do.

    Attributes:
        model: its name in the document.
        workload: text of a workload.
        settings: of the workload, ``batch_size`` among them.
        device: where to trace and to measure.
        checkpoints: checkpointing settings, one after the other.
        randoms: how many random groupings.
        seconds: no row begins when it could end later than that.
        fresh: whether plain all-layer is also measured in a process of its own.
        autocast: what forward and loss are cast to.
        done: (checkpoint, grouping) of rows that are there already.
    """

    model: str
    workload: str
    settings: Mapping[str, Any]
    device: str
    checkpoints: Sequence[str]
    randoms: int = 4
    seconds: float = float("inf")
    fresh: bool = False
    autocast: str = "none"
    done: Sequence[Sequence[str]] = field(default_factory=tuple)


def rows_of(part: Part) -> Iterator[dict[str, Any]]:
    """Rows of all checkpointing settings; of one that fails, a row with the reason under ``failed``."""
    begin, longest = time.monotonic(), 0.0
    for checkpoint in part.checkpoints:
        setup = Setup(part.workload, part.settings, checkpoint=checkpoint, device=part.device, autocast=part.autocast)
        shared = {"model": part.model, "checkpoint": checkpoint, "batch_size": part.settings["batch_size"]}
        done = {grouping for where, grouping in part.done if where == checkpoint}
        try:
            for row in _rows(setup, part, done):
                yield {**shared, **row}
                longest = max(longest, row["seconds"])
                if time.monotonic() - begin + longest > part.seconds:
                    return
        except (RuntimeError, GroupSearchError) as error:  # out of memory among them: the next setting may fit
            yield {**shared, "failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def _rows(setup: Setup, part: Part, done: set[str]) -> Iterator[dict[str, Any]]:
    device, begin = torch.device(part.device), time.monotonic()
    setup.loaded.make_batch(setup.loaded.batch_size)
    workspace_bytes(device)  # they stay, once they have been probed
    before = held_bytes(device)
    trace = traced(setup, device)
    check_held(device, before, "the trace")
    stage = stage_of(setup, device)
    baseline = held_bytes(device)
    for name, grouping in groupings_of(trace, part.randoms).items():
        if name in done:
            continue
        row = _row(setup, stage, trace, name, grouping)
        check_held(device, baseline, f"measuring {name}")
        if part.fresh and name == FRESH and setup.checkpoint == "none":
            row["fresh_bytes"] = _in_a_fresh_process(setup, grouping)
        yield {**row, "seconds": time.monotonic() - begin}
        begin = time.monotonic()


def built_on(workload: Workload, device: torch.device) -> nn.Module:
    """The model, its weights drawn on the device: on a CPU that takes longer than a row."""
    with device:
        return workload.build().to(device)


def traced(setup: Setup, device: torch.device) -> Trace:
    """The trace that :meth:`Setup.trace` makes, of a model built on the device."""
    if device.type == "cpu":
        return setup.trace()
    workload, step = setup.loaded, setup.step
    model, batch = built_on(workload, device), workload.make_batch(workload.batch_size)
    how = {name: getattr(step, name) for name in ("options", "optimizer", "checkpoint", "micro_batches", "autocast")}
    return trace_model(model, batch, workload.loss, **how, device=str(device), copy_model=False)


def stage_of(setup: Setup, device: torch.device) -> Stage:
    """The workload's own model on a device, with one step taken, so that whatever libraries keep is kept."""
    workload = setup.loaded
    moved = real_copy(built_on(workload, device), workload.make_batch(workload.batch_size), device, copy_model=False)
    stage = replace(make_stage(*moved, workload.loss, setup.step), micro_batches=setup.micro_batches)
    stage.step()
    return stage


def groupings_of(trace: Trace, randoms: int) -> dict[str, Grouping | None]:
    """Non-private training, the named groupings as far as there are sites, the floor's and random ones."""
    found: dict[str, Grouping | None] = {NON_PRIVATE: None}
    for text in NAMED:
        if int(text.partition(":")[2] or 1) <= trace.length:
            found[text] = Grouping.parse(trace, text)
    found["best"] = Grouping.from_boundaries(trace, front(trace)[-1][0])
    draw = random.Random(0)
    for number in range(randoms):
        most = trace.length - 1 if number % 2 else min(7, trace.length - 1)
        cuts = draw.sample(range(1, trace.length), draw.randint(min(1, most), most))
        found[f"random {number}"] = Grouping.from_boundaries(trace, cuts)
    return found


def _row(setup: Setup, stage: Stage, trace: Trace, name: str, grouping: Grouping | None) -> dict[str, Any]:
    private: AbstractContextManager[None] = nullcontext()
    row: dict[str, Any] = {"grouping": name, "estimate_bytes": trace.nonprivate_peak_bytes}
    if grouping is not None:
        private = made_private(stage, setup.step, grouping, setup.loaded.batch_size)
        row |= {"estimate_bytes": peak_memory(trace, grouping).peak_bytes}
        row |= {"boundaries": list(grouping.boundaries), "groups": grouping.groups}
    held = holding(trace, None if grouping is None else grouping.boundaries)
    if held is not None:
        row |= {"replayed_allocated_bytes": held.allocated_bytes, "replayed_reserved_bytes": held.reserved_bytes}
    with private:
        measured = measure_step(stage, torch.device(setup.device), STEPS)
    return {
        **row,
        "measured_bytes": measured.peak_bytes,
        **measured.beside(),
        "step_seconds": measured.step_seconds,
        "metric": measured.metric,
    }


def _in_a_fresh_process(setup: Setup, grouping: Grouping | None) -> int:
    """The same number as the tool itself takes it."""
    how = {"checkpoint": setup.checkpoint, "autocast": setup.autocast, "device": setup.device, "steps": 1}
    return measure_peak(setup.workload, grouping, settings=setup.settings, **how).peak_bytes


def held_bytes(device: torch.device) -> int:
    """What is allocated on a device now; on the CPU, the storages of all tensors there are."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(device)
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = [part.untyped_storage() for tensor in tensors if tensor.is_cpu for part in strided_parts(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def strided_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """What of a tensor has a storage: sparse ones, which other tests of the process may have left, have none."""
    if tensor.layout is torch.strided:
        return (tensor,)
    return (tensor._indices(), tensor._values()) if tensor.layout is torch.sparse_coo else ()


def check_held(device: torch.device, expected_bytes: int, after: str) -> None:
    """Refuse to go on measuring in a process that holds what it did not hold before.

    Raises:
        RuntimeError: when it does.
    """
    found_bytes = held_bytes(device)
    if found_bytes != expected_bytes:
        raise RuntimeError(
            f"Expected {expected_bytes} bytes to be held after {after}, as before it, found {found_bytes}: the next "
            "number of this process would not be that of a fresh one."
        )


def main() -> None:
    """Rows of the part on standard input."""
    part = Part(**json.load(sys.stdin))
    for row in rows_of(part):
        print(json.dumps(row), flush=True)


def request_of(part: Part) -> str:
    """What :func:`main` reads."""
    return json.dumps(asdict(part))


if __name__ == "__main__":
    main()
