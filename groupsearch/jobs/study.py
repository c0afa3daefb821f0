"""The study of Clip21 and its relatives: methods by problems, workers and thresholds.

A cell is one method on one problem with so many workers: all thresholds and step sizes run side by side. Finished cells
go to a journal beside the document, so that a study that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from groupsearch.distributed.clip21 import METHODS, Crew, Setup, spent
from groupsearch.documents import Study
from groupsearch.documents.rows import Cell, Descent, Guarantee
from groupsearch.errors import GroupSearchError
from groupsearch.jobs.events import Advanced, Begun, Interrupted
from groupsearch.jobs.request import Request, door
from groupsearch.privacy.accounting import default_delta, noise_multiplier_for
from groupsearch.records import environment, new_document
from groupsearch.workloads.skewed import DATA, MODELS, Skewed, skewed

STUDIES = ("clip21",)
BATCH = 4
RECORDS = 26
_TUNED = (0.25, 1.0, 4.0, 16.0)
"""Step sizes that are tried, in units of 1 / L; of a network, whose L nobody knows, of a fifth."""
_LENGTHS = (0.003, 0.01, 0.03, 0.1)
"""Those of normalised steps, whose length they are."""
_FITTED_SHARE = 0.1  # rates are fitted from this share of the steps on
_LAST = 3  # records that the result is the mean of


class Entry(NamedTuple):
    """A method as the study runs it.

    Attributes:
        name: as the document has it.
        method: of :data:`~groupsearch.distributed.clip21.METHODS`.
        stochastic: gradients of a few random examples of each worker.
        allocation: of thresholds to layers; None to clip all at once.
        theory: whether a step size from theory is run besides.
    """

    name: str
    method: str
    stochastic: bool = False
    allocation: str | None = None
    theory: bool = False


ENTRIES = (
    Entry("clip-gd", "clip-gd", theory=True),
    Entry("clip21-gd", "clip21-gd", theory=True),
    Entry("clip21-gd, layers, uniform", "clip21-gd", allocation="uniform"),
    Entry("clip21-gd, layers, dimension", "clip21-gd", allocation="dimension"),
    Entry("alpha-normec", "alpha-normec", theory=True),
    Entry("clip-sgd", "clip-sgd", stochastic=True),
    Entry("clip21-sgd", "clip21-sgd", stochastic=True),
    Entry("clip21-sgd2m", "clip21-sgd2m", stochastic=True),
    Entry("dp-sgd", "dp-sgd", stochastic=True),
    Entry("dp-clip21-gd", "dp-clip21-gd"),
    Entry("dp-clip21-sgd2m", "dp-clip21-sgd2m", stochastic=True),
    Entry("dp-alpha-normec", "dp-alpha-normec"),
)


@dataclass(frozen=True)
class StudyRequest(Request):
    """What to study.

    Attributes:
        name: of :data:`STUDIES`.
        quick: a small part of it, for a look.
        steps: of every run; None for 200, or 40 if quick.
        seed: of noise and batches.
        journal: where finished cells are written as they come; None for nowhere.
        resume: go on with the cells in the journal.
    """

    name: str = "clip21"
    _: KW_ONLY
    quick: bool = False
    steps: int | None = None
    seed: int = 0
    journal: str | Path | None = None
    resume: bool = False


class Job(NamedTuple):
    """One cell to come, or two where a step size from theory is run besides."""

    data: str
    model: str
    workers: int
    entry: Entry
    epsilon: float | None

    @property
    def problem(self) -> str:
        """As the document has it."""
        return f"{self.model}, {self.data}"


@dataclass(frozen=True)
class Plan:
    """All that is run."""

    steps: int
    thresholds: tuple[float, ...]
    epsilons: tuple[float, ...]
    workers: tuple[int, ...]
    problems: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, request: StudyRequest) -> Plan:
        """The whole, or a part of each for a look."""
        if request.quick:
            return cls(request.steps or 40, (1e-2, 1e-1, 1.0), (8.0,), (10,), (("breast-cancer", "logistic"),))
        problems = tuple((data, model) for model in MODELS for data in DATA)
        decades = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
        return cls(request.steps or 200, decades, (8.0, 18.0), (10, 20, 100), problems)

    def jobs(self) -> Iterator[Job]:
        """One after another, those with the fewest workers first."""
        for workers in self.workers:
            for data, model in self.problems:
                for entry in ENTRIES:
                    if entry.allocation is None or model == "network":
                        budgets = self.epsilons if METHODS[entry.method].noisy else (None,)
                        yield from (Job(data, model, workers, entry, epsilon) for epsilon in budgets)

    @property
    def middle(self) -> int:
        """Which threshold rates and curves are of."""
        return len(self.thresholds) // 2

    @property
    def records(self) -> tuple[int, ...]:
        """Steps after which gradients are looked at."""
        spaced = np.geomspace(1, self.steps, RECORDS).astype(int).tolist()
        return tuple(sorted({0, *spaced, *range(self.steps - _LAST + 1, self.steps + 1)}))


def run(request: StudyRequest) -> Study:
    """Run the study, or what is left of it.

    Raises:
        GroupSearchError: for a study that is not known, or a journal of another one.
        Interrupted: with the cells that are done.
    """
    if request.name not in STUDIES:
        raise GroupSearchError(f"Expected a study of {', '.join(STUDIES)}, found {request.name!r}.")
    plan = Plan.of(request)
    if plan.steps < 10:
        raise GroupSearchError(f"Expected at least 10 steps to tell a rate from, found {plan.steps}.")
    settings: dict[str, object] = {"quick": request.quick, "steps": plan.steps, "seed": request.seed, "batch": BATCH}
    largest = max(sum(skewed(*problem, plan.workers[0]).sizes) for problem in plan.problems)
    model = {"name": request.name, "batch_size": BATCH, "parameters": largest}
    header = new_document("study", model, environment(), settings)
    request.notify(Begun(header))
    journal = _Journal(request.journal, settings, request.resume)
    jobs = list(plan.jobs())
    try:
        for count, job in enumerate(jobs):
            request.notify(Advanced("Studying", f"{job.problem}, {job.workers}: {job.entry.name}", count, len(jobs)))
            if _key(job) not in journal.done:
                journal.add(_key(job), *_cells(plan, job, request.seed))
    except KeyboardInterrupt as interrupt:
        said = f"Interrupted; {len(journal.done)} of {len(jobs)} cells are done, and --resume goes on with them."
        raise Interrupted(said, _document(header, plan, jobs, journal)) from interrupt
    finally:
        journal.close()
    return _document(header, plan, jobs, journal)


study = door(StudyRequest, run)


def noise_for(epsilon: float, workers: int, steps: int) -> tuple[float, float]:
    """Noise multiplier of every worker and delta, for an epsilon of the weights that all workers' noise protects."""
    delta = default_delta(workers)
    return 2 * noise_multiplier_for(epsilon, delta, 1.0, steps) / math.sqrt(workers), delta


