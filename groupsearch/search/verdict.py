"""What the runs of a search tell: which candidates differ, and which one to take."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from groupsearch.search.candidates import Candidate
from groupsearch.search.choice import Boundaries, Choice
from groupsearch.search.statistics import half_width, shortfall
from groupsearch.units import format_bytes, format_number

# -- Which groupings are worse than the best one, said so that what is said is rarely wrong --------

FEWEST = 2  # seeds in common that say anything of the noise


@dataclass(frozen=True)
class Comparison:
    """A grouping against the best one, with the same seeds and so with the same weights, batches and noise.

    Attributes:
        choice: the grouping, and what else is searched.
        versus: the best one.
        seeds: how many seeds they were compared with.
        gap: how far its mean is below that of the best.
        half_width: half the width of the interval of the gap; None with fewer than two seeds.
    """

    choice: Choice
    versus: Choice
    seeds: int
    gap: float
    half_width: float | None

    @property
    def boundaries(self) -> Boundaries:
        """The grouping alone."""
        return self.choice.boundaries

    @property
    def below(self) -> bool:
        """Whether it is declared to be worse."""
        return self.half_width is not None and self.gap > self.half_width

    def to_json(self) -> dict[str, Any]:
        """One entry of the search document's ``comparisons``."""
        versus = self.versus.to_json()
        return {
            **self.choice.to_json(),
            "versus": versus.pop("boundaries"),
            **{f"versus_{name}": value for name, value in versus.items()},
            "seeds": self.seeds,
            "gap": self.gap,
            "half_width": self.half_width,
            "verdict": "below the best" if self.below else "no difference found",
        }


def compare(candidates: Sequence[Candidate], chosen_by: int, confidence: float = 0.95) -> tuple[Comparison, ...]:
    """The front and all-layer against the best of them, as far as they have other seeds than ``chosen_by``.

    With probability ``confidence`` none of the groupings declared to be below the best is as good as it,
    if paired differences are normal; whenever the replication is ended, and for whatever reason:

    * the seed by which candidates came to be on the front is left out, because they had luck with it;
    * the error allowed is divided by the number of pairs, because the best one is not known beforehand;
    * and by n (n - 1) for n seeds, which sums to 1 over all n, because one may look after every seed.
    """
    fresh = {
        c.choice: {seed: value for seed, value in c.values.items() if seed != chosen_by}
        for c in candidates
        if c.on_front or not c.boundaries
    }
    fresh = {choice: values for choice, values in fresh.items() if len(values) >= FEWEST}
    if len(fresh) < 2:
        return ()
    best = max(fresh, key=lambda choice: (statistics.fmean(fresh[choice].values()), -choice.groups))
    error = (1 - confidence) / (len(fresh) * (len(fresh) - 1) / 2)
    return tuple(_compare(choice, best, fresh, error) for choice in fresh if choice != best)


def _compare(choice: Choice, best: Choice, fresh: Mapping[Choice, Mapping[int, float]], error: float) -> Comparison:
    common = sorted(fresh[choice].keys() & fresh[best].keys())
    gaps, count = [fresh[best][seed] - fresh[choice][seed] for seed in common], len(common)
    width = half_width(gaps, 1 - error / (count * (count - 1))) if count >= FEWEST else None
    return Comparison(choice, best, count, statistics.fmean(gaps) if gaps else 0.0, width)


def answer(comparisons: Sequence[Comparison], confidence: float) -> str:
    """What the comparisons say together, in a sentence."""
    if not comparisons:
        return "No grouping was repeated often enough to tell it from another one."
    percent, most = f"{100 * confidence:g} % confidence", max((c.seeds for c in comparisons), default=0)
    below = sum(c.below for c in comparisons)
    if below == len(comparisons):
        return f"At {percent} every other grouping on the front is below the best one ({most} seeds)."
    equal = [c for c in comparisons if not c.below]
    widths = [c.gap + c.half_width for c in equal if c.half_width is not None]
    left = f"; gaps up to {format_number(max(widths), 2)} cannot be excluded" if widths else ""
    found = f"No difference was found at this budget between the best grouping and {len(equal)} of {len(comparisons)}"
    return f"{found} it was compared with ({percent} over all of them, {most} seeds){left}."


# -- What to recommend, with no winner declared inside the noise -----------------------------------


@dataclass(frozen=True)
class Recommendation:
    """The recommended choice and why, in a sentence or two."""

    choice: Choice
    reason: str

    @property
    def boundaries(self) -> Boundaries:
        """The grouping alone."""
        return self.choice.boundaries


def recommend(candidates: Sequence[Candidate], metric_name: str) -> Recommendation:
    """The least peak among the candidates that are not significantly below the best mean.

    Only candidates with two seeds or more are considered, where there are any: of the others nothing is
    known of the noise. Equal peaks are decided by fewer groups, then by the mean.
    """
    pool = [c for c in candidates if len(c.values) > 1] or list(candidates)
    best = max(pool, key=lambda c: (c.mean, -c.peak_bytes, -len(c.boundaries)))
    within = [c for c in pool if c is best or not _is_below(c, best)]
    chosen = min(within, key=lambda c: (c.peak_bytes, len(c.boundaries), -c.mean))
    return Recommendation(chosen.choice, _reason(chosen, best, candidates, metric_name))


def _is_below(candidate: Candidate, best: Candidate) -> bool:
    gap, noise = shortfall(candidate.values, best.values)
    return gap > (noise or 0.0)


def _reason(chosen: Candidate, best: Candidate, candidates: Sequence[Candidate], metric_name: str) -> str:
    lead = f"{_groups(chosen)} {_need(chosen)} {format_bytes(chosen.peak_bytes)}"
    most = max(candidates, key=lambda c: c.peak_bytes)
    if most.peak_bytes > chosen.peak_bytes:
        lead += f" where {_groups(most)} {_need(most)} {format_bytes(most.peak_bytes)}"
    mean = f"{metric_name} {format_number(chosen.mean, 4)}"
    if chosen is best:
        seeds = len(best.values)
        noise = " (one seed: the noise is not known)" if seeds == 1 else f" over {seeds} seeds"
        return f"{lead}, and no grouping reached a higher mean than {mean}{noise}."
    gap, noise_bound = shortfall(chosen.values, best.values)
    if noise_bound is None:
        return f"{lead}, with {mean}, the same as the best, {_groups(best)} (one seed: the noise is not known)."
    if gap <= 0:
        return f"{lead}, with {mean}, no less than the best mean where both were evaluated ({_groups(best)})."
    return (
        f"{lead}; {mean} is {format_number(gap, 2)} below the best mean ({_groups(best)}, "
        f"{format_number(best.mean, 4)}), which is not significant: up to {format_number(noise_bound, 2)} is noise "
        f"over {min(len(chosen.values), len(best.values))} seeds (one-sided t-test, 5 %)."
    )


def _groups(candidate: Candidate) -> str:
    count = len(candidate.boundaries) + 1
    name = "" if candidate.source in ("search", "exact front", "all-layer") else f" ({candidate.source})"
    return "1 group (all-layer)" if count == 1 else f"{count} groups{name}"


def _need(candidate: Candidate) -> str:
    return "needs" if len(candidate.boundaries) == 0 else "need"
