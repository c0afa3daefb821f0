"""Many workers, and large studies: ``python -m tests.benchmarks.scale -o profiles/scale-cpu.json``.

Throughput: one worker and eight against a real PostgreSQL server on this machine, with an objective that
sleeps, so that what is measured is the search and its storage. Size: a study of 5,000 finished trials, in a
journal and in PostgreSQL, is opened, resumed by two more trials, concluded and drawn, in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
from optuna.distributions import IntDistribution
from optuna.trial import create_trial

from groupsearch.records import new_document
from groupsearch.report import render_page
from groupsearch.search import Evaluation, SearchSettings, run_search
from groupsearch.search.evaluations import Ledger
from groupsearch.search.space import Boundaries, Space
from groupsearch.search.study import SharedStudy, open_study
from groupsearch.units import format_bytes, format_ratio, format_seconds
from tests.search.crew import Crew, Sleeper
from tests.search.postgres import missing, running_server
from tests.search.problem import Problem

SLEEP_SECONDS = 5.0
TRIALS, LENGTH = 5000, 24
TARGETS = {"speedup": 6.0, "seconds": 20.0, "bytes": 2**30}


def throughput(storage: str, workers: int, trials: int, folder: Path) -> dict[str, Any]:
    """Evaluations per second of so many workers, from the first that begins to the last that ends."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    log = folder / f"log-{workers}"
    settings = SearchSettings(trials=trials, seeds=1, storage=storage, resume=True)
    crew = Crew(Sleeper(Problem(LENGTH, noise=0.01), log, SLEEP_SECONDS), settings)
    for _ in range(workers):
        crew.hire()
    crew.wait_for("begin", 1)
    start = time.perf_counter()
    crew.finish(600)
    seconds = time.perf_counter() - start
    count = sum(crew.ended().values())
    twice = count - len(crew.ended())
    return {
        "workers": workers,
        "evaluations": count,
        "evaluated_twice": twice,
        "seconds": seconds,
        "per_second": count / seconds,
        "overhead_seconds_per_trial": workers * seconds / count - SLEEP_SECONDS,
    }


