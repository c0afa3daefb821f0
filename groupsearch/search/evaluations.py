"""The ledger of evaluations: one per grouping and seed, on disk before anything else happens.

Evaluations are kept in the study's user attributes, not in trials: they are then independent of
the search's encoding, several seeds of a grouping fit, and a kill between two evaluations loses neither.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna

_PREFIX = "evaluation:"
_ERROR_CHARACTERS = 1000


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
        value: the metric; None where the evaluation failed.
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

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Evaluation:
        """What the ledger wrote."""
        points = tuple((int(step), float(value)) for step, value in data["points"])
        return cls(**{**data, "boundaries": tuple(data["boundaries"]), "points": points})


class Ledger:
    """All evaluations of one study; makes those that are missing, and none twice.

    An exception that ``evaluate`` raises, or a value that is not finite, is remembered as a failure and
    not tried again. KeyboardInterrupt and its like pass through and leave nothing behind.
    """

    def __init__(self, study: optuna.Study, evaluate: Evaluate) -> None:
        self._study = study
        self._evaluate = evaluate
        found = (Evaluation.from_json(data) for key, data in study.user_attrs.items() if key.startswith(_PREFIX))
        self._known = {(e.boundaries, e.seed): e for e in found}

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Everything that is known."""
        return tuple(self._known.values())

    def get(self, boundaries: tuple[int, ...], seed: int) -> Evaluation | None:
        """What is known of a grouping and a seed."""
        return self._known.get((boundaries, seed))

    def obtain(self, boundaries: tuple[int, ...], seed: int) -> Evaluation:
        """What is known of a grouping and a seed, after evaluating it if nothing is."""
        known = self.get(boundaries, seed)
        if known is not None:
            return known
        evaluation = _attempt(self._evaluate, boundaries, seed)
        # A digest, because databases limit the length of a key and a grouping may have hundreds of cuts.
        digest = hashlib.sha256(json.dumps([boundaries, seed]).encode()).hexdigest()[:24]
        self._study.set_user_attr(f"{_PREFIX}{digest}", asdict(evaluation))
        self._known[boundaries, seed] = evaluation
        return evaluation


def _attempt(evaluate: Evaluate, boundaries: tuple[int, ...], seed: int) -> Evaluation:
    start = time.perf_counter()
    try:
        outcome = evaluate(boundaries, seed)
        value = float(outcome.value)
        failure = None if math.isfinite(value) else f"the metric is {value}"
    except Exception as error:
        outcome, value = Outcome(math.nan, 0.0, 0), math.nan
        failure = f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
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
