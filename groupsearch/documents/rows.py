"""What documents have in their lists and parts: estimates, measurements, candidates, ..."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from groupsearch.documents.codec import Part
from groupsearch.units import format_bytes, format_percent

Boundaries = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Model(Part):
    """What was looked at; ``extra`` has the settings it was made with.

    Attributes:
        parameters: those that are trained, in numbers.
        examples: to train on; None for a model without data.
    """

    name: str
    batch_size: int
    parameters: int
    examples: int | None = None


@dataclass(frozen=True, kw_only=True)
class Environment(Part):
    """Where numbers come from."""

    device: str
    python: str
    torch: str | None
    platform: str
    machine: str
    cpu_count: int | None
    packages: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class FrontRow(Part):
    """The least peak with a number of groups."""

    boundaries: Boundaries
    groups: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class GroupingRow(FrontRow):
    """The peak of a grouping that has a name."""

    grouping: str


@dataclass(frozen=True, kw_only=True)
class Estimate(GroupingRow):
    """An estimated peak, what is alive then, and where that is.

    Attributes:
        site: where it happens; -1 in the forward pass and in the optimizer's step.
        allocated_bytes: what a CUDA device's allocator hands out at most.
        reserved_bytes: what it holds at most.
    """

    breakdown: Mapping[str, int]
    site: int
    where: str
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Simulation(GroupingRow):
    """A simulated peak; ``relative_error`` is estimate / simulation - 1."""

    relative_error: float


@dataclass(frozen=True, kw_only=True)
class Measurement(Simulation):
    """A measured peak; ``relative_error`` is estimate / measurement - 1."""

    step_seconds: float
    metric: str
    reserved_bytes: int | None = None
    fragmentation_bytes: int | None = None
    requested_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Check(Measurement):
    """A peak measured again, and whether the estimate is within the tolerance."""

    estimate_bytes: int
    tolerance: float
    within: bool


@dataclass(frozen=True, kw_only=True)
class Held(Part):
    """What a CUDA device's allocator hands out and holds at most."""

    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, kw_only=True)
class Bound(Part):
    """What no choice goes below, and how far above it the choice may be; None where nobody knows."""

    of: str
    least: float
    gap: float | None


@dataclass(frozen=True, kw_only=True)
class Compared(Part):
    """What one norm method for all weights needs."""

    norm_method: str
    all_layer_bytes: int
    floor_bytes: int
    operations: float


@dataclass(frozen=True, kw_only=True)
class Joint(Part):
    """A grouping chosen together with norm methods; ``weights`` counts them by method."""

    budget_bytes: int | None
    boundaries: Boundaries
    groups: int
    peak_bytes: int
    operations: float
    bound: Bound
    weights: Mapping[str, int]
    compared: tuple[Compared, ...]


@dataclass(frozen=True, kw_only=True)
class Reduced(Part):
    """A step with one grouping on several processes, as :func:`groupsearch.plan.communication.overlap` has it."""

    grouping: str
    boundaries: Boundaries
    groups: int
    starts_seconds: tuple[float, ...]
    link_seconds: float
    step_seconds: float
    hidden: float


@dataclass(frozen=True, kw_only=True)
class Communication(Part):
    """What adding up clipped sums costs by grouping; ``alone_seconds`` is a measured step without it."""

    processes: int
    bytes_per_second: float
    latency_seconds: float
    size_bytes: int
    sent_bytes: float
    alone_seconds: float
    rows: tuple[Reduced, ...]


@dataclass(frozen=True, kw_only=True)
class Timing(Part):
    """A measured step at one batch."""

    batch_size: int
    peak_bytes: int
    step_seconds: float
    metric: str
    reserved_bytes: int | None = None
    requested_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Rate(Part):
    """Examples per second, ``measured`` or ``predicted``."""

    value: float
    batch_size: int
    source: str


@dataclass(frozen=True, kw_only=True)
class FitRow(Part):
    """The largest size that a grouping fits; see :func:`groupsearch.fit.fit_rows`."""

    grouping: str
    boundaries: Boundaries | None
    groups: int | None
    size: int
    batch_size: int
    expected_batch_size: int | None
    pieces: tuple[int, ...] | None
    peak_bytes: int | None
    next_peak_bytes: int | None
    limited_by: str
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    timings: tuple[Timing, ...] | None = None
    examples_per_second: Rate | None = None


@dataclass(frozen=True, kw_only=True)
class Poisson(Part):
    """How expected batches are found; with a sampling rate, what batches it makes."""

    quantile: float
    dataset_size: int | None
    sampling_rate: float | None
    rule: str
    expected_batch_size: float | None = None
    quantile_batch_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Fitting(Part):
    """What fits into a memory; ``summary`` is None where it was interrupted.

    The oldest documents say neither ``context_bytes`` nor ``held_back``: of a context nothing was held back then.
    """

    memory_bytes: int
    margin: float
    context_bytes: int | None = None
    held_back: str | None = None
    usable_bytes: int
    varies: str
    limit: int
    poisson: Poisson
    rows: tuple[FitRow, ...]
    summary: str | None
    traced: tuple[int, ...] | None = None

    @property
    def room(self) -> str:
        """The memory, and what of it is not given to a step."""
        share = f"{format_bytes(self.memory_bytes)}, {format_percent(self.margin)}"
        return self.held_back or f"{share} held back"