def theory_step_size(problem: Skewed, entry: Entry, thresholds: Tensor) -> Tensor:
    """The step size that theory gives for every threshold, as far as we can tell; (S,).

    ``clip-gd``: 1 / L, of descent without clipping. ``clip21-gd``: where no difference is longer than D, clipping is a
    contraction by tau / D, and EF21 (arXiv 2106.05203, theorem 1) then allows 1 / (L + L_max (D / tau - 1)); D is taken
    at the start. This is derived here; the constants of 2305.18929 were not at hand. ``alpha-normec``:
    tau D / (L_max (alpha + D)), read into 2502.13482.
    """
    assert problem.smoothness is not None
    mean, largest = problem.smoothness
    longest = float(problem.gradients(problem.start()[None]).norm(dim=-1).max())
    if entry.method == "clip-gd":
        return torch.full_like(thresholds, 1 / mean)
    if entry.method == "alpha-normec":
        return thresholds * longest / (largest * (Setup(entry.method, 1.0).alpha + longest))
    return 1 / (mean + largest * (longest / thresholds - 1).clip(min=0))


def _cells(plan: Plan, job: Job, seed: int) -> tuple[list[Cell], Descent]:
    """A cell for tuned step sizes, one for those of theory where there are any, and the curve of the first."""
    problem = skewed(job.data, job.model, job.workers)
    bounds = torch.tensor(plan.thresholds, dtype=torch.float64)
    if METHODS[job.entry.method].normalised:
        gammas = torch.tensor(_LENGTHS, dtype=torch.float64)
    else:
        gammas = torch.tensor(_TUNED, dtype=torch.float64) * (1 / problem.smoothness[0] if problem.smoothness else 0.2)
    tried = gammas.repeat(len(bounds))
    tuned = _Run(*_followed(plan, job, problem, bounds.repeat_interleave(len(gammas)), tried, seed), tried)
    best = tuned.ends.view(len(bounds), len(gammas)).argmin(1) + len(gammas) * torch.arange(len(bounds))
    cells = [_cell(plan, job, "tuned", tuned.at(best))]
    if job.entry.theory and problem.smoothness is not None:
        steps = theory_step_size(problem, job.entry, bounds)
        cells.append(_cell(plan, job, "theory", _Run(*_followed(plan, job, problem, bounds, steps, seed), steps)))
    curve = Descent(
        problem=job.problem,
        workers=job.workers,
        method=job.entry.name,
        epsilon=job.epsilon,
        squared=_rounded(tuned.squared[:, best[plan.middle]].tolist()),
    )
    return cells, curve


