"""Rank correlations against scipy, and their intervals against what happens by chance."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from groupsearch.errors import GroupSearchError
from groupsearch.search.statistics import rank_correlation


@pytest.mark.parametrize("count", [2, 3, 7, 30])
@pytest.mark.parametrize("levels", [3, 1000], ids=["ties", "few ties"])
def test_coefficients_are_those_of_scipy(count: int, levels: int) -> None:
    draw = np.random.default_rng(count)
    one, other = draw.permutation(np.arange(2 * count) % levels).reshape(2, count).astype(float)
    assert len(set(one)) > 1 < len(set(other))
    found = rank_correlation(list(zip(one, other, strict=True)))
    assert found.value == pytest.approx(stats.spearmanr(one, other).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau(one, other).statistic)
    assert found.count == count


@pytest.mark.parametrize("count", [4, 5, 6, 7])
def test_few_candidates_in_random_order_rarely_seem_to_predict(count: int) -> None:
    orders = list(permutations(range(count)))
    wrong = sum(rank_correlation(list(enumerate(order))).predicts for order in orders)
    assert wrong <= 0.025 * len(orders)
    assert rank_correlation([(i, i) for i in range(5)]).predicts


@pytest.mark.parametrize("truth", [0.0, 0.5, 0.9])
def test_intervals_hold_what_they_should(truth: float) -> None:
    """Of normal pairs, whose Spearman correlation is known, 95 % of the intervals hold it, within sampling error."""
    draw, held, trials = np.random.default_rng(0), 0, 400
    rho = 6 / math.pi * math.asin(truth / 2)
    for _ in range(trials):
        one, noise = draw.standard_normal((2, 16))
        found = rank_correlation(list(zip(one, truth * one + math.sqrt(1 - truth**2) * noise, strict=True)))
        held += found.low <= rho <= found.high
    assert held / trials >= 0.93


def test_an_interval_holds_its_value_and_turns_with_it() -> None:
    for pairs in ([(i, (7 * i) % 11) for i in range(11)], [(i, i) for i in range(11)]):
        found = rank_correlation(pairs)
        turned = rank_correlation([(one, -other) for one, other in pairs])
        assert -1 <= found.low < found.value <= found.high <= 1
        assert (turned.low, turned.value, turned.high) == pytest.approx((-found.high, -found.value, -found.low))


def test_more_confidence_is_a_wider_interval() -> None:
    pairs = [(i, (7 * i) % 11) for i in range(11)]
    sure, less = rank_correlation(pairs, 0.99), rank_correlation(pairs, 0.8)
    assert sure.low < less.low < less.high < sure.high


def test_order_alone_counts() -> None:
    pairs = [(0.1, 3.0), (0.5, 1.0), (0.7, 5.0), (0.9, 4.0), (1.0, 6.0)]
    assert rank_correlation(pairs) == rank_correlation([(math.exp(9 * a), -1 / b) for a, b in pairs])
    assert rank_correlation([(-math.inf, 0.0), *pairs]).value > rank_correlation(pairs).value


@pytest.mark.parametrize(
    "pairs", [[], [(1.0, 2.0)], [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)], [(1.0, float(i)) for i in range(9)]]
)
def test_nothing_is_said_of_too_few_or_of_ties_alone(pairs: list[tuple[float, float]]) -> None:
    found = rank_correlation(pairs)
    assert (found.low, found.high, found.count) == (-1.0, 1.0, len(pairs))
    assert not found.predicts


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(GroupSearchError, match="found nan"):
        rank_correlation([(1.0, math.nan)])
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(GroupSearchError, match="confidence between 0 and 1"):
            rank_correlation([(1.0, 1.0)], confidence)


def test_the_document_says_whether_it_predicts() -> None:
    found = rank_correlation([(i, i) for i in range(8)])
    assert found.to_json() == {
        "value": 1.0, "low": found.low, "high": 1.0, "count": 8, "kendall": 1.0, "predicts": True,
    }  # fmt: skip
