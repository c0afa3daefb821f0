"""How far estimates are from what a device allocates: models at realistic sizes, plain and checkpointed.

Run with ``python -m tests.gpu.grid OUTPUT [--device DEVICE] [--models NAME ...] [--seconds N] [--small] [--fresh]``.
One process per model; the document is written after every row, and a run that finds one goes on where it ended, so a
grid may be taken in parts. Errors are signed: estimate / measurement - 1, an under-estimate is negative. What the
allocator reserved stands beside what it had allocated, and is part of no error.

``--small`` takes small models of the same kinds, all in this process: the same path on a CPU, in a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import CHOICE_LIMIT, choice_of, environment, errors_of, summarise
from benchmarks.architectures import WITHOUT_BLOCKS, small_workload
from benchmarks.realistic import MODELS
from groupsearch.errors import GroupSearchError
from groupsearch.records import document_text, write_text
from groupsearch.units import format_bytes
from tests.gpu.grid_part import NON_PRIVATE, Part, request_of, rows_of

REALISTIC = (
    *("GPT-2 small", "RoBERTa base", "ViT-B/16", "T5 base", "Llama 3.2 1B"),
    *("ResNet-50 with GroupNorm", "Whisper small encoder"),
)
"""Names in :data:`benchmarks.realistic.MODELS`, which has their batch and sequence lengths."""
SMALL = ("gpt2", "roberta", "vit", "t5", "llama", "digits-cnn")
"""Names in :data:`benchmarks.architectures.ARCHITECTURES`."""
COMPARISONS = {
    "estimate/measurement": ("estimate_bytes", "measured_bytes"),
    "estimate/requested": ("estimate_bytes", "requested_bytes"),
    "replay/measurement": ("replayed_allocated_bytes", "measured_bytes"),
    "replay/reserved": ("replayed_reserved_bytes", "reserved_bytes"),
    "in process/fresh": ("measured_bytes", "fresh_bytes"),
}
MEDIAN_LIMIT, WORST_LIMIT = 3e-3, 1.5e-2
"""Largest median and worst absolute error that pass, of the peak allocated: by the replay through the allocator where
there is one, else by the estimate."""
CHECKPOINTS = ("none", "blocks")
Row = Mapping[str, Any]
Runner = Callable[[Part], Iterator[dict[str, Any]]]


def realistic_part(name: str, device: str, **how: Any) -> Part:
    """A model at the size it is trained at."""
    setup = MODELS[name].setup("none", "none")
    return Part(labelled(name, how), setup.workload, setup.settings, device, CHECKPOINTS, **how)


def small_part(name: str, folder: Path, device: str, **how: Any) -> Part:
    """A small model of the same kind; its configuration is written below ``folder``."""
    workload = small_workload(name, folder)
    known = ("batch_size", "sequence_length")
    settings = {key: workload.settings[key] for key in known if workload.settings.get(key) is not None}
    settings["batch_size"] = workload.batch_size
    checkpoints = CHECKPOINTS[:1] if name in WITHOUT_BLOCKS else CHECKPOINTS
    return Part(labelled(name, how), workload.name, settings, device, checkpoints, **how)


def labelled(name: str, how: Mapping[str, Any]) -> str:
    """A model's name in the document, with what it is cast to."""
    return name if how.get("autocast", "none") == "none" else f"{name}, {how['autocast']}"


def in_a_process(part: Part) -> Iterator[dict[str, Any]]:
    """Rows of a part from a process of its own, as they come."""
    command = [sys.executable, "-m", "tests.gpu.grid_part"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request_of(part))
            process.stdin.close()
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()
    if process.returncode:
        reason = f"the process ended with exit code {process.returncode}"
        yield {"model": part.model, "checkpoint": "any", "failed": reason}


