"""What is searched, a grouping and of the clipping mechanism what is not fixed, and what an evaluation of it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

Boundaries = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """Everything searched that changes the mechanism, and with it the accuracy.

    What changes memory and time alone is no part of it: two runs of one choice with one seed have one metric.
    Choices are in order of boundaries, rule and allocation; None comes first.

    Attributes:
        boundaries: the grouping; whatever order they are given in, they are kept increasing and once each.
        rule: the clip rule, or None: as the training fixes it.
        allocation: how thresholds are allotted to the groups, or None: as the training fixes it.
    """

    boundaries: Boundaries
    rule: str | None = None
    allocation: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundaries", tuple(sorted({int(b) for b in self.boundaries})))

    def __lt__(self, other: Choice) -> bool:
        return self._place < other._place

    @property
    def groups(self) -> int:
        """M, the number of groups."""
        return len(self.boundaries) + 1

    @property
    def options(self) -> tuple[str, ...]:
        """What is chosen besides the grouping, as words."""
        return tuple(option for option in (self.rule, self.allocation) if option is not None)

    def to_json(self) -> dict[str, Any]:
        """``boundaries``, and ``rule`` and ``allocation`` where they are chosen."""
        chosen = {"rule": self.rule, "allocation": self.allocation}
        known = {key: value for key, value in chosen.items() if value is not None}
        return {"boundaries": list(self.boundaries), **known}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choice:
        """The choice that is written in a mapping, among other things; what is not there is None."""
        return cls(tuple(data["boundaries"]), data.get("rule"), data.get("allocation"))

    @property
    def _place(self) -> tuple[Boundaries, str, str]:
        return self.boundaries, self.rule or "", self.allocation or ""


@dataclass(frozen=True)
class Outcome:
    """What evaluating one choice with one seed gives.

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


Evaluate = Callable[[Choice, int], Outcome]


@dataclass(frozen=True)
class Evaluation:
    """An outcome as it is remembered.

    Attributes:
        choice: the grouping, and what else is searched.
        seed: the seed.
        value: the metric; None where the evaluation failed or is under way.
        step_seconds: time of one step, 0 where it raised.
        steps: steps trained, 0 where it raised.
        points: (step, value) along the way.
        seconds: time that the evaluation took.
        error: why it failed, or None.
    """

    choice: Choice
    seed: int
    value: float | None
    step_seconds: float
    steps: int
    points: tuple[tuple[int, float], ...]
    seconds: float
    error: str | None

    @property
    def boundaries(self) -> Boundaries:
        """The grouping alone."""
        return self.choice.boundaries

    @property
    def under_way(self) -> bool:
        """Whether another process is making it; such an evaluation is never stored."""
        return self.value is None and self.error is None

    def to_json(self) -> dict[str, Any]:
        """What the ledger writes: the choice's parts beside the others."""
        others = asdict(self)
        del others["choice"]
        return {**self.choice.to_json(), **others}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """What the ledger wrote."""
        others = {field.name: data[field.name] for field in fields(cls) if field.name not in ("choice", "points")}
        points = tuple((int(step), float(value)) for step, value in data["points"])
        return cls(choice=Choice.from_json(data), points=points, **others)