class _Run(NamedTuple):
    """What S settings came to: squared norms (records, S), the last step that clipped (S,) and step sizes (S,)."""

    squared: Tensor
    last: Tensor
    gammas: Tensor

    @property
    def ends(self) -> Tensor:
        """Of the last records; infinite where it diverged."""
        return torch.nan_to_num(self.squared[-_LAST:].mean(0), math.inf, math.inf)

    def at(self, settings: Tensor) -> _Run:
        """Some of the settings."""
        return _Run(self.squared[:, settings], self.last[settings], self.gammas[settings])


def _followed(
    plan: Plan, job: Job, problem: Skewed, bounds: Tensor, gammas: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Squared norms (records, S) of the gradient of f, and (S,) the last step that clipped; S settings at once."""
    entry, sizes = job.entry, problem.sizes if job.entry.allocation else ()
    shares = torch.tensor([1 / max(1, len(sizes))] * max(1, len(sizes)), dtype=torch.float64)
    if entry.allocation == "dimension":
        shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    thresholds = (bounds[:, None] * shares.sqrt())[:, None]
    noise = noise_for(job.epsilon, job.workers, plan.steps)[0] if job.epsilon is not None else 0.0
    setup = Setup(
        entry.method,
        (1.0,) * len(shares),
        sizes,
        noise_multiplier=noise,
        server_momentum=0.1 if noise else 1.0,
    )
    start = problem.start().repeat(len(bounds), 1)
    crew = Crew(setup, start, job.workers, gammas[:, None], thresholds, seed=seed)
    drawn = torch.Generator().manual_seed(seed)
    last, found, records = torch.zeros(len(bounds), dtype=torch.long), [], set(plan.records)
    each = problem.labels.shape[1]
    for step in range(plan.steps + 1):
        whole = problem.gradients(crew.points) if step in records or not entry.stochastic else None
        if step in records:
            assert whole is not None
            found.append(whole.mean(1).square().sum(-1))
        if step < plan.steps:
            if entry.stochastic:
                rows = torch.randint(each, (job.workers, min(BATCH, each)), generator=drawn)
                whole = problem.gradients(crew.points, rows)
            assert whole is not None
            last[crew.step(whole).any(-1).any(-1)] = step + 1
    return torch.stack(found), last


def _cell(plan: Plan, job: Job, steps: str, run: _Run) -> Cell:
    """The cell of a run with one setting for each threshold."""
    slope, half_width = fitted_rate(plan.records, run.squared[:, plan.middle].tolist())
    always = METHODS[job.entry.method].normalised
    return Cell(
        problem=job.problem,
        workers=job.workers,
        method=job.entry.name,
        epsilon=job.epsilon,
        steps=steps,
        squared=_rounded(run.ends.tolist()),
        inactive_from=tuple(None if always or last >= plan.steps else last for last in run.last.tolist()),
        step_size=_rounded([float(run.gammas[plan.middle])])[0],
        slope=slope,
        half_width=half_width,
    )


def fitted_rate(records: Sequence[int], squared: Sequence[float]) -> tuple[float | None, float | None]:
    """The slope of the squared gradient norm against steps, both logarithmic, with a 95 % interval's half width.

    From a tenth of the steps on. The interval is that of a regression with independent residuals, which those of
    one run are not: it says how straight the line is.

    >>> slope, half_width = fitted_rate([1, 10, 20, 40, 100], [1, 1 / 10, 1 / 20, 1 / 40, 1 / 100])
    >>> round(slope, 6), half_width < 1e-6
    (-1.0, True)
    """
    kept = [(k, y) for k, y in zip(records, squared, strict=True) if k >= max(1, _FITTED_SHARE * records[-1])]
    if len(kept) < 3 or not all(math.isfinite(y) and y > 0 for _, y in kept):
        return None, None
    fit = stats.linregress(*np.log(np.array(kept, dtype=float)).T)
    half_width = float(fit.stderr * stats.t.ppf(0.975, len(kept) - 2))
    return round(float(fit.slope), 3), float(f"{half_width:.2g}")


def _rounded(values: Sequence[float]) -> tuple[float | None, ...]:
    """Three digits, as more say nothing; what diverged is None."""
    return tuple(float(f"{value:.3g}") if math.isfinite(value) else None for value in values)


def _document(header: Mapping[str, object], plan: Plan, jobs: Sequence[Job], journal: _Journal) -> Study:
    cells, curves = [], []
    for job in jobs:
        if _key(job) in journal.done:
            found, curve = journal.done[_key(job)]
            cells += found
            curves += [curve] if job.workers == plan.workers[0] else []
    guarantees = [_guarantee(epsilon, workers, plan.steps) for workers in plan.workers for epsilon in plan.epsilons]
    parts = {
        "records": list(plan.records),
        "thresholds": list(plan.thresholds),
        "cells": cells,
        "curves": curves,
        "guarantees": guarantees,
        "randomness": {"secret": False, "secure": False, "seed": _seed_of(header)},
    }
    return Study.from_json({**header, **parts})


def _seed_of(header: Mapping[str, object]) -> object:
    """The seed that a header tells."""
    settings = header["settings"]
    assert isinstance(settings, Mapping)
    return settings["seed"]


def _guarantee(epsilon: float, workers: int, steps: int) -> dict[str, object]:
    sigma, delta = noise_for(epsilon, workers, steps)
    found = spent(Setup("dp-sgd", 1.0, noise_multiplier=sigma), workers=workers, steps=steps, delta=delta)
    told = Guarantee(
        workers=workers,
        epsilon=epsilon,
        delta=delta,
        noise_multiplier=float(f"{sigma:.6g}"),
        of_weights=math.ceil(1e4 * found.of_weights) / 1e4,
        of_messages=math.ceil(1e4 * found.of_messages) / 1e4,
    )
    return told.to_json()


def _key(job: Job) -> str:
    return json.dumps([job.data, job.model, job.workers, job.entry.name, job.epsilon])


class _Journal:
    """Finished cells by their keys, one JSON line each after one that says what study they are of."""

    def __init__(self, path: str | Path | None, settings: Mapping[str, object], resume: bool) -> None:
        self.done: dict[str, tuple[list[object], object]] = {}
        self._file = None
        if path is None:
            return
        path = Path(path)
        if resume and path.exists():
            self._read(path, settings)
        self._file = path.open("a" if self.done else "w", encoding="utf-8")
        if not self.done:
            self._write({"settings": dict(settings)})

    def add(self, key: str, cells: Sequence[Cell], curve: Descent) -> None:
        """Keep what a job found."""
        self.done[key] = [list(cell) for cell in cells], curve.to_json()
        if self._file is not None:
            self._write({"key": key, "cells": self.done[key][0], "curve": self.done[key][1]})

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, line: object) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _read(self, path: Path, settings: Mapping[str, object]) -> None:
        whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        try:
            lines = [json.loads(line) for line in whole]
            told = lines[0]["settings"] if lines else dict(settings)
            found = {line["key"]: (line["cells"], line["curve"]) for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise GroupSearchError(
                f"Expected a journal of a study in {path}, found otherwise: {error}. Name another file, or begin anew "
                f"without --resume."
            ) from error
        if told != dict(settings):
            raise GroupSearchError(
                f"Expected a journal of a study with {dict(settings)} in {path}, found one with {told}. Ask for the "
                f"same, or begin anew without --resume."
            )
        path.write_text("".join(whole), encoding="utf-8")
        self.done = found
