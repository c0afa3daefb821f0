"""Clip21 and its relatives: what every worker sends, what is made of it, and n workers simulated at once.

n workers hold functions f_i and minimise their mean f. In every step worker i sends a bounded message c_i, all
messages are averaged, and everybody takes the same step. The bound is tau, on the whole vector or on groups of it
(R_m for group m, as a clip plan allots them; S = sqrt(sum R_m^2) bounds the message then). With clip for
min(1, R / |x|) x, gamma for the step size, z_i for Gaussian noise of standard deviation noise_multiplier S in every
coordinate, g_i for a worker's (stochastic) gradient at x, s_i for its shift and a for the aggregate (both begin at
zero):

* ``clip-gd``, ``clip-sgd``: c_i = clip(g_i); x <- x - gamma mean(c_i + z_i).
* ``clip21-gd``, ``clip21-sgd`` (arXiv 2305.18929): c_i = clip(g_i - s_i); s_i <- s_i + c_i; a <- a + mean(c_i + z_i);
  x <- x - gamma a.
* ``clip21-sgd2m`` (arXiv 2502.11682): v_i <- (1 - b1) v_i + b1 g_i; c_i = clip(v_i - s_i); s_i <- s_i + b2 c_i;
  a <- a + b2 mean(c_i + z_i); x <- x - gamma a.
* ``alpha-normec`` (arXiv 2502.13482): c_i = R (g_i - s_i) / (alpha + |g_i - s_i|); s_i <- s_i + c_i;
  a <- a + mean(c_i + z_i); x <- x - gamma a / |a|. R is the paper's beta: what it scales by beta is scaled here before
  it is sent, noise included.

``dp-sgd``, ``dp-clip21-gd``, ``dp-clip21-sgd2m`` and ``dp-alpha-normec`` are the same with noise that may not be zero.
``dp-sgd`` clips a worker's minibatch gradient; the gradients of single examples are clipped by ``make_private``.

Read into it, where the sources we have do not say: that a worker's own shift takes its message without the noise in
``dp-clip21-gd`` (2502.11682 writes its recursion so, and the noise in the aggregate then adds up over the steps); that
the step of ``alpha-normec`` is normalised; and everything about groups, which none of the papers has.

What holds, and what does not:

* Every worker takes part in every step. Nothing here samples workers, and no amplification by subsampling is claimed,
  not for examples either: a shift carries what earlier batches said into every later message.
* The noise hides one worker's message; the data of a worker are protected through that alone, see :func:`spent`.
* ``clip-gd`` has no promise for workers whose functions differ: it stalls where the clipped gradients cancel, which is
  not where the gradients do. No step size cures that.
* ``clip21-gd`` has the rate of gradient descent, O(1/K) for the mean of the squared gradient norms over K steps, for
  smooth functions without a bound on how they differ, for a small enough step size; clipping stops to act after
  O(1/tau) steps. With noise none of this is proven in what we have read.
* ``clip21-sgd`` can fail (2502.11682, theorem 2.2): under stochastic gradients it settles where the clipped noise, and
  not the noise, has mean zero, for any step size. It is here to show that.
* ``clip21-sgd2m``: O(1/T) with full gradients, O(1 / sqrt(n T)) with sub-Gaussian noise, for momenta that are small
  enough.
* ``alpha-normec``: O(1 / sqrt(K)) for gradient norms; its steps have length gamma whatever the gradient, so at a fixed
  step size it circles.
* Groups: a message is a smaller share of the difference in the groups that are clipped, so what holds for one group
  holds with the least of the factors, which is shown here by measurement and proven nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import ClipPlan
from groupsearch.privacy.accounting import epsilon
from groupsearch.randomness import secret_generator, seeded_generator
from groupsearch.units import format_at_most, format_count

_GUARD = 32  # units of rounding by which a norm is rounded up, so that no message is longer than its bound


class Traits(NamedTuple):
    """What tells one method from another.

    Attributes:
        feedback: the difference to a shift is sent, and the shift follows.
        momentum: of the workers' gradients and of the shift.
        normalised: messages are normalised smoothly in place of clipped, and steps have length gamma.
        noisy: it is only itself with noise.
    """

    feedback: bool = False
    momentum: bool = False
    normalised: bool = False
    noisy: bool = False


METHODS: Mapping[str, Traits] = MappingProxyType(
    {
        "clip-gd": Traits(),
        "clip-sgd": Traits(),
        "dp-sgd": Traits(noisy=True),
        "clip21-gd": Traits(feedback=True),
        "clip21-sgd": Traits(feedback=True),
        "dp-clip21-gd": Traits(feedback=True, noisy=True),
        "clip21-sgd2m": Traits(feedback=True, momentum=True),
        "dp-clip21-sgd2m": Traits(feedback=True, momentum=True, noisy=True),
        "alpha-normec": Traits(feedback=True, normalised=True),
        "dp-alpha-normec": Traits(feedback=True, normalised=True, noisy=True),
    }
)


@dataclass(frozen=True)
class Setup:
    """A method and its constants, the same for every worker.

    Attributes:
        method: of :data:`METHODS`.
        threshold: tau for the whole vector, or R_m of every group.
        sizes: coordinates of every group, in their order; empty for one group.
        noise_multiplier: standard deviation of a worker's noise over S, the bound of its message.
        worker_momentum: b1 of ``clip21-sgd2m``; 1 forgets what was.
        server_momentum: b2 of ``clip21-sgd2m``; 1 is no momentum.
        alpha: of ``alpha-normec``.

    Raises:
        GroupSearchError: for a method that is not known, or a value outside its range.
    """

    method: str
    threshold: float | Sequence[float]
    sizes: tuple[int, ...] = ()
    noise_multiplier: float = 0.0
    worker_momentum: float = 0.1
    server_momentum: float = 1.0
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise GroupSearchError(f"Expected a method of {', '.join(METHODS)}, found {self.method!r}.")
        given = self.threshold if isinstance(self.threshold, Sequence) else (self.threshold,)
        object.__setattr__(self, "threshold", tuple(float(each) for each in given))
        object.__setattr__(self, "sizes", tuple(int(each) for each in self.sizes))
        if not all(0 < each < math.inf for each in self.thresholds):
            raise GroupSearchError(f"Expected finite thresholds > 0, found {self.thresholds}.")
        if len(self.thresholds) != max(1, len(self.sizes)) or any(size < 1 for size in self.sizes):
            raise GroupSearchError(
                f"Expected a threshold for each group of at least one coordinate, found {len(self.thresholds)} "
                f"thresholds and groups of {self.sizes or 'all'} coordinates."
            )
        if not 0 <= self.noise_multiplier < math.inf:
            raise GroupSearchError(f"Expected a finite noise_multiplier >= 0, found {self.noise_multiplier}.")
        if self.traits.noisy and self.noise_multiplier == 0:
            raise GroupSearchError(
                f"Expected a noise_multiplier > 0 for {self.method}, found 0: without noise it protects nobody. Name "
                f"the method without dp- where that is meant."
            )
        for name in ("worker_momentum", "server_momentum"):
            if not 0 < getattr(self, name) <= 1:
                raise GroupSearchError(f"Expected a {name} in (0, 1], found {getattr(self, name)}.")
        if not 0 < self.alpha < math.inf:
            raise GroupSearchError(f"Expected a finite alpha > 0, found {self.alpha}.")

    @property
    def traits(self) -> Traits:
        """Those of the method."""
        return METHODS[self.method]

    @property
    def thresholds(self) -> tuple[float, ...]:
        """R_m of every group."""
        assert isinstance(self.threshold, tuple)
        return self.threshold

    @property
    def bound(self) -> float:
        """S, the largest norm of a message."""
        return math.hypot(*self.thresholds)

    def state(self, *shape: int, like: Tensor) -> dict[str, Tensor]:
        """A worker's state at the beginning, zeros of this shape: ``shift``, ``momentum``, as the method has them."""
        traits = self.traits
        names = [*(["shift"] if traits.feedback else []), *(["momentum"] if traits.momentum else [])]
        return {name: like.new_zeros(shape) for name in names}

    def state_bytes(self, coordinates: int, bytes_each: int = 4) -> int:
        """What one worker holds besides weights and gradient: its state, the aggregate and the message."""
        aggregate = 1 if self.traits.feedback else 0
        return (1 + aggregate + self.traits.feedback + self.traits.momentum) * coordinates * bytes_each


