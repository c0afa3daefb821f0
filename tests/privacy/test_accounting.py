"""Epsilon against independent computations.

Closed forms, bounds by convolution of rounded privacy losses, integrated Renyi and hockey-stick divergences,
a published amplification theorem and published figures.
"""

from __future__ import annotations

import logging
import math
from itertools import product

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.signal import fftconvolve
from scipy.stats import norm

from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import gradient_noise_multiplier
from groupsearch.privacy.accounting import SAMPLINGS, Accountant, default_delta, epsilon, noise_multiplier_for

noises = st.floats(0.4, 8.0)
rates = st.floats(0.001, 1.0)
step_counts = st.integers(1, 200)
few = settings(max_examples=6, deadline=None, derandomize=True)


def gaussian_delta(eps: float, noise: float) -> float:
    """Delta of one Gaussian release of sensitivity 1 (Balle and Wang, arXiv 1805.06530, theorem 8)."""
    low, high = norm.cdf(0.5 / noise - eps * noise), norm.cdf(-0.5 / noise - eps * noise)
    return float(low - math.exp(eps) * high)


def subsampled_delta(eps: float, noise: float, rate: float) -> float:
    """Delta of one release of a Poisson sample, removal of an example (Balle et al., arXiv 1807.01647)."""
    return rate * gaussian_delta(math.log1p((math.exp(eps) - 1) / rate), noise)


def convolved_bounds(noise: float, rate: float, steps: int, delta: float, width: float) -> tuple[float, float]:
    """Epsilon of removing one example with all losses rounded down, and with all rounded up, to a grid."""
    x = np.linspace(-12 * noise, 1 + 12 * noise, 400_001)
    middle = (x[1:] + x[:-1]) / 2
    mass = (1 - rate) * np.diff(norm.cdf(x, 0, noise)) + rate * np.diff(norm.cdf(x, 1, noise))
    loss = np.log1p(rate * np.expm1((2 * middle - 1) / (2 * noise**2)))
    found = []
    for index in (np.floor(loss / width).astype(int), np.ceil(loss / width).astype(int)):
        step = np.bincount(index - index.min(), weights=mass)
        total, power, left = np.ones(1), step, steps
        while left:
            if left % 2:
                total = fftconvolve(total, power)
            power, left = fftconvolve(power, power), left // 2
        losses = (np.arange(len(total)) + steps * index.min()) * width
        low, high = 0.0, 100.0
        while high - low > 1e-6:
            eps = (low + high) / 2
            beyond = losses > eps
            excess = float((total[beyond] * -np.expm1(eps - losses[beyond])).sum())
            low, high = (eps, high) if excess > delta else (low, eps)
        found.append(high)
    return found[0], found[1]


def integrated_rdp(order: float, noise: float, rate: float) -> float:
    """Renyi divergence of one release of a Poisson sample: the integral of (p/q)^order q."""

    def integrand(x: float) -> float:
        ratio = 1 - rate + rate * math.exp((2 * x - 1) / (2 * noise**2))
        return math.exp(order * math.log(ratio) - x * x / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))

    moment, _ = quad(integrand, -15 * noise, order + 15 * noise, epsabs=0, epsrel=1e-10, limit=500)
    return math.log(moment) / (order - 1)


