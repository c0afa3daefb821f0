"""The search against problems whose front is known exactly: ``python -m benchmarks.bench_search``.

Training is replaced by a function of the grouping (:class:`tests.search.problem.Problem`), memory is exact, and so
is the front, by a dynamic program that knows the function. A row is one way of searching one problem: the
share of the exact front's hypervolume that what was evaluated dominates after 60 and after 200 trials, mean and
least over seeds. The reference point lies a tenth of the front's extent outside it in both directions, so that its
ends count and what any search finds at once is not counted.

* ``front``: what ``groupsearch optimize`` does by default.
* ``tpe, warm start``, ``random, warm start``: the same encoding, first trials and cache, with Optuna's
  multivariate TPE or random sampler (``--sampler``).
* ``optuna default``, ``nsga2``, ``random``: Optuna as it comes, one 0-1 parameter for each boundary.
* ``uniform``: uniform:1, uniform:2, ... and no others.
* ``exact memory``: the least peak for 1, 2, ... groups and no others: what there is without searching for the metric.

The search's features are sums over groups; of the shapes ``layers`` and ``mixed`` are no such sums. It was
developed on the problem seeds 0 to 3 of 24 and 48 sites; those here begin at 100.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import peaks
from groupsearch.search import Choice, SearchSettings, hypervolume, run_search
from groupsearch.search.candidates import pareto
from groupsearch.search.space import Space
from groupsearch.units import format_seconds
from tests.search.problem import Boundaries, Problem

TRIALS = (60, 200)
LENGTHS = (24, 48, 100)
NOISES = {"places": 0.0, "balance": 0.0, "layers": 0.0, "mixed": 0.004}
FIRST_SEED = 100


@dataclass(frozen=True)
class Case:
    """One problem and one way of searching it."""

    way: str
    length: int
    shape: str
    seed: int

    @property
    def problem(self) -> Problem:
        return Problem(self.length, NOISES[self.shape], self.seed, self.shape)


def ours(case: Case, sampler: str) -> list[Boundaries]:
    """What our search evaluates, in order."""
    problem = case.problem
    settings = SearchSettings(trials=TRIALS[-1], seeds=1, seed=case.seed, sampler=sampler)
    return [e.boundaries for e in run_search(problem.trace, problem.evaluate, settings).evaluations]


def as_it_comes(case: Case, sampler: optuna.samplers.BaseSampler | None) -> list[Boundaries]:
    """What Optuna evaluates without anything of ours."""
    problem, made = case.problem, list[Boundaries]()

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        boundaries = tuple(b for b in range(1, case.length) if trial.suggest_int(f"cut{b}", 0, 1))
        made.append(boundaries)
        return problem.evaluate(Choice(boundaries), case.seed).value, float(peaks(problem.trace, [boundaries])[0])

    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    study.optimize(objective, n_trials=TRIALS[-1])
    return made


def optuna_default(case: Case) -> list[Boundaries]:
    """Optuna's default sampler for several objectives, seeded."""
    default = optuna.create_study(directions=["maximize", "minimize"]).sampler
    if not isinstance(default, optuna.samplers.TPESampler):
        raise TypeError(f"Optuna's default sampler is {type(default).__name__}, not TPESampler: seed that one.")
    return as_it_comes(case, optuna.samplers.TPESampler(seed=case.seed))


def uniform(case: Case) -> list[Boundaries]:
    """uniform:1, uniform:2, ..."""
    return [Grouping.uniform(case.problem.trace, k).boundaries for k in range(1, case.length + 1)]


def exact_memory(case: Case) -> list[Boundaries]:
    """The least peak for 1, 2, ... groups."""
    return [boundaries for boundaries, _ in Space.of(case.problem.trace, SearchSettings()).exact_front]


WAYS: dict[str, Callable[[Case], list[Boundaries]]] = {
    "front": lambda case: ours(case, "front"),
    "tpe, warm start": lambda case: ours(case, "tpe"),
    "random, warm start": lambda case: ours(case, "random"),
    "optuna default": optuna_default,
    "nsga2": lambda case: as_it_comes(case, optuna.samplers.NSGAIISampler(seed=case.seed)),
    "random": lambda case: as_it_comes(case, optuna.samplers.RandomSampler(seed=case.seed)),
    "uniform": uniform,
    "exact memory": exact_memory,
}