def groups_of(plan: ClipPlan, sizes: Mapping[str, int]) -> tuple[tuple[tuple[str, ...], ...], tuple[float, ...]]:
    """The parameters of every group of a clip plan, by name, and the groups' thresholds, for group-wise methods.

    Args:
        plan: with fixed thresholds.
        sizes: coordinates of every parameter that is trained, by name.

    Raises:
        GroupSearchError: for adaptive thresholds, a rule that does not clip, a parameter that several groups share,
            or one that the plan or the model lacks.
    """
    if plan.adaptive is not None or plan.rule != "abadi":
        raise GroupSearchError(
            f"Expected a plan with fixed thresholds and the rule abadi, found {plan.allocation!r} and {plan.rule!r}: "
            f"workers clip to given bounds."
        )
    found: list[list[str]] = [[] for _ in range(plan.grouping.groups)]
    for index, site in enumerate(plan.grouping.sites):
        for name in site.parameters:
            group = plan.grouping.group_of(index)
            if any(name in others for m, others in enumerate(found) if m != group):
                raise GroupSearchError(
                    f"Expected every parameter in one group, found {name} in two of them. Move the boundary between "
                    f"the layers that share it."
                )
            if name not in found[group]:
                found[group].append(name)
    named = {name for group in found for name in group}
    if named != set(sizes):
        odd = ", ".join(sorted(named ^ set(sizes)))
        raise GroupSearchError(f"Expected the plan to be of this model's trainable parameters, found apart: {odd}.")
    return tuple(map(tuple, found)), plan.thresholds


