"""Models that no laptop trains are traced on one: nothing of their size is allocated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
import json, resource, sys, time, torch
from groupsearch.plan.memory import cost_table
from groupsearch.tracer import trace_model
from groupsearch.workloads import load_workload
torch.set_num_threads(1)
workload = load_workload(sys.argv[1], **json.loads(sys.argv[2]))
with torch.device("meta"):
    model = workload.build()
batch = workload.make_batch(workload.batch_size)
wall, cpu = time.perf_counter(), time.process_time()
trace = trace_model(model, batch, workload.loss)
cost_table(trace)
print(json.dumps({
    "seconds": time.perf_counter() - wall,
    "cpu_seconds": time.process_time() - cpu,
    "resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    "sites": trace.length,
    "weights": trace.static.weights,
    "optimizer": trace.static.optimizer,
}))
"""
MODELS = {
    "GPT-2 XL": ("hf:gpt2-xl", {"batch_size": 4, "sequence_length": 128}, 1_557_611_200, 2 + 48 * 6 + 2, 12),
    "Llama 3 8B": (
        "hf:benchmarks/configurations/llama-3-8b",
        {"batch_size": 4, "sequence_length": 128},
        8_030_261_248,
        1 + 32 * 9 + 2,
        12,
    ),
    "1,000 layers": ("benchmarks.networks:mlp", {"layers": 1000, "width": 64}, 999 * 64 * 65 + 650, 1000, 20),
}
"""Workload, settings, trainable numbers, sites, seconds of a processor: half as many again as on a busy machine."""


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_large_model_is_traced_in_seconds_of_a_processor_and_3_gib(name: str) -> None:
    workload, settings, numbers, sites, seconds = MODELS[name]
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, workload, json.dumps(settings)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    print(f"{name}: {found['seconds']:.1f} s, {found['cpu_seconds']:.1f} s of a processor, ", end="")
    print(f"resident {found['resident_bytes'] / 2**30:.2f} GiB")
    assert found["weights"] == 4 * numbers
    assert found["optimizer"] > 2 * found["weights"]
    assert found["sites"] == sites
    assert found["resident_bytes"] < 3 * 2**30
    assert found["cpu_seconds"] < seconds  # what it takes of the clock is the neighbours' business as well
