"""Whether a rung of evidence said beforehand what the dearer one then found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from groupsearch.search.choice import Choice
from groupsearch.search.correlation import RankCorrelation
from groupsearch.units import format_number

_NAMES = {"proxy": "the proxy", "short": "short runs", "full": "full runs"}
_USED = {True: "; further ones were chosen by it", False: "; nothing was left to choose by it", None: ""}


@dataclass(frozen=True)
class Evidence:
    """What one rung found of every choice that it judged.

    Attributes:
        rung: ``proxy``, ``short`` or ``full``.
        fraction: of the steps of a full run; 0 for the proxy, which trains no choice.
        values: its score of every choice; up is better. Of runs the mean over seeds.
    """

    rung: str
    fraction: float
    values: Mapping[Choice, float]

    def to_json(self) -> dict[str, Any]:
        """One entry of the search document's ``evidence``."""
        rows = [{**choice.to_json(), "value": value} for choice, value in self.values.items()]
        return {"rung": self.rung, "fraction": self.fraction, "values": rows}


@dataclass(frozen=True)
class Agreement:
    """The rank correlation of two rungs.

    Attributes:
        lower: the cheaper rung.
        upper: the dearer one.
        correlation: over the choices that both judged.
        used: whether further choices came from the lower one because of it; None where nothing hung on it.
    """

    lower: str
    upper: str
    correlation: RankCorrelation
    used: bool | None = None

    @property
    def statement(self) -> str:
        """What was measured and what came of it, in a sentence."""
        found, upper = self.correlation, _NAMES[self.upper]
        low, high = (format_number(end, 2) for end in (found.low, found.high))
        measured = f"(rank correlation {format_number(found.value, 2)}, {low} to {high}, over {found.count} groupings)"
        order = f"groupings in the order of {upper} {measured}"
        one, decided = self.lower == "proxy", self.used is not None
        name = _NAMES[self.lower]
        name = f"At first {name}" if decided else f"In the end {name}" if one else name.capitalize()
        if found.predicts:
            return f"{name} put {order}{_USED[self.used]}."
        text = f"{name} {'was' if one else 'were'} not shown to put {order}"
        if decided:
            return f"{text}: it was not used, and further groupings came from {upper} alone."
        return f"{text}. To do without, search with --rungs full." if self.lower == "short" else f"{text}."

    def to_json(self) -> dict[str, Any]:
        """One entry of the search document's ``correlations``."""
        return {
            "lower": self.lower,
            "upper": self.upper,
            **self.correlation.to_json(),
            "used": self.used,
            "statement": self.statement,
        }
