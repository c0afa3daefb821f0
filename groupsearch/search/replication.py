"""More seeds for what ends up on the front, because a mean over one seed is partly luck."""

from __future__ import annotations

from groupsearch.search.candidates import gather
from groupsearch.search.exploration import Search
from groupsearch.search.space import Boundaries


def replicate(search: Search) -> None:
    """Evaluate the front and the references with every seed.

    One seed at a time: new means move the front, and what has left it is not evaluated further. It
    ends when everything on the front has all seeds, at the latest when every candidate has.
    """
    done = 0
    while missing := _missing(search):
        total = done + sum(len(seeds) for seeds in missing.values())
        for boundaries, seeds in missing.items():
            search.evaluate(boundaries, seeds[0], "replication", done, total)
            done += 1


def _missing(search: Search) -> dict[Boundaries, list[int]]:
    """The seeds that the references, the front, and what ties with it on peak with fewest groups still lack."""
    evaluations = search.ledger.evaluations
    failed = {e.boundaries for e in evaluations if e.error is not None}
    candidates = gather(search.space, evaluations)
    fewest: dict[int, Boundaries] = {}
    for candidate in candidates:  # of equal peaks those with fewer groups come first
        fewest.setdefault(candidate.peak_bytes, candidate.boundaries)
    front = [c for c in candidates if c.on_front]
    ties = [fewest[c.peak_bytes] for c in front]
    wanted = dict.fromkeys([*search.space.references(), *(c.boundaries for c in front), *ties])
    lacking = {
        boundaries: [seed for seed in search.settings.seed_numbers if search.ledger.get(boundaries, seed) is None]
        for boundaries in wanted
        if boundaries not in failed
    }
    return {boundaries: seeds for boundaries, seeds in lacking.items() if seeds}
