"""How far estimate, simulation and measurement of the same peak are apart, over random groupings.

Run with ``python -m benchmarks.accuracy [--output PATH] [--rows PATH] [--groupings N] [--models NAME ...]``. Every
number is exact and repeatable: a measurement sums the allocations and releases that torch's profiler
reports for one real step, in this process, plus the tensors alive throughout. Errors are signed:
estimate / simulation - 1 and so on, so an under-estimate is negative.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.architectures import ARCHITECTURES, CONFIGURATIONS, CONVOLUTIONS, WITHOUT_BLOCKS, small_workload
from groupsearch.measure import private_peak
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import peak_memory
from groupsearch.plan.partition import front
from groupsearch.plan.trace import Trace
from groupsearch.records import document_text, write_text
from groupsearch.tracer import trace_model
from groupsearch.tracer.allocator import profiled_peak
from groupsearch.tracer.scratch import cpu_scratch
from groupsearch.tracer.step import Stage, StepSettings, fake_stage, made_private, make_stage
from groupsearch.units import format_bytes
from groupsearch.workloads import Workload

LEVELS = ("estimate_bytes", "simulated_bytes", "measured_bytes")
COMPARISONS = {
    "estimate/simulation": ("estimate_bytes", "simulated_bytes"),
    "simulation/measurement": ("simulated_bytes", "measured_bytes"),
    "estimate/measurement": ("estimate_bytes", "measured_bytes"),
}
LIMITS = {"transformers": (1e-3, 1e-2), "convolutions": (1e-2, 3e-2)}
"""Largest median and worst absolute error of estimates against measurements that the benchmark lets pass."""
CHOICE_LIMIT = 5e-3
"""How much more than the best measured grouping the one chosen by estimate may take."""
SIMULATED = 3
"""How many of the random groupings are simulated as well."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A workload and how its step is taken; its three levels of any grouping."""

    workload: Workload
    settings: StepSettings = field(default_factory=StepSettings)

    @cached_property
    def batch(self) -> Any:
        """The workload's batch."""
        return self.workload.make_batch(self.workload.batch_size)

    @cached_property
    def trace(self) -> Trace:
        """From the model on the meta device."""
        return trace_model(
            self._empty_model(),
            self.batch,
            self.workload.loss,
            options=self.settings.options,
            optimizer=self.settings.optimizer,
            checkpoint=self.settings.checkpoint,
            micro_batches=self.settings.micro_batches,
            autocast=self.settings.autocast,
        )

    @cached_property
    def fake(self) -> Any:
        """A fake mode and a stage of it; made once and used for every grouping."""
        return fake_stage(self._empty_model(), self.batch, self.workload.loss, self.settings, cpu_scratch)

    @cached_property
    def real(self) -> Stage:
        """A stage on real tensors; it takes every micro-batch there is."""
        stage = make_stage(self.workload.build(), self.batch, self.workload.loss, self.settings)
        return replace(stage, micro_batches=self.settings.micro_batches)

    def estimate(self, grouping: Grouping) -> int:
        """Peak bytes in closed form."""
        return peak_memory(self.trace, grouping).peak_bytes

    def simulate(self, grouping: Grouping) -> int:
        """Peak bytes of the engine on fake tensors."""
        mode, stage = self.fake
        gc.collect()  # the norms that the engine of the grouping before kept are none of this one's
        with mode:
            return private_peak(stage, self.settings, grouping, self.workload.batch_size)

    def measure(self, grouping: Grouping | None) -> int:
        """Peak bytes of the engine on real tensors; without privacy for None."""
        stage = self.real
        if grouping is None:
            return stage.static.total + profiled_peak(stage.step)
        with made_private(stage, self.settings, grouping, self.workload.batch_size):
            return stage.static.total + profiled_peak(stage.step)

    def groupings(self, count: int, seed: int = 0) -> dict[str, Grouping]:
        """All-layer, layer-wise and ``count`` random groupings, every other one of eight groups or fewer."""
        draw, length = random.Random(seed), self.trace.length
        chosen = {"all-layer": Grouping.all_layer(self.trace), "layer-wise": Grouping.layer_wise(self.trace)}
        for number in range(count):
            most = length - 1 if number % 2 else min(7, length - 1)
            cuts = draw.sample(range(1, length), draw.randint(min(1, most), most))
            chosen[f"random {number}"] = Grouping.from_boundaries(self.trace, cuts)
        return chosen

    def best(self) -> Grouping:
        """The grouping of least estimated peak there is, with the fewest groups."""
        return Grouping.from_boundaries(self.trace, front(self.trace)[-1][0])

    def _empty_model(self) -> nn.Module:
        with torch.device("meta"):
            return self.workload.build()


