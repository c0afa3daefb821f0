"""A synthetic problem whose whole front is known exactly, to search without training anything."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from groupsearch.memory import cost_table
from groupsearch.search import Outcome
from groupsearch.trace import Booked, Instant, Site, StaticBytes, Trace

Boundaries = tuple[int, ...]


def make_trace(length: int, seed: int = 0) -> Trace:
    """A chain of layers: backward frees an activation at every site, and each site books its input and gradient."""
    rng = np.random.default_rng(seed)
    saved = rng.integers(400, 1000, length)
    output = rng.integers(300, 900, length)
    gradient = rng.integers(20, 80, length)
    sites, instants, booked = [], [], []
    alive, static = int(saved.sum()), 2000
    instants.append(Instant(-1, False, static + alive, alive))
    for index in range(length - 1, -1, -1):
        instants.append(Instant(index, True, static + alive + int(saved[index] // 2), alive))
        alive -= int(saved[index])
        booked.append(Booked(int(saved[index]), index, index, len(instants)))
        booked.append(Booked(int(output[index]), index, index, len(instants)))
        instants.append(Instant(index, False, static + alive + int(saved[index] // 3), alive))
    for index in range(length):
        live = static + int(saved[: index + 1].sum())
        sites.append(
            Site(
                name=f"layer{index}",
                layer=f"layer{index}",
                block=f"block{index // 3}",
                kind="linear",
                method="ghost",
                positions=4,
                inputs=8,
                outputs=8,
                parameters=(f"layer{index}.weight",),
                parameter_count=64,
                close_bytes=int(gradient[index]),
                gradient_bytes=int(gradient[index]),
                close_live_bytes=live,
            )
        )
    return Trace(
        sites=tuple(sites),
        instants=tuple(instants),
        booked=tuple(booked),
        cross_terms=(),
        static=StaticBytes(weights=static),
        step_bytes=static + int(gradient.sum()),
        nonprivate_peak_bytes=static + int(saved.sum()) + 500,
        batch_size=4,
        settings={"model": "synthetic"},
    )


@dataclass(frozen=True)
class Problem:
    """The value of a grouping falls with the number of groups and with where it is cut.

    ``noise`` is the standard deviation over seeds; the part of it that depends on the seed
    alone is common to all candidates, as with paired seeds in training.
    """

    length: int = 24
    noise: float = 0.0
    trace_seed: int = 0

    @cached_property
    def trace(self) -> Trace:
        return make_trace(self.length, self.trace_seed)

    @cached_property
    def boundary_cost(self) -> np.ndarray:
        return np.random.default_rng(17).uniform(0.0, 0.06, self.length + 1)

    def mean(self, boundaries: Boundaries) -> float:
        return 0.95 - 0.03 * ((len(boundaries) + 1) ** 0.25 - 1) - float(self.boundary_cost[list(boundaries)].sum())

    def evaluate(self, boundaries: Boundaries, seed: int) -> Outcome:
        own = np.random.default_rng([seed, *boundaries]).normal(0, 1)
        value = self.mean(boundaries) + self.noise * (0.8 * np.random.default_rng(seed).normal(0, 1) + 0.2 * own)
        return Outcome(value=value, step_seconds=0.001, steps=100, points=((0, 0.1), (100, value)))

    def exact_front(self) -> list[tuple[float, int]]:
        """(mean, peak bytes) of every Pareto-optimal grouping: for each peak and number of groups the best cuts."""
        table = cost_table(self.trace)
        costs, length = table.cost_bytes, self.length
        points = []
        for peak in sorted({max(int(c), table.outside_bytes) for c in costs[np.triu_indices(length)]}):
            best = np.where(costs[0] <= peak, 0.0, np.inf)
            for groups in range(1, length + 1):
                if np.isfinite(best[-1]):
                    points.append((0.95 - 0.03 * (groups**0.25 - 1) - float(best[-1]), peak))
                before = np.concatenate(([np.inf], best[:-1] + self.boundary_cost[1:length]))
                best = np.where(costs <= peak, before[:, None], np.inf).min(axis=0)
        return points
