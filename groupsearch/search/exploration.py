"""The trials: what is queued, then what Optuna suggests, until enough groupings are evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.trial import TrialState

from groupsearch.search.candidates import Candidate, gather
from groupsearch.search.choice import Choice, Evaluation
from groupsearch.search.evaluations import EvaluationLog
from groupsearch.search.settings import Event, Notify, SearchSettings
from groupsearch.search.space import Space
from groupsearch.search.study import Order, SharedStudy, queue, queued
from groupsearch.search.verdict import FEWEST, compare

# Suggestions in a row that train nothing before a neighbour of what was evaluated is taken instead.
PATIENCE = 10


@dataclass(frozen=True)
class Exploration:
    """One running search: the space, its study, its ledger and who is told."""

    space: Space
    study: SharedStudy
    ledger: EvaluationLog
    settings: SearchSettings
    notify: Notify

    def evaluate(self, choice: Choice, seed: int, phase: str, done: int, total: int) -> Evaluation:
        """Obtain an evaluation, and tell about it before and after."""
        peak = self.space.peak_bytes(choice.boundaries)

        def event(kind: str, value: float | None, done: int, reason: str | None = None) -> Event:
            return Event(kind, phase, choice, seed, value, peak, done, total, reason)

        self.notify(event("started", None, done))
        evaluation = self.ledger.obtain(choice, seed)
        if evaluation.under_way:  # another process was quicker
            self.notify(event("cached", None, done))
        else:
            kind = "trained" if evaluation.error is None else "failed"
            self.notify(event(kind, evaluation.value, done + 1, evaluation.error))
        return evaluation


def explore(search: Exploration) -> None:
    """Evaluate choices with the first seed until ``trials`` of them are, or none is left to find."""
    settings = search.settings
    start = starting_choices(search.space, settings)
    enqueue(search, start)
    wasted, asked = 0, settings.further is None
    while len(seen := _seen(search)) < settings.trials:
        if not asked and settings.further is not None and _ended(search, start):
            more = settings.further(search.ledger.evaluations)
            enqueue(search, more or ())
            asked = more is not None
        if wasted >= PATIENCE:
            rng = np.random.default_rng([settings.seed, len(search.study.get_trials(deepcopy=False))])
            fresh = search.space.unseen_near(seen, rng)
            if fresh is None:
                return
            queue(search.study, search.space, fresh)
            wasted = 0
        wasted = 0 if answer(search, len(seen)) else wasted + 1


def starting_choices(space: Space, settings: SearchSettings) -> list[Choice]:
    """What is evaluated before anything is sampled: the ``first`` of the settings, then the warm start."""
    first = [
        space.with_option(choice.boundaries, choice)
        for choice in settings.first
        if set(choice.boundaries) <= set(space.cuts) and space.feasible(choice.boundaries)
    ]
    return list(dict.fromkeys([*first, *space.warm_start(settings.trials)]))[: max(settings.trials, len(first))]


def enqueue(search: Exploration, choices: Sequence[Choice]) -> None:
    """Queue those that are neither evaluated nor queued."""
    known = {*_seen(search), *queued(search.study)}
    for choice in choices:
        if choice not in known:
            queue(search.study, search.space, choice)


def answer(search: Exploration, done: int) -> bool:
    """Ask for one trial and answer it; whether that took an evaluation.

    A trial that costs nothing is told as pruned: with its excess where it is outside the limits,
    from which the sampler learns where they are; without where it is a repetition, which drives
    the sampler away from it. A failed one is told as failed, which the sampler passes over.
    """
    space, study, settings = search.space, search.study, search.settings
    order = study.begin(space)
    choice = order.choice
    known, peak = search.ledger.get(choice, settings.seed), space.peak_bytes(choice.boundaries)
    fresh = known is None and space.feasible(choice.boundaries)
    if fresh:
        known = search.evaluate(choice, settings.seed, "search", done, settings.trials)
        kind = "cached" if known.under_way else "trained" if known.error is None else "failed"
    else:
        kind, value = ("cached", known.value) if known else ("rejected", None)
        search.notify(Event(kind, "search", choice, None, value, peak, done, settings.trials))
    _tell(search, order, known, kind)
    return fresh


def _tell(search: Exploration, order: Order, evaluation: Evaluation | None, kind: str) -> None:
    if evaluation is not None and evaluation.error is not None:
        search.study.end(order, TrialState.FAIL, answer=kind)
    elif evaluation is None or evaluation.value is None or (kind == "cached" and _told(search.study, order.choice)):
        search.study.end(order, TrialState.PRUNED, answer=kind)
    else:
        time = [evaluation.step_seconds] if search.settings.timed else []
        values = [evaluation.value, float(search.space.peak_bytes(order.choice.boundaries)), *time]
        search.study.end(order, TrialState.COMPLETE, values, answer="" if kind == "trained" else kind)


def _told(study: optuna.Study, choice: Choice) -> bool:
    """Whether Optuna knows the values of a choice; after a kill the ledger can be ahead of it."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return any(Choice.from_json(trial.user_attrs) == choice for trial in complete)


