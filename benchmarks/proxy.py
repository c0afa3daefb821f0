"""Whether the Gram proxy predicts what training says: ``python -m benchmarks.proxy [--output PATH]``.

For every workload and epsilon: some fixed styles, the exact memory front and random groupings, each with its proxy
score, a private run of an eighth of the steps (with the full run's noise, and a seed of its own) and full private runs
of two seeds. What is reported are rank correlations between these rungs of evidence, and between the full runs of
the two seeds: where these do not agree, groupings differ by less than noise, and no rung can predict what there is
not to predict. ``stdlib-gpt`` is narrower and shorter than by default; rules and rates are the workloads' own.

A document that is there already keeps its runs: an interrupted benchmark goes on. With ``--rescore`` nothing is
trained but what the Grams are taken of, and every row is scored again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.accuracy import environment
from groupsearch.gram import Grams
from groupsearch.plan.grouping import Grouping, named_groupings
from groupsearch.plan.partition import front
from groupsearch.plan.trace import Trace
from groupsearch.proxy import gram_matrices
from groupsearch.records import document_text, write_text
from groupsearch.search.statistics import rank_correlation
from groupsearch.tracer import trace_model
from groupsearch.training import TrainSettings, train
from groupsearch.workloads import Workload, load_workload

OUTPUT = Path("profiles/proxy-cpu.json")
EPSILONS = (1.0, 8.0)
SHORT_SEED, FULL_SEEDS = 2, (0, 1)
SHORTER = 8
"""How many times fewer steps a short run has."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A workload of the benchmark, how many groupings of it, and what is changed of its training."""

    groupings: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


SUBJECTS = {
    "digits-cnn": Subject(12),
    "digits-vit": Subject(8),
    "stdlib-gpt": Subject(8, {"width": 32, "blocks": 2, "context": 32}, {"steps": 48}),
}


def groupings_of(trace: Trace, count: int) -> dict[str, Grouping]:
    """Fixed styles, the end of the exact memory front, and random groupings, ``count`` in all and no two alike."""
    chosen = named_groupings(trace, uniform=(2, 4))
    chosen["least peak"] = Grouping.from_boundaries(trace, front(trace)[-1][0])
    draw, number = random.Random(0), 0
    while len(_distinct(chosen)) < count:
        most = (trace.length - 1, min(4, trace.length - 1))[number % 2]
        cuts = draw.sample(range(1, trace.length), draw.randint(1, most))
        chosen[f"random {number}"] = Grouping.from_boundaries(trace, cuts)
        number += 1
    return dict(list(_distinct(chosen).items())[:count])


def settings_of(workload: Workload, subject: Subject, epsilon: float, **changes: Any) -> TrainSettings:
    """How a full run is trained, its noise fixed, so that what is changed of its length leaves that."""
    full = TrainSettings.of(workload, **{**subject.training, "epsilon": epsilon})
    assert workload.data is not None
    noise_multiplier = full.noise_multiplier_for(workload.data.train_size)
    fixed = {"noise_multiplier": noise_multiplier, "epsilon": None}
    return TrainSettings.of(workload, **{**subject.training, **fixed, **changes})


