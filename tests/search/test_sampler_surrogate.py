from __future__ import annotations

from itertools import combinations, pairwise, product

import numpy as np
import pytest

from groupsearch.search.choice import Choice
from groupsearch.search.sampler import Features, Surrogate
from tests.search.problem import Mechanisms, Problem


def random_groupings(length: int, count: int, seed: int = 0) -> list[Choice]:
    rng = np.random.default_rng(seed)
    shares = rng.uniform(0, 0.6, count)
    return [Choice(tuple(np.flatnonzero(rng.random(length - 1) < share) + 1)) for share in shares]


@pytest.mark.parametrize("length", [1, 2, 5, 7, 24])
def test_weights_of_a_grouping_are_its_count_plus_the_sum_of_the_table_over_its_groups(length: int) -> None:
    features = Features(length)
    weights = np.random.default_rng(1).normal(size=features.ends[-1])
    counts, table = features.counts(weights, Choice(())), features.table(weights)
    for choice in random_groupings(length, 20):
        ends = (0, *choice.boundaries, length)
        expected = weights[0] + counts[choice.groups - 1] + sum(table[lo, end - 1] for lo, end in pairwise(ends))
        assert features.of([choice])[0] @ weights == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["places", "balance", "layers", "mixed"])
def test_what_was_not_seen_is_predicted_with_honest_deviations(shape: str) -> None:
    problem = Problem(24, shape=shape)
    seen, unseen = random_groupings(24, 40), random_groupings(24, 200, seed=1)
    surrogate = Surrogate.fit(Features(24), seen, [problem.mean(c.boundaries) for c in seen])
    mean, deviation = surrogate.predict(unseen)
    true = np.array([problem.mean(c.boundaries) for c in unseen])
    assert np.sqrt(np.mean((mean - true) ** 2)) < 0.25 * true.std()
    assert np.mean(np.abs(mean - true) < 3 * deviation) > 0.9


def test_noise_is_taken_for_noise_and_not_fitted() -> None:
    rng = np.random.default_rng(3)
    seen = random_groupings(24, 100)
    noise = rng.normal(size=100)
    surrogate = Surrogate.fit(Features(24), seen, list(5 + noise))
    mean, _ = surrogate.predict(random_groupings(24, 100, seed=1))
    assert surrogate.noise > 0.5
    assert mean.std() < 0.5 * noise.std()
    assert mean.mean() == pytest.approx(5, abs=0.5)


def test_draws_have_the_mean_and_the_deviation_that_are_predicted() -> None:
    problem, features = Problem(12, shape="places"), Features(12)
    seen = random_groupings(12, 10)
    surrogate = Surrogate.fit(features, seen, [problem.mean(c.boundaries) for c in seen])
    asked = random_groupings(12, 6, seed=2)
    rng = np.random.default_rng(0)
    draws = np.array([features.of(asked) @ surrogate.draw_weights(rng) for _ in range(4000)])
    draws = draws * surrogate.scale + surrogate.shift
    mean, deviation = surrogate.predict(asked)
    assert draws.mean(axis=0) == pytest.approx(mean, abs=5 * deviation.max() / 4000**0.5)
    assert draws.std(axis=0) == pytest.approx(deviation, rel=0.1, abs=1e-3 * deviation.max())
    assert features.of(asked) @ surrogate.mean_weights() * surrogate.scale + surrogate.shift == pytest.approx(mean)


def test_equal_values_and_a_single_grouping_are_no_difficulty() -> None:
    every = [Choice(cuts) for count in range(4) for cuts in combinations(range(1, 4), count)]
    for seen in (every[:1], every):
        mean, deviation = Surrogate.fit(Features(4), seen, [0.5] * len(seen)).predict(every)
        assert np.isfinite(deviation).all()
        assert mean == pytest.approx(0.5)


def test_weights_of_a_choice_are_those_of_its_grouping_plus_those_of_its_rule_and_allocation() -> None:
    features = Features(7, ("abadi", "auto-s", "uniform", "dimension"))
    weights = np.random.default_rng(1).normal(size=features.ends[-1])
    table = features.table(weights)
    for choice in random_groupings(7, 10):
        ends = (0, *choice.boundaries, 7)
        found = set()
        for rule, allocation in product(("abadi", "auto-s"), ("uniform", "dimension")):
            option = Choice(choice.boundaries, rule, allocation)
            counts = features.counts(weights, option)
            expected = weights[0] + counts[choice.groups - 1] + sum(table[lo, end - 1] for lo, end in pairwise(ends))
            assert features.of([option])[0] @ weights == pytest.approx(expected)
            found.add(round(float(expected), 9))
        assert len(found) == 4


def test_what_a_rule_and_an_allocation_do_is_learned_apart_from_the_groupings() -> None:
    problem, words = Mechanisms(16, shape="balance"), ("abadi", "auto-s", "auto-v", "uniform", "dimension")
    rng = np.random.default_rng(0)

    def drawn(seed: int) -> list[Choice]:
        picks = (rng.choice(words[:3]), rng.choice(words[3:]))
        return [Choice(c.boundaries, *map(str, picks)) for c in random_groupings(16, 10, seed)]

    seen, unseen = ([c for seed in seeds for c in drawn(seed)] for seeds in (range(8), range(10, 20)))
    surrogate = Surrogate.fit(Features(16, words), seen, [problem.mean_of(c) for c in seen])
    mean, deviation = surrogate.predict(unseen)
    true = np.array([problem.mean_of(c) for c in unseen])
    assert np.sqrt(np.mean((mean - true) ** 2)) < 0.2 * true.std()
    assert np.mean(np.abs(mean - true) < 3 * deviation) > 0.9
