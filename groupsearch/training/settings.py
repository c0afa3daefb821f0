"""What a training is told and what it tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from groupsearch.errors import GroupSearchError
from groupsearch.options import EngineOptions, checkpoint_interval
from groupsearch.plan.checked import Checked, Watched
from groupsearch.plan.clipping import AdaptiveQuantile, ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.privacy import PrivacyStatement
from groupsearch.privacy.accounting import Accountant, default_delta, noise_multiplier_for
from groupsearch.randomness import Streams
from groupsearch.tracer.step import AUTOCASTS
from groupsearch.workloads.workload import Workload

# -- TrainSettings: everything that a training run depends on besides its workload and grouping ----


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps: optimizer steps; one logical batch each.
        learning_rate: constant over the steps.
        optimizer: one of :data:`groupsearch.engine.optimizers.OPTIMIZERS`.
        sampling_rate: probability with which Poisson sampling takes each training example.
        epsilon: budget that the noise multiplier is calibrated for, when that is not given.
        delta: None for 1e-2 / n, see :func:`groupsearch.privacy.accounting.default_delta`.
        noise_multiplier: used as it is, and ``epsilon`` is then what it costs.
        rule: clip rule, see :class:`groupsearch.plan.clipping.ClipPlan`, as the three below.
        max_grad_norm: R.
        allocation: how R is allotted to the groups.
        noise_allocation: how noise is.
        physical_batch: most examples in one forward and backward pass; None for no limit.
        evaluate_every: steps between two points of the curve; 0 for the last step alone.
        seed: None for noise, batches, weights and dropout from the operating system's entropy. A seed, not negative,
            makes it an experiment that gives the same numbers every time, and whose epsilon holds for
            nobody who knows it.
        secure: whether noise and batches come from a cipher, see :class:`groupsearch.randomness.SecureStream`.
        device: where to train.
        options: cost-only choices of the engine.
        checkpoint: ``none``, or ``blocks`` (``every:K``) to recompute every repeated block (one in K) in the
            backward pass instead of keeping its activations, which changes memory and time and, but for
            rounding, no number.
        autocast: ``none``, ``bfloat16`` or ``float16``: what forward and loss are cast to, in training and
            evaluation; float16 comes with a loss scale.
        watch: the part of physical batches that the watch in training looks at, 0 for none.
        allow_state: names of buffers and attributes that a forward pass may leave data in; they are not private.
    """

    steps: int
    learning_rate: float
    optimizer: str = "adam"
    sampling_rate: float = 0.2
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    rule: str = "auto-s"
    max_grad_norm: float = 1.0
    allocation: str | Sequence[float] | AdaptiveQuantile = "uniform"
    noise_allocation: str | Sequence[float] = "global"
    physical_batch: int | None = None
    evaluate_every: int = 0
    seed: int | None = None
    secure: bool = False
    device: str = "cpu"
    options: EngineOptions = field(default_factory=EngineOptions)
    checkpoint: str = "none"
    autocast: str = "none"
    watch: float = 0.01
    allow_state: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("evaluate_every", 0), ("seed", 0)):
            found = getattr(self, name)
            if found is not None and found < least:
                raise GroupSearchError(f"Expected {name} >= {least}, found {found}.")
        self.streams()
        checkpoint_interval(self.checkpoint)
        if self.autocast not in AUTOCASTS:
            raise GroupSearchError(f"Expected autocast to be one of {', '.join(AUTOCASTS)}, found {self.autocast!r}.")

    @classmethod
    def of(cls, workload: Workload, **changes: Any) -> TrainSettings:
        """The workload's own settings with some changed; a noise multiplier takes the place of epsilon.

        Raises:
            GroupSearchError: when the workload has none, or a value is outside its range.
        """
        if workload.training is None:
            raise GroupSearchError(
                f"Expected a workload with training settings, found none in {workload.name!r}. Give its Workload a "
                f"`training=TrainingDefaults(...)` and data to train on."
            )
        settings = vars(workload.training) | changes
        if changes.get("noise_multiplier") is not None and "epsilon" not in changes:
            settings["epsilon"] = None
        return cls(**settings)

    def plan(self, grouping: Grouping) -> ClipPlan:
        """What clips and hides a step's sums when trained with this grouping.

        Raises:
            GroupSearchError: when a rule or allocation does not fit the grouping.
        """
        return ClipPlan(grouping, self.max_grad_norm, self.rule, self.allocation, self.noise_allocation)

    def streams(self) -> Streams:
        """Where what is random comes from.

        Raises:
            GroupSearchError: for a seed of a secure training.
        """
        return Streams(self.seed, self.secure)

    def delta_for(self, train_size: int) -> float:
        """The delta given, or the default one of this many training examples."""
        return default_delta(train_size) if self.delta is None else self.delta

    def noise_multiplier_for(self, train_size: int) -> float:
        """The noise multiplier given, or the one that epsilon asks for.

        Raises:
            GroupSearchError: when both or neither of the two are given, or no noise reaches epsilon.
        """
        if self.noise_multiplier is not None and self.epsilon is None:
            return self.noise_multiplier
        if self.epsilon is not None and self.noise_multiplier is None:
            return noise_multiplier_for(self.epsilon, self.delta_for(train_size), self.sampling_rate, self.steps)
        raise GroupSearchError(
            f"Expected either epsilon or noise_multiplier for private training, found epsilon {self.epsilon} and "
            f"noise_multiplier {self.noise_multiplier}. Give one of them."
        )

    def statement(self, train_size: int, steps: int | None = None) -> PrivacyStatement:
        """What training like this on so many examples costs in privacy, all steps or so many of them.

        Raises:
            GroupSearchError: as :meth:`noise_multiplier_for`.
        """
        accountant = Accountant(self.noise_multiplier_for(train_size), self.sampling_rate)
        accountant.step(self.steps if steps is None else steps)
        return accountant.statement(self.delta_for(train_size), train_size, seeded=self.seed is not None)


# -- What a training run gives, and how it fails ---------------------------------------------------


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
class StepRecord:
    """What one step can be followed by. All but its number, and epsilon, is exact and of private data.

    Attributes:
        step: from 1.
        epsilon: spent so far; None between two points of the curve.
        seconds: of this step; moves with the size of its batch.
        examples: in its batch.
        loss: their mean; None where there were none.
        clipped: share of them whose gradient norm was above the threshold, of every group; None where there were none.
        norms: the quantiles :data:`QUANTILES` of their gradient norms before clipping, of every group.
        point: the curve's, where the step was evaluated.
    """

    step: int
    epsilon: float | None
    seconds: float
    examples: int
    loss: float | None
    clipped: tuple[float, ...] | None
    norms: tuple[tuple[float, ...], ...] | None
    point: CurvePoint | None = None


QUANTILES = (0.1, 0.5, 0.9)


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