def fill(storage: str, *, one_by_one: bool) -> None:
    """Make a study of 5,000 finished trials; ``one_by_one`` as a search writes them, else in fewer statements.

    A journal keeps every step of a trial as a line of its own; a database looks the same either way.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    problem = Problem(LENGTH, noise=0.01)
    settings = SearchSettings(trials=TRIALS, seeds=1, storage=storage, resume=True, sampler="random")
    space = Space.of(problem.trace, settings)
    rng = np.random.default_rng(0)
    drawn: dict[Boundaries, None] = {}
    while len(drawn) < TRIALS:
        drawn[tuple(b for b in space.cuts if rng.random() < 0.25)] = None
    with mock.patch.object(os, "fsync"):  # only the filling is spared the wait for the disk
        study = open_study(space, settings)
        ledger = Ledger(study, problem.evaluate)
        for boundaries in drawn:
            _add(study, space, boundaries, ledger, problem, one_by_one=one_by_one)


def _add(
    study: SharedStudy, space: Space, boundaries: Boundaries, ledger: Ledger, problem: Problem, *, one_by_one: bool
) -> None:
    from groupsearch.search.evaluations import _record

    attributes = {"boundaries": list(boundaries), "answer": "trained"}
    outcome = problem.evaluate(boundaries, 0)
    points = tuple((step, outcome.value * step / 100) for step in range(0, 101, 10))
    evaluation = Evaluation(boundaries, 0, outcome.value, 0.001, 100, points, 1.0, None)
    values = [outcome.value, float(space.peak_bytes(boundaries))]
    parameters = space.parameters(boundaries)
    if one_by_one:
        study.enqueue_trial(parameters, user_attrs={"boundaries": list(boundaries)})
        trial = optuna.Study.ask(study)
        space.suggest(trial)
        study.records.add_trial(_record(evaluation))
        trial.set_user_attr("answer", "trained")
        study.tell(trial, values)
        return
    study.records.add_trial(_record(evaluation))
    cut = IntDistribution(0, 1)
    study.add_trial(
        create_trial(
            params=parameters, distributions=dict.fromkeys(parameters, cut), values=values, user_attrs=attributes
        )
    )


def reopen(storage: str, folder: str, answers: Any) -> None:
    """Open; then open, resume by two trials, conclude and draw: how long each took and what memory was used."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    problem = Problem(LENGTH, noise=0.01)
    settings = SearchSettings(trials=TRIALS, seeds=1, storage=storage, resume=True)
    clock = [time.perf_counter()]
    open_study(Space.of(problem.trace, settings), settings)
    clock.append(time.perf_counter())
    more = run_search(problem.trace, problem.evaluate, replace(settings, trials=TRIALS + 2))  # opens it again
    clock.append(time.perf_counter())
    page_bytes = _draw(problem, more.to_json(), Path(folder))
    clock.append(time.perf_counter())
    opened, resumed, reported = (after - before for before, after in pairwise(clock))
    answers.put(
        {
            "evaluations": len(more.evaluations),
            "seconds": {"open": opened, "open_and_resume": resumed, "report": reported},
            "total_seconds": resumed + reported,
            "page_bytes": page_bytes,
            "imported_bytes": imported,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )


def _draw(problem: Problem, parts: dict[str, Any], folder: Path) -> int:
    from groupsearch.partition import floor_bytes
    from groupsearch.records import environment, write_document

    trace = problem.trace
    known = {"trace": trace.to_json(), "nonprivate_peak_bytes": trace.nonprivate_peak_bytes}
    model = {"name": "synthetic", "batch_size": 4, "parameters": 64 * LENGTH}
    lists: dict[str, Any] = {"front": [], "estimates": [], "simulations": [], "measurements": [], "summary": {}}
    document = new_document(
        "search", model, environment(), {}, **known, floor_bytes=floor_bytes(trace), **lists, **parts
    )
    write_document(folder / "search.json", document, force=True)
    page = render_page(document)
    (folder / "search.html").write_text(page, encoding="utf-8")
    return len(page)


def in_fresh_process(storage: str, folder: Path) -> dict[str, Any]:
    """What :func:`reopen` finds in a process that has done nothing before."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=reopen, args=(storage, str(folder), answers))
    process.start()
    answer: dict[str, Any] = answers.get(timeout=600)
    process.join()
    return answer


@contextmanager
def database(folder: Path) -> Iterator[Any]:
    """A server, or None with the reason printed."""
    if reason := missing():
        print(f"Without PostgreSQL: {reason}")
        yield None
        return
    with running_server() as server:
        yield server


def measure(folder: Path, parts: list[str]) -> dict[str, Any]:
    """All rows."""
    found: dict[str, Any] = {"throughput": [], "size": []}
    with database(folder) as server:
        if server is not None and "throughput" in parts:
            for workers, trials in ((1, 10), (8, 80)):
                row = throughput(server.create(f"throughput{workers}"), workers, trials, folder)
                print(
                    f"{workers} workers: {row['per_second']:.2f} evaluations of {SLEEP_SECONDS} s per second, "
                    f"{format_seconds(row['overhead_seconds_per_trial'])} more per trial"
                )
                found["throughput"].append(row)
            one, eight = found["throughput"]
            found["speedup"] = eight["per_second"] / one["per_second"]
            print(f"8 workers do {format_ratio(found['speedup'])} of one (at least {TARGETS['speedup']:.0f})")
        if "size" in parts:
            stores = {"journal": str(folder / "large.journal")}
            if server is not None:
                stores["postgresql"] = server.create("large")
            for kind, storage in stores.items():
                fill(storage, one_by_one=kind == "journal")
                row = {"storage": kind, "trials": TRIALS, "sites": LENGTH, **in_fresh_process(storage, folder)}
                print(
                    f"{kind}: {TRIALS} trials in {format_seconds(row['total_seconds'])} "
                    f"({', '.join(f'{name} {format_seconds(s)}' for name, s in row['seconds'].items())}), "
                    f"{format_bytes(row['peak_bytes'])}"
                )
                found["size"].append(row)
    return found


def main() -> None:
    """Print every row and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="append", choices=["throughput", "size"], help="measure only this")
    parser.add_argument("-o", "--output", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), chosen.part or ["throughput", "size"])
    if chosen.output is not None:
        where = {"platform": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()}
        where["load"] = os.getloadavg()
        document = {"environment": {**where, "optuna": optuna.__version__}, "targets": TARGETS, **found}
        chosen.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
