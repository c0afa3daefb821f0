"""A model that no laptop trains is traced on one: nothing of its size is allocated."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, time, torch
from groupsearch.tracer import trace_model
from groupsearch.workloads import load_workload
torch.set_num_threads(1)
workload = load_workload("hf:gpt2-xl", batch_size=4, sequence_length=128)
with torch.device("meta"):
    model = workload.build()
begin = time.perf_counter()
trace = trace_model(model, workload.make_batch(4), workload.loss)
print(json.dumps({
    "seconds": time.perf_counter() - begin,
    "resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    "sites": trace.length,
    "weights": trace.static.weights,
    "optimizer": trace.static.optimizer,
}))
"""


@pytest.mark.slow
def test_gpt2_xl_is_traced_within_2_gib() -> None:
    finished = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    print(f"traced in {found['seconds']:.1f} s, resident {found['resident_bytes'] / 2**30:.2f} GiB")
    assert found["weights"] == 4 * 1_557_611_200
    assert found["optimizer"] > 2 * found["weights"]
    assert found["sites"] == 2 + 48 * 6 + 2
    assert found["resident_bytes"] < 2 * 2**30
    assert found["seconds"] < 60
