"""What is believed of choices that were not trained, from those that were.

The metric is modelled as a function of the number of groups plus a sum over the groups of an unknown
function of where the group begins and ends, plus noise:

    y = c(M) + sum over groups (u(begin) + r(begin, end) + w(size) + s(begin, end)) + noise,

c, w and s smooth (cosine series with falling prior variance), u free at every place, r a sum of free terms over
the runs of a few sites that the group contains whole, w of how many sites it has. Where the clip rule or the
allocation of thresholds is searched, every one of them adds a smooth function of M of its own. In these features
it is Bayesian linear regression; the variances of the parts and of the noise are those under which the values
seen are likeliest (coordinate search).
A sum over groups is also what a dynamic program can optimise exactly, see
:mod:`groupsearch.search.acquisition`. Where the metric is no such sum, the misfit is taken for noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from groupsearch.search.choice import Choice

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
