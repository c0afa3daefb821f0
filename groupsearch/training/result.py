"""What a training run gives, and how it fails."""

from __future__ import annotations

from dataclasses import dataclass

from groupsearch.checked import Checked, Watched
from groupsearch.errors import GroupSearchError
from groupsearch.privacy import PrivacyStatement


class DivergedError(GroupSearchError):
    """A weight that is no longer finite. ``step`` is the step after which it was seen."""

    exit_code = 1

    def __init__(self, step: int, learning_rate: float) -> None:
        super().__init__(
            f"Expected finite weights, found others after step {step}. The training has diverged at learning rate "
            f"{learning_rate:g}: lower the learning rate, or raise the expected batch size."
        )
        self.step = step


@dataclass(frozen=True)
class CurvePoint:
    """Means over the validation data after ``step`` steps: exact numbers, whose data have no privacy of their own.

    Attributes:
        step: from 1.
        loss: mean loss.
        metric: mean metric; None where the workload has none.
        thresholds: of every group for the step to come, where they are adaptive; else empty.
    """

    step: int
    loss: float
    metric: float | None
    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrainResult:
    """What a training run gave and what it cost.

    Attributes:
        metric: mean over the validation data after the last step, or None without a metric.
        metric_name: what it is called.
        curve: one point per evaluation, the last one after the last step.
        step_seconds: median over the steps, evaluation left out; moves with the sizes of batches, which are private.
        epsilon: spent by all steps at ``delta``; infinite without noise.
        delta: the other half of the budget.
        noise_multiplier: 0 without privacy.
        steps: optimizer steps taken.
        statement: what that means; None where nothing was made private.
        added_delta: what noise that ends somewhere adds to ``delta``, see
            :func:`groupsearch.engine.mechanism.added_delta`; 0 without privacy.
        checked: how the engine was held to plain autograd before the first step; None without privacy.
        watched: what the watch in training did; None where there was none.
    """

    metric: float | None
    metric_name: str
    curve: tuple[CurvePoint, ...]
    step_seconds: float
    epsilon: float
    delta: float
    noise_multiplier: float
    steps: int
    statement: PrivacyStatement | None
    added_delta: float = 0.0
    checked: Checked | None = None
    watched: Watched | None = None