def subjects(names: Sequence[str], folder: Path) -> Iterator[tuple[str, str, Subject]]:
    """(name, checkpoint, subject) of every model, plain and, where it has blocks, checkpointed."""
    for name in names:
        workload = small_workload(name, folder)
        for checkpoint in ("none",) if name in WITHOUT_BLOCKS else ("none", "blocks"):
            yield name, checkpoint, Subject(workload, StepSettings(checkpoint=checkpoint))


def rows_of(name: str, checkpoint: str, subject: Subject, count: int) -> list[dict[str, Any]]:
    """One row for non-private training and one for every grouping."""
    shared = {"model": name, "checkpoint": checkpoint, "batch_size": subject.workload.batch_size}
    plain = (subject.trace.nonprivate_peak_bytes, subject.measure(None))
    rows = [{**shared, "grouping": "non-private", "estimate_bytes": plain[0], "measured_bytes": plain[1]}]
    for number, (text, grouping) in enumerate([("best", subject.best()), *subject.groupings(count).items()]):
        found = {
            "boundaries": list(grouping.boundaries),
            "groups": grouping.groups,
            "estimate_bytes": subject.estimate(grouping),
            "measured_bytes": subject.measure(grouping),
        }
        if number < 3 + SIMULATED:
            found["simulated_bytes"] = subject.simulate(grouping)
        rows.append({**shared, "grouping": text, **found})
    return [{**row, "errors": errors_of(row)} for row in rows]


def errors_of(row: Mapping[str, Any], comparisons: Mapping[str, tuple[str, str]] = COMPARISONS) -> dict[str, float]:
    """Signed relative errors of every two levels that a row has."""
    pairs = {name: pair for name, pair in comparisons.items() if all(level in row for level in pair)}
    return {name: row[one] / row[other] - 1 for name, (one, other) in pairs.items()}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per comparison the median of the absolute error, the worst signed error, and how many are below zero."""
    summary = {}
    found = {name for row in rows for name in row["errors"]}
    for name in (*(name for name in COMPARISONS if name in found), *sorted(found - set(COMPARISONS))):
        errors = [row["errors"][name] for row in rows if name in row["errors"]]
        summary[name] = {
            "numbers": len(errors),
            "median_absolute": statistics.median(map(abs, errors)),
            "worst": max(errors, key=abs),
            "underestimates": sum(error < 0 for error in errors),
            "worst_underestimate": min((*errors, 0.0)),
        }
    return summary


def choice_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one model's groupings the one of least estimate, and how much more it takes than the best measured one."""
    grouped = [row for row in rows if "boundaries" in row]
    chosen = min(grouped, key=lambda row: row["estimate_bytes"])
    best = min(grouped, key=lambda row: row["measured_bytes"])
    return {
        "model": chosen["model"],
        "checkpoint": chosen["checkpoint"],
        "chosen": chosen["grouping"],
        "best": best["grouping"],
        "excess": chosen["measured_bytes"] / best["measured_bytes"] - 1,
    }


