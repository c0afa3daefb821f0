"""What DP-SGD with Poisson sampling costs in privacy, through Google's dp-accounting.

Neighbouring data sets differ by adding or removing one example. A step samples every example
independently with the sampling rate and releases the clipped sum with Gaussian noise of
``noise_multiplier`` times the sum's sensitivity; all figures are upper bounds on epsilon.

The figure that is reported comes from privacy loss distributions (``pld``: arXiv 2106.08567,
discretised as in arXiv 2207.04380); Renyi differential privacy (``rdp``: arXiv 1702.07476,
1908.10530) is looser and serves as the cross-check.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from groupsearch.errors import GroupSearchError

ACCOUNTANTS = ("pld", "rdp")

# Enough orders to guess the scale of epsilon; the rdp figure itself uses dp-accounting's own list.
_FEW_ORDERS = (2, 3, 4, 6, 8, 16, 32, 64, 128, 256)
_LEAST_NOISE, _MOST_NOISE = 2.0**-6, 2.0**24
_TIGHTNESS = 1e-3

Phase = tuple[float, float, int]  # noise multiplier, sampling rate, steps


def default_delta(train_size: int) -> float:
    """n^-1.1 for n training examples.

    Publishing each example with probability delta is (0, delta)-private, so delta must fall faster
    than 1/n for that to become useless; n^-1.1 does, which a constant fraction of 1/n does not.

    Raises:
        GroupSearchError: when there is not at least one example.

    >>> round(default_delta(10**5), 9)
    3.162e-06
    """
    if train_size < 1:
        raise GroupSearchError(f"Expected at least one training example, found {train_size}.")
    return min(0.5, float(train_size) ** -1.1)


def epsilon(noise_multiplier: float, sampling_rate: float, steps: int, delta: float, accountant: str = "pld") -> float:
    """Epsilon at ``delta`` of ``steps`` equal steps; cached.

    No steps cost 0; steps without noise cost ``math.inf``, and so does a delta that lies below what
    the numerics resolve (about 1e-13).

    Args:
        noise_multiplier: standard deviation of the noise over the sensitivity.
        sampling_rate: probability with which each example enters a step, 0 < rate <= 1.
        steps: number of steps.
        delta: 0 < delta < 1.
        accountant: ``pld`` (the figure) or ``rdp`` (the cross-check).

    Raises:
        GroupSearchError: when an argument is outside its range.
    """
    _check_mechanism(noise_multiplier, sampling_rate, steps)
    return _composed(((float(noise_multiplier), float(sampling_rate), int(steps)),), delta, accountant)


def noise_multiplier_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The least noise multiplier whose PLD epsilon is at most ``epsilon``, and within 1 % of it; cached.

    Raises:
        GroupSearchError: when an argument is outside its range, or no noise multiplier between
            2^-6 and 2^24 reaches this epsilon.
    """
    _check_mechanism(1.0, sampling_rate, steps)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise GroupSearchError(
            f"Expected a finite epsilon > 0, found {epsilon}. To train without noise give a noise multiplier of 0."
        )
    if steps == 0:
        raise GroupSearchError("Expected at least one step to calibrate noise for, found 0.")
    return _calibrated(float(epsilon), delta, float(sampling_rate), int(steps))


