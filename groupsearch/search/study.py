"""Opening the study of one problem: new, resumed, joined or refused."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from groupsearch.errors import GroupSearchError
from groupsearch.search.patience import WORKER, SharedStorage
from groupsearch.search.settings import SearchSettings
from groupsearch.search.space import Space
from groupsearch.search.storage import open_storage, shown, study_names
from groupsearch.search.workers import Watch, is_known_dead
from groupsearch.trace import Trace

_DIRECTIONS = (StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE)  # the metric, the peak
_FINGERPRINT = "fingerprint"
_RECORDS = "/evaluations"  # what the name of the study that holds the evaluations ends with
_LOOK_SECONDS = 1.0  # between looks for the dead


class SharedStudy(Study):
    """A study that several processes work on, with a second one beside it for what they evaluate.

    Trials of the search are the sampler's; ``records`` holds the fingerprint, what is being evaluated
    and by whom, and every evaluation. Both take back what a dead worker left.

    Attributes:
        shared: the storage of both.
        records: the study of evaluations; it has no sampler's trials.
        place: a number that no other worker has, nor had: a sampler seeded by it repeats nobody's draws.
    """

    def __init__(self, name: str, storage: SharedStorage) -> None:
        super().__init__(study_name=name, storage=storage)
        self.shared = storage
        self.records = optuna.load_study(study_name=name + _RECORDS, storage=storage)
        self.place = 0
        self._watch = Watch()
        self._looked = self._beats_at = -math.inf
        self._beats: dict[str, Any] = {}

    def ask(self, *arguments: Any, **named: Any) -> Trial:
        """The next trial; before that, what dead workers left is queued again."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            self.take_back()
        return super().ask(*arguments, **named)

    def take_back(self, *, own: bool = False) -> None:
        """Queue the groupings of dead workers' trials again and end the trials; with ``own`` also this worker's."""
        for trial in self.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not self.is_abandoned(trial, own=own):
                continue
            if "boundaries" in trial.user_attrs:  # else it ended before it was a grouping
                # Queued first: to be killed between the two costs a repetition, not a grouping.
                self.enqueue_trial(trial.params, user_attrs={"boundaries": trial.user_attrs["boundaries"]})
            self.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def is_abandoned(self, trial: FrozenTrial, *, own: bool = False) -> bool:
        """Whether the worker that runs a trial is dead, or silent for too long."""
        worker = trial.user_attrs.get(WORKER, "")  # none: killed between taking a trial and signing it
        if worker == self.shared.worker:
            return own
        if is_known_dead(worker, self.shared.worker):
            return True
        if time.monotonic() - self._beats_at > _LOOK_SECONDS:
            self._beats, self._beats_at = self.records.user_attrs, time.monotonic()
        return self._watch.silent(f"{trial.number} {trial.datetime_start}", worker, self._beats, self.shared.outages)


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna logs errors only while this lasts; then its verbosity is what it was."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def open_study(space: Space, settings: SearchSettings) -> SharedStudy:
    """The study that settings name, begun or joined; a sampler it is yet to be given.

    Trials that dead workers left running are marked failed and their groupings queued again.

    Raises:
        GroupSearchError: when there is one and neither ``resume`` nor ``force`` is set, when it is of
            another problem (the message names what differs), or when the storage cannot be opened.
    """
    fingerprint = problem_fingerprint(space.trace, settings)
    storage, name = open_storage(settings.storage), settings.study_name
    names = study_names(storage)
    if name in names and settings.force:
        for old in {name, name + _RECORDS} & set(names):
            optuna.delete_study(study_name=old, storage=storage)
    elif name in names and not settings.resume:
        raise GroupSearchError(
            f"Found a study {name!r} in {shown(settings.storage)} already. Go on with it with --resume, "
            f"throw it away with --force, or name another storage."
        )
    # The records first: where there is a study, there are records.
    optuna.create_study(study_name=name + _RECORDS, storage=storage, direction="maximize", load_if_exists=True)
    optuna.create_study(study_name=name, storage=storage, directions=_DIRECTIONS, load_if_exists=True)
    study = SharedStudy(name, storage)
    study.place = _join(study, fingerprint)
    study.take_back()
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


def queue(study: Study, space: Space, boundaries: tuple[int, ...]) -> None:
    """Let a coming trial be this grouping."""
    study.enqueue_trial(space.parameters(boundaries), user_attrs={"boundaries": list(boundaries)})


def queued(study: Study) -> set[tuple[int, ...]]:
    """The groupings that wait."""
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    return {tuple(trial.user_attrs["boundaries"]) for trial in waiting}


def requeue_running(study: SharedStudy, space: Space) -> None:
    """Give back what this worker, when it is interrupted, and dead ones have begun."""
    study.take_back(own=True)


def _join(study: SharedStudy, fingerprint: Mapping[str, Any]) -> int:
    """Say what this worker takes the problem to be; the place of that among the records, which no other worker has.

    The first to say so is right: of two that begin a study at the same time one is refused.
    """
    _check_fingerprint(study, fingerprint)
    attributes = {_FINGERPRINT: dict(fingerprint), WORKER: study.shared.worker}
    study.records.add_trial(create_trial(state=TrialState.PRUNED, user_attrs=attributes))
    _check_fingerprint(study, fingerprint)
    records = study.records.get_trials(deepcopy=False)
    return min(record.number for record in records if record.user_attrs.get(WORKER) == study.shared.worker)


def _check_fingerprint(study: SharedStudy, fingerprint: Mapping[str, Any]) -> None:
    said = (record.user_attrs.get(_FINGERPRINT) for record in study.records.get_trials(deepcopy=False))
    stored = next((each for each in said if each is not None), None)
    if stored is None:
        return
    old, new = _flat(stored), _flat(fingerprint)
    different = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if different:
        changes = "; ".join(f"{key}: {_short(old.get(key))} -> {_short(new.get(key))}" for key in different)
        raise GroupSearchError(
            f"Expected to resume the study {study.study_name!r} on the problem it was begun with, found another one "
            f"({changes}). Ask for what it was begun with, or begin anew with --force or another --storage."
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value under its dotted name, so that a message can name the one that differs."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) and item else {f"{prefix}{key}": item}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
