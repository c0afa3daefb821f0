"""What a differentially private training run costs in privacy, and what noise a budget asks for.

How batches are drawn (``sampling``) decides what a step costs; the three ways, and the neighbouring data sets that
epsilon is about, are described in :mod:`groupsearch.engine.composition`. Only Poisson sampling is amplified as
Poisson sampling: batches of a fixed size and shuffled epochs cost more, and are accounted as what they are.

The figure that is reported comes from privacy loss distributions (``pld``) where there are any;
Renyi differential privacy (``rdp``) is looser and serves as the cross-check. Adaptive thresholds change
nothing here: their counts are paid for by more noise on the gradients, so that a step is still one Gaussian
release of the stated noise multiplier (:func:`groupsearch.clipping.gradient_noise_multiplier`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from groupsearch.engine.composition import (
    ACCOUNTANTS,
    SAMPLINGS,
    Phase,
    accountant_for,
    check_phase,
    check_sampling,
    composed_epsilon,
)
from groupsearch.errors import GroupSearchError
from groupsearch.privacy import PrivacyStatement

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
