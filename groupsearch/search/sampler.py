"""Which sampler suggests groupings: ours, or one of Optuna's.

Apart from the run, as a sampler is chosen by name and knows nothing of evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from groupsearch.plan.memory import UNREACHABLE_BYTES, Bytes
from groupsearch.search.candidates import pareto
from groupsearch.search.choice import Boundaries, Choice
from groupsearch.search.settings import SearchSettings
from groupsearch.search.space import Space

# -- What is believed of choices that were not trained, from those that were -----------------------
#
# The metric is modelled as a function of the number of groups plus a sum over the groups of an unknown
# function of where the group begins and ends, plus noise:
#
#     y = c(M) + sum over groups (u(begin) + r(begin, end) + w(size) + s(begin, end)) + noise,
#
# c, w and s smooth (cosine series with falling prior variance), u free at every place, r a sum of free terms over
# the runs of a few sites that the group contains whole, w of how many sites it has. Where the clip rule or the
# allocation of thresholds is searched, every one of them adds a smooth function of M of its own. In these features
# it is Bayesian linear regression; the variances of the parts and of the noise are those under which the values
# seen are likeliest (coordinate search).
# A sum over groups is also what a dynamic program can optimise exactly, see
# :mod:`groupsearch.search.sampler`. Where the metric is no such sum, the misfit is taken for noise.

Floats = npt.NDArray[np.float64]

_COUNT_WAVES = 6
_PLACE_WAVES = 10
_CONSTANT = 10.0  # prior variance of the mean, in variances of the values
_RUNS = (3, 6)  # sites
_START = (1.0, 0.1, 0.1, 0.1, 0.1, 0.1)  # of count, places, runs, sizes, spans, options
_START_NOISE = 0.1
_LEAST, _MOST = 2.0**-16, 2.0**6
_SWEEPS = 6


class Features:
    """Choices of groupings of ``length`` sites as vectors [constant | count | places | runs | sizes | spans | options].

    What weights say of a choice is the constant, plus :meth:`counts` of its number of groups, plus the sum
    of :meth:`table` over its groups.

    Attributes:
        length: L, the number of sites.
        options: the words of which a choice has some besides its grouping; without any there is no last part.
        ends: where each part of a vector ends.
        falls: [D] prior standard deviation of every weight within its part: long waves are likelier than short.
    """

    def __init__(self, length: int, options: Sequence[str] = ()) -> None:
        self.length = length
        self.options = tuple(options)
        self._count = _waves(np.log(np.arange(1, length + 1)), math.log(length + 1), _COUNT_WAVES)
        self._place = _waves(np.arange(length), length, _PLACE_WAVES)
        self._size = np.concatenate((self._count, self._place), axis=1)  # of small groups and of large ones
        counts, waves = self._count.shape[1], self._place.shape[1]
        parts = [1, counts, length, len(_RUNS) * length, counts + waves, waves**2, len(self.options) * counts]
        self.ends = tuple(np.cumsum(parts if self.options else parts[:-1]).tolist())
        fall = 1 / (1 + np.arange(max(counts, waves))) ** 1.5
        pairs = np.minimum(fall[:waves, None], fall[None, :waves])
        free = np.ones(self.ends[3] - self.ends[1])
        alike = np.tile(fall[:counts], len(self.options))
        self.falls = np.concatenate(([1.0], fall[:counts], free, fall[:counts], fall[:waves], pairs.ravel(), alike))

    def of(self, many: Sequence[Choice]) -> Floats:
        """[N, D] of N choices."""
        rows = np.zeros((len(many), self.ends[-1]))
        for row, choice in zip(rows, many, strict=True):
            begin = np.array((0, *choice.boundaries))
            last = np.array((*choice.boundaries, self.length)) - 1
            _, count, places, runs, sizes, spans, *options = np.split(row, self.ends[:-1])
            row[0] = 1
            count[:] = self._count[len(choice.boundaries)]
            for part in options:
                part[:] = np.outer(self._has(choice), count).ravel()
            places[begin] = 1
            cuts = np.concatenate(([0], np.cumsum(places)))
            for width, run in zip(_RUNS, np.split(runs, len(_RUNS)), strict=True):
                inside = max(self.length - width + 1, 0)
                run[:inside] = cuts[width : width + inside] == cuts[1 : 1 + inside]
            sizes[:] = self._size[last - begin].sum(axis=0)
            spans[:] = (self._place[begin].T @ self._place[last]).ravel()
        return rows

    def counts(self, weights: Floats, option: Choice) -> Floats:
        """[L] what weights say of 1, 2, ... groups with the rule and allocation of a choice."""
        _, count, _, _, _, _, *options = np.split(weights, self.ends[:-1])
        for part in options:
            count = count + self._has(option) @ part.reshape(len(self.options), -1)
        return np.asarray(self._count @ count)

    def table(self, weights: Floats) -> Floats:
        """[L, L] what weights say of a group from a site to a last site; of no meaning where that comes before."""
        _, _, places, runs, sizes, spans, *_ = np.split(weights, self.ends[:-1])
        waves = self._place.shape[1]
        gains = self._place @ spans.reshape(waves, waves) @ self._place.T + places[:, None]
        first, last = np.arange(self.length)[:, None], np.arange(self.length)[None, :]
        gains += (self._size @ sizes)[np.maximum(last - first, 0)]
        for width, run in zip(_RUNS, np.split(runs, len(_RUNS)), strict=True):
            sums = np.concatenate(([0.0], np.cumsum(run)))
            gains += np.where(last - first + 1 >= width, sums[np.maximum(last - width + 2, 0)] - sums[first], 0.0)
        return np.asarray(gains)

    def _has(self, choice: Choice) -> Floats:
        """[options] 1 where the choice has one."""
        return np.array([float(option in choice.options) for option in self.options])


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A posterior over weights of features.

    Attributes:
        features: how a choice becomes a vector.
        prior: [D] variances of the weights, in variances of the values.
        noise: variance of the noise, likewise.
        rows: [N, D] what was seen.
        scaled: [N] the values seen, of mean 0 and variance 1.
        shift: their mean before scaling.
        scale: their standard deviation before scaling.
    """

    features: Features
    prior: Floats
    noise: float
    rows: Floats
    scaled: Floats
    shift: float
    scale: float

    @classmethod
    def fit(cls, features: Features, many: Sequence[Choice], values: Sequence[float]) -> Surrogate:
        """The posterior after at least one choice was seen with a value."""
        rows, y = features.of(many), np.asarray(values, np.float64)
        shift, scale = float(y.mean()), float(y.std()) or 1.0
        scaled = (y - shift) / scale
        grams = [part @ part.T for part in np.split(rows * features.falls, features.ends[:-1], axis=1)]
        *variances, noise = _likeliest(grams, scaled)
        prior = np.repeat((_CONSTANT, *variances), np.diff((0, *features.ends))) * features.falls**2
        return cls(features, prior, noise, rows, scaled, shift, scale)

    def predict(self, many: Sequence[Choice]) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the metric of choices, its noise left out."""
        rows = self.features.of(many)
        mean = rows @ self._explain(self.scaled)
        shared = np.linalg.solve(self._lower, (self.rows * self.prior) @ rows.T)
        variance = (rows**2 @ self.prior) - (shared**2).sum(axis=0)
        return mean * self.scale + self.shift, np.sqrt(np.maximum(variance, 0)) * self.scale

    def mean_weights(self) -> Floats:
        """[D] the mean of the weights, for scaled values."""
        return self._explain(self.scaled)

    def draw_weights(self, rng: np.random.Generator) -> Floats:
        """[D] weights drawn from the posterior: a draw from the prior, corrected by what it misses (Matheron)."""
        drawn = rng.normal(size=len(self.prior)) * np.sqrt(self.prior)
        seen = self.rows @ drawn + rng.normal(size=len(self.rows)) * math.sqrt(self.noise)
        return np.asarray(drawn + self._explain(self.scaled - seen))

    @cached_property
    def _lower(self) -> Floats:
        """[N, N] the Cholesky factor of the covariance of the values seen."""
        covariance = (self.rows * self.prior) @ self.rows.T + self.noise * np.eye(len(self.rows))
        return np.asarray(np.linalg.cholesky(covariance), np.float64)

    def _explain(self, values: Floats) -> Floats:
        return np.asarray(self.prior * (self.rows.T @ _solve(self._lower, values)))


def _waves(places: Floats | npt.NDArray[np.int64], length: float, most: int) -> Floats:
    """[places, waves] of cosines over 0..length."""
    count = max(1, min(most, len(places)))
    return np.cos(np.pi * np.arange(count) * (np.asarray(places)[:, None] + 0.5) / length)


def _likeliest(grams: Sequence[Floats], scaled: Floats) -> tuple[float, ...]:
    """The variances of count, places, runs, sizes, spans, options and noise with the largest marginal likelihood."""
    best = np.array((*_START[: len(grams) - 1], _START_NOISE))
    score = _likelihood(grams, best, scaled)
    step = 16.0
    for _ in range(_SWEEPS):
        moved = False
        for index in range(len(best)):
            for factor in (step, 1 / step):
                trial = best.copy()
                trial[index] = min(max(trial[index] * factor, _LEAST), _MOST)
                found = _likelihood(grams, trial, scaled)
                if found > score + 1e-9:
                    best, score, moved = trial, found, True
        if not moved:
            step = math.sqrt(step)
    return tuple(float(v) for v in best)


def _likelihood(grams: Sequence[Floats], variances: Floats, scaled: Floats) -> float:
    covariance = _CONSTANT * grams[0] + variances[-1] * np.eye(len(scaled))
    for variance, gram in zip(variances, grams[1:], strict=False):
        covariance += variance * gram
    try:
        lower = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        return -math.inf
    return float(-0.5 * scaled @ np.linalg.solve(covariance, scaled) - np.log(np.diag(lower)).sum())


def _solve(lower: Floats, values: Floats) -> Floats:
    return np.asarray(np.linalg.solve(lower.T, np.linalg.solve(lower, values)))


# -- Which grouping to train next: the one expected to add most to the front -----------------------
#
# Peaks are known before anything is trained, so only the metric is uncertain and the expected
# hypervolume improvement has a closed form. Where it may be large is found by a dynamic program: under a
# drawn surrogate the best grouping within any peak is exact, as the least peak is.

Normal = tuple[Floats, Floats]  # mean and standard deviation of each
_BEYOND = 0.1  # how far the reference lies outside, in extents
_SLICES = 8


@dataclass(frozen=True)
class Stairs:
    """The best value that a front reaches within any size.

    Attributes:
        sizes: [K + 1] where the value changes, in increasing order, and at the end the reference size.
        values: [K] the best value between two of them; below the first size nothing is reached.
        floor: the reference value, which counts as reached everywhere.
    """

    sizes: Floats
    values: Floats
    floor: float

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Stairs:
        """The stairs of (value up, size down) points.

        The reference lies a tenth of their extent outside: in value below the front, in size above the
        largest of all points, because the front that is sought may reach further than the one that is known.
        """
        values, sizes = _steps(points)
        floor = values[0] - _BEYOND * max(values[-1] - values[0], 1e-3 * abs(values[-1]) or 1e-3)
        most = max(size for _, size in points)
        return cls(np.append(sizes, _beyond(sizes[0], most)), values, float(floor))

    def ending(self, size: float) -> Stairs:
        """The same front, with the reference a tenth of the extent beyond this size or, if larger, beyond the front.

        What is gained at the top counts from there to the reference: one that lies far beyond what can still
        be on the front lets nothing but the top be sought.
        """
        return Stairs(
            np.append(self.sizes[:-1], _beyond(self.sizes[0], max(size, self.sizes[-2]))), self.values, self.floor
        )

    def among(self, points: Sequence[tuple[float, float]]) -> Stairs:
        """The stairs of some of the points with the reference of all."""
        values, sizes = _steps(points)
        return Stairs(np.append(sizes, self.sizes[-1]), np.maximum(values, self.floor), self.floor)

    def reached(self, sizes: Floats) -> Floats:
        """The best value within these sizes; the floor where there is none."""
        levels = np.concatenate(([self.floor], self.values))
        return np.asarray(levels[np.searchsorted(self.sizes[:-1], sizes, side="right")])

    def expected_improvement(self, mean: Floats, deviation: Floats, sizes: Floats) -> Floats:
        """[P] the hypervolume that points of known size and normally distributed value are expected to add.

        The integral over all sizes s from the point's own to the reference of E[max(0, V - r(s))], with r(s)
        the value reached within s: constant between two steps, and there Jones' expected improvement.
        """
        starts = np.concatenate(([-np.inf], self.sizes[:-1]))
        widths = np.maximum(self.sizes - np.maximum(starts, sizes[:, None]), 0.0)
        levels = np.concatenate(([self.floor], self.values))
        return np.asarray((widths * _improvement(mean[:, None] - levels, deviation[:, None])).sum(axis=1))


@dataclass(frozen=True)
class Slices:
    """The stairs of what takes at most each of several times, evenly spread: three objectives, slice by slice.

    The hypervolume of (value up, size down, time down) is the integral over times of the hypervolume of what
    takes no longer. Where the best is slow, a fast point adds to the slices that it is too slow for.

    Attributes:
        times: [S] the times, the slowest of all points and a tenth of their extent more at the end.
        stairs: what is reached within each of them.
    """

    times: Floats
    stairs: tuple[Stairs, ...]

    @classmethod
    def of(cls, points: Sequence[tuple[float, float, float]], count: int = _SLICES) -> Slices:
        """The slices of (value, size, time) points, with the reference of the stairs of all of them."""
        fastest, slowest = (end(time for *_, time in points) for end in (min, max))
        whole = Stairs.of([(value, size) for value, size, _ in points])
        extent = max(slowest - fastest, 1e-3 * slowest)
        times = fastest + (1 + _BEYOND) * extent * (np.arange(count) + 0.5) / count
        within = [[(value, size) for value, size, time in points if time <= most] for most in times]
        return cls(times, tuple(whole.among(some) for some in within))

    def expected_improvement(self, value: Normal, sizes: Floats, time: Normal) -> Floats:
        """[P] the mean over slices of what points are expected to add to a slice, if they are fast enough for it."""
        gains = [
            stairs.expected_improvement(*value, sizes) * _normal((most - time[0]) / np.maximum(time[1], 1e-12))
            for most, stairs in zip(self.times, self.stairs, strict=True)
        ]
        return np.asarray(np.mean(gains, axis=0))


def best_within(
    gains: Floats, costs: npt.NDArray[np.int64], starts: Sequence[int], limits: Floats, prices: Floats
) -> list[Boundaries]:
    """For each limit and price the grouping with the largest sum of gains less a price per group.

    Exact, by a dynamic program over the ends of groups for all limits at once: O(L^2) for each.

    Args:
        gains: [L, L] what a group from a site to a last site adds.
        costs: [L, L] bytes of that group, none of which may exceed the limit.
        starts: the sites at which a group may begin, 0 among them.
        limits: [K] bytes.
        prices: [K] per group.

    Returns:
        Those of the K groupings that exist: under a limit below the floor there is none.
    """
    begin, gain, cost = _between(gains, costs, starts)
    count, places = len(limits), len(begin)
    best = np.full((count, places + 1), -np.inf)
    best[:, 0] = 0.0
    choice = np.zeros((count, places), np.int64)
    for place in range(places):
        sums = best[:, : place + 1] + gain[: place + 1, place]
        sums[cost[: place + 1, place] > limits[:, None]] = -np.inf
        choice[:, place] = sums.argmax(axis=1)
        best[:, place + 1] = sums[np.arange(count), choice[:, place]] - prices
    found = []
    for row in np.flatnonzero(np.isfinite(best[:, -1])):
        boundaries, end = [], places
        while (end := int(choice[row, end - 1])) > 0:
            boundaries.append(int(begin[end]))
        found.append(tuple(reversed(boundaries)))
    return found


def best_with(
    gains: Floats, costs: npt.NDArray[np.int64], starts: Sequence[int], limits: Floats, groups: int
) -> list[Boundaries]:
    """:func:`best_within` of the groupings with so many groups, which makes a price pointless: O(M L^2) for each."""
    begin, gain, cost = _between(gains, costs, starts)
    allowed = np.where(cost <= limits[:, None, None], gain, -np.inf)
    best, choices = allowed[:, 0], []
    for _ in range(groups - 1):
        before = np.concatenate((np.full((len(limits), 1), -np.inf), best[:, :-1]), axis=1)
        sums = before[:, :, None] + allowed
        choices.append(sums.argmax(axis=1))
        best = sums.max(axis=1)
    found = []
    for row in np.flatnonzero(np.isfinite(best[:, -1])):
        boundaries, end = [], len(begin)
        for choice in reversed(choices):
            end = int(choice[row, end - 1])
            boundaries.append(int(begin[end]))
        found.append(tuple(reversed(boundaries)))
    return found


def _between(
    gains: Floats, costs: npt.NDArray[np.int64], starts: Sequence[int]
) -> tuple[npt.NDArray[np.int64], Floats, npt.NDArray[np.int64]]:
    """Where groups may begin, and [begin, end] of gains and costs; of no meaning where a group ends before it begins.

    A cost there is above any limit.
    """
    begin = np.asarray(starts)
    ends = np.append(begin[1:], len(gains)) - 1
    cost = np.where(ends >= begin[:, None], costs[np.ix_(begin, ends)], UNREACHABLE_BYTES)
    return begin, gains[np.ix_(begin, ends)], cost


def _steps(points: Sequence[tuple[float, float]]) -> tuple[Floats, Floats]:
    """Values and sizes of the points on the front, both increasing."""
    steps: list[tuple[float, float]] = []
    for value, size in sorted(points, key=lambda point: (point[1], -point[0])):
        if not steps or value > steps[-1][0]:
            steps.append((value, size))
    values, sizes = (np.array(side) for side in zip(*steps, strict=True))
    return values, sizes


def _beyond(least: float, most: float) -> float:
    """A tenth of the extent further than the largest size."""
    return most + _BEYOND * max(most - least, 1e-3 * most)


def _improvement(excess: Floats, deviation: Floats) -> Floats:
    """E[max(0, X)] of X normal with this mean and deviation."""
    safe = np.maximum(deviation, 1e-12)
    ratio = excess / safe
    density = np.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
    return np.where(deviation > 1e-12, excess * _normal(ratio) + safe * density, np.maximum(excess, 0.0))


def _normal(x: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))))


# -- samplers --------------------------------------------------------------------------------------

# More than these the surrogate is not fitted to: those nearest to the front are taken.
MOST_SEEN = 300
_DRAWS = 3
_LEVELS = 24
_NEIGHBOURS = 100
_OWN_PART = 0.25  # of what is proposed, with several workers


def make_sampler(space: Space, settings: SearchSettings, existing: int) -> BaseSampler:
    """The sampler that settings name.

    Optuna's are seeded by the seed and by how many trials there are: with one seed they would suggest
    the same again on resume.
    """
    if settings.sampler == "front":
        return FrontSampler(space, settings.seed, existing)
    seed = int(np.random.SeedSequence([settings.seed, existing]).generate_state(1)[0])
    if settings.sampler == "random":
        return RandomSampler(seed=seed)
    if settings.sampler == "nsga2":
        return NSGAIISampler(population_size=20, seed=seed)  # the default of 50 is more than most searches train
    if settings.sampler == "gp":
        return GPSampler(seed=seed, deterministic_objective=False)
    return TPESampler(multivariate=True, seed=seed)


class FrontSampler(BaseSampler):
    """Suggests the grouping that is expected to add most to the front (see :mod:`groupsearch.search.sampler`).

    A suggestion is a function of the seed, the trial's number and the trials that were told before: it does
    not depend on how often a study was resumed. What was suggested before is never suggested again, by this
    process or another one, as long as a neighbour of it is left.
    """

    def __init__(self, space: Space, seed: int, place: int = 0) -> None:
        self._space = space
        self._seed = seed
        self._place = place
        words = [word for values in (space.rules, space.allocations) if len(values) > 1 for word in values]
        self._features = Features(space.trace.length, [word for word in words if word is not None])
        self._fallback = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters at once."""
        return self._space.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of the suggestion; none while nothing is known."""
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        choice = self.propose(others, trial.number)
        return {} if choice is None else dict(self._space.parameters(choice))

    def propose(self, trials: Sequence[FrozenTrial], number: int) -> Choice | None:
        """The suggestion for the trial of this number, given the others; None while nothing is known.

        Two workers may ask for the same number at the same time: while others run trials, each draws for itself.
        """
        others = [(t, Choice.from_json(t.user_attrs)) for t in trials if "boundaries" in t.user_attrs]
        told = {choice: t.values for t, choice in others if t.state == TrialState.COMPLETE}
        if not told:
            return None
        taken = {choice: t.state for t, choice in others}
        alone = all(t.state != TrialState.RUNNING for t, _ in others)
        rng = np.random.default_rng([self._seed, number] if alone else [self._seed, number, self._place])
        return self._suggest(told, taken, rng)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """At random, while nothing is known."""
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    def _suggest(
        self, told: Mapping[Choice, Sequence[float]], taken: Mapping[Choice, TrialState], rng: np.random.Generator
    ) -> Choice:
        known = _nearest_to_front(list(told), [values[0] for values in told.values()], self._peaks(list(told)))
        columns = zip(*((value, *time) for value, _, *time in map(told.__getitem__, known)), strict=True)
        metric, *timing = (Surrogate.fit(self._features, known, column) for column in columns)
        # What other workers train now is taken to turn out as expected, so that nobody seeks the same gain.
        seen = known + [c for c, state in taken.items() if state == TrialState.RUNNING and c not in told]
        believed, *times = (surrogate.predict(seen)[0].tolist() for surrogate in (metric, *timing))
        points = list(zip(believed, self._peaks(seen).tolist(), *times, strict=True))
        front = [choice for choice, on in zip(seen, pareto(points), strict=True) if on]
        stairs = Stairs.of([(value, size) for value, size, *_ in points])
        proposed = dict.fromkeys(self._propose(metric, timing, front, stairs, rng))
        pool = [c for c in proposed if c not in taken and self._space.feasible(c.boundaries)]
        if not pool:
            fresh = self._space.unseen_near(list(taken), rng)
            return front[0] if fresh is None else fresh
        sizes, (mean, deviation) = self._peaks(pool).astype(np.float64), metric.predict(pool)
        if timing:
            gains = Slices.of(points).expected_improvement((mean, deviation), sizes, timing[0].predict(pool))
        else:  # a size counts where a value may be had that is better than what is known
            hopeful = sizes[mean + deviation >= stairs.values[-1]]
            gains = stairs.ending(hopeful.max(initial=0.0)).expected_improvement(mean, deviation, sizes)
        if TrialState.RUNNING in taken.values():  # others may be choosing at this instant: each from a part of its own
            gains = np.where(rng.random(len(pool)) < _OWN_PART, gains, -1.0)
        return pool[int(np.argmax(gains))]

    def _propose(
        self,
        metric: Surrogate,
        timing: Sequence[Surrogate],
        front: Sequence[Choice],
        stairs: Stairs,
        rng: np.random.Generator,
    ) -> list[Choice]:
        """The best choices under the surrogate's mean and some draws, and what is near the front.

        Where time counts, also under what is left of them when time is paid for at random rates.
        """
        space, features = self._space, self._features
        sizes = stairs.sizes[:-1]
        between = rng.uniform(sizes[0], stairs.sizes[-1], _LEVELS)
        limits = np.concatenate((sizes, sizes[1:] - 1, between))
        around = [c for near in front for c in space.neighbours(near)]
        found = [around[i] for i in rng.permutation(len(around))[:_NEIGHBOURS]]
        weights = [metric.mean_weights(), *(metric.draw_weights(rng) for _ in range(_DRAWS))]
        weights += [drawn - rng.exponential() * time.mean_weights() for time in timing for drawn in weights]
        for drawn, option, table in product(weights, space.options, space.variants.tables):
            given = (features.table(drawn), table.cost_bytes, (0, *space.cuts), limits)
            if space.groups is not None:
                best = best_with(*given, space.groups)
            else:
                counts = features.counts(drawn, option)
                prices = -np.diff(counts, append=counts[-1])[rng.integers(0, _reach(front), len(limits))]
                best = best_within(*given, prices)
            found += [space.with_option(boundaries, option) for boundaries in best]
        return found

    def _peaks(self, many: Sequence[Choice]) -> Bytes:
        return self._space.peaks([choice.boundaries for choice in many])


def _reach(front: Sequence[Choice]) -> int:
    return max(choice.groups for choice in front)


def _nearest_to_front(many: list[Choice], values: Sequence[float], sizes: Bytes) -> list[Choice]:
    """At most MOST_SEEN of these: those whose value is least below what is reached within their size."""
    if len(many) <= MOST_SEEN:
        return many
    stairs = Stairs.of(list(zip(values, sizes.tolist(), strict=True)))
    gaps = stairs.reached(sizes.astype(np.float64)) - np.asarray(values)
    return [many[i] for i in np.sort(np.argsort(gaps, kind="stable")[:MOST_SEEN])]
