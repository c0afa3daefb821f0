"""Opening the study of one problem: new, resumed, joined or refused."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from groupsearch.errors import GroupSearchError
from groupsearch.search.choice import Choice
from groupsearch.search.settings import SearchSettings
from groupsearch.search.shared import (
    WORKER,
    SharedStorage,
    WorkerWatch,
    is_known_dead,
    open_storage,
    shown,
    study_names,
)
from groupsearch.search.space import Space, digest

# -- What makes two runs runs of one problem -------------------------------------------------------


def problem_fingerprint(space: Space, settings: SearchSettings) -> dict[str, Any]:
    """What must be equal for evaluations of one run to count in another; as it reads back from JSON."""
    problem = {
        "metric_name": settings.metric_name,
        "seed": settings.seed,
        "budget_bytes": settings.budget_bytes,
        "max_groups": settings.max_groups,
        "granularity": settings.granularity,
        "trace": digest(space.trace),
        # None, as in a study of before these could be searched, where they are not.
        "variants": space.variants.fingerprint() if space.variants.free else None,
        "groups": settings.groups,
        "rules": list(settings.rules) or None,
        "allocations": list(settings.allocations) or None,
        "objectives": list(settings.objectives) if settings.timed else None,
    }
    clash = sorted(problem.keys() & settings.fingerprint.keys())
    if clash:
        raise GroupSearchError(
            f"Found {', '.join(clash)} in the fingerprint, which the search keeps there itself. Leave it out."
        )
    plain: dict[str, Any] = json.loads(json.dumps({**problem, **settings.fingerprint}))
    return plain


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What differs, by dotted name and with both values; empty where nothing does."""
    old, new = _flat(stored), _flat(given)
    different = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return "; ".join(f"{key}: {_short(old.get(key))} -> {_short(new.get(key))}" for key in different)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value under its dotted name, so that a message can name the one that differs."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) and item else {f"{prefix}{key}": item}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# -- What is to be evaluated next, as a trial of Optuna's: queued, begun, or begun anew ------------


@runtime_checkable
class Proposer(Protocol):
    """A sampler that chooses without asking for one parameter after the other."""

    def propose(self, trials: Sequence[FrozenTrial], number: int) -> Choice | None:
        """What the trial of this number is to be, given the others; None while nothing is known."""


@dataclass(frozen=True)
class Order:
    """A trial that this worker runs.

    Attributes:
        choice: what it is to be.
        trial_id: what the storage calls it.
        trial: the same as Optuna's samplers know it, or None: ours needs nothing of it.
    """

    choice: Choice
    trial_id: int
    trial: Trial | None = None


def trial_of(space: Space, choice: Choice, state: TrialState, *, sparse: bool) -> FrozenTrial:
    """A trial that is this choice; ``sparse`` without a parameter for a cut that is not made.

    Optuna's samplers learn from parameters and need them all. Ours learns from the choice, and of 100 allowed
    cuts few are made: a database takes three statements for every parameter.
    """
    parameters = {name: value for name, value in space.parameters(choice).items() if not sparse or value != 0}
    distributions = space.distributions()
    return create_trial(
        state=state,
        params=parameters,
        distributions={name: distributions[name] for name in parameters},
        user_attrs=choice.to_json(),
        constraints=space.limits(choice.boundaries),
    )


def begun_anew(trial: FrozenTrial) -> FrozenTrial:
    """The same to be begun anew; its parameters need not be suggested again."""
    return create_trial(
        state=TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=Choice.from_json(trial.user_attrs).to_json(),
        constraints=trial.constraints,
    )


# -- study -----------------------------------------------------------------------------------------

