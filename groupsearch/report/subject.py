"""What a page is about: the document, its trace, and the few groupings that every figure shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple, TypedDict, cast

from groupsearch.documents import Study
from groupsearch.documents.rows import Fitting, Joint
from groupsearch.plan.memory import peak_memory
from groupsearch.plan.trace import Trace
from groupsearch.privacy import PrivacyStatement
from groupsearch.units import format_count, format_interval

PARTS = ("weights", "buffers", "optimizer", "batch", "activations", "transients", "book", "sums")
NEAR_FLOOR = 1.01


class MetricOf(TypedDict, total=False):
    """The metric in a row, as far as it is told."""

    name: str
    mean: float | None
    half_width: float | None
    seeds: int | None


class Row(TypedDict, total=False):
    """A grouping in any list of a document: what rows of one kind or another tell."""

    boundaries: list[int]
    groups: int
    peak_bytes: int
    grouping: str
    source: str
    rule: str | None
    allocation: str | None
    variant: str | None
    on_front: bool
    metric: MetricOf | None
    level: str
    relative_error: float | None
    estimate_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    step_seconds: float
    within: bool
    breakdown: Mapping[str, int]
    site: int
    where: str


class Against(Row, total=False):
    """A candidate against the best of the front."""

    versus: list[int]
    verdict: str
    seeds: int
    gap: float
    half_width: float | None


class Run(Row, total=False):
    """The curve of one training."""

    seed: int
    points: list[list[float | None]]


class Training(TypedDict, total=False):
    """How every run was trained."""

    epsilon: float | None
    delta: float
    noise_multiplier: float
    sampling_rate: float
    steps: int
    learning_rate: float
    optimizer: str
    curves: list[Run]


class Cost(TypedDict, total=False):
    """What a search cost."""

    epsilon: float | None
    seconds: float
    trials: int
    trained: int
    steps: int
    full_trainings: float
    rungs: list[Mapping[str, object]]
    selection: Mapping[str, str] | None


class Read(Training, total=False):
    """A document of any kind as a page reads it: a plain structure of which any part may be missing."""

    schema_version: int
    kind: str
    model: Mapping[str, object]
    environment: Mapping[str, object]
    settings: Mapping[str, object]
    trace: Mapping[str, object] | None
    nonprivate_peak_bytes: int
    floor_bytes: int
    front: list[Row]
    estimates: list[Row]
    simulations: list[Row]
    measurements: list[Row]
    rows: list[Row]
    summary: str
    not_measured: str
    joint: Mapping[str, object] | None
    fit: Mapping[str, object] | None
    candidates: list[Row]
    recommended: Row | None
    answer: str
    comparisons: list[Against]
    correlations: list[Mapping[str, object]]
    cost: Cost
    training: Training
    privacy: Mapping[str, object] | None
    not_private: Mapping[str, str]
    randomness: Mapping[str, object]
    added_delta: float | None
    grouping: str
    boundaries: list[int]
    curve: list[list[float | None]]
    peak_bytes: int
    step_seconds: float | None
    cells: list[list[object]]
    metric: MetricOf | None
    metric_name: str
    final_metric: float
    next: Mapping[str, object] | None


def read(document: Mapping[str, object]) -> Read:
    """A plain structure as a page reads it; what it lacks or garbles shows when it is drawn."""
    return cast(Read, document)


class Shown(NamedTuple):
    """A grouping under the name and the role (colour, marker) it has in every figure of a page."""

    name: str
    role: str
    boundaries: tuple[int, ...]

    @property
    def groups(self) -> int:
        """M, the number of groups."""
        return len(self.boundaries) + 1


class Peak(NamedTuple):
    """The peak of one grouping and what is alive at it, in bytes by the names of ``PARTS``."""

    peak_bytes: int
    parts: Mapping[str, int]
    site: int
    where: str


class Metric(NamedTuple):
    """A metric of one grouping: its mean, and the half width of its interval where there is one."""

    name: str
    mean: float
    half_width: float | None

    @property
    def text(self) -> str:
        """As text, in percent where the metric is an accuracy."""
        return format_interval(self.mean, self.half_width, percent=is_share(self.name))


@dataclass(frozen=True, eq=False)
class Subject:
    """One document seen as a subject: absent parts are None or empty, never an error."""

    document: Read

    @property
    def kind(self) -> str:
        """``profile``, ``search``, ``verify``, ``train`` or ``study``."""
        return str(self.document["kind"])

    @property
    def topic(self) -> str:
        """The kind, or ``fit`` where a profile also tells what fits into a memory."""
        return "fit" if self.fit is not None else self.kind

    @property
    def model_name(self) -> str:
        """The model as the user named it."""
        return str(self.document["model"].get("name", "the model"))

    @cached_property
    def fit(self) -> Fitting | None:
        """What fits, where a profile tells a row of that."""
        found = self.document.get("fit") or {}
        return Fitting.from_json(found, "fit") if found.get("rows") else None

    @cached_property
    def study(self) -> Study | None:
        """The study, where it has a cell."""
        return Study.from_json(self.document) if self.kind == "study" and self.document.get("cells") else None

    @cached_property
    def joint(self) -> Joint | None:
        """The norm methods that were chosen together with the grouping, where they were."""
        found = self.document.get("joint")
        return Joint.from_json(found, "joint") if found else None

    @cached_property
    def trace(self) -> Trace | None:
        """The trace in the document, if it carries one."""
        data = self.document.get("trace")
        return Trace.from_json(data) if data else None

    @cached_property
    def privacy(self) -> PrivacyStatement | None:
        """What is stated of the training, where the document says it."""
        stated = self.document.get("privacy")
        return PrivacyStatement.from_json(stated) if stated else None

    @property
    def nonprivate_peak_bytes(self) -> int | None:
        """The peak of the same step without privacy, where it is known."""
        found = self.document.get("nonprivate_peak_bytes")
        return found if found or self.trace is None else self.trace.nonprivate_peak_bytes

    @cached_property
    def chosen(self) -> tuple[int, ...] | None:
        """The boundaries the page recommends: the search's, the trained ones, or the fewest groups near the floor.

        Where a profile's front ends above the floor, that is its last entry; where norm methods were chosen
        together with the grouping, it is that one.
        """
        if self.joint is not None:
            return self.joint.boundaries
        if recommended := self.document.get("recommended"):
            return tuple(recommended["boundaries"])
        if self.kind == "train" and self.document.get("boundaries") is not None:
            return tuple(self.document["boundaries"])
        front, floor = self.document.get("front") or [], self.document.get("floor_bytes")
        near = [row for row in front if floor and row["peak_bytes"] <= NEAR_FLOOR * floor] or front[-1:]
        return tuple(min(near, key=lambda row: row["groups"])["boundaries"]) if near else None

    @cached_property
    def shown(self) -> tuple[Shown, ...]:
        """All-layer, the chosen grouping and layer-wise, each once, as far as the document knows them."""
        found = {} if self.trace is None else {"all-layer": (), "layer-wise": self.trace.layer_boundaries}
        if self.chosen is None:
            return tuple(Shown(name, name, cuts) for name, cuts in found.items())
        word = {"train": "trained", "profile": "least peak"}.get(self.kind, "recommended")
        word = "joint" if self.joint is not None else word
        same = [name for name, cuts in found.items() if cuts == self.chosen]
        if same:
            return tuple(Shown(f"{n} ({word})" if n in same else n, n, cuts) for n, cuts in found.items())
        groups = len(self.chosen) + 1
        ours = Shown(f"{word}, {groups_word(groups)}", "recommended", self.chosen)
        rest = [Shown(name, name, cuts) for name, cuts in found.items()]
        return (*rest[:1], ours, *rest[1:])

    def peak(self, boundaries: Sequence[int]) -> Peak | None:
        """Peak and breakdown of a grouping: as the document recorded them, else from its trace."""
        for row in self.document.get("estimates") or []:
            if tuple(row["boundaries"]) == tuple(boundaries) and row.get("breakdown"):
                where = str(row.get("where", ""))
                return Peak(row["peak_bytes"], _parts(row["breakdown"]), row.get("site", -1), where)
        if self.trace is None:
            return None
        estimate = peak_memory(self.trace, tuple(boundaries))
        return Peak(estimate.peak_bytes, _parts(asdict(estimate.breakdown)), estimate.site, str(estimate.where))

    def candidate(self, boundaries: Sequence[int] | None) -> Row | None:
        """The search's candidate with these boundaries; of several with other rules or thresholds the recommended."""
        recommended = self.document.get("recommended")
        rows = [*([recommended] if recommended else []), *(self.document.get("candidates") or [])]
        return next((row for row in rows if boundaries is not None and row["boundaries"] == list(boundaries)), None)

    def shown_as(self, row: Row) -> Shown | None:
        """What a candidate is shown as, which of several with the same boundaries is :meth:`candidate`."""
        found = next((entry for entry in self.shown if entry.boundaries == tuple(row["boundaries"])), None)
        same = found is not None and options_of(self.candidate(found.boundaries) or row) == options_of(row)
        return found if same else None

    def metric(self, boundaries: Sequence[int] | None) -> Metric | None:
        """The metric of the candidate with these boundaries, if it was trained and did not diverge."""
        return metric_of(self.candidate(boundaries))


def is_share(metric_name: str) -> bool:
    """Whether a metric is a share of 1 that a reader expects in percent."""
    return "accuracy" in metric_name.lower()


def metric_of(row: Row | Read | None) -> Metric | None:
    """The metric in a candidate or in a training document; None where there is none."""
    found = None if row is None else row.get("metric")
    if not isinstance(found, Mapping) or (mean := found.get("mean")) is None:
        return None
    return Metric(str(found.get("name", "metric")), float(mean), found.get("half_width"))


def options_of(row: Row) -> tuple[str, ...]:
    """The clip rule and the allocation of thresholds of a candidate or a curve, where a search chose them."""
    return tuple(str(each) for each in (row.get("rule"), row.get("allocation")) if each is not None)


def groups_word(groups: int) -> str:
    """``1 group``, ``4 groups``."""
    return "1 group" if groups == 1 else f"{format_count(groups)} groups"


def _parts(breakdown: Mapping[str, int]) -> dict[str, int]:
    plain = {key.removesuffix("_bytes"): value for key, value in breakdown.items()}
    return {part: int(plain.get(part, 0)) for part in PARTS}