def integrated_rdp_epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon through integrated divergences, converted as in arXiv 2004.00010, proposition 12."""
    return min(
        steps * integrated_rdp(order, noise, rate) + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        for order in (1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 24.0, 32.0)
    )


def pair_delta(eps: float, noise: float, rate: float, groups: int, count_noise: float) -> float:
    """Delta of one release of sums *and* counts of a Poisson sample, integrated over the plane of both.

    The counts' noise matters along the change of their vector alone, which is sqrt(M) / 2 long.
    """
    gradient = gradient_noise_multiplier(noise, groups, count_noise)
    x, y = (np.linspace(-9, 9 + shift, 3001) for shift in (1 / gradient, math.sqrt(groups) / 2 / count_noise))
    without = norm.pdf(x)[:, None] * norm.pdf(y)
    moved = norm.pdf(x - 1 / gradient)[:, None] * norm.pdf(y - math.sqrt(groups) / 2 / count_noise)
    excess = np.maximum((1 - rate) * without + rate * moved - math.exp(eps) * without, 0)
    return float(excess.sum() * (x[1] - x[0]) * (y[1] - y[0]))


def replaced_delta(eps: float, noise: float, rate: float) -> float:
    """Delta of one fixed-size batch when an example that adds 1 is replaced by one that adds -1, the others nothing.

    Two data sets that are neighbours: their delta is no upper bound, but none may be below it.
    """
    x = np.linspace(-1 - 12 * noise, 1 + 12 * noise, 400_001)
    batch, other = ((1 - rate) * norm.pdf(x, 0, noise) + rate * norm.pdf(x, side, noise) for side in (1, -1))
    return float(np.maximum(batch - math.exp(eps) * other, 0).sum() * (x[1] - x[0]))


def amplified_rdp_epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon of batches without replacement by the general theorem (Wang et al., arXiv 1808.00087, theorem 9).

    It holds for any mechanism, so dp-accounting's theorem 27 for Gaussians must be at least as good. The
    Gaussian's divergence of order j is j (2 / noise)^2 / 2: replacing an example moves the sum by 2.
    """
    found = []
    for order in range(2, 65):
        divergence = [2.0 * j / noise**2 for j in range(order + 1)]
        second = min(math.log(4) + math.log(math.expm1(divergence[2])), divergence[2] + math.log(2))
        terms = [0.0, 2 * math.log(rate) + math.log(math.comb(order, 2)) + second]
        terms += [
            j * math.log(rate) + math.log(math.comb(order, j)) + (j - 1) * divergence[j] + math.log(2)
            for j in range(3, order + 1)
        ]
        rdp = steps * float(np.logaddexp.reduce(terms)) / (order - 1)
        found.append(rdp + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return min(found)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (2.0, 10), (5.0, 100), (0.3, 3)])
def test_pld_of_full_batches_is_the_gaussian_closed_form(noise, steps):
    eps = epsilon(noise, 1.0, steps, 1e-5)
    assert gaussian_delta(eps, noise / math.sqrt(steps)) <= 1e-5
    assert gaussian_delta(0.999 * eps, noise / math.sqrt(steps)) > 1e-5


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.2), (0.5, 0.01), (2.0, 0.5), (3.0, 0.001)])
def test_pld_of_one_sampled_step_is_the_closed_form(noise, rate):
    eps = epsilon(noise, rate, 1, 1e-6)
    assert subsampled_delta(eps, noise, rate) <= 1e-6
    assert subsampled_delta(0.998 * eps, noise, rate) > 1e-6


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.0, 0.2, 75), (1.5, 0.05, 40)])
def test_pld_lies_between_convolutions_rounded_down_and_up(noise, rate, steps):
    low, high = convolved_bounds(noise, rate, steps, 1e-5, width=4e-4)
    assert high / low < 1.03
    assert low <= epsilon(noise, rate, steps, 1e-5) <= high


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.0, 0.2, 75), (1.1, 0.01, 10_000), (4.0, 0.01, 10_000)])
def test_rdp_is_the_integrated_divergence(noise, rate, steps):
    # A few orders of ours against dp-accounting's many: ours may be larger, by little.
    assert epsilon(noise, rate, steps, 1e-5, "rdp") == pytest.approx(
        integrated_rdp_epsilon(noise, rate, steps, 1e-5), rel=0.01
    )


def test_the_published_moments_accountant_bound_is_an_upper_bound():
    # arXiv 1607.00133, section 3.2: q = 0.01, sigma = 4, T = 10000, delta = 1e-5 gives epsilon about 1.26.
    assert epsilon(4.0, 0.01, 10_000, 1e-5) < epsilon(4.0, 0.01, 10_000, 1e-5, "rdp") < 1.26