# -- One step: of a worker, and of everybody with the mean of the messages; shared by simulation and process groups


def message(
    setup: Setup, state: Mapping[str, Tensor], gradient: Tensor, thresholds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What a worker sends, before noise, and whether it was clipped in each group; its state moves on in place.

    A gradient that is not finite is not sent: the message is zero and the state stays.

    Args:
        setup: the method.
        state: of :meth:`Setup.state`.
        gradient: (..., d); the leading dimensions are workers, or settings and workers.
        thresholds: (..., M) in place of the setup's, to run several at once.

    Returns:
        the message (..., d), and (..., M) of truth values.
    """
    traits = setup.traits
    finite = gradient.isfinite().all(-1, keepdim=True)
    gradient = torch.where(finite, gradient, 0.0)
    if traits.momentum:
        moved = setup.worker_momentum * (gradient - state["momentum"])
        state["momentum"].add_(torch.where(finite, moved, 0.0))
        gradient = state["momentum"]
    if traits.feedback:
        gradient = gradient - state["shift"]
    sent, clipped = _bounded(setup, gradient, thresholds)
    sent = torch.where(finite, sent, 0.0)
    if traits.feedback:
        state["shift"].add_(sent, alpha=_follow(setup))
    return sent, clipped


def direction(setup: Setup, aggregate: Tensor, mean: Tensor) -> Tensor:
    """Minus the step over gamma, from the mean of all messages with their noise; the aggregate moves on in place.

    Args:
        setup: the method.
        aggregate: (..., d), zeros at the beginning; not used by methods without feedback.
        mean: (..., d).
    """
    found = aggregate.add_(mean, alpha=_follow(setup)) if setup.traits.feedback else mean
    if not setup.traits.normalised:
        return found
    length = torch.linalg.vector_norm(found, dim=-1, keepdim=True)
    return torch.where(length > 0, found / length.clip(min=torch.finfo(found.dtype).tiny), 0.0)


def _follow(setup: Setup) -> float:
    return setup.server_momentum if setup.traits.momentum else 1.0


def _bounded(setup: Setup, vectors: Tensor, thresholds: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each group of the vectors within its bound, and whether it was shortened."""
    bounds = vectors.new_tensor(setup.thresholds) if thresholds is None else thresholds
    sizes = list(setup.sizes) or [vectors.shape[-1]]
    norms = torch.stack([torch.linalg.vector_norm(part, dim=-1) for part in vectors.split(sizes, -1)], -1)
    norms = norms * (1 + _GUARD * torch.finfo(vectors.dtype).eps)
    if setup.traits.normalised:
        factors, active = bounds / (setup.alpha + norms), torch.ones_like(norms, dtype=torch.bool)
    else:
        factors, active = bounds / torch.maximum(norms, bounds), norms > bounds
    if len(sizes) > 1:
        factors = torch.repeat_interleave(factors, torch.tensor(sizes, device=vectors.device), dim=-1)
    return vectors * factors, active


# -- Simulation: all workers in one process, several settings at once


@dataclass(frozen=True)
class Trajectory:
    """What a simulation went through.

    Attributes:
        points: (steps + 1, d), from the start.
        gradient_norms: (steps + 1,), of the mean of the workers' gradients at the points; of stochastic gradients it
            is their mean's, too, unless a true gradient was given.
        clipped: (steps,), share of the workers and groups whose message was shortened.
        setup: the method.
    """

    points: Tensor
    gradient_norms: Tensor
    clipped: Tensor
    setup: Setup

    @property
    def inactive_from(self) -> int | None:
        """The first step from which nothing is clipped any more; None where the last one still clips."""
        active = self.clipped.nonzero()
        last = int(active[-1]) if len(active) else -1
        return last + 1 if last + 1 < len(self.clipped) else None


Gradient = Callable[[Tensor], Tensor]


@dataclass
class Crew:
    """n workers and what they share, for one setting or (leading dimensions) several of them.

    Attributes:
        setup: the method.
        points: (..., d), moved in place.
        workers: n.
        step_size: gamma, or (..., 1) of them.
        thresholds: (..., 1, M) in place of the setup's.
        seed: of the workers' noise, worker i's from (seed, i); None for the operating system's entropy.
    """

    setup: Setup
    points: Tensor
    workers: int
    step_size: float | Tensor
    thresholds: Tensor | None = None
    seed: int | None = 0
    state: dict[str, Tensor] = field(init=False)
    aggregate: Tensor = field(init=False)

    def __post_init__(self) -> None:
        *settings, d = self.points.shape
        if self.setup.sizes and sum(self.setup.sizes) != d:
            raise GroupSearchError(f"Expected groups of {d} coordinates together, found {sum(self.setup.sizes)}.")
        self.state = self.setup.state(*settings, self.workers, d, like=self.points)
        self.aggregate = torch.zeros_like(self.points)
        self._noise = [noise_of(self.seed, i) for i in range(self.workers)] if self.setup.noise_multiplier else []

    def step(self, gradients: Tensor) -> Tensor:
        """One step from the workers' gradients (..., n, d) at the points; (..., n, M), what was clipped."""
        sent, clipped = message(self.setup, self.state, gradients, self.thresholds)
        mean = sent.mean(-2)
        if self._noise:
            drawn = torch.stack([_normal(each, self.points.shape[-1], self.points) for each in self._noise])
            mean = mean + self._noise_scale() * drawn.mean(0)
        self.points.sub_(self.step_size * direction(self.setup, self.aggregate, mean))
        return clipped

    def _noise_scale(self) -> float | Tensor:
        if self.thresholds is None:
            return self.setup.noise_multiplier * self.setup.bound
        return self.setup.noise_multiplier * torch.linalg.vector_norm(self.thresholds, dim=-1)


def noise_of(seed: int | None, worker: int) -> torch.Generator:
    """What a worker's noise is drawn from: its own stream of a seed, or nobody's."""
    return secret_generator() if seed is None else seeded_generator([seed, worker], "noise")


def _normal(generator: torch.Generator, count: int, like: Tensor) -> Tensor:
    drawn = torch.randn(count, generator=generator, dtype=like.dtype, device=generator.device)
    return drawn.to(like.device)


def simulate(  # noqa: PLR0913  (what a method takes)
    method: str,
    worker_gradients: Sequence[Gradient],
    start: Tensor,
    *,
    steps: int,
    step_size: float,
    threshold: float | Sequence[float],
    noise_multiplier: float = 0.0,
    seed: int | None = 0,
    **constants: float | tuple[int, ...],
) -> Trajectory:
    """Run a method with all workers in this process; shifts and momenta begin at zero.

    Args:
        method: of :data:`METHODS`.
        worker_gradients: one function for each worker, from a point (d,) to its gradient (d,).
        start: (d,); its dtype is that of everything, float64 for experiments.
        steps: how many.
        step_size: gamma.
        threshold: tau, or one for each group of ``sizes``.
        noise_multiplier: standard deviation of a worker's noise over the bound of its message.
        seed: of the noise; None for the operating system's entropy.
        **constants: further fields of :class:`Setup`.

    Raises:
        GroupSearchError: for a method that is not known, a value outside its range, or no worker at all.
    """
    if not worker_gradients or steps < 1:
        raise GroupSearchError(f"Expected workers and steps, found {len(worker_gradients)} and {steps}.")
    setup = Setup(method, threshold, noise_multiplier=noise_multiplier, **constants)  # type: ignore[arg-type]
    crew = Crew(setup, start.clone(), len(worker_gradients), step_size, seed=seed)
    points, norms, clipped = [start.clone()], [], []
    for _ in range(steps):
        gradients = torch.stack([each(crew.points) for each in worker_gradients])
        norms.append(torch.linalg.vector_norm(gradients.mean(0)))
        clipped.append(crew.step(gradients).double().mean())
        points.append(crew.points.clone())
    norms.append(torch.linalg.vector_norm(torch.stack([each(crew.points) for each in worker_gradients]).mean(0)))
    return Trajectory(torch.stack(points), torch.stack(norms), torch.stack(clipped), setup)


# -- Privacy


@dataclass(frozen=True)
class Spent:
    """What steps of a method cost one worker in privacy; every epsilon at ``delta``.

    A neighbour has one worker's data replaced by any others, of which one example more, less or changed is a case:
    a message moves by twice its bound. ``absent`` epsilons are for a worker that sends noise alone.

    Attributes:
        workers: n.
        steps: that every worker took part in.
        delta: the other half.
        of_messages: against whoever sees a worker's messages; only its own noise protects it. Workers' data are
            disjoint, so it is also what all messages together cost.
        of_weights: against whoever sees the weights after every step and nothing else, which the noise of all workers
            hides; it holds if they add it, all of them, and nobody sees a message (secure aggregation).
        absent_of_messages: the same of a worker that is not there.
        absent_of_weights: likewise.
    """

    workers: int
    steps: int
    delta: float
    of_messages: float
    of_weights: float
    absent_of_messages: float
    absent_of_weights: float

    @property
    def sentences(self) -> tuple[str, ...]:
        """What is stated, in words."""
        if math.isinf(self.of_messages):
            return ("No privacy: without noise epsilon is infinite.",)
        steps, delta = format_count(self.steps), format_at_most(self.delta)
        return (
            f"Per worker, from its messages: epsilon {format_at_most(self.of_messages)} at delta {delta} after {steps} "
            f"steps, whatever its data are replaced by; {format_at_most(self.absent_of_messages)} for whether it is "
            f"there.",
            f"For the whole, from the weights alone, if all {format_count(self.workers)} workers add their noise and "
            f"nobody sees a message: epsilon {format_at_most(self.of_weights)} "
            f"({format_at_most(self.absent_of_weights)} for whether a worker is there).",
            "Every worker takes part in every step; no amplification by subsampling is claimed.",
        )


def spent(setup: Setup, *, workers: int, steps: int, delta: float) -> Spent:
    """What so many steps cost one of the workers.

    Step k is a Gaussian release of a message whose norm is at most S, whatever data and earlier messages are, so the
    releases compose adaptively; what a worker keeps (shift, momentum) follows from its data and what was released.

    Raises:
        GroupSearchError: for a delta or a count outside its range.
    """
    sigma = setup.noise_multiplier

    def cost(noise: float) -> float:
        found = epsilon(noise, 1.0, steps, delta)
        # far above what anybody wants pld finds no bound, where Renyi divergences still have one
        return epsilon(noise, 1.0, steps, delta, "rdp") if math.isinf(found) and noise > 0 else found

    whole = sigma * math.sqrt(workers)
    return Spent(workers, steps, delta, cost(sigma / 2), cost(whole / 2), cost(sigma), cost(whole))