def run_of(workload: Workload, grouping: Grouping, settings: TrainSettings) -> dict[str, float]:
    """Validation metric and loss after a private run, and its seconds."""
    begin, cpu = time.perf_counter(), time.process_time()
    result = train(workload, grouping, settings)
    assert result.metric is not None
    return {
        "seed": settings.seed,
        "metric": result.metric,
        "loss": result.curve[-1].loss,
        "seconds": round(time.perf_counter() - begin, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }


def score_of(grams: Grams, workload: Workload, grouping: Sequence[int], settings: TrainSettings) -> dict[str, float]:
    """The proxy's numbers of one grouping."""
    assert workload.data is not None
    assert settings.noise_multiplier is not None
    expected = settings.sampling_rate * workload.data.train_size
    found = grams.score(
        grouping,
        rule=settings.rule,
        max_grad_norm=settings.max_grad_norm,
        noise_multiplier=settings.noise_multiplier,
        expected_batch_size=expected,
    )
    return asdict(found)


def correlations_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Rank correlations between the rungs, over the groupings of one workload and epsilon."""
    full = [statistics.fmean(run["metric"] for run in row["full"]) for row in rows]
    loss = [-statistics.fmean(run["loss"] for run in row["full"]) for row in rows]
    rungs = {
        "proxy": [row["score"]["value"] for row in rows],
        "short": [row["short"]["metric"] for row in rows],
        "few groups": [-row["groups"] for row in rows],
    }
    found = {f"{name}/full": list(zip(rung, full, strict=True)) for name, rung in rungs.items()}
    found["proxy/short"] = list(zip(rungs["proxy"], rungs["short"], strict=True))
    found["proxy/full loss"] = list(zip(rungs["proxy"], loss, strict=True))
    found["full/full"] = [(row["full"][0]["metric"], row["full"][1]["metric"]) for row in rows]
    return {name: rank_correlation(pairs).to_json() for name, pairs in found.items()}


def _complete(name: str, rows: Sequence[Row]) -> bool:
    return len(rows) == SUBJECTS[name].groupings and all("score" in row for row in rows)


def _distinct(groupings: Mapping[str, Grouping]) -> dict[str, Grouping]:
    seen: dict[tuple[int, ...], str] = {}
    for name, grouping in groupings.items():
        seen.setdefault(grouping.boundaries, name)
    return {name: groupings[name] for name in seen.values()}


class Document:
    """The rows found so far, in a file beside the document's, and what they amount to; both on disk after each."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows_path = path, path.with_suffix(".rows.json")
        read = json.loads(self.rows_path.read_text(encoding="utf-8")) if self.rows_path.exists() else {}
        self.rows: list[Row] = read.get("rows", [])
        self.grams: list[Row] = read.get("grams", [])

    def of(self, name: str, epsilon: float) -> list[Row]:
        """The rows of one workload and epsilon."""
        return [row for row in self.rows if (row["workload"], row["epsilon"]) == (name, epsilon)]

    def write(self) -> None:
        """Put everything into the file."""
        parts = sorted({(row["workload"], row["epsilon"]) for row in self.rows})
        complete = {part: rows for part in parts if _complete(part[0], rows := self.of(*part))}
        document = {
            "schema_version": 1,
            "kind": "proxy-benchmark",
            "environment": environment(),
            "subjects": {name: asdict(subject) for name, subject in SUBJECTS.items()},
            "correlations": [
                {"workload": name, "epsilon": epsilon, **correlations_of(rows)}
                for (name, epsilon), rows in complete.items()
            ],
            "grams": self.grams,
        }
        write_text(self.rows_path, document_text({"grams": self.grams, "rows": self.rows}) + "\n", force=True)
        write_text(self.path, document_text(document) + "\n", force=True)


def train_missing(document: Document, name: str, epsilon: float) -> None:
    """Train the groupings of one workload at one epsilon that have no row yet."""
    subject, workload = SUBJECTS[name], load_workload(name, **SUBJECTS[name].settings)
    full = [settings_of(workload, subject, epsilon, seed=seed) for seed in FULL_SEEDS]
    short = settings_of(workload, subject, epsilon, steps=full[0].steps // SHORTER, seed=SHORT_SEED)
    trace = trace_model(workload.build(), workload.make_batch(workload.batch_size), workload.loss)
    done = {tuple(row["boundaries"]) for row in document.of(name, epsilon)}
    for label, grouping in groupings_of(trace, subject.groupings).items():
        if grouping.boundaries in done:
            continue
        row = {"workload": name, "epsilon": epsilon, "grouping": label, "groups": grouping.groups}
        row |= {"boundaries": list(grouping.boundaries), "short": run_of(workload, grouping, short)}
        row["full"] = [run_of(workload, grouping, settings) for settings in full]
        document.rows.append(row)
        document.write()
        print(f"{name} {epsilon:g} {label:<12} {[run['metric'] for run in row['full']]}", flush=True)


def score(document: Document, name: str, epsilon: float) -> None:
    """Take the Grams of one workload at one epsilon and score all of its rows."""
    subject, workload = SUBJECTS[name], load_workload(name, **SUBJECTS[name].settings)
    full = settings_of(workload, subject, epsilon)
    begin, cpu = time.perf_counter(), time.process_time()
    grams = gram_matrices(workload, settings=full)
    spent = {"seconds": round(time.perf_counter() - begin, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
    entry = {"workload": name, "epsilon": epsilon, "steps": list(grams.steps), "examples": grams.grams.shape[-1]}
    document.grams = [g for g in document.grams if (g["workload"], g["epsilon"]) != (name, epsilon)] + [entry | spent]
    for row in document.of(name, epsilon):
        row["score"] = score_of(grams, workload, row["boundaries"], full)
    document.write()


def main(arguments: list[str]) -> int:
    """Measure every workload at every epsilon and say what the rank correlations are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proxy", description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"the document; {OUTPUT} if not given")
    parser.add_argument("--workloads", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--rescore", action="store_true", help="keep all runs and score their groupings again")
    options = parser.parse_args(arguments)
    document = Document(options.output)
    for epsilon, name in product(EPSILONS, options.workloads):
        if not options.rescore:
            train_missing(document, name, epsilon)
        score(document, name, epsilon)
        for what, found in correlations_of(document.of(name, epsilon)).items():
            verdict = "predicts" if found["predicts"] else "does not predict"
            interval = f"[{found['low']:+.2f}, {found['high']:+.2f}]"
            print(f"{name:<11} {epsilon:g} {what:<16} {found['value']:+.2f} {interval}  {verdict}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