def run(case: Case) -> dict[str, Any]:
    """Search once; the shares found, and those of what is declared to be the front from one noisy value each."""
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    problem, begun = case.problem, time.perf_counter()
    made = WAYS[case.way](case)
    seconds = time.perf_counter() - begun
    sizes = [int(size) for size in peaks(problem.trace, made)]
    true = [(problem.mean(b), size) for b, size in zip(made, sizes, strict=True)]
    told = [(problem.evaluate(Choice(b), case.seed).value, size) for b, size in zip(made, sizes, strict=True)]
    exact = problem.exact_front()
    row: dict[str, Any] = {**vars(case), "distinct": len(set(made)), "seconds": seconds}
    for trials in TRIALS:
        declared = [point for point, on in zip(true, pareto(told[:trials]), strict=False) if on]
        row[f"found_{trials}"] = share(true[:trials], exact)
        row[f"declared_{trials}"] = share(declared, exact)
    return row


def share(points: list[tuple[float, int]], exact: list[tuple[float, int]]) -> float:
    """Of the exact front's hypervolume, from a reference a tenth of its extent outside (at least 0.1 %)."""
    (low, high), (small, large) = ((min(side), max(side)) for side in zip(*exact, strict=True))
    reference = (low - max(0.1 * (high - low), 1e-3 * high), large + max(0.1 * (large - small), 1e-3 * large))
    return hypervolume(points, reference) / hypervolume(exact, reference)


def summary(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Means and least values over seeds, for every way, shape and length, and over all shapes."""
    for way in dict.fromkeys(row["way"] for row in rows):
        for length in sorted({row["length"] for row in rows}):
            here = [row for row in rows if row["way"] == way and row["length"] == length]
            shapes = list(dict.fromkeys(row["shape"] for row in here))
            for shape in (*shapes, "all"):
                chosen = [row for row in here if shape in (row["shape"], "all")]
                each: dict[str, Any] = {"way": way, "length": length, "shape": shape, "runs": len(chosen)}
                for key in (f"{kind}_{trials}" for kind in ("found", "declared") for trials in TRIALS):
                    values = [row[key] for row in chosen]
                    each |= {key: statistics.fmean(values), f"{key}_least": min(values)}
                each["seconds"] = statistics.fmean(row["seconds"] for row in chosen)
                yield each


def verdict(means: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether ``front`` is first in every column (a shape, a length, a number of trials), and where it misses 0.99."""
    second, missed = [], []
    for each in means:
        key = (each["shape"], each["length"])
        if each["way"] != "front":
            continue
        for trials in TRIALS:
            rivals = {m["way"]: m[f"found_{trials}"] for m in means if (m["shape"], m["length"]) == key}
            best = max(rivals, key=rivals.__getitem__)
            if rivals[best] > rivals["front"] + 1e-9:
                second.append([*key, trials, best])
        if each["found_200"] < 0.99:
            missed.append([*key, each["found_200"]])
    return {"not_first": second, "below_0.99_at_200": missed}


def as_text(document: dict[str, Any]) -> str:
    """JSON with one line for each entry of a list, and shares to six digits."""

    def plain(value: Any) -> str:
        if isinstance(value, dict):
            value = {key: round(item, 6) if isinstance(item, float) else item for key, item in value.items()}
        return json.dumps(value)

    def part(value: Any) -> str:
        return "[\n" + ",\n".join(map(plain, value)) + "\n]" if isinstance(value, list) else plain(value)

    return "{\n" + ",\n".join(f"{json.dumps(key)}: {part(value)}" for key, value in document.items()) + "\n}\n"


def main() -> None:
    """Print the means as a table and write everything where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--shapes", nargs="+", choices=tuple(NOISES), default=tuple(NOISES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--output", type=Path, help="write means and least values as JSON to this file")
    parser.add_argument("--rows", type=Path, help="write every search as JSON to this file")
    given = parser.parse_args()
    seeds = range(FIRST_SEED, FIRST_SEED + given.seeds)
    cases = [Case(w, n, shape, seed) for n in given.lengths for shape in given.shapes for seed in seeds for w in WAYS]
    begun = time.perf_counter()
    with ProcessPoolExecutor(given.jobs) as pool:
        rows = list(pool.map(run, cases))
    means = list(summary(rows))
    print(f"{'way':18} {'sites':>5} {'shape':8} {'60':>7} {'200':>7} {'least':>7} {'declared':>8} {'seconds':>8}")
    for m in means:
        shares = f"{m['found_60']:7.4f} {m['found_200']:7.4f} {m['found_200_least']:7.4f} {m['declared_200']:8.4f}"
        print(f"{m['way']:18} {m['length']:5} {m['shape']:8} {shares} {m['seconds']:8.2f}")
    found = verdict(means)
    print(json.dumps(found))
    print(f"{len(rows)} searches in {format_seconds(time.perf_counter() - begun)}")
    if given.output:
        versions = {"python": platform.python_version(), "numpy": np.__version__, "optuna": optuna.__version__}
        document = {"environment": versions, "noise": NOISES, "verdict": found, "summary": means}
        given.output.write_text(as_text(document))
    if given.rows:
        given.rows.write_text(as_text({"rows": rows}))


if __name__ == "__main__":
    main()
