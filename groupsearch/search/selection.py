"""What it costs in privacy to have compared groupings, said in every result."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import dp_accounting
import numpy as np
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant

from groupsearch.errors import GroupSearchError
from groupsearch.privacy import SelectionCost
from groupsearch.units import format_at_most, format_number

SELECTION_DATA = ("public", "private")


def adaptive_selection_cost(data: str) -> SelectionCost:
    """What a search costs that learns from the scores before it, as all of ours do.

    Private selection that is accounted for is of another kind, see :mod:`groupsearch.search.selection`.

    Raises:
        GroupSearchError: when ``data`` is neither ``public`` nor ``private``.
    """
    if data not in SELECTION_DATA:
        raise GroupSearchError(f"Expected selection data to be {' or '.join(SELECTION_DATA)}, found {data!r}.")
    if data == "public":
        statement = "Groupings were trained and compared on public or synthetic data, which costs no privacy."
        return SelectionCost(data, 0.0, statement)
    return SelectionCost(
        data,
        None,
        "Groupings were compared on private data by an adaptive search, which no theorem accounts for: the epsilon "
        "stated is that of one training alone, and choosing has cost more. Runs of one seed share their noise, so that "
        "not even their own epsilons add up. Search on public or synthetic data, or "
        "with --private-selection, to state an epsilon of the whole.",
    )


def repeated_selection_cost(
    candidates: int, mean: float, delta: float, epsilon: float, with_training: float
) -> SelectionCost:
    """What it costs to have chosen by repeat-and-select on private data, see :mod:`groupsearch.search.selection`.

    Args:
        candidates: how many there were to be drawn from.
        mean: how many were expected to be drawn.
        delta: the other half of both budgets.
        epsilon: of choosing, the trainings that were done for it included.
        with_training: of choosing and of training the chosen one anew.
    """
    return SelectionCost(
        "private",
        epsilon,
        f"Repeat-and-select (arXiv 2110.03620): a random number of groupings, {format_number(mean)} expected, was "
        f"drawn from {candidates} that were fixed beforehand, each was trained once, and the best by a noisy score is "
        f"all that is published. Choosing and the trainings for it cost epsilon {format_at_most(epsilon)} together, at "
        f"delta {format_at_most(delta)}; with the chosen one trained anew on the same data it is "
        f"{format_at_most(with_training)}.",
        with_training,
    )


# -- What choosing the best of several private trainings costs in privacy --------------------------
#
# Choosing by public or synthetic data costs nothing. Choosing by private data costs, and only one way of doing it
# has a proof that is worth having: repeat-and-select (Papernot and Steinke, arXiv 2110.03620). The number of
# candidates is itself drawn at random, each candidate is drawn independently from one distribution that was
# fixed beforehand, each is trained and scored with the same guarantee, and nothing but the best one is published.
#
# A search that learns from its scores, as ``front`` or TPE do, is not of that kind: its candidates depend on
# the private scores before them; see :mod:`groupsearch.search.selection`.
#
# A training fails when its weights are no longer finite, which they tell by themselves; it then scores 0, plus noise.
# No loss and no score decides anything before noise is added to it.
#
# What the proof does not cover: how long a selection takes tells how many candidates there were, and a training
# that raises tells something by raising. Neither is written anywhere here; see to it that nobody watches the clock.

T = TypeVar("T")
_ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(11, 65), 128, 256, 512, 1024)


@dataclass(frozen=True)
class RepeatAndSelect:
    """How many candidates are trained to publish the best one.

    The number follows the negative binomial distribution truncated to at least 1, or, for an infinite
    shape, the Poisson distribution, whose 0 means that nothing is published.

    Attributes:
        mean: expected number of candidates, at least 1.
        shape: the distribution's eta: 1 geometric, 0 logarithmic, ``math.inf`` Poisson.

    Raises:
        GroupSearchError: for a value outside its range.
    """

    mean: float
    shape: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and self.mean >= 1):
            raise GroupSearchError(f"Expected a finite mean number of candidates of at least 1, found {self.mean}.")
        if not self.shape >= 0:
            raise GroupSearchError(f"Expected a shape of at least 0 (or infinite, for Poisson), found {self.shape}.")

    def draw(self, rng: np.random.Generator) -> int:
        """The number of candidates to train, which must not be known before the candidates are fixed."""
        if self.shape == math.inf:
            return int(rng.poisson(self.mean))
        if self.mean == 1:
            return 1
        gamma = self._success()
        if self.shape == 0:
            return int(rng.logseries(1 - gamma))
        while True:
            drawn = int(rng.negative_binomial(self.shape, gamma))
            if drawn > 0:
                return drawn

    def epsilon(
        self, training: dp_accounting.DpEvent, delta: float, then: dp_accounting.DpEvent | None = None
    ) -> float:
        """Epsilon of drawing, training and publishing the best, at ``delta``, by Renyi differential privacy.

        Args:
            training: what one candidate costs, its score included; see :func:`candidate_event`.
            delta: the other half of the budget.
            then: what is done with the same data afterwards, such as training the best one anew; None for nothing.
        """
        accountant = RdpAccountant(_ORDERS)
        always_one = self.mean == 1 and math.isfinite(self.shape)  # nothing is chosen; the theorem would charge twice
        with _silent_absl():
            accountant.compose(training if always_one else RepeatAndSelectDpEvent(training, self.mean, self.shape))
            if then is not None:
                accountant.compose(then)
            return float(accountant.get_epsilon(delta))

    def _success(self) -> float:
        """The success probability gamma at which the truncated distribution has this mean, by bisection.

        Its mean is eta (1 - gamma) / (gamma (1 - gamma^eta)), for eta = 0 (1 / gamma - 1) / log(1 / gamma).
        """
        low, high = 0.0, 1.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean_at(middle) > self.mean else (low, middle)
        return high

    def _mean_at(self, gamma: float) -> float:
        if gamma in (0.0, 1.0):
            return math.inf if gamma == 0 else 1.0
        if self.shape == 0:
            return (1 / gamma - 1) / -math.log(gamma)
        return self.shape * (1 - gamma) / (gamma * -math.expm1(self.shape * math.log(gamma)))


@dataclass(frozen=True)
class Selected(Generic[T]):
    """All that may be published of a private selection.

    Attributes:
        candidate: the one with the highest score.
        score: its score, noise included.
    """

    candidate: T
    score: float


def select_privately(
    candidates: Sequence[T],
    train: Callable[[T, int], float | None],
    scheme: RepeatAndSelect,
    score_noise: float,
    rng: np.random.Generator,
) -> Selected[T] | None:
    """Draw a number, train as many candidates drawn uniformly and independently, and keep the best alone.

    Nothing else leaves this function: neither how many there were, nor which, nor how the others did, nor the
    number that noise was added to. With the same candidate drawn twice it is trained twice.

    Args:
        candidates: fixed without a look at the data.
        train: takes a candidate and a seed and gives its score without noise, a sum over the examples
            that one of them changes by at most 1; None where weights are not finite, which scores 0, as does a number
            that is not finite. Every call gets a seed of its own.
        scheme: how many are trained.
        score_noise: standard deviation of the Gaussian noise that is added to every score.
        rng: where all that is random comes from. Whoever knows its seed knows what noise was drawn, so it is to
            come from the system's entropy, as ``np.random.default_rng()`` does.

    Returns:
        The best; None when the number drawn is 0, which only the Poisson distribution gives.

    Raises:
        GroupSearchError: without candidates or noise; when a training raises. What was trained before is then
            forgotten.
    """
    if not candidates or not score_noise > 0:
        raise GroupSearchError(
            f"Expected candidates and a positive noise of their scores, found {len(candidates)} and {score_noise}."
        )
    best: Selected[T] | None = None
    for _ in range(scheme.draw(rng)):
        candidate = candidates[int(rng.integers(len(candidates)))]
        score = _noisy(train, candidate, score_noise, rng)
        if best is None or score > best.score:
            best = Selected(candidate, score)
    return best


def _noisy(
    train: Callable[[T, int], float | None], candidate: T, score_noise: float, rng: np.random.Generator
) -> float:
    seed = int(rng.integers(2**63))
    try:
        score = train(candidate, seed)
    except Exception as error:
        # What the error says may depend on the data, and so may which candidate it was.
        raise GroupSearchError(
            f"Expected every candidate to train, found that one raised ({type(error).__name__}). Nothing is published: "
            f"which and when is not covered by the guarantee. See on public or synthetic data that all candidates "
            f"train with these settings, then begin anew."
        ) from None
    known = 0.0 if score is None or not math.isfinite(score) else float(score)
    return known + float(rng.normal(0.0, score_noise))


def candidate_event(
    noise_multiplier: float, sampling_rate: float, steps: int, score_noise_multiplier: float
) -> dp_accounting.DpEvent:
    """What training one candidate with Poisson sampling and publishing its noisy score costs.

    The score is a function of private data as much as the weights are. It must be a sum over the
    validation examples of which each one changes it by at most 1 (the number that are right), with
    Gaussian noise of standard deviation ``score_noise_multiplier``. Training and score are composed, which is more
    than is needed when no example is in both sets.

    Raises:
        GroupSearchError: when one of the noises is not positive: there is no finite epsilon then.
    """
    for name, value in (("noise_multiplier", noise_multiplier), ("score_noise_multiplier", score_noise_multiplier)):
        if not value > 0:
            raise GroupSearchError(
                f"Expected {name} > 0 to choose by private data, found {value}: a training or a score without noise "
                f"costs an infinite epsilon. Add noise to it, or choose by public data."
            )
    training = training_event(noise_multiplier, sampling_rate, steps)
    return dp_accounting.ComposedDpEvent([training, dp_accounting.GaussianDpEvent(score_noise_multiplier)])


def training_event(noise_multiplier: float, sampling_rate: float, steps: int) -> dp_accounting.DpEvent:
    """What one training with Poisson sampling costs."""
    step = dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    return dp_accounting.SelfComposedDpEvent(step, steps)


@contextmanager
def _silent_absl() -> Iterator[None]:
    """dp-accounting warns of every order that it leaves out, which makes an epsilon larger and never wrong."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
