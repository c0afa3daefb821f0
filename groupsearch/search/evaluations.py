"""The ledger of evaluations: one per grouping and seed, on disk before anything else happens.

Evaluations are records of their own, not trials of the search: they are then independent of the
search's encoding, several seeds of a grouping fit, and a kill between two evaluations loses neither.
"""

from __future__ import annotations

import gc
import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial

from groupsearch.search.study import SharedStudy
from groupsearch.search.workers import beating

POLL_SECONDS = 0.5
_STALE_SECONDS = 0.5
_EVALUATION, _CLAIM = "evaluation", "claim"
_ERROR_CHARACTERS = 1000
_Key = tuple[tuple[int, ...], int]


@dataclass(frozen=True)
class Outcome:
    """What evaluating one grouping with one seed gives.

    Attributes:
        value: the metric; larger is better. Not finite means that the evaluation failed.
        step_seconds: time of one step.
        steps: steps trained.
        points: (step, value) along the way.
    """

    value: float
    step_seconds: float
    steps: int
    points: Sequence[tuple[int, float]] = ()


Evaluate = Callable[[tuple[int, ...], int], Outcome]


@dataclass(frozen=True)
class Evaluation:
    """An outcome as it is remembered.

    Attributes:
        boundaries: the grouping.
        seed: the seed.
        value: the metric; None where the evaluation failed or is under way.
        step_seconds: time of one step, 0 where it raised.
        steps: steps trained, 0 where it raised.
        points: (step, value) along the way.
        seconds: time that the evaluation took.
        error: why it failed, or None.
    """

    boundaries: tuple[int, ...]
    seed: int
    value: float | None
    step_seconds: float
    steps: int
    points: tuple[tuple[int, float], ...]
    seconds: float
    error: str | None

    @property
    def under_way(self) -> bool:
        """Whether another process is making it; such an evaluation is never stored."""
        return self.value is None and self.error is None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Evaluation:
        """What the ledger wrote."""
        points = tuple((int(step), float(value)) for step, value in data["points"])
        return cls(**{**data, "boundaries": tuple(data["boundaries"]), "points": points})


