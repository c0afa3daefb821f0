"""What to recommend, with no winner declared inside the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from groupsearch.search.candidates import Candidate
from groupsearch.search.choice import Boundaries, Choice
from groupsearch.search.intervals import shortfall
from groupsearch.units import format_bytes, format_number


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
