"""The fronts that a search finds, beside the groupings that need none: ``python -m benchmarks.fronts``.

Every case is ``groupsearch optimize`` as it comes (proxy, short runs, full runs), at epsilon 1 and 8, then the
groupings that anybody would try, trained in full with the same seeds: uniform:k and the least peak with k groups.
A row is a grouping with its peak, the mean of its metric over seeds and half the width of its 95 % interval. What
it cost to find the front is counted in full trainings, the replication that gives it its intervals apart. A
document that is there keeps the cases that are in it. A case takes one core two to ten minutes, of ``stdlib-gpt``
an hour.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import environment
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import peak_memory
from groupsearch.plan.trace import Trace
from groupsearch.records import document_text, write_text
from groupsearch.search.statistics import half_width
from groupsearch.training import TrainSettings, train
from groupsearch.units import format_bytes, format_interval, format_number
from groupsearch.workloads import load_workload

OUTPUT = Path("profiles/fronts-cpu.json")
EPSILONS = (1.0, 8.0)
SEEDS = 3
STYLES = ("uniform:4", "best:4", "uniform:2", "best:2", "uniform:8", "best:8")
MODELS: dict[str, tuple[dict[str, str], int]] = {
    "digits-vit": ({"checkpoint": "blocks"}, 6),
    "digits-cnn": ({}, 6),
    "stdlib-gpt": ({"checkpoint": "blocks"}, 2),
}
"""Options of the command, and how many of the styles are trained besides: one training of the last takes minutes."""
MOST_TRAININGS = 10.0
"""What finding a front may cost, in full trainings."""
_TRAINING = ("delta", "steps", "learning_rate", "sampling_rate", "rule", "max_grad_norm", "noise_multiplier")


def search(model: str, epsilon: float, seeds: int) -> dict[str, Any]:
    """The document that ``groupsearch optimize`` writes."""
    words = [f"--{name}={value}" for name, value in MODELS[model][0].items()]
    words += [f"--epsilon={epsilon}", f"--seeds={seeds}", "--verify=none"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "search.json"
        subprocess.run([sys.executable, "-m", "groupsearch", "optimize", model, *words, f"--output={path}"], check=True)
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def case(model: str, epsilon: float, seeds: int) -> dict[str, Any]:
    """One search with what it is compared with."""
    begin = time.perf_counter()
    document = search(model, epsilon, seeds)
    rows = [_row_of_candidate(c) for c in document["candidates"] if c["metric"]["seeds"] == seeds]
    known = {tuple(row["boundaries"]) for row in rows}
    trace = Trace.from_json(document["trace"])
    for style in STYLES[: MODELS[model][1]]:
        grouping = Grouping.parse(trace, style)
        if grouping.boundaries not in known:
            known.add(grouping.boundaries)
            rows.append(_trained(document, trace, style, grouping, seeds))
    rows.sort(key=lambda row: -row["peak_bytes"])
    cost = document["cost"]
    return {
        "model": model,
        "settings": document["settings"]["workload"],
        "checkpoint": document["settings"]["checkpoint"],
        "epsilon": epsilon,
        "metric": document["candidates"][0]["metric"]["name"],
        "nonprivate_peak_bytes": document["nonprivate_peak_bytes"],
        "rows": rows,
        "recommended": document["recommended"]["boundaries"],
        "answer": document["answer"],
        "correlations": document["correlations"],
        "rungs": cost["rungs"],
        "trainings_to_find": sum(r["full_trainings"] for r in cost["rungs"] if r["name"] != "replication"),
        "seconds": time.perf_counter() - begin,
    }


def _row_of_candidate(candidate: Mapping[str, Any]) -> dict[str, Any]:
    metric = candidate["metric"]
    return {
        "grouping": candidate["source"],
        "boundaries": candidate["boundaries"],
        "groups": candidate["groups"],
        "peak_bytes": candidate["peak_bytes"],
        "mean": metric["mean"],
        "half_width": metric["half_width"],
        "values": metric["values"],
        "on_front": candidate["on_front"],
        "searched": True,
    }


def _trained(document: Mapping[str, Any], trace: Trace, style: str, grouping: Grouping, seeds: int) -> dict[str, Any]:
    """A grouping that the search left out, trained as its candidates were."""
    model, settings = document["model"]["name"], document["settings"]
    workload = load_workload(model, **settings["workload"])
    shared = {key: document["training"][key] for key in _TRAINING}
    physical = document["model"]["batch_size"] if settings["micro_batches"] > 1 else None
    how = {"optimizer": settings["optimizer"], "checkpoint": settings["checkpoint"], "physical_batch": physical}
    values = [
        train(workload, grouping, TrainSettings.of(workload, **shared, **how, seed=seed)).metric
        for seed in range(seeds)
    ]
    found = [float("nan") if value is None else value for value in values]
    return {
        "grouping": style,
        "boundaries": list(grouping.boundaries),
        "groups": grouping.groups,
        "peak_bytes": peak_memory(trace, grouping).peak_bytes,
        "mean": sum(found) / len(found),
        "half_width": half_width(found),
        "values": found,
        "on_front": False,
        "searched": False,
    }


def main(arguments: Sequence[str]) -> int:
    """Run the cases that are missing and write them; 1 when one cost more to find than it may."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fronts", description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"the document; {OUTPUT} if not given")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=EPSILONS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args(arguments)
    cases = json.loads(options.output.read_text(encoding="utf-8"))["cases"] if options.output.exists() else []
    for model in options.models:
        for epsilon in options.epsilons:
            if any(c["model"] == model and c["epsilon"] == epsilon for c in cases):
                continue
            cases.append(case(model, epsilon, options.seeds))
            _print_case(cases[-1])
            document = {"schema_version": 1, "kind": "fronts-benchmark", "environment": environment(), "cases": cases}
            write_text(options.output, document_text(document) + "\n", force=True)
    return int(any(c["trainings_to_find"] > MOST_TRAININGS for c in cases))


def _print_case(found: Mapping[str, Any]) -> None:
    percent = "accuracy" in found["metric"]
    print(f"{found['model']} at epsilon {format_number(found['epsilon'])}: {found['answer']}")
    for row in found["rows"]:
        mark = "front" if row["on_front"] else "" if row["searched"] else "besides"
        value = format_interval(row["mean"], row["half_width"], percent=percent)
        print(f"  {row['grouping']:<14} {row['groups']:>3} {format_bytes(row['peak_bytes']):>10} {value:>16}  {mark}")
    for agreement in found["correlations"]:
        print(f"  {agreement['statement']}")
    print(f"  {format_number(found['trainings_to_find'])} full trainings to find it", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
