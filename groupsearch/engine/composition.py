"""Epsilon of composed steps by the way that batches are drawn, through Google's dp-accounting.

A step samples a batch and releases its clipped sum with Gaussian noise of ``noise_multiplier`` times the sum's
sensitivity to one example. Neighbours are the same for every way of drawing batches: two data sets of the same,
public number of examples n, in one of which one example contributes nothing (zero-out). The number is public because
what it decides is: the sampling rate, the divisor of a step, the noise (through delta). What a step costs depends on
how batches are drawn:

* ``poisson``: every example enters a batch independently with the sampling rate. Privacy loss distributions
  (arXiv 2106.08567, discretised as in 2207.04380) or Renyi divergences (1702.07476, 1908.10530).
* ``fixed-size``: a batch is a uniformly random subset of rate times n examples. Whether one example is in it says who
  else is, so the bound is that of *replacing* an example by any other, of which leaving it out is a case: a sum moves
  by twice its sensitivity and the noise counts half. Renyi divergences only (1808.00087, theorem 27).
* ``shuffled``: the data are permuted every epoch and cut into batches; an example is in one batch per epoch. No
  amplification is claimed: an epoch is one Gaussian release (parallel composition), whatever its number of batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import dp_accounting
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from groupsearch.errors import GroupSearchError

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