def _ended(search: Exploration, choices: Sequence[Choice]) -> bool:
    ended = {e.choice for e in search.ledger.evaluations if e.seed == search.settings.seed}
    return ended.issuperset(choices)


def _seen(search: Exploration) -> list[Choice]:
    """What has been evaluated with the first seed, or is being evaluated by another process."""
    first = search.settings.seed
    ended = [e.choice for e in search.ledger.evaluations if e.seed == first]
    return [*ended, *(choice for choice, seed in search.ledger.under_way if seed == first)]


# -- More seeds for what ends up on the front, because a mean over one seed is partly luck ---------

# With this many seeds the noise of a mean is a tenth of that of a run, and few can pay for it.
MOST_SEEDS = 100


def replicate(search: Exploration) -> None:
    """Evaluate the front and the references with every seed, then with more as long as that may decide something.

    One seed at a time: new means move the front, and what has left it is not evaluated further. It
    ends when everything on the front has all seeds, at the latest when every candidate has. With ``max_runs``
    it then goes on with the best grouping and those that are not told from it; what is declared to be below it is
    given up. At ``max_runs`` evaluations it ends in any case.
    """
    done = 0
    while missing := (_missing(search) or _undecided(search)):
        total = done + sum(len(seeds) for seeds in missing.values())
        for choice, seeds in missing.items():
            if _runs_left(search) == 0:
                return
            search.evaluate(choice, seeds[0], "replication", done, total)
            done += 1


def _missing(search: Exploration) -> dict[Choice, list[int]]:
    """The seeds that the references, the front, and what ties with it on peak with fewest groups still lack."""
    candidates = _candidates(search)
    fewest: dict[int, Candidate] = {}
    for candidate in candidates:  # of equal peaks those with fewer groups come first
        first = fewest.setdefault(candidate.peak_bytes, candidate)
        if candidate.boundaries == first.boundaries and candidate.mean > first.mean:
            fewest[candidate.peak_bytes] = candidate
    front = [c for c in candidates if c.on_front]
    ties = [fewest[c.peak_bytes].choice for c in front]
    wanted = dict.fromkeys([*search.space.references(), *(c.choice for c in front), *ties])
    seeds, more = search.settings.seeds, search.settings.max_runs is not None
    return _lacking(search, list(wanted), max(seeds, FEWEST + 1) if more else seeds)  # of fewer nothing is told


def _undecided(search: Exploration) -> dict[Choice, list[int]]:
    """One more seed for the best and each that is not told from it; for those behind first, so that they compare."""
    settings = search.settings
    if settings.max_runs is None:
        return {}
    candidates = _candidates(search)
    comparisons = [c for c in compare(candidates, settings.seed, settings.confidence) if not c.below]
    wanted = list(dict.fromkeys(choice for c in comparisons for choice in (c.versus, c.choice)))
    counts: dict[Choice, int] = {c.choice: _seeds(c) for c in candidates}
    fewest = min((counts[choice] for choice in wanted), default=MOST_SEEDS)
    return _lacking(search, wanted, fewest + 1) if fewest < MOST_SEEDS else {}


def _lacking(search: Exploration, wanted: list[Choice], seeds: int) -> dict[Choice, list[int]]:
    """Which of the first so many seeds choices lack, those left out that failed or lack none."""
    failed = {e.choice for e in search.ledger.evaluations if e.error is not None}
    first = search.settings.seed
    lacking = {
        choice: [seed for seed in range(first, first + seeds) if search.ledger.get(choice, seed) is None]
        for choice in wanted
        if choice not in failed
    }
    return {choice: missing for choice, missing in lacking.items() if missing}


def _candidates(search: Exploration) -> tuple[Candidate, ...]:
    return gather(search.space, search.ledger.evaluations, timed=search.settings.timed)


def _seeds(candidate: Candidate) -> int:
    return len(candidate.values)


def _runs_left(search: Exploration) -> int | None:
    most = search.settings.max_runs
    return None if most is None else max(0, most - len(search.ledger.evaluations))
