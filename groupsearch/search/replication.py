"""More seeds for what ends up on the front, because a mean over one seed is partly luck."""

from __future__ import annotations

from groupsearch.search.candidates import Candidate, gather
from groupsearch.search.choice import Choice
from groupsearch.search.comparison import FEWEST, compare
from groupsearch.search.exploration import Search

# With this many seeds the noise of a mean is a tenth of that of a run, and few can pay for it.
MOST_SEEDS = 100


def replicate(search: Search) -> None:
    """Evaluate the front and the references with every seed, then with more as long as that may decide something.

    One seed at a time: new means move the front, and what has left it is not evaluated further. It
    ends when everything on the front has all seeds, at the latest when every candidate has. With ``max_runs``
    it then goes on with the best grouping and those that are not told from it; what is declared to be below it is
    given up. At ``max_runs`` evaluations it ends in any case.
    """
    done = 0
    while missing := (_missing(search) or _undecided(search)):
        total = done + sum(len(seeds) for seeds in missing.values())
        for choice, seeds in missing.items():
            if _runs_left(search) == 0:
                return
            search.evaluate(choice, seeds[0], "replication", done, total)
            done += 1


def _missing(search: Search) -> dict[Choice, list[int]]:
    """The seeds that the references, the front, and what ties with it on peak with fewest groups still lack."""
    candidates = _candidates(search)
    fewest: dict[int, Candidate] = {}
    for candidate in candidates:  # of equal peaks those with fewer groups come first
        first = fewest.setdefault(candidate.peak_bytes, candidate)
        if candidate.boundaries == first.boundaries and candidate.mean > first.mean:
            fewest[candidate.peak_bytes] = candidate
    front = [c for c in candidates if c.on_front]
    ties = [fewest[c.peak_bytes].choice for c in front]
    wanted = dict.fromkeys([*search.space.references(), *(c.choice for c in front), *ties])
    seeds, more = search.settings.seeds, search.settings.max_runs is not None
    return _lacking(search, list(wanted), max(seeds, FEWEST + 1) if more else seeds)  # of fewer nothing is told


def _undecided(search: Search) -> dict[Choice, list[int]]:
    """One more seed for the best and each that is not told from it; for those behind first, so that they compare."""
    settings = search.settings
    if settings.max_runs is None:
        return {}
    candidates = _candidates(search)
    comparisons = [c for c in compare(candidates, settings.seed, settings.confidence) if not c.below]
    wanted = list(dict.fromkeys(choice for c in comparisons for choice in (c.versus, c.choice)))
    counts: dict[Choice, int] = {c.choice: _seeds(c) for c in candidates}
    fewest = min((counts[choice] for choice in wanted), default=MOST_SEEDS)
    return _lacking(search, wanted, fewest + 1) if fewest < MOST_SEEDS else {}


def _lacking(search: Search, wanted: list[Choice], seeds: int) -> dict[Choice, list[int]]:
    """Which of the first so many seeds choices lack, those left out that failed or lack none."""
    failed = {e.choice for e in search.ledger.evaluations if e.error is not None}
    first = search.settings.seed
    lacking = {
        choice: [seed for seed in range(first, first + seeds) if search.ledger.get(choice, seed) is None]
        for choice in wanted
        if choice not in failed
    }
    return {choice: missing for choice, missing in lacking.items() if missing}


def _candidates(search: Search) -> tuple[Candidate, ...]:
    return gather(search.space, search.ledger.evaluations, timed=search.settings.timed)


def _seeds(candidate: Candidate) -> int:
    return len(candidate.values)


def _runs_left(search: Search) -> int | None:
    most = search.settings.max_runs
    return None if most is None else max(0, most - len(search.ledger.evaluations))
