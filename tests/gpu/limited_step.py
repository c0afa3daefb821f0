"""A step under a real limit of the caching allocator, in a process of its own.

Run as ``python -m tests.gpu.limited_step`` with a request as JSON on standard input; prints ``ran``
or ``out of memory``. Any other failure is a traceback and exit code 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch

from groupsearch.engine import make_private
from groupsearch.errors import is_out_of_memory
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer import observe_sites
from groupsearch.tracer.step import StepSettings, make_stage, real_copy
from groupsearch.workloads import load_workload
from groupsearch.workloads.batches import map_tensors
from tests.gpu.grid_part import built_on

RAN, FAILED = "ran", "out of memory"


def step_under_limit(limit_bytes: int, workload: str, settings: dict[str, Any], **how: Any) -> str:
    """Take two steps in a fresh process whose allocator may hold ``limit_bytes``; ``ran`` or ``out of memory``.

    Args:
        limit_bytes: of all memory that the allocator reserves. Its segments grow in place, so that what is
            held without being used is small.
        workload: text of a workload.
        settings: of the workload, ``batch_size`` among them.
        **how: ``boundaries`` (None without privacy), ``optimizer``, ``checkpoint`` and ``device``. On the CPU there
            is no limit: a step only shows that it can be taken.
    """
    request = json.dumps({"limit_bytes": limit_bytes, "workload": workload, "settings": settings, **how})
    finished = subprocess.run(
        [sys.executable, "-m", "tests.gpu.limited_step"],
        input=request,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        timeout=120,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(finished.stderr)
    return finished.stdout.splitlines()[-1]


def main() -> None:
    """Take the steps that the request on standard input asks for."""
    request = json.load(sys.stdin)
    device = torch.device(request.get("device", "cuda"))
    workload = load_workload(request["workload"], **request["settings"])
    sites = None
    if request["boundaries"] is not None:
        few = map_tensors(lambda t: t.to(device), workload.make_batch(2))
        sites = observe_sites(built_on(workload, device), few, workload.loss)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(request["limit_bytes"] / torch.cuda.mem_get_info()[1])
    try:
        batch = workload.make_batch(workload.batch_size)
        model, batch = real_copy(built_on(workload, device), batch, device, copy_model=False)
        settings = StepSettings(optimizer=request["optimizer"], checkpoint=request["checkpoint"])
        stage = make_stage(model, batch, workload.loss, settings)
        if sites is not None:
            plan = ClipPlan(Grouping(tuple(request["boundaries"]), sites))
            make_private(
                stage.model,
                stage.optimizer,
                plan,
                noise_multiplier=1.0,
                expected_batch_size=workload.batch_size,
            )
        for _ in range(2):
            stage.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(FAILED)
    else:
        print(RAN)


if __name__ == "__main__":
    main()
