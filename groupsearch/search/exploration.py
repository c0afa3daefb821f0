"""The trials: what is queued, then what Optuna suggests, until enough groupings are evaluated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import optuna
from optuna.trial import TrialState

from groupsearch.search.evaluations import Evaluation, Ledger
from groupsearch.search.settings import Event, Notify, SearchSettings
from groupsearch.search.space import Boundaries, Space
from groupsearch.search.study import queue, queued

# Suggestions in a row that train nothing before a neighbour of what was evaluated is taken instead.
PATIENCE = 10


@dataclass(frozen=True)
class Search:
    """One running search: the space, its study, its ledger and who is told."""

    space: Space
    study: optuna.Study
    ledger: Ledger
    settings: SearchSettings
    notify: Notify

    def evaluate(self, boundaries: Boundaries, seed: int, phase: str, done: int, total: int) -> Evaluation:
        """Obtain an evaluation, and tell about it before and after."""

        def event(kind: str, value: float | None, done: int) -> Event:
            return Event(kind, phase, boundaries, seed, value, self.space.peak_bytes(boundaries), done, total)

        self.notify(event("started", None, done))
        evaluation = self.ledger.obtain(boundaries, seed)
        if evaluation.under_way:  # another process was quicker
            self.notify(event("cached", None, done))
        else:
            self.notify(event("trained" if evaluation.error is None else "failed", evaluation.value, done + 1))
        return evaluation


def explore(search: Search) -> None:
    """Evaluate groupings with the first seed until ``trials`` of them are, or none is left to find."""
    enqueue_warm_start(search)
    wasted = 0
    while len(seen := _seen(search)) < search.settings.trials:
        if wasted >= PATIENCE:
            rng = np.random.default_rng([search.settings.seed, len(search.study.get_trials(deepcopy=False))])
            fresh = search.space.unseen_near(seen, rng)
            if fresh is None:
                return
            queue(search.study, search.space, fresh)
            wasted = 0
        wasted = 0 if answer(search, len(seen)) else wasted + 1


def enqueue_warm_start(search: Search) -> None:
    """Queue what is worth evaluating first and neither evaluated nor queued."""
    known = {*_seen(search), *queued(search.study)}
    for boundaries in search.space.warm_start(search.settings.trials):
        if boundaries not in known:
            queue(search.study, search.space, boundaries)


def answer(search: Search, done: int) -> bool:
    """Ask for one trial and answer it; whether that took an evaluation.

    A trial that costs nothing is told as pruned: with its excess where it is outside the limits,
    from which the sampler learns where they are; without where it is a repetition, which drives
    the sampler away from it. A failed one is told as failed, which the sampler passes over.
    """
    space, study, settings = search.space, search.study, search.settings
    trial = study.ask()
    boundaries = space.suggest(trial)
    if "boundaries" not in trial.user_attrs:
        trial.set_user_attr("boundaries", list(boundaries))
    limits, peak = space.limits(boundaries), space.peak_bytes(boundaries)
    for name, excess in limits.items():
        trial.set_constraint(name, excess)
    known = search.ledger.get(boundaries, settings.seed)
    feasible = all(excess <= 0 for excess in limits.values())
    fresh = known is None and feasible
    if fresh:
        known = search.evaluate(boundaries, settings.seed, "search", done, settings.trials)
        kind = "cached" if known.under_way else "trained" if known.error is None else "failed"
    else:
        kind, value = ("cached", known.value) if known else ("rejected", None)
        search.notify(Event(kind, "search", boundaries, None, value, peak, done, settings.trials))
    trial.set_user_attr("answer", kind)
    _tell(study, trial, known, peak)
    return fresh


def _tell(study: optuna.Study, trial: optuna.Trial, evaluation: Evaluation | None, peak: int) -> None:
    # skip_if_finished: another process that resumes this study may have taken the trial for abandoned.
    if evaluation is not None and evaluation.error is not None:
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
    elif evaluation is None or evaluation.value is None or _told(study, evaluation.boundaries):
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
    else:
        study.tell(trial, [evaluation.value, float(peak)], skip_if_finished=True)


def _told(study: optuna.Study, boundaries: Boundaries) -> bool:
    """Whether Optuna knows the values of a grouping; after a kill the ledger can be ahead of it."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return any(tuple(trial.user_attrs["boundaries"]) == boundaries for trial in complete)


def _seen(search: Search) -> list[Boundaries]:
    """What has been evaluated with the first seed, or is being evaluated by another process."""
    first = search.settings.seed
    ended = [e.boundaries for e in search.ledger.evaluations if e.seed == first]
    return [*ended, *(boundaries for boundaries, seed in search.ledger.under_way if seed == first)]
