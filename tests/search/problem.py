"""A synthetic problem whose whole front is known exactly, to search without training anything."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from groupsearch.plan.memory import cost_table
from groupsearch.plan.trace import Booked, Instant, Site, StaticBytes, Trace
from groupsearch.search import Choice, Outcome
from groupsearch.search.candidates import pareto

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


SHAPES = ("count", "places", "balance", "layers", "mixed")


@dataclass(frozen=True)
class Problem:
    """A made-up metric of every grouping, whose exact front a dynamic program gives.

    It falls with the number of groups, and, but for the shape ``count``, with which groups there are, so
    that the least peak for each number of groups is not the best that this number of groups can be:

    * ``count``: nothing else;
    * ``places``: every boundary costs a random amount of its own, near ones have nothing in common;
    * ``balance``: large groups cost by the square of their size, and boundaries towards the output, where
      memory wants them, cost most;
    * ``layers``: layers have random scales, and a group costs by how much those in it differ, and a random
      amount for its boundary; the sum saturates, so that the metric is *not* a sum over groups;
    * ``mixed``: half of each of ``places``, ``balance`` and ``layers``.

    ``noise`` is the standard deviation over seeds; the part of it that depends on the seed alone is common to
    all candidates, as with paired seeds in training.
    """

    length: int = 24
    noise: float = 0.0
    trace_seed: int = 0
    shape: str = "places"

    @cached_property
    def trace(self) -> Trace:
        return make_trace(self.length, self.trace_seed)

    @cached_property
    def group_cost(self) -> np.ndarray:
        """[lo, last] what a group costs."""
        return _group_cost(self.shape, self.length, self.trace_seed)

    def value(self, groups: int, cost: float) -> float:
        """The metric of so many groups that cost so much together; falls with the cost."""
        lost = 0.3 * -math.expm1(-cost / 0.3) if self.shape in ("layers", "mixed") else cost
        return 0.95 - 0.03 * (groups**0.25 - 1) - lost

    def mean(self, boundaries: Boundaries) -> float:
        ends = (0, *boundaries, self.length)
        cost = sum(self.group_cost[lo, end - 1] for lo, end in pairwise(ends))
        return self.value(len(ends) - 1, float(cost))

    def evaluate(self, choice: Choice, seed: int) -> Outcome:
        own = np.random.default_rng([seed, *choice.boundaries]).normal(0, 1)
        value = self.mean(choice.boundaries) + self.noise * (0.8 * np.random.default_rng(seed).normal(0, 1) + 0.6 * own)
        return Outcome(value=value, step_seconds=0.001, steps=100, points=((0, 0.1), (100, value)))

    def exact_front(self) -> list[tuple[float, int]]:
        """(mean, peak bytes) of the front over all 2^(L-1) groupings.

        The best metric within a peak is exact: for each number of groups the least cost of prefixes that end
        at each site, with groups above the peak left out. Then the limit is what that needed less one byte.
        """
        table = cost_table(self.trace)
        limit, points = np.iinfo(np.int64).max, []
        while (found := self._best_within(table.cost_bytes, limit)) is not None:
            value, boundaries = found
            ends = (0, *boundaries, self.length)
            peak = max(table.outside_bytes, *(int(table.cost_bytes[lo, end - 1]) for lo, end in pairwise(ends)))
            points.append((value, peak))
            limit = peak - 1
            if limit < table.outside_bytes:
                break
        return [point for point, on in zip(points, pareto(points), strict=True) if on]

    def _best_within(self, peak_bytes: np.ndarray, limit: int) -> tuple[float, Boundaries] | None:
        allowed = np.where(peak_bytes <= limit, self.group_cost, np.inf)
        best, choices, values = allowed[0], [], []
        for groups in range(1, self.length + 1):
            values.append(self.value(groups, float(best[-1])) if np.isfinite(best[-1]) else -np.inf)
            sums = np.concatenate(([np.inf], best[:-1]))[:, None] + allowed
            choices.append(sums.argmin(axis=0))
            best = sums.min(axis=0)
        most = int(np.argmax(values))
        if not np.isfinite(values[most]):
            return None
        boundaries, end = [], self.length
        for groups in range(most, 0, -1):
            end = int(choices[groups - 1][end - 1])
            boundaries.append(end)
        return values[most], tuple(reversed(boundaries))


RULES = {"abadi": 0.0, "auto-s": 0.01, "auto-v": -0.02}


@dataclass(frozen=True)
class Mechanisms(Problem):
    """A problem in which the clip rule and the allocation of thresholds matter, and so does step time.

    auto-s is the best rule everywhere; ``dimension`` is worse than ``uniform`` with few groups and better with
    many. A step takes longer the more groups there are, and every group ends with a cost of its own.
    """

    def mean_of(self, choice: Choice) -> float:
        gained = RULES.get(choice.rule or "abadi", 0.0)
        if choice.allocation == "dimension" and choice.boundaries:
            gained += 0.012 * math.log2(choice.groups) - 0.02
        return self.mean(choice.boundaries) + gained

    def seconds(self, boundaries: Boundaries) -> float:
        own = np.random.default_rng([3, self.trace_seed]).uniform(0, 0.004, self.length)
        return float(0.01 + sum(own[b] for b in boundaries))

    def evaluate(self, choice: Choice, seed: int) -> Outcome:
        outcome = super().evaluate(choice, seed)
        gained = self.mean_of(choice) - self.mean(choice.boundaries)
        return Outcome(outcome.value + gained, self.seconds(choice.boundaries), outcome.steps, outcome.points)


def frugal(trace: Trace) -> Trace:
    """The same sites by another way of taking the step: less is kept until a group is closed, more is always alive."""
    booked = tuple(replace(each, size_bytes=each.size_bytes * 3 // 5) for each in trace.booked)
    instants = tuple(replace(each, live_bytes=each.live_bytes + 1500) for each in trace.instants)
    return replace(trace, booked=booked, instants=instants)


def _group_cost(shape: str, length: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([17, seed])
    lo, last = np.arange(length)[:, None], np.arange(length)[None, :]
    size = np.maximum(last - lo + 1, 0) / length
    begins_inside = (lo > 0) & (last >= lo)
    places = np.where(begins_inside, rng.uniform(0.0, 1.4 / length, length)[:, None], 0.0)
    balance = 0.15 * size**2 + np.where(begins_inside, 0.4 / length * (lo / length) ** 2, 0.0)
    scales = np.cumsum(rng.normal(0, 4 / length**0.5, length)) / 4 + np.resize(rng.normal(0, 1, 4), length)
    layers = 0.08 * size * _spread(scales) + 0.3 * places
    costs = {"count": 0 * size, "places": places, "balance": balance, "layers": layers}
    return costs[shape] if shape != "mixed" else (places + balance + layers) / 2


def _spread(scales: np.ndarray) -> np.ndarray:
    """[lo, last] the variance of the scales lo..last."""
    count = np.maximum(np.arange(len(scales))[None, :] - np.arange(len(scales))[:, None] + 1, 1)
    sums, squares = (np.concatenate(([0.0], np.cumsum(scales**power))) for power in (1, 2))
    mean = (sums[None, 1:] - sums[:-1, None]) / count
    return np.maximum((squares[None, 1:] - squares[:-1, None]) / count - mean**2, 0.0)
