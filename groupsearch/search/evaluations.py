"""The ledger of evaluations: one per choice and seed, on disk before anything else happens.

Evaluations are records of their own, not trials of the search: they are then independent of the
search's encoding, several seeds of a choice fit, and a kill between two evaluations loses neither.
"""

from __future__ import annotations

import gc
import math
import time

from optuna.trial import FrozenTrial, TrialState, create_trial

from groupsearch.errors import UnsupportedModelError
from groupsearch.search.choice import Choice, Evaluate, Evaluation, Outcome
from groupsearch.search.shared import WORKER, beating
from groupsearch.search.study import SharedStudy

POLL_SECONDS = 0.5
_STALE_SECONDS = 0.5
_EVALUATION, _CLAIM = "evaluation", "claim"
_ERROR_CHARACTERS = 1000
_Key = tuple[Choice, int]


class EvaluationLog:
    """All evaluations of one study; makes those that are missing, and none twice.

    An exception that ``evaluate`` raises, or a value that is not finite, is remembered as a failure and
    not tried again. KeyboardInterrupt and its like pass through and leave nothing behind.

    Several processes may share a study. Whoever begins an evaluation first adds a claim to the records,
    and storages number records in the order in which they are added: of two claims on the same evaluation
    the one with the smaller number counts. A claim becomes the record of its evaluation, or ends when its worker
    is dead.
    """

    def __init__(self, study: SharedStudy, evaluate: Evaluate) -> None:
        self._study = study
        self._storage, self._place = study.shared, study.shared.get_study_id_from_name(study.records.study_name)
        self._evaluate = evaluate
        self._known: dict[_Key, Evaluation] = {}
        self._claims: dict[_Key, FrozenTrial] = {}  # the first claim on all that is under way, here or elsewhere
        self._mine: list[FrozenTrial] = []  # all claims of this worker
        self._settled = 0  # records before this one have ended and were read
        self._read_at = -math.inf

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Everything that is known and has ended, here or in another process."""
        self._read(fresh=True)
        return tuple(self._known.values())

    @property
    def under_way(self) -> tuple[_Key, ...]:
        """(choice, seed) of what other processes evaluate now."""
        self._read()
        return tuple(self._claims)

    def get(self, choice: Choice, seed: int) -> Evaluation | None:
        """What is known of a choice and a seed; that it is ``under_way`` in another process is something known."""
        self._read()
        key = (choice, seed)
        return self._known.get(key) or (_under_way(*key) if key in self._claims else None)

    def obtain(self, choice: Choice, seed: int) -> Evaluation:
        """What is known of a choice and a seed, after evaluating it if nothing is."""
        key = (choice, seed)
        known = self.get(*key)
        if known is not None:
            return known
        claim, evaluation = self._claim(key), None
        try:
            if not self._is_first(key):
                return self.get(*key) or _under_way(*key)
            with beating(self._study.records.set_user_attr, self._storage.worker):
                evaluation = _attempt(self._evaluate, *key)
        finally:
            self._end(claim, key, evaluation)
        return self._known[key]

    def wait_for_others(self) -> bool:
        """Wait until an evaluation of another process ends, or its worker is dead; False where there is none."""
        self._read(fresh=True)
        before = self._claims.keys()
        while before and before <= self._claims.keys():
            time.sleep(POLL_SECONDS)
            self._read(fresh=True)
        return bool(before)

    def _claim(self, key: _Key) -> int:
        """Add a claim; what the storage calls the first of this worker, for an outage may have made it twice."""
        template = create_trial(state=TrialState.RUNNING, user_attrs={_CLAIM: {**key[0].to_json(), "seed": key[1]}})
        made = self._storage.create_new_trial(self._place, template)
        self._read(fresh=True)
        mine = [self._id(record) for record in self._mine] or [made]
        for other in mine[1:]:
            self._finish(other, None)
        return mine[0]

    def _is_first(self, key: _Key) -> bool:
        """Whether this evaluation is ours now."""
        first = self._claims.get(key)
        return key not in self._known and first is not None and first.user_attrs[WORKER] == self._storage.worker

    def _end(self, claim: int, key: _Key, evaluation: Evaluation | None) -> None:
        """Make a claim the record of its evaluation, or give it up where there is none."""
        if self._is_first(key):
            del self._claims[key]
        if evaluation is not None:
            written = self._storage.patiently("set_trial_user_attr", claim, _EVALUATION, evaluation.to_json())
            if written is False:  # another worker took this one for dead and ended its claim
                self._study.records.add_trial(_record(evaluation))
            self._known.setdefault(key, evaluation)
        self._finish(claim, evaluation)

    def _finish(self, claim: int, evaluation: Evaluation | None) -> None:
        values = None if evaluation is None or evaluation.value is None else [evaluation.value]
        state = TrialState.COMPLETE if values else TrialState.FAIL if evaluation else TrialState.PRUNED
        self._storage.set_trial_state_values(claim, state, values)

    def _id(self, record: FrozenTrial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._place, record.number)

    def _read(self, *, fresh: bool = False) -> None:
        """Take in what was added to the records, and end the claims of the dead.

        What others add may be seen late unless it is to be ``fresh``: what decides who evaluates is the claim.
        """
        if not fresh and time.monotonic() - self._read_at < _STALE_SECONDS:
            return
        self._claims, self._mine, settled = {}, [], self._settled
        for record in self._study.records.get_trials(deepcopy=False)[self._settled :]:
            evaluation = None
            if _EVALUATION in record.user_attrs:
                evaluation = Evaluation.from_json(record.user_attrs[_EVALUATION])
                self._known.setdefault((evaluation.choice, evaluation.seed), evaluation)
            if record.state != TrialState.RUNNING:
                settled += settled == record.number
            elif self._study.is_abandoned(record):
                self._finish(self._id(record), evaluation)
            elif evaluation is None:
                claim = record.user_attrs[_CLAIM]
                self._claims.setdefault((Choice.from_json(claim), claim["seed"]), record)
                if record.user_attrs[WORKER] == self._storage.worker:
                    self._mine.append(record)
        for key in self._known.keys() & self._claims.keys():
            del self._claims[key]  # evaluated, its claim about to be ended
        self._settled, self._read_at = settled, time.monotonic()


def _record(evaluation: Evaluation) -> FrozenTrial:
    attributes = {_EVALUATION: evaluation.to_json()}
    if evaluation.value is None:
        return create_trial(state=TrialState.FAIL, user_attrs=attributes)
    return create_trial(value=evaluation.value, user_attrs=attributes)


def _under_way(choice: Choice, seed: int) -> Evaluation:
    return Evaluation(choice, seed, None, 0.0, 0, (), 0.0, None)


def _attempt(evaluate: Evaluate, choice: Choice, seed: int) -> Evaluation:
    start = time.perf_counter()
    try:
        outcome = evaluate(choice, seed)
        value = float(outcome.value)
        failure = None if math.isfinite(value) else f"the metric is {value}"
    except UnsupportedModelError:  # no fault of the choice: what other trainings gave would not count either
        raise
    except Exception as error:
        outcome, value = Outcome(math.nan, 0.0, 0), math.nan
        failure = f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
    if failure:
        gc.collect()  # what ran out of memory may be held in cycles, and the next evaluation needs the room
    return Evaluation(
        choice=choice,
        seed=seed,
        value=None if failure else value,
        step_seconds=float(outcome.step_seconds),
        steps=int(outcome.steps),
        points=tuple((int(step), float(v)) for step, v in outcome.points),
        seconds=time.perf_counter() - start,
        error=failure,
    )
