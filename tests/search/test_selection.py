from __future__ import annotations

import math
from collections import Counter

import dp_accounting
import numpy as np
import pytest
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from groupsearch.errors import GroupSearchError
from groupsearch.search import SearchSettings
from groupsearch.search.selection import (
    RepeatAndSelect,
    Selected,
    adaptive_selection_cost,
    candidate_event,
    repeated_selection_cost,
    select_privately,
    training_event,
)
from groupsearch.search.space import Space
from tests.search.problem import Problem

EVENT = candidate_event(noise_multiplier=2.0, sampling_rate=0.05, steps=200, score_noise_multiplier=20.0)
ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(11, 65)) + [128, 256, 512, 1024]


def theorem_2(mean: float, shape: float, gamma: float, delta: float) -> float:
    """Epsilon by theorem 2 of arXiv 2110.03620, from the Renyi curve of one training, order by order."""
    accountant = RdpAccountant(ORDERS)
    accountant.compose(EVENT)
    orders, one = np.array(ORDERS), accountant._rdp
    extra = (1 + shape) * np.min((1 - 1 / orders) * one - math.log(gamma) / orders)
    repeated = one + math.log(mean) / (orders - 1) + extra
    repeated = np.minimum.accumulate(repeated[::-1])[::-1]
    return float(np.min(repeated + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)))


@pytest.mark.parametrize("mean", [2.0, 10.0, 50.0])
def test_epsilon_is_that_of_the_theorem(mean: float) -> None:
    # The geometric distribution of mean m has gamma = 1/m.
    found = RepeatAndSelect(mean, shape=1.0).epsilon(EVENT, 1e-5)
    assert found == pytest.approx(theorem_2(mean, 1.0, 1 / mean, 1e-5), rel=1e-6)


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, math.inf])
def test_choosing_costs_more_than_one_training_and_less_than_publishing_all(shape: float) -> None:
    accountant = RdpAccountant(ORDERS)
    accountant.compose(EVENT)
    one = accountant.get_epsilon(1e-5)
    accountant.compose(EVENT, 29)
    found = RepeatAndSelect(30.0, shape).epsilon(EVENT, 1e-5)
    assert one < found < accountant.get_epsilon(1e-5)


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 3.0, math.inf])
def test_the_number_drawn_has_the_mean_and_is_at_least_one(shape: float) -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([RepeatAndSelect(8.0, shape).draw(rng) for _ in range(20_000)])
    assert drawn.mean() == pytest.approx(8.0, abs=5 * drawn.std() / len(drawn) ** 0.5)
    assert drawn.min() >= (0 if shape == math.inf else 1)


def test_the_number_drawn_is_geometric_for_shape_one() -> None:
    rng = np.random.default_rng(1)
    drawn = np.array([RepeatAndSelect(4.0).draw(rng) for _ in range(20_000)])
    counts = np.bincount(np.minimum(drawn, 12), minlength=13)[1:]
    law = stats.geom(0.25)
    expected = np.append(law.pmf(np.arange(1, 12)), law.sf(11)) * len(drawn)
    assert stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0])
def test_one_candidate_costs_what_one_training_does(shape: float) -> None:
    """The theorem would charge for a choice that there is not, here a third more than the one run costs."""
    event = candidate_event(0.95, 0.2, 50, 0.5)
    accountant, charged = RdpAccountant(ORDERS), RdpAccountant(ORDERS)
    accountant.compose(event)
    charged.compose(RepeatAndSelectDpEvent(event, 1.0, shape))
    one = accountant.get_epsilon(1e-5)
    assert RepeatAndSelect(1.0, shape).epsilon(event, 1e-5) == pytest.approx(one)
    assert charged.get_epsilon(1e-5) > 1.1 * one
    assert RepeatAndSelect(1.0, math.inf).epsilon(event, 1e-5) > one, "a Poisson number is not always one"


def test_one_candidate_is_one_training() -> None:
    rng = np.random.default_rng(0)
    assert {RepeatAndSelect(1.0, shape).draw(rng) for shape in (0.0, 0.5, 1.0) for _ in range(20)} == {1}


@pytest.mark.parametrize("wrong", [{"mean": 0.5}, {"mean": math.inf}, {"mean": 3.0, "shape": -1.0}])
def test_what_the_theorem_does_not_cover_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(GroupSearchError):
        RepeatAndSelect(**wrong)


@pytest.mark.parametrize(("noise", "score"), [(0.0, 5.0), (1.0, 0.0)])
def test_a_training_or_a_score_without_noise_is_refused(noise: float, score: float) -> None:
    with pytest.raises(GroupSearchError, match="infinite epsilon"):
        candidate_event(noise, 0.1, 10, score)


def test_the_score_is_paid_for() -> None:
    training = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(2.0)), 200
    )
    scheme = RepeatAndSelect(10.0)
    assert scheme.epsilon(EVENT, 1e-5) > scheme.epsilon(training, 1e-5)


def test_public_data_cost_nothing_and_an_adaptive_search_on_private_data_is_called_unaccounted() -> None:
    assert adaptive_selection_cost("public").epsilon == 0
    private = adaptive_selection_cost("private")
    assert private.epsilon is None
    assert "choosing has cost more" in private.statement
    with pytest.raises(GroupSearchError, match="public or private"):
        adaptive_selection_cost("secret")