@pytest.mark.parametrize(("noise", "epochs", "published"), [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)])
def test_published_figures_are_met_in_their_conversion_and_bettered_in_ours(noise, epochs, published):
    # The table of TensorFlow Privacy's MNIST tutorial: 60000 examples, batch 256, delta 1e-5, and the older
    # conversion from RDP (arXiv 1702.07476, proposition 3): rdp + log(1 / delta) / (order - 1).
    rate, steps = 256 / 60_000, epochs * 60_000 // 256
    orders = [3.4, 3.6, 3.8, 4.0, 4.2, 7.0, 7.5, 8.0, 8.5, 9.0, 14.0, 15.0, 16.0, 17.0]
    older = min(steps * integrated_rdp(order, noise, rate) - math.log(1e-5) / (order - 1) for order in orders)
    assert older == pytest.approx(published, abs=0.006)
    assert 0.7 * published < epsilon(noise, rate, steps, 1e-5) < epsilon(noise, rate, steps, 1e-5, "rdp") < published


@pytest.mark.parametrize(("groups", "count_noise"), [(1, 10.0), (4, 10.0), (12, 5.0), (81, 25.0)])
def test_with_adaptive_thresholds_a_step_costs_the_stated_multiplier_by_rdp(groups, count_noise):
    pair = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.GaussianDpEvent(gradient_noise_multiplier(1.2, groups, count_noise)),
            dp_accounting.GaussianDpEvent(count_noise / (math.sqrt(groups) / 2)),
        ]
    )
    released = RdpAccountant().compose(dp_accounting.PoissonSampledDpEvent(0.1, pair), 50)
    assert released.get_epsilon(1e-5) == pytest.approx(epsilon(1.2, 0.1, 50, 1e-5, "rdp"))


@pytest.mark.parametrize(("groups", "count_noise"), [(1, 2.0), (4, 2.0), (12, 5.0)])
def test_with_adaptive_thresholds_a_step_costs_the_stated_multiplier_by_integration(groups, count_noise):
    eps = epsilon(1.2, 0.1, 1, 1e-5)
    alone = subsampled_delta(eps, 1.2, 0.1)
    assert pair_delta(eps, 1.2, 0.1, groups, count_noise) == pytest.approx(alone, rel=1e-3)
    assert 0.99e-5 < alone <= 1e-5


@pytest.mark.parametrize(("noise", "rate", "steps"), [(4.0, 0.01, 1000), (2.0, 0.05, 20), (6.0, 0.2, 75)])
def test_fixed_size_batches_are_within_a_general_theorem_and_above_poisson(noise, rate, steps):
    fixed = epsilon(noise, rate, steps, 1e-5, sampling="fixed-size")
    assert fixed <= amplified_rdp_epsilon(noise, rate, steps, 1e-5) * (1 + 1e-9)
    assert fixed > epsilon(noise, rate, steps, 1e-5)
    assert fixed == epsilon(noise, rate, steps, 1e-5, "rdp", "fixed-size")


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.01), (1.0, 0.2), (2.0, 0.9), (4.0, 0.5), (1.0, 1.0)])
def test_fixed_size_batches_cost_at_least_what_two_neighbours_show(noise, rate):
    eps = epsilon(noise, rate, 1, 1e-5, sampling="fixed-size")
    assert replaced_delta(eps, noise, rate) <= 1e-5


def test_full_batches_of_fixed_size_are_a_gaussian_of_twice_the_sensitivity():
    # Renyi divergence of order a: a (2 / noise)^2 / 2, composed; converted as in arXiv 2004.00010, proposition 12.
    orders = np.arange(1.01, 60, 0.01)
    best = (10 * orders * 2 / 5.0**2 + np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1)).min()
    assert epsilon(5.0, 1.0, 10, 1e-5, sampling="fixed-size") == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("rate", [0.7, 0.9, 0.99])
def test_amplification_never_costs_more_than_none(rate):
    assert epsilon(3.0, rate, 20, 1e-5, sampling="fixed-size") <= epsilon(3.0, 1.0, 20, 1e-5, sampling="fixed-size")