class Accountant:
    """Counts the steps of one training run, also when it is resumed under another mechanism.

    >>> accountant = Accountant(noise_multiplier=1.0, sampling_rate=0.01)
    >>> accountant.step()
    >>> accountant.steps, round(accountant.epsilon(delta=1e-5), 2)
    (1, 0.2)
    """

    def __init__(self, noise_multiplier: float, sampling_rate: float) -> None:
        _check_mechanism(noise_multiplier, sampling_rate, 0)
        self._noise_multiplier = float(noise_multiplier)
        self._sampling_rate = float(sampling_rate)
        self._phases: list[Phase] = []

    @property
    def steps(self) -> int:
        """Steps counted so far."""
        return sum(steps for _, _, steps in self._phases)

    def step(self, count: int = 1) -> None:
        """Counts ``count`` more optimizer steps (an empty batch is a step too: its noise is released).

        Raises:
            GroupSearchError: when the count is negative.
        """
        _check_mechanism(self._noise_multiplier, self._sampling_rate, count)
        done = 0
        if self._phases and self._phases[-1][:2] == (self._noise_multiplier, self._sampling_rate):
            done = self._phases.pop()[2]
        self._phases.append((self._noise_multiplier, self._sampling_rate, done + count))

    def epsilon(self, delta: float, accountant: str = "pld") -> float:
        """Epsilon at ``delta`` of all steps counted so far, see :func:`epsilon`."""
        return _composed(tuple(self._phases), delta, accountant)

    def state_dict(self) -> dict[str, Any]:
        """Plain lists: one [noise multiplier, sampling rate, steps] per stretch of equal steps."""
        return {"phases": [list(phase) for phase in self._phases]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces what was counted; steps to come use this accountant's own mechanism.

        Raises:
            GroupSearchError: when the state is not one that :meth:`state_dict` wrote.
        """
        try:
            phases = [(float(noise), float(rate), int(steps)) for noise, rate, steps in state["phases"]]
        except (KeyError, TypeError, ValueError) as error:
            raise GroupSearchError(
                f"Expected an accountant's state with a list `phases` of noise multiplier, sampling rate and "
                f"steps, found one that lacks or garbles {error}. Give what `state_dict()` returned."
            ) from error
        for phase in phases:
            _check_mechanism(*phase)
        self._phases = phases


def _check_mechanism(noise_multiplier: float, sampling_rate: float, steps: int) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise GroupSearchError(f"Expected a finite noise_multiplier >= 0, found {noise_multiplier}.")
    if not 0 < sampling_rate <= 1:
        raise GroupSearchError(
            f"Expected a sampling_rate in (0, 1], found {sampling_rate}. It is the expected batch size over the "
            f"number of training examples."
        )
    if steps < 0 or steps != int(steps):
        raise GroupSearchError(f"Expected a whole number of steps >= 0, found {steps}.")


@lru_cache(maxsize=1024)
def _composed(phases: tuple[Phase, ...], delta: float, accountant: str) -> float:
    if not 0 < delta < 1:
        raise GroupSearchError(f"Expected a delta between 0 and 1, found {delta}. A common choice is n^-1.1.")
    if accountant not in ACCOUNTANTS:
        raise GroupSearchError(f"Expected accountant to be one of {', '.join(ACCOUNTANTS)}, found {accountant!r}.")
    phases = tuple(phase for phase in phases if phase[2] > 0)
    if not phases:
        return 0.0
    if any(noise == 0 for noise, _, _ in phases):
        return math.inf
    with _silent_absl():
        if accountant == "rdp":
            return _rdp(phases, delta)
        guess = _rdp(phases, delta, _FEW_ORDERS)
        found = _pld(phases, delta, guess)
        # Where Renyi divergences are far off (tiny epsilons) the first grid was too wide.
        return found if 2 * found > guess else _pld(phases, delta, found)


@lru_cache(maxsize=256)
def _calibrated(target: float, delta: float, sampling_rate: float, steps: int) -> float:
    def excess(log_noise: float) -> float:
        found = _composed(((math.exp(log_noise), sampling_rate, steps),), delta, "pld")
        return math.log(max(found, 1e-300) / target)

    low = high = 0.0
    while excess(low) <= 0 and low > math.log(_LEAST_NOISE):
        low, high = low - math.log(2), low
    while excess(high) > 0 and high < math.log(_MOST_NOISE):
        low, high = high, high + math.log(2)
    above, below = excess(low), excess(high)
    if above <= 0 or below > 0:
        raise GroupSearchError(
            f"Expected an epsilon that some noise multiplier between {_LEAST_NOISE:g} and {_MOST_NOISE:g} reaches "
            f"at delta {delta:g} in {steps} steps of sampling rate {sampling_rate:g}, found {target:g}. Change "
            f"epsilon, delta or the steps, or give the noise multiplier itself."
        )
    # log epsilon is nearly linear in log noise: false position aims just below the target, and the
    # clamp makes it at worst a slow bisection. `high` is on the safe side throughout.
    while below < -_TIGHTNESS and high - low > 1e-9:
        fraction = (above + _TIGHTNESS / 2) / (above - below)
        middle = low + (high - low) * min(max(fraction, 0.1), 0.9)
        found = excess(middle)
        if found > 0:
            low, above = middle, found
        else:
            high, below = middle, found
    return math.exp(high)


def _event(phases: Sequence[Phase]) -> dp_accounting.DpEvent:
    return dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), steps
            )
            for noise, rate, steps in phases
        ]
    )


def _rdp(phases: Sequence[Phase], delta: float, orders: Sequence[float] | None = None) -> float:
    return float(RdpAccountant(orders).compose(_event(phases)).get_epsilon(delta))


def _pld(phases: Sequence[Phase], delta: float, guess: float) -> float:
    """Epsilon by privacy loss distributions on a grid fit for an epsilon of about ``guess``.

    Every grid gives an upper bound. Its width w shifts each step's loss by about w^2 / 5, and the total
    is kept near 1e-5 of epsilon; a thousand to 200,000 points per step keep a call near a second.
    """
    steps = sum(steps for _, _, steps in phases)
    span = min(0.5 / noise**2 + 16 / noise for noise, _, _ in phases)
    wanted = min(math.sqrt(5e-5 * guess / steps), guess / 100)
    accountant = PLDAccountant(value_discretization_interval=min(max(wanted, span / 200_000), span / 1000))
    return float(accountant.compose(_event(phases)).get_epsilon(delta))


@contextmanager
def _silent_absl() -> Iterator[None]:
    """dp-accounting logs each Renyi order that it leaves out; leaving one out keeps the bound valid."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
