"""Which sampler suggests groupings: ours, or one of Optuna's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from groupsearch.lifetimes import Bytes
from groupsearch.search.acquisition import Slices, Stairs, best_with, best_within
from groupsearch.search.choice import Choice
from groupsearch.search.front import pareto
from groupsearch.search.settings import SearchSettings
from groupsearch.search.space import Space
from groupsearch.search.surrogate import Features, Surrogate

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
    """Suggests the grouping that is expected to add most to the front (see :mod:`groupsearch.search.acquisition`).

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