class Ledger:
    """All evaluations of one study; makes those that are missing, and none twice.

    An exception that ``evaluate`` raises, or a value that is not finite, is remembered as a failure and
    not tried again. KeyboardInterrupt and its like pass through and leave nothing behind.

    Several processes may share a study. Whoever begins an evaluation first adds a claim to the records,
    and storages number records in the order in which they are added: of two claims on the same evaluation
    the one with the smaller number counts. A claim ends with its evaluation, or when its worker is dead.
    """

    def __init__(self, study: SharedStudy, evaluate: Evaluate) -> None:
        self._study = study
        self._evaluate = evaluate
        self._known: dict[_Key, Evaluation] = {}
        self._claims: dict[_Key, FrozenTrial] = {}  # the first claim on all that is under way, here or elsewhere
        self._settled = 0  # records before this one have ended and were read
        self._read_at = -math.inf

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Everything that is known and has ended, here or in another process."""
        self._read(fresh=True)
        return tuple(self._known.values())

    @property
    def under_way(self) -> tuple[_Key, ...]:
        """(boundaries, seed) of what other processes evaluate now."""
        self._read()
        return tuple(self._claims)

    def get(self, boundaries: tuple[int, ...], seed: int) -> Evaluation | None:
        """What is known of a grouping and a seed; that it is ``under_way`` in another process is something known."""
        self._read()
        key = (boundaries, seed)
        return self._known.get(key) or (_under_way(*key) if key in self._claims else None)

    def obtain(self, boundaries: tuple[int, ...], seed: int) -> Evaluation:
        """What is known of a grouping and a seed, after evaluating it if nothing is."""
        key = (boundaries, seed)
        known = self.get(*key)
        if known is not None:
            return known
        claim = uuid.uuid4().hex
        try:
            if not self._claim(key, claim):
                return self.get(*key) or _under_way(*key)
            with beating(self._study.records.set_user_attr, self._study.shared.worker):
                evaluation = _attempt(self._evaluate, *key)
            self._study.records.add_trial(_record(evaluation))
        finally:
            self._end(claim)
        self._known.setdefault(key, evaluation)
        return self._known[key]

    def wait_for_others(self) -> bool:
        """Wait until an evaluation of another process ends, or its worker is dead; False where there is none."""
        self._read(fresh=True)
        before = self._claims.keys()
        while before and before <= self._claims.keys():
            time.sleep(POLL_SECONDS)
            self._read(fresh=True)
        return bool(before)

    def _claim(self, key: _Key, claim: str) -> bool:
        """Whether this evaluation is ours now."""
        attributes = {"boundaries": list(key[0]), "seed": key[1], _CLAIM: claim}
        self._study.records.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=attributes))
        self._read(fresh=True)
        first = self._claims.get(key)
        return key not in self._known and first is not None and first.user_attrs[_CLAIM] == claim

    def _end(self, claim: str) -> None:
        for record in self._study.records.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if record.user_attrs.get(_CLAIM) == claim:
                self._study.records.tell(record.number, state=TrialState.PRUNED, skip_if_finished=True)
        self._claims = {key: record for key, record in self._claims.items() if record.user_attrs[_CLAIM] != claim}

    def _read(self, *, fresh: bool = False) -> None:
        """Take in what was added to the records, and end the claims of the dead.

        What others add may be seen late unless it is to be ``fresh``: what decides who evaluates is the claim.
        """
        if not fresh and time.monotonic() - self._read_at < _STALE_SECONDS:
            return
        self._claims, settled = {}, self._settled
        for record in self._study.records.get_trials(deepcopy=False)[self._settled :]:
            if record.state != TrialState.RUNNING:
                if _EVALUATION in record.user_attrs:
                    evaluation = Evaluation.from_json(record.user_attrs[_EVALUATION])
                    self._known.setdefault((evaluation.boundaries, evaluation.seed), evaluation)
                settled += settled == record.number
            elif self._study.is_abandoned(record):
                self._study.records.tell(record.number, state=TrialState.FAIL, skip_if_finished=True)
            else:
                key = (tuple(record.user_attrs["boundaries"]), record.user_attrs["seed"])
                self._claims.setdefault(key, record)
        for key in self._known.keys() & self._claims.keys():
            del self._claims[key]  # evaluated, its claim about to be ended
        self._settled, self._read_at = settled, time.monotonic()


def _record(evaluation: Evaluation) -> FrozenTrial:
    attributes = {_EVALUATION: asdict(evaluation)}
    if evaluation.value is None:
        return create_trial(state=TrialState.FAIL, user_attrs=attributes)
    return create_trial(value=evaluation.value, user_attrs=attributes)


def _under_way(boundaries: tuple[int, ...], seed: int) -> Evaluation:
    return Evaluation(boundaries, seed, None, 0.0, 0, (), 0.0, None)


def _attempt(evaluate: Evaluate, boundaries: tuple[int, ...], seed: int) -> Evaluation:
    start = time.perf_counter()
    try:
        outcome = evaluate(boundaries, seed)
        value = float(outcome.value)
        failure = None if math.isfinite(value) else f"the metric is {value}"
    except Exception as error:
        outcome, value = Outcome(math.nan, 0.0, 0), math.nan
        failure = f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
    if failure:
        gc.collect()  # what ran out of memory may be held in cycles, and the next evaluation needs the room
    return Evaluation(
        boundaries=boundaries,
        seed=seed,
        value=None if failure else value,
        step_seconds=float(outcome.step_seconds),
        steps=int(outcome.steps),
        points=tuple((int(step), float(v)) for step, v in outcome.points),
        seconds=time.perf_counter() - start,
        error=failure,
    )
