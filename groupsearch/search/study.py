"""Opening the study of one problem: new, resumed or refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from groupsearch.errors import GroupSearchError
from groupsearch.search.settings import SearchSettings
from groupsearch.search.space import Space
from groupsearch.search.storage import open_storage, study_names
from groupsearch.trace import Trace

_FINGERPRINT = "fingerprint"


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna logs errors only while this lasts; then its verbosity is what it was."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def open_study(space: Space, settings: SearchSettings) -> optuna.Study:
    """The study that settings name, with a sampler that does not repeat what it drew before.

    A trial that another process left running is marked failed and its grouping queued again.

    Raises:
        GroupSearchError: when there is one and neither ``resume`` nor ``force`` is set, when it is of
            another problem (the message names what differs), or when the storage cannot be opened.
    """
    fingerprint = problem_fingerprint(space.trace, settings)
    storage, name = open_storage(settings.storage), settings.study_name
    if name in study_names(storage):
        if settings.force:
            optuna.delete_study(study_name=name, storage=storage)
        elif not settings.resume:
            raise GroupSearchError(
                f"Found a study {name!r} in {settings.storage} already. Go on with it with --resume, "
                f"throw it away with --force, or name another storage."
            )
    study = optuna.create_study(
        study_name=name, storage=storage, directions=["maximize", "minimize"], load_if_exists=settings.resume
    )
    _check_fingerprint(study, fingerprint)
    requeue_running(study, space)
    study.sampler = make_sampler(settings, len(study.get_trials(deepcopy=False)))
    return study


def problem_fingerprint(trace: Trace, settings: SearchSettings) -> dict[str, Any]:
    """What must be equal for evaluations of one run to count in another; as it reads back from JSON."""
    problem = {
        "metric_name": settings.metric_name,
        "seed": settings.seed,
        "budget_bytes": settings.budget_bytes,
        "max_groups": settings.max_groups,
        "granularity": settings.granularity,
        "trace": hashlib.sha256(json.dumps(trace.to_json(), sort_keys=True).encode()).hexdigest(),
    }
    clash = sorted(problem.keys() & settings.fingerprint.keys())
    if clash:
        raise GroupSearchError(
            f"Found {', '.join(clash)} in the fingerprint, which the search keeps there itself. Leave it out."
        )
    plain: dict[str, Any] = json.loads(json.dumps({**problem, **settings.fingerprint}))
    return plain


def make_sampler(settings: SearchSettings, existing: int) -> BaseSampler:
    """A sampler seeded by the seed and by how many trials there are: with one seed it would repeat itself on resume."""
    seed = int(np.random.SeedSequence([settings.seed, existing]).generate_state(1)[0])
    if settings.sampler == "random":
        return RandomSampler(seed=seed)
    if settings.sampler == "nsga2":
        return NSGAIISampler(population_size=20, seed=seed)  # the default of 50 is more than most searches train
    return TPESampler(multivariate=True, seed=seed)


def queue(study: optuna.Study, space: Space, boundaries: tuple[int, ...]) -> None:
    """Let a coming trial be this grouping."""
    study.enqueue_trial(space.parameters(boundaries), user_attrs={"boundaries": list(boundaries)})


def queued(study: optuna.Study) -> set[tuple[int, ...]]:
    """The groupings that wait."""
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    return {tuple(trial.user_attrs["boundaries"]) for trial in waiting}


def requeue_running(study: optuna.Study, space: Space) -> None:
    """Mark trials that a killed or interrupted process left as failed, and queue their groupings again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        if "boundaries" in trial.user_attrs:  # else it was killed before it was a grouping
            queue(study, space, tuple(trial.user_attrs["boundaries"]))


def _check_fingerprint(study: optuna.Study, fingerprint: Mapping[str, Any]) -> None:
    stored = study.user_attrs.get(_FINGERPRINT)
    if stored is None and not study.get_trials(deepcopy=False):
        study.set_user_attr(_FINGERPRINT, dict(fingerprint))
        return
    stored = stored or {}
    different = [key for key in sorted({*fingerprint, *stored}) if stored.get(key) != fingerprint.get(key)]
    if different:
        changes = "; ".join(f"{key}: {_short(stored.get(key))} -> {_short(fingerprint.get(key))}" for key in different)
        raise GroupSearchError(
            f"Expected to resume the study {study.study_name!r} on the problem it was begun with, found another one "
            f"({changes}). Ask for what it was begun with, or begin anew with --force or another --storage."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
