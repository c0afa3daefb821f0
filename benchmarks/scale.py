"""Many workers, and large studies: ``python -m benchmarks.scale -o profiles/scale-cpu.json``.

Throughput: one to eight worker processes on a journal and on a real PostgreSQL server on this machine, with an
objective that sleeps, so that what is measured is the search and its storage. A worker's cycle is the time from
the beginning of one of its evaluations to the next, counted from when all have begun; what it is longer than the
sleep is the overhead of a trial; and so many cycles as there are workers are the throughput. Start and end of the
processes are told apart. Operations: what one trial of one worker costs without a sleep. Size: a study of 5,000
finished trials is opened, resumed by two more trials, concluded and drawn, in a fresh process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
import sqlalchemy
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from groupsearch.records import document_text, new_document, write_text
from groupsearch.report import render_page
from groupsearch.search import Choice, Evaluation, Outcome, SearchSettings, run_search
from groupsearch.search.space import Space
from groupsearch.search.study import open_study, trial_of
from groupsearch.units import format_bytes, format_ratio, format_seconds
from tests.search.crew import Crew, Sleeper
from tests.search.postgres import missing, running_server
from tests.search.problem import Problem

SLEEP_SECONDS, ROUNDS = 5.0, 6
WORKERS = (1, 2, 4, 8)
TRIALS, LENGTH = 5000, 24
COUNTED = (20, 60)  # between these evaluations operations are counted
TARGETS = {"speedup": 6.0, "seconds": 20.0, "bytes": 2**30}


def throughput(storage: str, workers: int, folder: Path) -> dict[str, Any]:
    """Evaluations per second of so many workers."""
    settings = SearchSettings(trials=ROUNDS * workers, seeds=1, storage=storage, resume=True)
    log = folder / f"log-{workers}-{time.monotonic_ns()}"
    crew, start = Crew(Sleeper(Problem(LENGTH, noise=0.01), log, SLEEP_SECONDS), settings), time.monotonic()
    for _ in range(workers):
        crew.hire()
    crew.finish(600)
    begun, count = crew.begun(), sum(crew.ended().values())
    from_here = max(moments[0] for moments in begun.values())
    cycles = [b - a for moments in begun.values() for a, b in pairwise(moments) if a >= from_here - SLEEP_SECONDS]
    cycle = statistics.fmean(cycles)
    return {
        "workers": workers,
        "working": len(begun),
        "evaluations": count,
        "evaluated_twice": count - len(crew.ended()),
        "per_second": workers / cycle,
        "overhead_seconds_per_trial": cycle - SLEEP_SECONDS,
        "start_seconds": from_here - start,
        "total_seconds": time.monotonic() - start,
        "load": os.getloadavg()[0],
    }


def operations(storage: str) -> dict[str, float]:
    """What a trial of one worker costs without any sleep: time, processor time, SQL statements, commits."""
    counts: Counter[str] = Counter()
    marks: list[tuple[float, float, Counter[str]]] = []
    problem = Problem(LENGTH, noise=0.01)

    def evaluate(choice: Choice, seed: int) -> Outcome:
        marks.append((time.perf_counter(), time.process_time(), counts.copy()))
        return problem.evaluate(choice, seed)

    listeners = {"before_cursor_execute": "statements", "commit": "commits"}
    for event, name in listeners.items():
        sqlalchemy.event.listen(sqlalchemy.engine.Engine, event, _counter(counts, name))
    run_search(problem.trace, evaluate, SearchSettings(trials=COUNTED[1] + 1, seeds=1, storage=storage))
    first, last = (marks[index] for index in COUNTED)
    trials = COUNTED[1] - COUNTED[0]
    seconds = {"seconds": (last[0] - first[0]) / trials, "processor_seconds": (last[1] - first[1]) / trials}
    return seconds | {name: (last[2][name] - first[2][name]) / trials for name in listeners.values()}


def _counter(counts: Counter[str], name: str) -> Callable[..., None]:
    def count(*arguments: Any) -> None:
        counts[name] += 1

    return count


def fill(storage: str, *, one_by_one: bool) -> None:
    """Make a study of 5,000 finished trials; ``one_by_one`` as a search writes them, else in fewer statements.

    A journal keeps every step of a trial as a line of its own; a database looks the same either way.
    """
    problem = Problem(LENGTH, noise=0.01)
    settings = SearchSettings(trials=TRIALS, seeds=1, storage=storage, resume=True)
    space = Space.of(problem.trace, settings)
    rng = np.random.default_rng(0)
    drawn: dict[Choice, None] = {}
    while len(drawn) < TRIALS:
        drawn[Choice(tuple(b for b in space.cuts if rng.random() < 0.12))] = None
    with mock.patch.object(os, "fsync"):  # only the filling is spared the wait for the disk
        study = open_study(space, settings)
        study.sampler = Given(list(drawn))
        for choice in drawn:
            evaluation = _evaluation(problem, choice)
            values = [evaluation.value, float(space.peak_bytes(choice.boundaries))]
            record = create_trial(value=evaluation.value, user_attrs={"evaluation": evaluation.to_json()})
            if one_by_one:
                order = study.begin(space)
                study.records.add_trial(record)
                study.end(order, TrialState.COMPLETE, values)
            else:
                study.records.add_trial(record)
                trial = trial_of(space, choice, TrialState.RUNNING, sparse=True)
                trial.state, trial.values = TrialState.COMPLETE, values
                trial.datetime_complete = trial.datetime_start
                study.add_trial(trial)


class Given(RandomSampler):
    """Suggests what is given, one after the other."""

    def __init__(self, choices: list[Choice]) -> None:
        super().__init__()
        self._choices = choices

    def propose(self, trials: Sequence[FrozenTrial], number: int) -> Choice | None:
        """The next of them."""
        return self._choices[number]


def _evaluation(problem: Problem, choice: Choice) -> Evaluation:
    outcome = problem.evaluate(choice, 0)
    points = tuple((step, outcome.value * step / 100) for step in range(0, 101, 10))
    return Evaluation(choice, 0, outcome.value, 0.001, 100, points, 1.0, None)


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
    from groupsearch.plan.partition import floor_bytes
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


def measure(folder: Path, parts: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All rows, each with the name of its list, as they are found."""
    with database(folder) as server:
        makers = {"journal": lambda name: str(folder / f"{name}.journal")}
        if server is not None:
            makers["postgresql"] = server.create
        for kind, make in makers.items():
            if "throughput" in parts:
                rows = []
                for workers in WORKERS:
                    row = {"storage": kind, **throughput(make(f"throughput{workers}"), workers, folder)}
                    row["speedup"] = row["per_second"] / (rows or [row])[0]["per_second"]
                    rows.append(row)
                    yield "throughput", row
            if "operations" in parts:
                yield "operations", {"storage": kind, **operations(make("operations"))}
            if "size" in parts:
                storage = make("large")
                fill(storage, one_by_one=kind == "journal")
                yield "size", {"storage": kind, "trials": TRIALS, "sites": LENGTH, **in_fresh_process(storage, folder)}