def families_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of all models, of either kind of model, and of every model."""
    kinds = {"transformers": lambda name: name not in CONVOLUTIONS, "convolutions": lambda name: name in CONVOLUTIONS}
    families = {"all": list(rows)}
    families |= {kind: [row for row in rows if of(row["model"])] for kind, of in kinds.items()}
    families |= {name: [row for row in rows if row["model"] == name] for name in {row["model"]: 0 for row in rows}}
    return {name: part for name, part in families.items() if part}


def missed(summary: Mapping[str, Any], choices: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is beyond ``LIMITS`` or ``CHOICE_LIMIT``, in words."""
    found = []
    for kind, (median, worst) in LIMITS.items():
        errors = summary.get(kind, {}).get("estimate/measurement")
        if errors and (errors["median_absolute"] > median or abs(errors["worst"]) > worst):
            found.append(f"{kind}: median {errors['median_absolute']:.3%}, worst {errors['worst']:+.3%}")
    found += [
        f"{c['model']} ({c['checkpoint']}): {c['chosen']} takes {c['excess']:.2%} more than {c['best']}"
        for c in choices
        if c["excess"] > CHOICE_LIMIT
    ]
    return found


def version_of(package: str) -> str:
    """The version of a package; in words that it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment(device: str = "cpu") -> dict[str, Any]:
    """Where the numbers are from; a GPU by its name."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _print_line(label: str, rows: Sequence[Mapping[str, Any]]) -> None:
    summary = summarise(rows)
    largest = format_bytes(max(row["measured_bytes"] for row in rows))
    cells = "  ".join(
        f"{part['median_absolute']:7.3%} {part['worst']:+8.3%} {part['underestimates']:3d}/{part['numbers']:<3d}"
        for part in summary.values()
    )
    print(f"{label:<26} {largest:>10}  {cells}", flush=True)


def main(arguments: list[str]) -> int:  # noqa: PLR0915 - a script from top to bottom
    """Compare, print a table, and write the document where asked; 1 when a model failed or an error is too large."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--output", type=Path, help="where to write the JSON document")
    parser.add_argument("--rows", type=Path, help="where to write every number that was compared")
    parser.add_argument("--groupings", type=int, default=20, help="random groupings of every model")
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []
    choices: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    print(f"{'':<26} {'largest':>10}  " + "  ".join(f"{name:>24}" for name in COMPARISONS))
    print(f"{'':<26} {'':>10}  " + "  ".join([f"{'median':>7} {'worst':>8} {'under':>7}"] * len(COMPARISONS)))
    with tempfile.TemporaryDirectory() as folder:
        for name, checkpoint, subject in subjects(options.models, Path(folder)):
            label = f"{name}{'' if checkpoint == 'none' else ', checkpointed'}"
            try:
                part = rows_of(name, checkpoint, subject, options.groupings)
            except RuntimeError as error:  # a flaw in one model must not cost the numbers of the others
                reason = str(error).splitlines()[0]
                failures.append({"model": name, "checkpoint": checkpoint, "reason": reason})
                print(f"{label:<26} failed: {reason}", flush=True)
                continue
            rows += part
            choices.append(choice_of(part))
            _print_line(label, part)
    summary = {name: summarise(part) for name, part in families_of(rows).items()}
    _print_line("all", rows)
    print(f"chosen by estimate: at most {max(c['excess'] for c in choices):.3%} above the best measured grouping")
    beyond = missed(summary, choices)
    print("\n".join(beyond) or "within every limit")
    if options.output is not None:
        document = {
            "schema_version": 1,
            "kind": "accuracy-benchmark",
            "environment": environment(),
            "configurations": CONFIGURATIONS,
            "limits": {**{kind: list(limit) for kind, limit in LIMITS.items()}, "choice": CHOICE_LIMIT},
            "seconds": time.perf_counter() - begin,
            "summary": summary,
            "choices": choices,
            "missed": beyond,
            "failures": failures,
        }
        write_text(options.output, document_text(document) + "\n", force=True)
    if options.rows is not None:
        write_text(options.rows, document_text({"rows": rows}) + "\n", force=True)
    return 1 if failures or beyond else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