class Training:
    """Counts of right examples that are known, and what was asked for."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores, self.calls = scores, []

    def __call__(self, candidate: str, seed: int) -> float:
        self.calls.append((candidate, seed))
        return self.scores[candidate]


def test_candidates_are_drawn_independently_and_as_many_as_the_distribution_says() -> None:
    rng, counts, drawn = np.random.default_rng(3), [], []
    for _ in range(3000):
        training = Training({"a": 5.0, "b": 1.0, "c": 3.0})
        select_privately("abc", training, RepeatAndSelect(4.0), 1.0, rng)
        counts.append(len(training.calls))
        drawn += training.calls
    observed = np.bincount(np.minimum(counts, 12), minlength=13)[1:]
    law = stats.geom(0.25)
    expected = np.append(law.pmf(np.arange(1, 12)), law.sf(11)) * len(counts)
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    assert stats.chisquare([sum(name == each for name, _ in drawn) for each in "abc"]).pvalue > 1e-3
    assert len({seed for _, seed in drawn}) == len(drawn), "two trainings with the same noise"


def test_the_best_is_chosen_by_its_noisy_score_and_nothing_else_is_given_back() -> None:
    wins, scores = [], []
    for seed in range(400):
        best = select_privately("ab", Training({"a": 0.0, "b": 1.0}), RepeatAndSelect(5.0), 2.0, rng_of(seed))
        assert isinstance(best, Selected)
        assert vars(best).keys() == {"candidate", "score"}
        wins.append(best.candidate)
        scores.append(best.score)
    assert 0.5 < wins.count("b") / 400 < 0.9, "with this much noise the worse one wins at times"
    assert not any(score.is_integer() for score in scores), "a score without noise"


def test_noise_has_the_deviation_that_is_paid_for() -> None:
    rng = np.random.default_rng(5)
    scores = [select_privately("a", Training({"a": 7.0}), RepeatAndSelect(1.0), 3.0, rng).score for _ in range(2000)]
    assert stats.kstest(scores, stats.norm(7.0, 3.0).cdf).pvalue > 1e-3


def test_of_no_candidate_nothing_is_published() -> None:
    scheme = RepeatAndSelect(1.0, math.inf)  # Poisson: 0 in 37 % of all cases
    found = [select_privately("a", Training({"a": 7.0}), scheme, 3.0, rng_of(seed)) for seed in range(200)]
    assert 0.25 < found.count(None) / 200 < 0.5


def test_a_training_that_raises_ends_the_selection_without_a_word_on_which() -> None:
    def train(candidate: str, seed: int) -> float:
        raise ValueError("example 17 of candidate secret")

    with pytest.raises(GroupSearchError, match="ValueError") as failure:
        select_privately(["secret"], train, RepeatAndSelect(3.0), 1.0, rng_of(0))
    assert "secret" not in str(failure.value)
    assert failure.value.__cause__ is None


@pytest.mark.parametrize("score", [None, math.nan, math.inf, -math.inf])
def test_a_run_that_failed_scores_nothing_but_noise_and_nobody_sees_it_fail(score: float | None) -> None:
    """One record with NaN could otherwise stop the whole selection."""
    rng = np.random.default_rng(8)
    found = [select_privately("a", lambda *_: score, RepeatAndSelect(1.0), 3.0, rng).score for _ in range(500)]
    assert stats.kstest(found, stats.norm(0.0, 3.0).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("candidates", "noise"), [("", 1.0), ("a", 0.0)])
def test_selection_needs_candidates_and_noise(candidates: str, noise: float) -> None:
    with pytest.raises(GroupSearchError, match="positive noise"):
        select_privately(candidates, Training({"a": 1.0}), RepeatAndSelect(3.0), noise, rng_of(0))


def test_training_the_chosen_one_anew_is_paid_for_as_well() -> None:
    scheme, again = RepeatAndSelect(10.0), training_event(noise_multiplier=2.0, sampling_rate=0.05, steps=200)
    accountant = RdpAccountant(ORDERS)
    accountant.compose(RepeatAndSelectDpEvent(EVENT, 10.0, 1.0))
    assert scheme.epsilon(EVENT, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5))
    accountant.compose(again)
    assert scheme.epsilon(EVENT, 1e-5, then=again) == pytest.approx(accountant.get_epsilon(1e-5))


def test_what_repeat_and_select_costs_is_stated_in_full() -> None:
    cost = repeated_selection_cost(candidates=20, mean=8.0, delta=1e-5, epsilon=14.25, with_training=17.5)
    assert (cost.data, cost.epsilon, cost.whole) == ("private", 14.25, 17.5)
    assert all(number in cost.statement for number in ("8 expected", "from 20", "14.3", "17.5", "1e-05"))


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_what_is_drawn_from_is_within_the_limits_and_has_every_option() -> None:
    problem = Problem(16)
    budget = int(np.quantile([peak for _, peak in Space.of(problem.trace, SearchSettings()).exact_front], 0.5))
    space = Space.of(problem.trace, SearchSettings(budget_bytes=budget, rules=("auto-s", "abadi")))
    choices = space.fixed_choices()
    assert len(set(choices)) == len(choices)
    assert all(space.peak_bytes(choice.boundaries) <= budget for choice in choices)
    assert Counter(choice.rule for choice in choices) == dict.fromkeys(("auto-s", "abadi"), len(choices) // 2)
    assert {space.source(choice.boundaries) for choice in choices} > {"layer-wise", "exact front"}
