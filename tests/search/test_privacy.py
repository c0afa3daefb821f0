from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from groupsearch.errors import GroupSearchError
from groupsearch.search.privacy import RepeatAndSelect, candidate_event
from groupsearch.search.selection import adaptive_selection_cost

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