@pytest.mark.parametrize(
    ("rate", "steps", "epochs"),
    [
        (0.1, 10, 1),
        (0.1, 11, 2),
        (0.1, 30, 3),
        (1 / 3, 9, 3),
        (0.3, 9, 3),
        (0.4, 9, 5),
        (1.0, 4, 4),
        (250 / 6e4, 720, 3),
    ],
)
def test_shuffled_epochs_are_one_gaussian_each(rate, steps, epochs):
    eps = epsilon(2.0, rate, steps, 1e-5, sampling="shuffled")
    assert gaussian_delta(eps, 2.0 / math.sqrt(epochs)) <= 1e-5
    assert gaussian_delta(0.999 * eps, 2.0 / math.sqrt(epochs)) > 1e-5


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_sampling_has_its_noise_multiplier(sampling):
    noise = noise_multiplier_for(3.0, 1e-5, 0.02, 100, sampling)
    assert 2.97 <= epsilon(noise, 0.02, 100, 1e-5, sampling=sampling) <= 3.0
    assert (noise > noise_multiplier_for(3.0, 1e-5, 0.02, 100)) == (sampling != "poisson")


@few
@given(noises, rates, step_counts)
@example(1e3, 0.2, 10)
def test_rdp_is_never_below_pld(noise, rate, steps):
    assert epsilon(noise, rate, steps, 1e-5, "rdp") >= 0.999 * epsilon(noise, rate, steps, 1e-5)


@few
@given(noises, rates, step_counts)
@example(3.0, 0.001, 1)
def test_epsilon_falls_with_noise_and_delta_and_rises_with_rate_and_steps(noise, rate, steps):
    here = epsilon(noise, rate, steps, 1e-5)
    slack = 1 + 1e-3
    assert epsilon(1.5 * noise, rate, steps, 1e-5) <= here * slack
    assert epsilon(noise, rate, steps, 1e-4) <= here * slack
    assert epsilon(noise, rate / 2, steps, 1e-5) <= here * slack
    assert epsilon(noise, rate, 2 * steps, 1e-5) >= here / slack


@few
@given(st.floats(0.1, 30.0), rates, step_counts)
def test_calibrated_noise_spends_the_budget_and_never_more(target, rate, steps):
    noise = noise_multiplier_for(target, 1e-5, rate, steps)
    assert 0.99 * target <= epsilon(noise, rate, steps, 1e-5) <= target


@pytest.mark.parametrize(("target", "delta", "rate", "steps"), [(1000.0, 1e-5, 0.2, 75), (0.01, 1e-6, 0.2, 75)])
def test_calibration_at_the_extremes(target, delta, rate, steps):
    noise = noise_multiplier_for(target, delta, rate, steps)
    assert 0.99 * target <= epsilon(noise, rate, steps, delta) <= target


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_edge_cases(accountant):
    assert epsilon(0.0, 0.2, 5, 1e-5, accountant) == math.inf
    assert epsilon(1.0, 0.2, 0, 1e-5, accountant) == 0
    assert epsilon(0.0, 0.2, 0, 1e-5, accountant) == 0
    assert 0 < epsilon(1.0, 1.0, 1, 1e-5, accountant) < 10
    assert epsilon(1e6, 1e-6, 1, 1e-5, accountant) >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 0.2, 5, 1e-5), "noise_multiplier >= 0, found -1"),
        ((math.nan, 0.2, 5, 1e-5), "noise_multiplier"),
        ((math.inf, 0.2, 5, 1e-5), "noise_multiplier"),
        ((1.0, 0.0, 5, 1e-5), "sampling_rate"),
        ((1.0, 1.1, 5, 1e-5), "sampling_rate"),
        ((1.0, 0.2, -1, 1e-5), "steps"),
        ((1.0, 0.2, 1.5, 1e-5), "steps"),
        ((1.0, 0.2, 5, 0.0), "delta"),
        ((1.0, 0.2, 5, 1.0), "delta"),
        ((1.0, 0.2, 0, 2.0), "delta"),
        ((1.0, 0.2, 5, 1e-5, "prv"), "pld, rdp"),
        ((1.0, 0.2, 5, 1e-5, "pld", "fixed-size"), "rdp for fixed-size batches, found pld"),
        ((1.0, 0.2, 5, 1e-5, None, "uniform"), "sampling to be one of poisson, fixed-size, shuffled, found 'uniform'"),
    ],
)
def test_epsilon_refuses_what_is_out_of_range(arguments, message):
    with pytest.raises(GroupSearchError, match=message):
        epsilon(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1e-5, 0.2, 5), "epsilon > 0"),
        ((math.inf, 1e-5, 0.2, 5), "noise multiplier of 0"),
        ((1.0, 1e-5, 0.2, 0), "at least one step"),
        ((1.0, 1e-5, 2.0, 5), "sampling_rate"),
        ((1.0, 0.0, 0.2, 5), "delta"),
        ((1e9, 1e-5, 0.2, 5), "reaches"),
    ],
)
def test_calibration_refuses_what_no_noise_reaches(arguments, message):
    with pytest.raises(GroupSearchError, match=message):
        noise_multiplier_for(*arguments)