@dataclass(frozen=True, kw_only=True)
class Metric(Part):
    """A metric's mean over seeds, and its interval."""

    name: str
    mean: float | None
    half_width: float | None = None
    interval: tuple[float | None, ...] | None = None
    interval_from: str | None = None
    seeds: int | None = None
    seed_numbers: tuple[int, ...] | None = None
    values: tuple[float | None, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Chosen(Part):
    """A grouping and, where they were searched, the clip rule and how thresholds are allotted."""

    boundaries: Boundaries
    rule: str | None = None
    allocation: str | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """What was chosen besides the grouping."""
        return tuple(each for each in (self.rule, self.allocation) if each is not None)


@dataclass(frozen=True, kw_only=True)
class Candidate(Chosen):
    """A grouping that was trained; ``variant`` names the way of taking a step that its peak is of."""

    groups: int
    peak_bytes: int
    metric: Metric
    on_front: bool
    source: str
    step_seconds: float | None = None
    variant: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison(Chosen):
    """A candidate against the best of the front."""

    versus: Boundaries
    versus_rule: str | None = None
    versus_allocation: str | None = None
    seeds: int
    gap: float
    half_width: float | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Score(Chosen):
    """What one rung found of a choice."""

    value: float | None


@dataclass(frozen=True, kw_only=True)
class Evidence(Part):
    """What one rung of a search found."""

    rung: str
    fraction: float
    values: tuple[Score, ...]


@dataclass(frozen=True, kw_only=True)
class Correlation(Part):
    """Whether a rung said beforehand what a dearer one then found."""

    lower: str
    upper: str
    value: float
    low: float
    high: float
    count: int
    kendall: float
    predicts: bool
    used: bool | None
    statement: str


@dataclass(frozen=True, kw_only=True)
class Rung(Part):
    """What one kind of evidence cost."""

    name: str
    runs: int
    seconds: float
    steps: int
    full_trainings: float
    passes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Selection(Part):
    """What choosing adds to epsilon."""

    data: str
    epsilon: float | None
    statement: str
    whole: float | None = None


@dataclass(frozen=True, kw_only=True)
class Cost(Part):
    """What a search cost; of a private selection epsilon alone is told."""

    epsilon: float | None
    selection: Selection | None = None
    seconds: float | None = None
    trials: int | None = None
    trained: int | None = None
    steps: int | None = None
    full_trainings: float | None = None
    rejected: int | None = None
    cached: int | None = None
    failed: int | None = None
    rungs: tuple[Rung, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Failure(Chosen):
    """A training that failed."""

    seed: int
    error: str


class Point(NamedTuple):
    """Validation loss and metric after a step."""

    step: int
    loss: float | None
    metric: float | None


@dataclass(frozen=True, kw_only=True)
class Curve(Chosen):
    """Steps and values of one training."""

    seed: int
    points: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Training(Part):
    """How every run of a search was trained."""

    epsilon: float | None
    delta: float
    steps: int
    learning_rate: float
    sampling_rate: float
    rule: str
    max_grad_norm: float
    noise_multiplier: float
    optimizer: str
    curves: tuple[Curve, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Variant(Part):
    """A way of taking a step."""

    name: str
    checkpoint: str
    micro_batches: int
    batch_size: int
    norm_method: str


@dataclass(frozen=True, kw_only=True)
class Randomness(Part):
    """Where noise and batches came from."""

    secret: bool
    secure: bool
    seed: int | None = None


class Cell(NamedTuple):
    """A method of a study in one setting; written as a list.

    Attributes:
        problem: model and data.
        workers: n.
        method: as the study names it.
        epsilon: of the weights, at the guarantee's delta; None without noise.
        steps: where the step size is from, ``tuned`` or ``theory``.
        squared: squared norm of the gradient of the mean, at the end, for every threshold at the best of the step
            sizes tried; None where all diverged.
        inactive_from: likewise the step from which nothing is clipped any more; None where the last one still clips.
        step_size: at the middle threshold, and what follows is of it.
        slope: of the squared norm against the step, both logarithmic; None where it is no line.
        half_width: of its 95 % interval.
    """

    problem: str
    workers: int
    method: str
    epsilon: float | None
    steps: str
    squared: tuple[float | None, ...]
    inactive_from: tuple[int | None, ...]
    step_size: float | None
    slope: float | None
    half_width: float | None

    @property
    def best(self) -> float | None:
        """The least of the squared norms."""
        return min((value for value in self.squared if value is not None), default=None)

    @property
    def middle(self) -> float | None:
        """The one of the middle threshold."""
        return self.squared[len(self.squared) // 2]


@dataclass(frozen=True, kw_only=True)
class Descent(Part):
    """How the squared gradient norm fell, at a study's records: middle threshold, best step size."""

    problem: str
    workers: int
    method: str
    epsilon: float | None
    squared: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Guarantee(Part):
    """What noise costs a worker.

    Attributes:
        workers: n.
        epsilon: that was asked for.
        delta: the other half.
        noise_multiplier: of every worker, over the bound of its message.
        of_weights: epsilon for whoever sees the weights alone.
        of_messages: epsilon for whoever sees the worker's messages.
    """

    workers: int
    epsilon: float
    delta: float
    noise_multiplier: float
    of_weights: float
    of_messages: float