class Grid:
    """The document: rows so far, and what they amount to."""

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self.environment = {**environment(device), "allocator": allocator_settings()}
        self.rows: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["environment"] != self.environment:
                raise GroupSearchError(
                    f"Expected {path} to be of this device, torch and allocator, {self.environment}, found "
                    f"{found['environment']}. Name another file."
                )
            self.rows = found["rows"]

    def done(self, model: str) -> list[tuple[str, str]]:
        """(checkpoint, grouping) of the rows of a model."""
        return [(row["checkpoint"], row["grouping"]) for row in self.rows if row["model"] == model]

    def add(self, row: dict[str, Any]) -> None:
        """Take a row, or a failure, and write the document."""
        if "failed" in row:
            self.failures.append(row)
        else:
            self.rows.append({**row, "errors": errors_of(row, COMPARISONS)})
        write_text(self.path, document_text(self.document()) + "\n", force=True)

    def document(self) -> dict[str, Any]:
        """Everything that is known so far."""
        models = list(dict.fromkeys(row["model"] for row in self.rows))
        by_model = {name: [row for row in self.rows if row["model"] == name] for name in models}
        return {
            "schema_version": 1,
            "kind": "grid-benchmark",
            "environment": self.environment,
            "limits": {"median": MEDIAN_LIMIT, "worst": WORST_LIMIT, "choice": CHOICE_LIMIT},
            "summary": {name: summarise(rows) for name, rows in {"all": self.rows, **by_model}.items() if rows},
            "choices": self.choices(),
            "missed": self.missed(),
            "failures": self.failures,
            "rows": self.rows,
        }

    def choices(self) -> list[dict[str, Any]]:
        """For every model and checkpointing, what choosing by estimate costs."""
        parts: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self.rows:
            if row["grouping"] != NON_PRIVATE:
                parts.setdefault((row["model"], row["checkpoint"]), []).append(row)
        return [choice_of(rows) for rows in parts.values()]

    def missed(self) -> list[str]:
        """What is beyond the limits, in words."""
        found = []
        summary = summarise(self.rows)
        errors = summary.get("replay/measurement") or summary.get("estimate/measurement")
        if errors and (errors["median_absolute"] > MEDIAN_LIMIT or abs(errors["worst"]) > WORST_LIMIT):
            found.append(f"median {errors['median_absolute']:.3%}, worst {errors['worst']:+.3%}")
        found += [
            f"{row['model']} ({row['checkpoint']}): a fresh process measures {row['fresh_bytes']} bytes"
            for row in self.rows
            if row.get("fresh_bytes", row["measured_bytes"]) != row["measured_bytes"]
        ]
        return found + [
            f"{c['model']} ({c['checkpoint']}): {c['chosen']} takes {c['excess']:.2%} more than {c['best']}"
            for c in self.choices()
            if c["excess"] > CHOICE_LIMIT
        ]


def allocator_settings() -> str:
    """What the caching allocator was told; empty where it is as torch has it."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")


def run(grid: Grid, parts: Sequence[Part], seconds: float, measured: Runner = in_a_process) -> None:
    """Add the rows that are missing, part after part, until the time is over."""
    end = time.monotonic() + seconds
    for part in parts:
        left = end - time.monotonic()
        if left <= 0:
            return
        given = {**vars(part), "seconds": left, "done": grid.done(part.model)}
        for row in measured(Part(**given)):
            grid.add(row)
            print(_line(grid.rows[-1]) if "failed" not in row else f"{part.model} failed: {row['failed']}", flush=True)


def _line(row: Row) -> str:
    reserved = f"  reserved {format_bytes(row['reserved_bytes'])}" if "reserved_bytes" in row else ""
    return (
        f"{row['model']:<26} {row['checkpoint']:<7} {row['grouping']:<12} {format_bytes(row['estimate_bytes']):>10} "
        f"{format_bytes(row['measured_bytes']):>10} {row['errors']['estimate/measurement']:+8.3%}{reserved}"
    )


def main(arguments: Sequence[str]) -> int:
    """Measure what is missing; 1 when a part failed or an error is too large, 0 also where time ran out."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.grid", description=__doc__)
    parser.add_argument("output", type=Path, help="the document; what it has is not measured again")
    parser.add_argument("--device", default="cuda", help="a torch device")
    parser.add_argument("--models", nargs="+", choices=(*REALISTIC, *SMALL), help="all if not given")
    parser.add_argument("--random", type=int, default=4, help="random groupings of every model")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no row begins that may end later")
    parser.add_argument("--small", action="store_true", help="small models of the same kinds")
    parser.add_argument("--fresh", action="store_true", help="plain all-layer in a process of its own as well")
    parser.add_argument("--autocast", default="none", choices=("none", "bfloat16"), help="what forward is cast to")
    options = parser.parse_args(arguments)
    known = SMALL if options.small else REALISTIC
    how = {"randoms": options.random, "fresh": options.fresh, "autocast": options.autocast}
    grid = Grid(options.output, options.device)
    with tempfile.TemporaryDirectory() as folder:
        names = [name for name in options.models or known if name in known]
        parts = [
            small_part(name, Path(folder), options.device, **how)
            if options.small
            else realistic_part(name, options.device, **how)
            for name in names
        ]
        run(grid, parts, options.seconds, rows_of if options.small else in_a_process)
    for sentence in grid.missed() or ["within every limit"]:
        print(sentence)
    return 1 if grid.failures or grid.missed() or not grid.rows else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