def test_the_default_delta_is_a_hundredth_of_one_over_the_size():
    for n in (1, 10, 1437, 10**6, 10**9):
        assert n * default_delta(n) <= 1e-2 * (1 + 1e-12)
    assert default_delta(1437) == pytest.approx(6.96e-6, rel=1e-3)
    with pytest.raises(GroupSearchError, match="at least one"):
        default_delta(0)


@pytest.mark.parametrize("delta", [1e-12, 2e-12, 1e-11, 1e-10])
@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (60.0, 10_000), (600.0, 1_000_000)])
def test_at_tiny_deltas_pld_is_not_below_the_closed_form(delta, noise, steps):
    """Without the allowance for convolutions in floating point it was up to 0.14 % short."""
    eps = epsilon(noise, 1.0, steps, delta)
    assert gaussian_delta(eps, noise / math.sqrt(steps)) <= delta
    if steps < 1_000_000:  # there truncated tails add up, on the safe side
        assert gaussian_delta(0.98 * eps, noise / math.sqrt(steps)) > delta


def test_below_what_pld_resolves_rdp_is_taken_and_pld_refused():
    assert epsilon(1.0, 1.0, 3, 1e-13) == epsilon(1.0, 1.0, 3, 1e-13, "rdp") < math.inf
    assert gaussian_delta(epsilon(1.0, 1.0, 3, 1e-13), 1 / math.sqrt(3)) <= 1e-13
    with pytest.raises(GroupSearchError, match=r"at least 1e-12 .* found 1e-13.*Take rdp"):
        epsilon(1.0, 1.0, 3, 1e-13, "pld")
    noise = noise_multiplier_for(1.0, 1e-17, 0.2, 5)
    assert 0.99 <= epsilon(noise, 0.2, 5, 1e-17) <= 1.0


def test_an_accountant_counts_equal_steps_as_one_mechanism():
    accountant = Accountant(1.0, 0.2)
    assert accountant.epsilon(1e-5) == 0
    for _ in range(5):
        accountant.step()
    accountant.step(70)
    assert accountant.steps == 75
    assert accountant.epsilon(1e-5) == epsilon(1.0, 0.2, 75, 1e-5)
    assert accountant.epsilon(1e-5, "rdp") == epsilon(1.0, 0.2, 75, 1e-5, "rdp")


def test_an_accountant_resumes_and_composes_with_another_mechanism():
    first = Accountant(1.0, 0.2)
    first.step(40)
    same, other = Accountant(1.0, 0.2), Accountant(2.0, 0.1)
    for resumed in (same, other):
        resumed.load_state_dict(first.state_dict())
        resumed.step(35)
    assert same.epsilon(1e-5) == epsilon(1.0, 0.2, 75, 1e-5)
    assert epsilon(1.0, 0.2, 40, 1e-5) < other.epsilon(1e-5) < same.epsilon(1e-5)
    assert other.steps == 75