def shown(name: str, row: dict[str, Any]) -> str:
    """A row as a line of text."""
    if name == "throughput":
        overhead = format_seconds(row["overhead_seconds_per_trial"])
        return (
            f"{row['storage']}, {row['workers']} workers: {row['per_second']:.2f} evaluations of {SLEEP_SECONDS} s per "
            f"second, {format_ratio(row['speedup'])} of one, {overhead} more per trial, load {row['load']:.1f}"
        )
    if name == "operations":
        return f"{row['storage']}: {row['statements']:.1f} SQL statements, {format_seconds(row['seconds'])} per trial"
    parts = ", ".join(f"{part} {format_seconds(seconds)}" for part, seconds in row["seconds"].items())
    return (
        f"{row['storage']}: {row['trials']} trials in {format_seconds(row['total_seconds'])} ({parts}), "
        f"{format_bytes(row['peak_bytes'])}"
    )


def main() -> None:
    """Print every row and write them where asked, after each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ["throughput", "operations", "size"]
    parser.add_argument("--part", action="append", choices=parts, help="measure only this")
    parser.add_argument("-o", "--output", type=Path)
    chosen = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    where = {"platform": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()}
    document: dict[str, Any] = {"environment": {**where, "optuna": optuna.__version__}, "targets": TARGETS}
    document["sleep_seconds"] = SLEEP_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        for name, row in measure(Path(folder), chosen.part or parts):
            print(shown(name, row), flush=True)
            document.setdefault(name, []).append(row)
            document["environment"]["load"] = os.getloadavg()
            if chosen.output is not None:
                write_text(chosen.output, document_text(document) + "\n", force=True)


if __name__ == "__main__":
    main()
