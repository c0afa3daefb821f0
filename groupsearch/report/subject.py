"""What a page is about: the document, its trace, and the few groupings that every figure shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

from groupsearch.memory import peak_memory
from groupsearch.privacy import PrivacyStatement
from groupsearch.trace import Trace
from groupsearch.units import format_count, format_interval

PARTS = ("weights", "buffers", "optimizer", "batch", "activations", "transients", "book", "sums")
NEAR_FLOOR = 1.01


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

    document: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """``profile``, ``search``, ``verify`` or ``train``."""
        return str(self.document["kind"])

    @property
    def topic(self) -> str:
        """The kind, or ``fit`` where a profile also tells what fits into a memory."""
        return "fit" if (self.document.get("fit") or {}).get("rows") else self.kind

    @property
    def model_name(self) -> str:
        """The model as the user named it."""
        return str(self.document["model"].get("name", "the model"))

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
        if self.document.get("joint"):
            return tuple(self.document["joint"]["boundaries"])
        if self.document.get("recommended"):
            return tuple(self.document["recommended"]["boundaries"])
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
        word = "joint" if self.document.get("joint") else word
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

    def candidate(self, boundaries: Sequence[int] | None) -> Mapping[str, Any] | None:
        """The search's candidate with these boundaries; of several with other rules or thresholds the recommended."""
        recommended = self.document.get("recommended")
        rows = [*([recommended] if recommended else []), *(self.document.get("candidates") or [])]
        return next((row for row in rows if boundaries is not None and row["boundaries"] == list(boundaries)), None)

    def shown_as(self, row: Mapping[str, Any]) -> Shown | None:
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


def metric_of(row: Mapping[str, Any] | None) -> Metric | None:
    """The metric in a candidate or in a training document; None where there is none."""
    found = (row or {}).get("metric")
    if not isinstance(found, Mapping) or found.get("mean") is None:
        return None
    return Metric(str(found.get("name", "metric")), float(found["mean"]), found.get("half_width"))


def options_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The clip rule and the allocation of thresholds of a candidate or a curve, where a search chose them."""
    return tuple(str(row[name]) for name in ("rule", "allocation") if row.get(name) is not None)


def groups_word(groups: int) -> str:
    """``1 group``, ``4 groups``."""
    return "1 group" if groups == 1 else f"{format_count(groups)} groups"


def _parts(breakdown: Mapping[str, Any]) -> dict[str, int]:
    plain = {key.removesuffix("_bytes"): value for key, value in breakdown.items()}
    return {part: int(plain.get(part, 0)) for part in PARTS}