@pytest.mark.parametrize("state", [{}, {"phases": [[1.0, 0.2]]}, {"phases": 3}, {"phases": [[1.0, 7.0, 1]]}])
def test_an_accountant_refuses_a_foreign_state_and_keeps_its_own(state):
    accountant = Accountant(1.0, 0.2)
    accountant.step(3)
    with pytest.raises(GroupSearchError):
        accountant.load_state_dict(state)
    assert accountant.steps == 3


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_an_accountant_counts_the_sampling_that_it_was_made_for(sampling):
    first, second = (Accountant(2.0, 0.1, sampling) for _ in range(2))
    first.step(25)
    second.load_state_dict(first.state_dict())
    assert second.epsilon(1e-5) == epsilon(2.0, 0.1, 25, 1e-5, sampling=sampling)
    for other in set(SAMPLINGS) - {sampling}:
        with pytest.raises(GroupSearchError, match=f"state of {other} sampling, found '{sampling}'"):
            Accountant(2.0, 0.1, other).load_state_dict(first.state_dict())
    with pytest.raises(GroupSearchError, match="sampling to be one of"):
        Accountant(2.0, 0.1, "cyclic")


def shuffled(*stretches):
    """The accountant of a shuffled run, resumed between stretches of (noise, steps), at rate 0.1."""
    state = Accountant(1.0, 0.1, "shuffled").state_dict()
    for noise, steps in stretches:
        accountant = Accountant(noise, 0.1, "shuffled")
        accountant.load_state_dict(state)
        accountant.step(steps)
        state = accountant.state_dict()
    return accountant


def worst_precision(stretches, restarts):
    """The most that one example is in, as the sum of 1 / noise^2, over its places in epochs of ten steps.

    ``restarts`` says of every stretch but the first whether it begins an epoch anew.
    """
    epochs, left = [[]], 10
    for index, (noise, steps) in enumerate(stretches):
        for step in range(steps):
            if left == 0 or (step == 0 and index > 0 and restarts[index - 1]):
                epochs.append([])
                left = 10
            epochs[-1].append(noise)
            left -= 1
    return sum(1 / min(epoch) ** 2 for epoch in epochs if epoch)


def test_a_shuffled_phase_that_begins_inside_an_epoch_may_see_an_example_once_more():
    """5 steps of noise 10, then 10 of noise 1, at rate 0.1: two of them at noise 1 may have one example."""
    found = shuffled((10.0, 5), (1.0, 10)).epsilon(1e-5)
    possible = epsilon(1 / math.sqrt(2), 1.0, 1, 1e-5)
    assert possible == pytest.approx(6.57, abs=0.005)
    assert possible <= found <= 1.005 * possible


@pytest.mark.parametrize(
    "stretches",
    [
        ((10.0, 5), (1.0, 10)),
        ((2.0, 3), (2.0, 8), (2.0, 12)),
        ((2.0, 10), (3.0, 10), (2.0, 7)),
        ((2.0, 1), (2.0, 1), (2.0, 1)),
        ((2.0, 20), (2.0, 20)),
        ((3.0, 9), (2.0, 2), (3.0, 30)),
    ],
)
def test_a_shuffled_run_costs_what_any_way_of_resuming_may(stretches):
    found = shuffled(*stretches).epsilon(1e-5)
    precisions = [worst_precision(stretches, ways) for ways in product((False, True), repeat=len(stretches) - 1)]
    for precision in precisions:
        assert gaussian_delta(found, 1 / math.sqrt(precision)) <= 1e-5
    assert found <= epsilon(1 / math.sqrt(max(precisions) + len(stretches) - 1), 1.0, 1, 1e-5) * 1.001


def test_a_shuffled_run_resumed_where_epochs_end_costs_what_an_uninterrupted_one_does():
    assert shuffled((2.0, 20), (2.0, 20)).epsilon(1e-5) == pytest.approx(
        epsilon(2.0, 0.1, 40, 1e-5, sampling="shuffled"), rel=1e-9
    )


def test_the_log_stays_silent_and_its_level_is_restored(capfd, caplog):
    logger = logging.getLogger("absl")
    level = logger.level
    # These settings make dp-accounting leave out Renyi orders, and say so.
    epsilon(0.987, 0.2, 75, 1e-5, "rdp")
    epsilon(0.987, 0.2, 75, 1e-5)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert logger.level == level
