"""The kinds of documents: Profile, Fit, Search, Verify and Train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from groupsearch.checked import Checked
from groupsearch.documents import tables
from groupsearch.documents.codec import Part
from groupsearch.documents.document import Document, Table
from groupsearch.documents.rows import (
    Boundaries,
    Candidate,
    Check,
    Comparison,
    Correlation,
    Cost,
    Estimate,
    Evidence,
    Failure,
    Fitting,
    FrontRow,
    Held,
    Joint,
    Measurement,
    Metric,
    Point,
    Randomness,
    Simulation,
    Training,
    Variant,
)
from groupsearch.privacy import PrivacyStatement
from groupsearch.trace import Trace
from groupsearch.units import format_bytes


@dataclass(frozen=True, kw_only=True, repr=False)
class Memory(Document):
    """A document that has a traced step and what groupings of it cost.

    Attributes:
        trace: the step.
        nonprivate_peak_bytes: of the step without privacy.
        floor_bytes: the least peak of any grouping.
        front: the least peak with 1, 2, ... groups.
        estimates: of the groupings that were asked for.
        simulations: by the engine on fake tensors.
        measurements: by the engine on the device.
        summary: what grouping is worth, and why.
        nonprivate_held: what a CUDA device's allocator holds without privacy.
        not_measured: of a card that is not there: that nothing was measured on it.
    """

    trace: Trace
    nonprivate_peak_bytes: int
    floor_bytes: int
    front: tuple[FrontRow, ...]
    estimates: tuple[Estimate, ...]
    simulations: tuple[Simulation, ...]
    measurements: tuple[Measurement, ...]
    summary: str
    nonprivate_held: Held | None = None
    not_measured: str | None = None

    def peaks(self) -> Table:
        """Estimates, their ratio to non-private training, and how they were checked."""
        reference, held = self.nonprivate_peak_bytes, self.nonprivate_held
        title = f"{self.about}: non-private {format_bytes(reference)}"
        title += "" if held is None else f", {format_bytes(held.reserved_bytes)} held"
        return tables.peaks(title, reference, self.estimates, self.simulations, self.measurements)


@dataclass(frozen=True, kw_only=True, repr=False)
class Profile(Memory):
    """What every grouping costs in memory.

    Attributes:
        joint: a grouping chosen together with norm methods, where that was asked for.
    """

    KIND: ClassVar[str] = "profile"

    joint: Joint | None = None

    def rows_of_table(self) -> tuple[Part, ...]:
        """The estimates."""
        return self.estimates

    def table(self) -> Table:
        """The peaks."""
        return self.peaks()

    @property
    def finding(self) -> str:
        """The summary."""
        return self.summary


@dataclass(frozen=True, kw_only=True, repr=False)
class Fit(Profile):
    """A profile that also tells what fits into a memory.

    Attributes:
        fit: the largest sizes.
    """

    fit: Fitting

    @classmethod
    def is_of(cls, data: Mapping[str, object]) -> bool:
        """Whether it is a profile with that part."""
        return super().is_of(data) and "fit" in data

    def rows_of_table(self) -> tuple[Part, ...]:
        """The rows of the fit."""
        return self.fit.rows

    def table(self) -> Table:
        """What fits, against non-private training."""
        return tables.fits(self.model, self.fit)

    @property
    def finding(self) -> str:
        """The summary of the fit."""
        return self.fit.summary or ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Search(Memory):
    """The front of accuracy against peak memory; a private selection has one candidate and few of the parts.

    Attributes:
        candidates: what was trained, by falling peak.
        recommended: which to use; None when nothing was evaluated before an interrupt.
        reason: why.
        cost: of the search.
        training: how every run was trained.
        privacy: what one training costs, and what is known of having chosen it.
        not_private: which parts are exact numbers of private data, and why.
        randomness: where noise came from.
        variants: ways of taking a step that were compared, the request's own first.
        interrupted: whether it was stopped; the study can then be resumed.
    """

    KIND: ClassVar[str] = "search"

    candidates: tuple[Candidate, ...]
    recommended: Candidate | None
    reason: str
    cost: Cost
    training: Training
    privacy: PrivacyStatement
    not_private: Mapping[str, str]
    randomness: Randomness
    variants: tuple[Variant, ...] | None = None
    answer: str | None = None
    confidence: float | None = None
    comparisons: tuple[Comparison, ...] | None = None
    rung: str | None = None
    evidence: tuple[Evidence, ...] | None = None
    correlations: tuple[Correlation, ...] | None = None
    hypervolume: Mapping[str, float] | None = None
    interrupted: bool | None = None
    failures: tuple[Failure, ...] | None = None

    def rows_of_table(self) -> tuple[Part, ...]:
        """The candidates."""
        return self.candidates

    def table(self) -> Table:
        """The front, the references and what is recommended."""
        return tables.candidates(self.about, self.candidates, self.recommended)

    @property
    def finding(self) -> str:
        """Why what is recommended is."""
        return self.reason


@dataclass(frozen=True, kw_only=True, repr=False)
class Verify(Document):
    """Groupings of a document, measured again.

    Attributes:
        rows: the measurements, and whether the estimates are within the tolerance.
    """

    KIND: ClassVar[str] = "verify"

    rows: tuple[Check, ...]

    @property
    def outside(self) -> tuple[Check, ...]:
        """The rows whose estimate is outside the tolerance."""
        return tuple(row for row in self.rows if not row.within)

    def rows_of_table(self) -> tuple[Part, ...]:
        """The rows."""
        return self.rows

    def table(self) -> Table:
        """Estimates and measurements side by side."""
        return tables.checks(self.about, self.rows)


@dataclass(frozen=True, kw_only=True, repr=False)
class Train(Document):
    """One training; what comes after ``privacy`` an interrupted one lacks.

    Attributes:
        trace: one step of it.
        grouping: as it was asked for.
        boundaries: of that grouping.
        groups: how many.
        peak_bytes: the estimated peak.
        curve: loss and metric of the validation data.
        thresholds: step and every group's threshold, where those are adaptive.
        steps: optimizer steps taken.
        privacy: what they cost.
        metric: after the last step.
    """

    KIND: ClassVar[str] = "train"

    trace: Trace
    grouping: str
    boundaries: Boundaries
    groups: int
    peak_bytes: int
    curve: tuple[Point, ...]
    thresholds: tuple[tuple[float, ...], ...]
    steps: int
    epsilon: float | None
    delta: float
    learning_rate: float
    sampling_rate: float
    rule: str
    max_grad_norm: float
    noise_multiplier: float
    optimizer: str
    sampling: str
    allocation: object
    noise_allocation: object
    randomness: Randomness
    not_private: Mapping[str, str]
    privacy: PrivacyStatement
    metric: Metric | None = None
    step_seconds: float | None = None
    expected_examples: float | None = None
    added_delta: float | None = None
    checked: Checked | None = None
    watched: Mapping[str, float] | None = None

    def rows_of_table(self) -> tuple[Part, ...]:
        """The curve."""
        return tuple(Part(extra=point._asdict()) for point in self.curve)

    def table(self) -> Table:
        """The curve."""
        title = f"{self.about}, {self.groups} group{'' if self.groups == 1 else 's'}, {self.steps} steps"
        return tables.curve(title, self.curve, "metric" if self.metric is None else self.metric.name)

    @property
    def finding(self) -> str:
        """What the training cost in privacy."""
        return self.privacy.sentences[0]
