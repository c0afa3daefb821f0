"""What counts of right and wrong guesses prove about epsilon, with stated confidence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from scipy.stats import beta, binom

from groupsearch.privacy.accounting import epsilon

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Claim:
    """What is said of a run: noise multiplier, sampling rate and steps, and hence epsilon at delta."""

    noise_multiplier: float
    sampling_rate: float
    steps: int
    delta: float = 1e-5

    @property
    def epsilon(self) -> float:
        return epsilon(self.noise_multiplier, self.sampling_rate, self.steps, self.delta)


def rates(hits: int, alarms: int, trials: int, confidence: float) -> tuple[float, float]:
    """Clopper-Pearson: a true positive rate not overestimated and a false positive rate not underestimated."""
    error = (1 - confidence) / 2
    least = float(beta.ppf(error, hits, trials - hits + 1)) if hits else 0.0
    most = float(beta.ppf(1 - error, alarms + 1, trials - alarms)) if alarms < trials else 1.0
    return least, most


def distinguishing_bound(hits: int, alarms: int, trials: int, delta: float, confidence: float) -> float:
    """Every (epsilon, delta) mechanism has TPR <= e^epsilon FPR + delta, so epsilon is at least this."""
    least, most = rates(hits, alarms, trials, confidence)
    return math.log((least - delta) / most) if least - delta > most else 0.0


def family_bound(hits: int, alarms: int, trials: int, claim: Claim, confidence: float) -> float:
    """Epsilon of the least noise that the rates refute: TPR <= e^x FPR + delta(x) would have to hold at every x."""
    least, most = rates(hits, alarms, trials, confidence)
    grid = np.linspace(0, 6, 61)

    def refuted(noise_multiplier: float) -> bool:
        one = from_gaussian_mechanism(
            noise_multiplier, sampling_prob=claim.sampling_rate, value_discretization_interval=2e-3
        )
        deltas = np.asarray(one.self_compose(claim.steps).get_delta_for_epsilon(grid))
        there, back = np.exp(grid) * most + deltas, np.exp(grid) * (1 - least) + deltas
        return bool((least > there).any() or (1 - most > back).any())

    low, high = claim.noise_multiplier / 4, claim.noise_multiplier * 16
    if not refuted(high):
        return 0.0
    for _ in range(8):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return epsilon(high, claim.sampling_rate, claim.steps, claim.delta)


def one_run_bound(guesses: int, correct: int, canaries: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The lower bound of one-run auditing (arXiv 2305.08846, theorem 5.2 and appendix D).

    Args:
        guesses: how many of the canaries were guessed at; a number fixed beforehand.
        correct: how many of these guesses were right.
        canaries: how many there are, each in or out by a fair coin.
        delta: of the claim.
        confidence: with which the bound holds.
    """
    low, high = 0.0, 1.0
    while one_run_p_value(guesses, correct, canaries, high, delta) < 1 - confidence:
        high *= 2
    if one_run_p_value(guesses, correct, canaries, 0.0, delta) >= 1 - confidence:
        return 0.0
    for _ in range(30):
        middle = (low + high) / 2
        refuted = one_run_p_value(guesses, correct, canaries, middle, delta) < 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def one_run_p_value(guesses: int, correct: int, canaries: int, epsilon: float, delta: float) -> float:
    """The most likely that an (epsilon, delta) mechanism lets ``correct`` or more guesses be right."""
    rate = 1 / (1 + math.exp(-epsilon))
    steps = np.arange(1, correct + 1)
    below = np.cumsum(binom.pmf(correct - steps, guesses, rate))  # P[correct > W >= correct - i]
    alpha = float(np.max(below / steps, initial=0.0))
    return min(1.0, float(binom.sf(correct - 1, guesses, rate)) + alpha * delta * 2 * canaries)
