"""Which sampler suggests groupings: ours, or one of Optuna's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from groupsearch.lifetimes import Bytes
from groupsearch.memory import cost_table
from groupsearch.search.acquisition import Stairs, best_within
from groupsearch.search.settings import SearchSettings
from groupsearch.search.space import Boundaries, Space
from groupsearch.search.surrogate import Features, Surrogate

# More than these the surrogate is not fitted to: those nearest to the front are taken.
MOST_SEEN = 300
_DRAWS = 3
_LEVELS = 24
_NEIGHBOURS = 100


def make_sampler(space: Space, settings: SearchSettings, existing: int) -> BaseSampler:
    """The sampler that settings name.

    Optuna's are seeded by the seed and by how many trials there are: with one seed they would suggest
    the same again on resume.
    """
    if settings.sampler == "front":
        return FrontSampler(space, settings.seed)
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

    def __init__(self, space: Space, seed: int) -> None:
        self._space = space
        self._seed = seed
        self._features = Features(space.trace.length)
        self._fallback = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All boundaries at once."""
        return {name: IntDistribution(0, 1) for name in self._space.parameters(())}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of the suggestion; none while nothing is known."""
        trials = study.get_trials(deepcopy=False)
        others = [t for t in trials if t.number != trial.number and "boundaries" in t.user_attrs]
        told = {_boundaries(t): t.values[0] for t in others if t.state == TrialState.COMPLETE}
        if not told:
            return {}
        taken = {_boundaries(t): t.state for t in others}
        rng = np.random.default_rng([self._seed, trial.number])
        return dict(self._space.parameters(self._suggest(told, taken, rng)))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """At random, while nothing is known."""
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    def _suggest(
        self, told: Mapping[Boundaries, float], taken: Mapping[Boundaries, TrialState], rng: np.random.Generator
    ) -> Boundaries:
        space = self._space
        seen = _nearest_to_front(list(told), list(told.values()), space.peaks(list(told)))
        surrogate = Surrogate.fit(self._features, seen, [told[b] for b in seen])
        # What other workers train now is taken to turn out as expected, so that nobody seeks the same gain.
        seen += [b for b, state in taken.items() if state == TrialState.RUNNING and b not in told]
        believed, sizes = surrogate.predict(seen)[0], space.peaks(seen)
        stairs = Stairs.of(list(zip(believed.tolist(), sizes.tolist(), strict=True)))
        front = [b for b, value, size in zip(seen, believed, sizes, strict=True) if value >= stairs.reached(size)]
        proposed = dict.fromkeys(self._propose(surrogate, front, stairs, rng))
        pool = [b for b in proposed if b not in taken and space.feasible(b)]
        if not pool:
            fresh = space.unseen_near(list(taken), rng)
            return front[0] if fresh is None else fresh
        mean, deviation = surrogate.predict(pool)
        gains = stairs.expected_improvement(mean, deviation, space.peaks(pool).astype(np.float64))
        return pool[int(np.argmax(gains))]

    def _propose(
        self, surrogate: Surrogate, front: Sequence[Boundaries], stairs: Stairs, rng: np.random.Generator
    ) -> list[Boundaries]:
        """The best groupings under the surrogate's mean and some draws, and what is near the front."""
        features, table = self._features, cost_table(self._space.trace)
        sizes = stairs.sizes[:-1]
        between = rng.uniform(sizes[0], stairs.sizes[-1], _LEVELS)
        limits = np.concatenate((sizes, sizes[1:] - 1, between))
        around = [b for near in front for b in self._space.neighbours(near)]
        found = [around[i] for i in rng.permutation(len(around))[:_NEIGHBOURS]]
        weights = [surrogate.mean_weights(), *(surrogate.draw_weights(rng) for _ in range(_DRAWS))]
        for drawn in weights:
            counts = features.counts(drawn)
            prices = -np.diff(counts, append=counts[-1])[rng.integers(0, _reach(front), len(limits))]
            found += best_within(features.table(drawn), table.cost_bytes, (0, *self._space.cuts), limits, prices)
        return found


def _reach(front: Sequence[Boundaries]) -> int:
    return max(len(b) + 1 for b in front)


def _nearest_to_front(many: list[Boundaries], values: Sequence[float], sizes: Bytes) -> list[Boundaries]:
    """At most MOST_SEEN of these: those whose value is least below what is reached within their size."""
    if len(many) <= MOST_SEEN:
        return many
    stairs = Stairs.of(list(zip(values, sizes.tolist(), strict=True)))
    gaps = stairs.reached(sizes.astype(np.float64)) - np.asarray(values)
    return [many[i] for i in np.sort(np.argsort(gaps, kind="stable")[:MOST_SEEN])]


def _boundaries(trial: FrozenTrial) -> Boundaries:
    return tuple(trial.user_attrs["boundaries"])