_ANSWER = "answer"  # the user attribute that says why a trial was not trained
_DIRECTIONS = {"metric": StudyDirection.MAXIMIZE, "peak": StudyDirection.MINIMIZE, "time": StudyDirection.MINIMIZE}
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
        study_id: what the storage calls this study.
    """

    def __init__(self, name: str, storage: SharedStorage) -> None:
        super().__init__(study_name=name, storage=storage)
        self.shared = storage
        self.records = optuna.load_study(study_name=name + _RECORDS, storage=storage)
        self.place = 0
        self.study_id = storage.get_study_id_from_name(name)
        self._watch = WorkerWatch()
        self._looked = self._beats_at = -math.inf
        self._beats: dict[str, Any] = {}

    def ask(self, *arguments: Any, **named: Any) -> Trial:
        """The next trial; before that, what dead workers left is queued again."""
        self._look()
        return super().ask(*arguments, **named)

    def begin(self, space: Space) -> Order:
        """What waits, or else what the sampler suggests; this worker runs it then.

        What our sampler suggests is stored in one step, and nothing of it is read again: on a database every
        further operation costs several statements and a transaction.
        """
        self._look()
        if isinstance(self.sampler, Proposer):
            trials = self.get_trials(deepcopy=False)
            waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
            for trial in waiting:
                if (trial_id := self._take(trial)) is not None:
                    return Order(Choice.from_json(trial.user_attrs), trial_id)
            if waiting:  # others took them all
                return self.begin(space)
            choice = self.sampler.propose(trials, len(trials))
            if choice is not None:
                template = trial_of(space, choice, TrialState.RUNNING, sparse=True)
                return Order(choice, self.shared.create_new_trial(self.study_id, template))
        return self._ask(space)

    def end(self, order: Order, state: TrialState, values: Sequence[float] | None = None, answer: str = "") -> None:
        """Tell a trial, and why it was not trained where that is so.

        One that another worker took for abandoned and ended stays as it is.
        """
        if answer:
            self.shared.set_trial_user_attr(order.trial_id, _ANSWER, answer)
        if order.trial is None:
            self.shared.set_trial_state_values(order.trial_id, state, values)
        else:
            self.tell(order.trial, values, state, skip_if_finished=True)

    def take_back(self, *, own: bool = False) -> None:
        """Queue the groupings of dead workers' trials again and end the trials.

        With ``own`` also this worker's, and those that nobody signed: a worker that lives and is about to sign
        one then evaluates it all the same, and tells nobody but the ledger.
        """
        for trial in self.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not self.is_abandoned(trial, own=own):
                continue
            if "boundaries" in trial.user_attrs:  # else it ended before it was a grouping
                # Queued first: to be killed between the two costs a repetition, not a grouping.
                self.add_trial(begun_anew(trial))
            self.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _take(self, trial: FrozenTrial) -> int | None:
        """What the storage calls a waiting trial, which this worker runs now; None where another was quicker."""
        trial_id = self._id(trial.number)
        try:
            return trial_id if self.shared.set_trial_state_values(trial_id, TrialState.RUNNING) else None
        except UpdateFinishedTrialError:
            return None

    def _ask(self, space: Space) -> Order:
        trial = self.ask()
        if "boundaries" in trial.user_attrs:
            return Order(Choice.from_json(trial.user_attrs), self._id(trial.number), trial)
        choice = space.suggest(trial)
        for name, excess in space.limits(choice.boundaries).items():
            trial.set_constraint(name, excess)
        for name, value in reversed(choice.to_json().items()):  # boundaries last: with them it is known whole
            trial.set_user_attr(name, value)
        return Order(choice, self._id(trial.number), trial)

    def _id(self, number: int) -> int:
        return self.shared.get_trial_id_from_study_id_trial_number(self.study_id, number)

    def _look(self) -> None:
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            self.take_back()

    def is_abandoned(self, trial: FrozenTrial, *, own: bool = False) -> bool:
        """Whether the worker that runs a trial is dead, or silent for too long."""
        worker = trial.user_attrs.get(WORKER, "")  # none: killed between taking a trial and signing it
        if own and worker in ("", self.shared.worker):
            return True
        if worker == self.shared.worker:
            return False
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
    fingerprint = problem_fingerprint(space, settings)
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
    directions = [_DIRECTIONS[objective] for objective in settings.objectives]
    optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
    study = SharedStudy(name, storage)
    study.place = _join(study, fingerprint)
    study.take_back()
    return study


def queue(study: Study, space: Space, choice: Choice) -> None:
    """Let a coming trial be this choice."""
    study.add_trial(trial_of(space, choice, TrialState.WAITING, sparse=isinstance(study.sampler, Proposer)))


def queued(study: Study) -> set[Choice]:
    """The choices that wait."""
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    return {Choice.from_json(trial.user_attrs) for trial in waiting}


def count_answers(study: Study) -> Counter[str]:
    """How many trials were ``trained``, ``failed``, ``rejected`` or ``cached``; those that a kill ended are none."""
    trials = study.get_trials(deepcopy=False)
    trained = {TrialState.COMPLETE: "trained"}
    return Counter(filter(None, (t.user_attrs.get(_ANSWER, trained.get(t.state)) for t in trials)))


def requeue_running(study: SharedStudy, space: Space) -> None:
    """Give back what this worker, when it is interrupted, and dead ones have begun, at the end of a search."""
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
    stored = next((each for each in said if each is not None), fingerprint)
    if changes := differences(stored, fingerprint):
        raise GroupSearchError(
            f"Expected to resume the study {study.study_name!r} on the problem it was begun with, found another one "
            f"({changes}). Ask for what it was begun with, or begin anew with --force or another --storage."
        )
