"""What a differentially private training run costs in privacy, and what noise a budget asks for.

How batches are drawn (``sampling``) decides what a step costs; the three ways, and the neighbouring data sets that
epsilon is about, are described in :mod:`groupsearch.privacy.accounting`. Only Poisson sampling is amplified as
Poisson sampling: batches of a fixed size and shuffled epochs cost more, and are accounted as what they are.

The figure that is reported comes from privacy loss distributions (``pld``) where there are any;
Renyi differential privacy (``rdp``) is looser and serves as the cross-check. Adaptive thresholds change
nothing here: their counts are paid for by more noise on the gradients, so that a step is still one Gaussian
release of the stated noise multiplier (:func:`groupsearch.plan.clipping.gradient_noise_multiplier`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import dp_accounting
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from groupsearch.errors import GroupSearchError
from groupsearch.privacy import PrivacyStatement

# -- Epsilon of composed steps by the way that batches are drawn, through Google's dp-accounting ---
#
# A step samples a batch and releases its clipped sum with Gaussian noise of ``noise_multiplier`` times the sum's
# sensitivity to one example. Neighbours are the same for every way of drawing batches: two data sets of the same,
# public number of examples n, in one of which one example contributes nothing (zero-out). The number is public because
# what it decides is: the sampling rate, the divisor of a step, the noise (through delta). What a step costs depends on
# how batches are drawn:
#
# * ``poisson``: every example enters a batch independently with the sampling rate. Privacy loss distributions
#   (arXiv 2106.08567, discretised as in 2207.04380) or Renyi divergences (1702.07476, 1908.10530).
# * ``fixed-size``: a batch is a uniformly random subset of rate times n examples. Whether one example is in it says who
#   else is, so the bound is that of *replacing* an example by any other, of which leaving it out is a case: a sum moves
#   by twice its sensitivity and the noise counts half. Renyi divergences only (1808.00087, theorem 27).
# * ``shuffled``: the data are permuted every epoch and cut into batches; an example is in one batch per epoch. No
#   amplification is claimed: an epoch is one Gaussian release (parallel composition), whatever its number of batches.

ACCOUNTANTS = ("pld", "rdp")
SAMPLINGS = ("poisson", "fixed-size", "shuffled")

# Enough orders to guess the scale of epsilon; the rdp figure itself uses dp-accounting's own list.
_FEW_ORDERS = (2, 3, 4, 6, 8, 16, 32, 64, 128, 256)
_POPULATION = 2**53  # dp-accounting wants two whole numbers whose ratio is the rate
_FFT_ERROR = 2e-13  # of a privacy loss distribution's delta; measured up to 10^6 compositions
LEAST_PLD_DELTA = 1e-12

Phase = tuple[float, float, int]  # noise multiplier, sampling rate, steps


def check_phase(noise_multiplier: float, sampling_rate: float, steps: int) -> None:
    """Raise GroupSearchError unless these can be the parameters of some steps."""
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise GroupSearchError(f"Expected a finite noise_multiplier >= 0, found {noise_multiplier}.")
    if not 0 < sampling_rate <= 1:
        raise GroupSearchError(
            f"Expected a sampling_rate in (0, 1], found {sampling_rate}. It is the (expected) batch size over "
            f"the number of training examples."
        )
    if steps < 0 or steps != int(steps):
        raise GroupSearchError(f"Expected a whole number of steps >= 0, found {steps}.")


def check_sampling(sampling: str) -> None:
    """Raise GroupSearchError unless this names a way to draw batches."""
    if sampling not in SAMPLINGS:
        raise GroupSearchError(
            f"Expected sampling to be one of {', '.join(SAMPLINGS)}, found {sampling!r}. Name what the data loader "
            f"does: epsilon holds for that alone."
        )


@lru_cache(maxsize=1024)
def composed_epsilon(phases: tuple[Phase, ...], delta: float, accountant: str | None, sampling: str) -> float:
    """An upper bound on epsilon at ``delta`` of all steps of all phases together; cached.

    Raises:
        GroupSearchError: for a delta, accountant or sampling outside its range, ``pld`` for fixed-size batches, or
            a delta below what ``pld`` resolves.
    """
    if not 0 < delta < 1:
        raise GroupSearchError(f"Expected a delta between 0 and 1, found {delta}. A common choice is 1e-2 / n.")
    if accountant is not None and accountant not in ACCOUNTANTS:
        raise GroupSearchError(f"Expected accountant to be one of {', '.join(ACCOUNTANTS)}, found {accountant!r}.")
    accountant = accountant_for(sampling, delta) if accountant is None else accountant
    if accountant == "pld":
        _check_pld(sampling, delta)
    phases = tuple(phase for phase in phases if phase[2] > 0)
    if not phases:
        return 0.0
    if any(noise == 0 for noise, _, _ in phases):
        return math.inf
    with _silent_absl():
        if sampling == "fixed-size":
            return _fixed_size_rdp(phases, delta)
        if sampling == "shuffled":
            phases = tuple(_epochs(phases))
        if accountant == "rdp":
            return _rdp(phases, delta)
        guess = _rdp(phases, delta, _FEW_ORDERS)
        found = _pld(phases, delta, guess)
        # Where Renyi divergences are far off (tiny epsilons) the first grid was too wide.
        return found if 2 * found > guess else _pld(phases, delta, found)


def accountant_for(sampling: str, delta: float) -> str:
    """The tightest accountant that this sampling and this delta have.

    Raises:
        GroupSearchError: for a sampling that is none.
    """
    check_sampling(sampling)
    return "rdp" if sampling == "fixed-size" or delta < LEAST_PLD_DELTA else "pld"


def _check_pld(sampling: str, delta: float) -> None:
    check_sampling(sampling)
    if sampling == "fixed-size":
        raise GroupSearchError(
            "Expected the accountant rdp for fixed-size batches, found pld: dp-accounting has no privacy loss "
            "distribution of sampling without replacement. Take rdp, or sample batches by Poisson."
        )
    if delta < LEAST_PLD_DELTA:
        raise GroupSearchError(
            f"Expected a delta of at least {LEAST_PLD_DELTA:g} for the accountant pld, found {delta:g}, which its "
            "floating point convolutions do not resolve. Take rdp, or a larger delta."
        )


def _epochs(phases: Sequence[Phase]) -> Iterator[Phase]:
    """The same phases counted in releases of one example: the most batches of a phase that it is in.

    k steps touch ceil(k / per epoch) epochs where they begin with one, and one more where they may begin inside one.
    An epoch may leave out an incomplete batch. Where one phase ends and the next begins (a run that was stopped and
    resumed) the data may have been permuted anew or not: unless epochs ended there, both are allowed for.
    """
    begins_epoch = True
    for noise, rate, steps in phases:
        per_epoch = math.floor(1 / rate + 1e-9)
        yield noise, 1.0, math.ceil(steps / per_epoch) if begins_epoch else math.ceil((steps - 1) / per_epoch) + 1
        begins_epoch = begins_epoch and steps % per_epoch == 0 and abs(per_epoch * rate - 1) < 1e-9


def _event(phases: Sequence[Phase]) -> dp_accounting.DpEvent:
    return dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), steps
            )
            for noise, rate, steps in phases
        ]
    )


def _fixed_size_rdp(phases: Sequence[Phase], delta: float) -> float:
    """Replacing an example moves a sum by twice its sensitivity, hence half the noise multiplier.

    At high rates the amplification theorem gives more than no amplification at all, which is a bound too.
    """
    sampled, full = (RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE) for _ in range(2))
    for noise, rate, steps in phases:
        release = dp_accounting.GaussianDpEvent(noise / 2)
        taken = math.ceil(rate * _POPULATION)
        sampled.compose(dp_accounting.SampledWithoutReplacementDpEvent(_POPULATION, taken, release), steps)
        full.compose(release, steps)
    return float(min(sampled.get_epsilon(delta), full.get_epsilon(delta)))


def _rdp(phases: Sequence[Phase], delta: float, orders: Sequence[float] | None = None) -> float:
    return float(RdpAccountant(orders).compose(_event(phases)).get_epsilon(delta))


def _pld(phases: Sequence[Phase], delta: float, guess: float) -> float:
    """Epsilon by privacy loss distributions on a grid fit for an epsilon of about ``guess``.

    Every grid gives an upper bound, up to the rounding of the convolutions, which is taken off delta. Its width w
    shifts each step's loss by about w^2 / 5, and the total
    is kept near 1e-5 of epsilon; a thousand to 200,000 points per step keep a call near a second.
    """
    steps = sum(steps for _, _, steps in phases)
    span = min(0.5 / noise**2 + 16 / noise for noise, _, _ in phases)
    wanted = min(math.sqrt(5e-5 * guess / steps), guess / 100)
    accountant = PLDAccountant(value_discretization_interval=min(max(wanted, span / 200_000), span / 1000))
    return float(accountant.compose(_event(phases)).get_epsilon(delta - _FFT_ERROR))


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


# -- accounting ------------------------------------------------------------------------------------

__all__ = ["ACCOUNTANTS", "SAMPLINGS", "Accountant", "default_delta", "epsilon", "noise_multiplier_for"]

_LEAST_NOISE, _MOST_NOISE = 2.0**-6, 2.0**24
_TIGHTNESS = 1e-3


def default_delta(train_size: int) -> float:
    """1e-2 / n for n training examples.

    Publishing each example with probability delta is (0, delta)-private: at delta = 1e-2 / n that lets one example
    out in one run of a hundred. A delta near 1/n promises nothing.

    Raises:
        GroupSearchError: when there is not at least one example.

    >>> default_delta(10**5)
    1e-07
    """
    if train_size < 1:
        raise GroupSearchError(f"Expected at least one training example, found {train_size}.")
    return 1e-2 / train_size


def epsilon(
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    accountant: str | None = None,
    sampling: str = "poisson",
) -> float:
    """Epsilon at ``delta`` of ``steps`` equal steps; cached.

    No steps cost 0; steps without noise cost ``math.inf``.

    Args:
        noise_multiplier: standard deviation of the noise over the sensitivity.
        sampling_rate: 0 < rate <= 1; by Poisson the probability with which each example enters a
            step, else the batch size over the number of examples.
        steps: number of steps.
        delta: 0 < delta < 1.
        accountant: ``pld`` (the figure), ``rdp`` (the cross-check), or None for the tightest that
            there is: rdp for fixed-size batches and for a delta below 1e-12, which pld does not resolve, else pld.
        sampling: ``poisson``, ``fixed-size`` or ``shuffled``, what the data loader does.

    Raises:
        GroupSearchError: when an argument is outside its range, or for ``pld`` where it cannot be computed.
    """
    check_phase(noise_multiplier, sampling_rate, steps)
    phase = float(noise_multiplier), float(sampling_rate), int(steps)
    return composed_epsilon((phase,), delta, accountant, sampling)


def noise_multiplier_for(
    epsilon: float, delta: float, sampling_rate: float, steps: int, sampling: str = "poisson"
) -> float:
    """The least noise multiplier whose :func:`epsilon` is at most ``epsilon``, and within 1 % of it; cached.

    Raises:
        GroupSearchError: when an argument is outside its range, or no noise multiplier between
            2^-6 and 2^24 reaches this epsilon.
    """
    check_phase(1.0, sampling_rate, steps)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise GroupSearchError(
            f"Expected a finite epsilon > 0, found {epsilon}. To train without noise give a noise multiplier of 0."
        )
    if steps == 0:
        raise GroupSearchError("Expected at least one step to calibrate noise for, found 0.")
    return _calibrated(float(epsilon), delta, float(sampling_rate), int(steps), sampling)


class Accountant:
    """Counts the steps of one training run, also when it is resumed, or resumed under another mechanism.

    Of a shuffled run that was resumed nobody knows whether an epoch went on or a new one began; both are allowed for.

    >>> accountant = Accountant(noise_multiplier=1.0, sampling_rate=0.01)
    >>> accountant.step()
    >>> accountant.steps, round(accountant.epsilon(delta=1e-5), 2)
    (1, 0.2)
    """

    def __init__(self, noise_multiplier: float, sampling_rate: float, sampling: str = "poisson") -> None:
        check_phase(noise_multiplier, sampling_rate, 0)
        check_sampling(sampling)
        self.sampling = sampling
        self._noise_multiplier = float(noise_multiplier)
        self._sampling_rate = float(sampling_rate)
        self._phases: list[Phase] = []
        self._resumed = False

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Noise multiplier, sampling rate and steps of every stretch of equal steps, in order."""
        return tuple(self._phases)

    @property
    def steps(self) -> int:
        """Steps counted so far."""
        return sum(steps for _, _, steps in self._phases)

    def step(self, count: int = 1) -> None:
        """Counts ``count`` more optimizer steps (an empty batch is a step too: its noise is released).

        Raises:
            GroupSearchError: when the count is negative.
        """
        check_phase(self._noise_multiplier, self._sampling_rate, count)
        mechanism = self._noise_multiplier, self._sampling_rate
        goes_on = bool(self._phases) and self._phases[-1][:2] == mechanism and not self._resumed
        done = self._phases.pop()[2] if goes_on else 0
        self._phases.append((*mechanism, done + count))
        self._resumed = False

    def epsilon(self, delta: float, accountant: str | None = None) -> float:
        """Epsilon at ``delta`` of all steps counted so far, see :func:`epsilon`."""
        return composed_epsilon(self.phases, delta, accountant, self.sampling)

    def statement(self, delta: float, examples: int, **known: Any) -> PrivacyStatement:
        """All steps counted so far and what they cost at ``delta``, in a training on so many examples.

        Args:
            delta: 0 < delta < 1.
            examples: n.
            known: further fields of :class:`~groupsearch.privacy.PrivacyStatement`.
        """
        accountant = accountant_for(self.sampling, delta)
        spent = self.epsilon(delta, accountant)
        return PrivacyStatement(spent, delta, examples, self.sampling, self.phases, accountant, **known)

    def state_dict(self) -> dict[str, Any]:
        """The sampling, and one [noise multiplier, sampling rate, steps] per stretch of equal steps; plain types."""
        return {"sampling": self.sampling, "phases": [list(phase) for phase in self._phases]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces what was counted; steps to come use this accountant's own mechanism.

        Raises:
            GroupSearchError: when the state is not one that :meth:`state_dict` wrote, or one of another
                sampling: their epsilons are about different neighbours and do not add up.
        """
        try:
            phases = [(float(noise), float(rate), int(steps)) for noise, rate, steps in state["phases"]]
        except (KeyError, TypeError, ValueError) as error:
            raise GroupSearchError(
                f"Expected an accountant's state with a list `phases` of noise multiplier, sampling rate and "
                f"steps, found one that lacks or garbles {error}. Give what `state_dict()` returned."
            ) from error
        for phase in phases:
            check_phase(*phase)
        if state.get("sampling") != self.sampling:
            raise GroupSearchError(
                f"Expected an accountant's state of {self.sampling} sampling, found {state.get('sampling')!r}. Steps "
                f"whose batches were drawn in different ways cannot be accounted together."
            )
        self._phases, self._resumed = phases, self.sampling == "shuffled"


@lru_cache(maxsize=256)
def _calibrated(target: float, delta: float, sampling_rate: float, steps: int, sampling: str) -> float:
    def excess(log_noise: float) -> float:
        found = composed_epsilon(((math.exp(log_noise), sampling_rate, steps),), delta, None, sampling)
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
