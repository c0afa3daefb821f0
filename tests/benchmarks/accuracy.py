"""How far estimate, simulation and measurement of the same peak are apart, over random groupings.

Run with ``python -m tests.benchmarks.accuracy [--output PATH] [--groupings N] [--models NAME ...]``. Every
number is exact and repeatable: a measurement sums the allocations and releases that torch's profiler
reports for one real step, in this process, plus the tensors alive throughout. Errors are signed:
estimate / simulation - 1 and so on, so an under-estimate is negative.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groupsearch.clipping import ClipPlan
from groupsearch.engine import make_private
from groupsearch.grouping import Grouping
from groupsearch.memory import peak_memory
from groupsearch.simulate import private_peak
from groupsearch.trace import Trace
from groupsearch.tracer import trace_model
from groupsearch.tracer.profiled import profiled_peak
from groupsearch.tracer.scratch import cpu_scratch
from groupsearch.tracer.step import Stage, StepSettings, fake_stage, make_stage
from groupsearch.units import format_bytes
from groupsearch.workloads import Workload, load_workload

_BERT = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 500, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "roberta": {"model_type": "roberta", "vocab_size": 500, "max_position_embeddings": 66, **_BERT},
    "vit": {"model_type": "vit", "image_size": 32, "patch_size": 4, **_BERT},
    "llama": {
        "model_type": "llama",
        "vocab_size": 500,
        "max_position_embeddings": 64,
        "num_key_value_heads": 2,
        **_BERT,
    },
    "t5": {"model_type": "t5", "vocab_size": 500, "d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2}
    | {"num_heads": 4, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
}
"""Architectures of transformers, scaled down to run in a second on one thread."""
BUILT_IN = {"digits-vit": 128, "digits-cnn": 128, "stdlib-gpt": 16}
"""The built-in workloads and a batch size for each."""
LEVELS = ("estimate_bytes", "simulated_bytes", "measured_bytes")
COMPARISONS = {
    "estimate/simulation": ("estimate_bytes", "simulated_bytes"),
    "simulation/measurement": ("simulated_bytes", "measured_bytes"),
    "estimate/measurement": ("estimate_bytes", "measured_bytes"),
}


def small_workload(name: str, folder: Path, blocks: int | None = None) -> Workload:
    """A built-in workload or a scaled-down architecture, whose ``config.json`` is written below ``folder``.

    Args:
        name: a key of ``BUILT_IN`` or ``CONFIGURATIONS``.
        folder: an existing one.
        blocks: how many blocks to have, where it has any; by default as many as it says.
    """
    if name in BUILT_IN:
        settings: dict[str, Any] = {"blocks": blocks} if blocks and name != "digits-cnn" else {}
        return load_workload(name, batch_size=BUILT_IN[name], **settings)
    configuration = dict(CONFIGURATIONS[name])
    if blocks is not None:
        configuration |= {key: blocks for key in ("n_layer", "num_hidden_layers", "num_layers") if key in configuration}
    place = folder / name
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(configuration))
    settings = {} if name == "vit" else {"sequence_length": 48}
    return load_workload(f"hf:{place}", batch_size=8, **settings)


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
        )

    @cached_property
    def fake(self) -> Any:
        """A fake mode and a stage of it; made once and used for every grouping."""
        return fake_stage(self._empty_model(), self.batch, self.workload.loss, self.settings, cpu_scratch)

    @cached_property
    def real(self) -> Stage:
        """A stage on real tensors."""
        return make_stage(self.workload.build(), self.batch, self.workload.loss, self.settings)

    def estimate(self, grouping: Grouping) -> int:
        """Peak bytes in closed form."""
        return peak_memory(self.trace, grouping).peak_bytes

    def simulate(self, grouping: Grouping) -> int:
        """Peak bytes of the engine on fake tensors."""
        mode, stage = self.fake
        with mode:
            return private_peak(stage, self.settings, grouping, self.workload.batch_size)

    def measure(self, grouping: Grouping | None) -> int:
        """Peak bytes of the engine on real tensors; without privacy for None."""
        stage = self.real
        if grouping is None:
            return stage.static.total + profiled_peak(stage.step)
        engine = make_private(
            stage.model,
            stage.optimizer,
            ClipPlan(grouping),
            noise_multiplier=self.settings.noise_multiplier,
            expected_batch_size=self.workload.batch_size,
            options=self.settings.options,
        )
        try:
            return stage.static.total + profiled_peak(stage.step)
        finally:
            engine.detach()

    def groupings(self, count: int, seed: int = 0) -> dict[str, Grouping]:
        """All-layer, layer-wise and ``count`` random groupings, every other one of eight groups or fewer."""
        draw, length = random.Random(seed), self.trace.length
        chosen = {"all-layer": Grouping.all_layer(self.trace), "layer-wise": Grouping.layer_wise(self.trace)}
        for number in range(count):
            most = length - 1 if number % 2 else min(7, length - 1)
            cuts = draw.sample(range(1, length), draw.randint(min(1, most), most))
            chosen[f"random {number}"] = Grouping.from_boundaries(self.trace, cuts)
        return chosen

    def _empty_model(self) -> nn.Module:
        with torch.device("meta"):
            return self.workload.build()


def subjects(names: Sequence[str], folder: Path) -> Iterator[tuple[str, str, Subject]]:
    """(name, checkpoint, subject) of every model, plain and, where it has blocks, checkpointed."""
    for name in names:
        workload = small_workload(name, folder)
        for checkpoint in ("none",) if name == "digits-cnn" else ("none", "blocks"):
            yield name, checkpoint, Subject(workload, StepSettings(checkpoint=checkpoint))


def rows_of(name: str, checkpoint: str, subject: Subject, count: int) -> list[dict[str, Any]]:
    """One row for non-private training and one for every grouping."""
    shared = {"model": name, "checkpoint": checkpoint, "batch_size": subject.workload.batch_size}
    plain = (subject.trace.nonprivate_peak_bytes, subject.measure(None))
    rows = [{**shared, "grouping": "non-private", "estimate_bytes": plain[0], "measured_bytes": plain[1]}]
    for text, grouping in subject.groupings(count).items():
        found = {
            "boundaries": list(grouping.boundaries),
            "groups": grouping.groups,
            "estimate_bytes": subject.estimate(grouping),
            "simulated_bytes": subject.simulate(grouping),
            "measured_bytes": subject.measure(grouping),
        }
        rows.append({**shared, "grouping": text, **found})
    return [{**row, "errors": errors_of(row)} for row in rows]


def errors_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Signed relative errors of every two levels that a row has."""
    pairs = {name: pair for name, pair in COMPARISONS.items() if all(level in row for level in pair)}
    return {name: row[one] / row[other] - 1 for name, (one, other) in pairs.items()}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per comparison the median of the absolute error, the worst signed error, and how many are below zero."""
    summary = {}
    for name in COMPARISONS:
        errors = [row["errors"][name] for row in rows if name in row["errors"]]
        summary[name] = {
            "numbers": len(errors),
            "median_absolute": statistics.median(map(abs, errors)),
            "worst": max(errors, key=abs),
            "underestimates": sum(error < 0 for error in errors),
            "worst_underestimate": min((*errors, 0.0)),
        }
    return summary


def environment() -> dict[str, Any]:
    """Where the numbers are from."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": "cpu",
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


def main(arguments: list[str]) -> int:
    """Compare, print a table, and write the document where asked; 1 when a model failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.accuracy", description=__doc__)
    names = [*BUILT_IN, *CONFIGURATIONS]
    parser.add_argument("--output", type=Path, help="where to write the JSON document")
    parser.add_argument("--groupings", type=int, default=10, help="random groupings of every model")
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []
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
            _print_line(label, part)
    _print_line("all", rows)
    if options.output is not None:
        measured = dict.fromkeys(row["model"] for row in rows)
        families = {name: [row for row in rows if row["model"] == name] for name in measured}
        document = {
            "schema_version": 1,
            "kind": "accuracy-benchmark",
            "environment": environment(),
            "configurations": CONFIGURATIONS,
            "seconds": time.perf_counter() - begin,
            "summary": {"all": summarise(rows), **{name: summarise(part) for name, part in families.items()}},
            "failures": failures,
            "rows": rows,
        }
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
