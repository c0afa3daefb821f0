"""Choosing by a proxy, as long as it is seen to say what runs find."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from groupsearch.search.candidates import pareto, worthiest
from groupsearch.search.choice import Choice, Evaluation
from groupsearch.search.exploration import starting_choices
from groupsearch.search.settings import SearchSettings
from groupsearch.search.space import Space
from groupsearch.search.statistics import RankCorrelation, rank_correlation
from groupsearch.units import format_number

# -- Whether a rung of evidence said beforehand what the dearer one then found ---------------------

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


# -- proxied ---------------------------------------------------------------------------------------

_BEFORE = 0.6  # of the trials come before the proxy is judged: of fewer groupings no correlation can be told
MOST_SCORED = 1000  # choices that the proxy is asked about; each takes a millisecond or two


@dataclass(frozen=True)
class Proxy:
    """A score of any choice that needs no run of it.

    Attributes:
        predict: the score, up is better; None where it cannot tell, as of adaptive thresholds.
        seconds: what it took to make.
        steps: trained for it.
        passes: forward and backward passes for it.
    """

    predict: Callable[[Choice], float | None]
    seconds: float = 0.0
    steps: int = 0
    passes: int = 0


@dataclass
class Judge:
    """The proxy, what it said, and whether that is believed."""

    space: Space
    proxy: Proxy
    scores: dict[Choice, float] = field(default_factory=dict)
    seconds: float = 0.0

    def score(self, choices: Sequence[Choice]) -> None:
        """Ask about choices that were not asked about."""
        begin = time.perf_counter()
        for choice in choices:
            if choice not in self.scores and (value := self.proxy.predict(choice)) is not None:
                self.scores[choice] = value
        self.seconds += time.perf_counter() - begin

    def agreement(self, upper: str, values: Mapping[Choice, float], used: bool | None = None) -> Agreement:
        """Whether it puts choices in the order of their values."""
        self.score(list(values))
        pairs = [(self.scores[choice], value) for choice, value in values.items() if choice in self.scores]
        return Agreement("proxy", upper, rank_correlation(pairs), used)

    def choose_for(self, settings: SearchSettings) -> Callable[[Sequence[Evaluation]], Sequence[Choice] | None]:
        """What a search of these settings asks for further choices; none if what it found so far refutes the proxy."""
        return lambda evaluations: self.choose(settings, evaluations)

    def choose(self, settings: SearchSettings, evaluations: Sequence[Evaluation]) -> tuple[Choice, ...] | None:
        """Choices by the proxy for half of the trials that are left, or none; None while it is too early to say."""
        first = self._first(settings, evaluations)
        if len(first) < self._enough(settings):
            return None
        if not self.is_used(settings, evaluations):
            return ()
        known = {e.choice for e in first}
        fresh = [choice for choice in self._climb(list(known)) if choice not in known]
        points = [(self.scores[choice], float(self.space.peak_bytes(choice.boundaries))) for choice in fresh]
        return tuple(fresh[i] for i in worthiest(points, self._room(settings)))

    def is_used(self, settings: SearchSettings, evaluations: Sequence[Evaluation]) -> bool:
        """Whether it chooses: it has enough to be judged by, is seen to predict, and there is something left."""
        seen = self.unchosen(settings, evaluations)
        enough = len(self._first(settings, evaluations)) == self._enough(settings)
        return enough and self._room(settings) > 0 and self.agreement("full", seen).correlation.predicts

    def unchosen(self, settings: SearchSettings, evaluations: Sequence[Evaluation]) -> dict[Choice, float]:
        """The values, with the first seed, of what was evaluated first: the proxy had no part in choosing it."""
        return {e.choice: e.value for e in self._first(settings, evaluations) if e.value is not None}

    def _first(self, settings: SearchSettings, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        return [e for e in evaluations if e.seed == settings.seed][: self._enough(settings)]

    def _room(self, settings: SearchSettings) -> int:
        """How many choices are its own in a search of these settings; the others are the sampler's."""
        return max(0, settings.trials - self._enough(settings) + 1) // 2

    def _enough(self, settings: SearchSettings) -> int:
        """Evaluations before it is judged: what a search begins with, and three in five of the trials."""
        return max(len(starting_choices(self.space, settings)), round(_BEFORE * settings.trials))

    def _climb(self, start: Sequence[Choice]) -> list[Choice]:
        """Everything scored when, from the start, the front by score and peak has no neighbour that is not."""
        self.score(start)
        expanded: set[Choice] = set()
        while len(self.scores) < MOST_SCORED:
            scored = list(self.scores)
            peaks = self.space.peaks([choice.boundaries for choice in scored])
            marks = pareto([(self.scores[c], float(peak)) for c, peak in zip(scored, peaks, strict=True)])
            top = [choice for choice, on in zip(scored, marks, strict=True) if on and choice not in expanded]
            if not top:
                break
            expanded |= set(top)
            near = dict.fromkeys(n for choice in top for n in self.space.neighbours(choice))
            fresh = [n for n in near if n not in self.scores and self.space.feasible(n.boundaries)]
            self.score(fresh[: MOST_SCORED - len(self.scores)])
        return list(self.scores)
