"""Gram matrices of per-example gradients, from which the effect of any clip plan follows without a model.

Apart from the proxy, which needs a model and torch; this needs neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import ClipPlan, clip_factors
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import Site

# -- What Gram matrices say of a clip plan: sums over examples, expectations, and the score made of them
#
# Shapes: n batches, of which some are of the same instant of training.

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ProxyScore:
    """How well a private step with a clip plan follows the gradient, where the Grams were taken.

    The true gradient is the mean of unclipped ones over the examples that the batches were drawn from; an
    update is a noisy clipped sum over a Poisson sample, divided by its expected size.

    Attributes:
        value: expected inner product of update and true gradient, over the norm of the one and the root mean
            square norm of the other. Higher is better: among updates of one length it is how fast the loss falls.
            Adam divides by nearly the same number in every coordinate as long as noise outweighs the gradient.
        cosine: of the mean clipped and the true gradient: 1 where clipping does not turn it.
        norm_kept: norm of the mean clipped gradient over that of the true one.
        snr: squared norm of the mean clipped gradient over the variance of the update (sampling and noise).
    """

    value: float
    cosine: float
    norm_kept: float
    snr: float


@dataclass(frozen=True)
class Moments:
    """Sums over the examples i, j of each batch, (n,) each; c is the clipped gradient, g the unclipped one.

    Attributes:
        gradient: sum over i, j of <g_i, g_j>, the squared norm of the sum of the gradients.
        inner: sum of <c_i, g_j>, the inner product of the clipped and the unclipped sum.
        clipped: sum of <c_i, c_j>, the squared norm of the clipped sum.
        own_gradient: the part of ``gradient`` with i = j.
        own_inner: the part of ``inner`` with i = j.
        own_clipped: the part of ``clipped`` with i = j.
    """

    gradient: Floats
    inner: Floats
    clipped: Floats
    own_gradient: Floats
    own_inner: Floats
    own_clipped: Floats


@dataclass(frozen=True)
class Expectations:
    """Expected products of a random example's clipped gradient c and unclipped one g, per instant of training.

    Estimated from pairs of distinct examples, without bias, so that a squared norm may come out negative.

    Attributes:
        gradient: |E g|^2, the squared norm of the true gradient.
        inner: <E c, E g>.
        clipped: |E c|^2.
        own_clipped: E |c|^2.
    """

    gradient: Floats
    inner: Floats
    clipped: Floats
    own_clipped: Floats


# -- Grams: inner products of per-example gradients, from which the effect of any clip plan follows without a model
#
# Shapes: n batches, L sites, B examples of a batch, M groups, P pairs of sites that share a parameter.


@dataclass(frozen=True, eq=False)
class Grams:
    """Gram matrices of per-example gradients, per site, of several batches.

    They are functions of the examples, without any noise: keep them as safe as the data, and count what is
    chosen by them as chosen by the data (``selection_data``).

    Attributes:
        sites: the L sites in order.
        parameter_sizes: numbers in each trainable parameter, by name.
        steps: after how many steps of training each batch's gradients were taken, n of them.
        grams: (n, L, B, B), entry i, j of site l is <g_i, g_j> over the parameters of that use.
        pairs: sites (l, k), l < k, that use a parameter together.
        crosses: (n, P, B, B), entry i, j of pair (l, k) is <g_i of l, g_j of k> over what they share.

    Raises:
        GroupSearchError: when shapes do not fit each other, there are fewer than two examples, a pair that
            shares a parameter or a parameter's size is missing, or a number is not finite.
    """

    sites: tuple[Site, ...]
    parameter_sizes: Mapping[str, int]
    steps: tuple[int, ...]
    grams: Floats
    pairs: tuple[tuple[int, int], ...]
    crosses: Floats

    def __post_init__(self) -> None:
        batches, length, examples = len(self.steps), len(self.sites), self.grams.shape[-1]
        expected = ((batches, length, examples, examples), (batches, len(self.pairs), examples, examples))
        if (self.grams.shape, self.crosses.shape) != expected or not batches or examples < 2:
            raise GroupSearchError(
                f"Expected Grams (n, L, B, B) and (n, P, B, B) of n = {batches} batches, L = {length} sites, P = "
                f"{len(self.pairs)} pairs and at least two examples, found {self.grams.shape} and {self.crosses.shape}."
            )
        if self.pairs != sharing_pairs(self.sites):
            raise GroupSearchError(
                f"Expected a Gram for each pair of sites that share a parameter, {sharing_pairs(self.sites)}, found "
                f"them for {self.pairs}. Without one the norm of a group would be wrong."
            )
        if set(self.parameter_sizes) != {name for site in self.sites for name in site.parameters}:
            raise GroupSearchError(
                "Expected a size for each parameter of the sites and no other, because noise is counted by them. Give "
                "the sizes of the trainable parameters, by the names that the sites have."
            )
        if not (np.isfinite(self.grams).all() and np.isfinite(self.crosses).all()):
            raise GroupSearchError(
                "Expected finite gradients, found an example without. Lower the learning rate, or take the Grams "
                "at an earlier step of training."
            )

    def score(  # noqa: PLR0913 - the settings of a clip plan, by name
        self,
        boundaries: Sequence[int],
        *,
        rule: str = "auto-s",
        allocation: str | Sequence[float] = "uniform",
        max_grad_norm: float = 1.0,
        noise_allocation: str | Sequence[float] = "global",
        noise_multiplier: float,
        expected_batch_size: float,
    ) -> ProxyScore:
        """What a grouping, with these thresholds, rule and noise, makes of the gradient.

        Args:
            boundaries: of the grouping.
            rule: as in :class:`~groupsearch.plan.clipping.ClipPlan`, and so are the next three.
            allocation: of the thresholds; fixed ones.
            max_grad_norm: R.
            noise_allocation: of the noise.
            noise_multiplier: sigma >= 0.
            expected_batch_size: of the logical batch of training, not of these.

        Raises:
            GroupSearchError: when the plan is none for these sites, or a number is outside its range.
        """
        plan = ClipPlan(Grouping(tuple(boundaries), self.sites), max_grad_norm, rule, allocation, noise_allocation)
        return self.score_plan(plan, noise_multiplier, expected_batch_size)

    def score_plan(self, plan: ClipPlan, noise_multiplier: float, expected_batch_size: float) -> ProxyScore:
        """As :meth:`score`, for a clip plan of these sites.

        Instants of training count by the norm of their true gradient; one where that cannot be told from zero, its
        estimated square not being positive, counts nothing. The signal-to-noise ratio is a plain mean.

        Raises:
            GroupSearchError: for adaptive thresholds, which are not known beforehand, and as :meth:`score`.
        """
        if not (0 <= noise_multiplier < math.inf and 0 < expected_batch_size < math.inf):
            raise GroupSearchError(
                f"Expected finite noise_multiplier >= 0 and expected_batch_size > 0, found {noise_multiplier} and "
                f"{expected_batch_size}."
            )
        noise = sum((noise_multiplier * s) ** 2 * self.parameter_sizes[p] for p, s in plan.noise_scales.items())
        mean = self.expectations(plan)
        # A Poisson sample of a large population: every example adds its own second moment.
        variance = mean.own_clipped / expected_batch_size + noise / expected_batch_size**2
        seen = mean.gradient > 0
        length = np.sqrt(mean.gradient[seen]).sum(keepdims=True)
        clipped = np.maximum(mean.clipped, 0.0)

        def against_gradient(values: Floats) -> float:
            return float(_over(values[seen].sum(keepdims=True), length)[0])

        return ProxyScore(
            value=against_gradient(_over(mean.inner, np.sqrt(clipped + variance))),
            cosine=against_gradient(_over(mean.inner, np.sqrt(clipped))),
            norm_kept=against_gradient(np.sqrt(clipped)),
            snr=float(_over(clipped, variance).mean()),
        )

    def expectations(self, plan: ClipPlan) -> Expectations:
        """What the moments say of the population that the examples are from, at every instant of training.

        Raises:
            GroupSearchError: as :meth:`moments`.
        """
        moments, examples, steps = self.moments(plan), self.grams.shape[-1], np.array(self.steps)
        distinct = examples * (examples - 1)

        def mean(values: Floats) -> Floats:
            return np.array([values[steps == step].mean() for step in sorted(set(self.steps))])

        return Expectations(
            gradient=mean(moments.gradient - moments.own_gradient) / distinct,
            inner=mean(moments.inner - moments.own_inner) / distinct,
            clipped=mean(moments.clipped - moments.own_clipped) / distinct,
            own_clipped=mean(moments.own_clipped) / examples,
        )

    def moments(self, plan: ClipPlan) -> Moments:
        """The inner products of clipped and unclipped sums of every batch under a plan of these sites, exactly.

        Raises:
            GroupSearchError: for adaptive thresholds, or a plan of other sites.
        """
        factor_nLB = self._factors(plan)
        early_nPB, late_nPB = (factor_nLB[:, [pair[k] for pair in self.pairs]] for k in (0, 1))
        carried_nLB = (self.grams @ factor_nLB[..., None])[..., 0]
        crossed_nPB = (self.crosses @ late_nPB[..., None])[..., 0]
        rows, cross_rows, cross_columns = self._sums
        own, cross_own = self._own, self._cross_own
        return Moments(
            gradient=_total(rows) + 2 * _total(cross_rows),
            inner=_total(factor_nLB * rows) + _total(early_nPB * cross_rows) + _total(late_nPB * cross_columns),
            clipped=_total(factor_nLB * carried_nLB) + 2 * _total(early_nPB * crossed_nPB),
            own_gradient=_total(own) + 2 * _total(cross_own),
            own_inner=_total(factor_nLB * own) + _total((early_nPB + late_nPB) * cross_own),
            own_clipped=_total(factor_nLB**2 * own) + 2 * _total(early_nPB * late_nPB * cross_own),
        )

    def _factors(self, plan: ClipPlan) -> Floats:
        """What each example's gradient of each site is multiplied by, (n, L, B)."""
        if plan.adaptive is not None:
            raise GroupSearchError(
                "Expected fixed thresholds, found adaptive ones: what they will be depends on the training. Score "
                "their initial thresholds as they are, or judge them by training."
            )
        if [s.parameters for s in plan.grouping.sites] != [s.parameters for s in self.sites]:
            raise GroupSearchError(
                "Expected a plan of the sites that the Grams were taken of, found one of others. Take the Grams with "
                "the model and the settings that the trace is of."
            )
        spans = plan.grouping.spans
        # Sums of slices, not differences of prefix sums: a quiet group beside a loud one keeps its digits.
        sqnorm_nMB = np.add.reduceat(self._own, [lo for lo, _ in spans], axis=1)
        group = [plan.grouping.group_of(site) for site in range(len(self.sites))]
        for number, (early, late) in enumerate(self.pairs):
            if group[early] == group[late]:
                sqnorm_nMB[:, group[early]] += 2 * self._cross_own[:, number]
        norm_nMB = np.sqrt(np.maximum(sqnorm_nMB, 0.0))
        return clip_factors(plan.rule, norm_nMB, np.array(plan.thresholds)[:, None], np.where)[:, group]

    @cached_property
    def _sums(self) -> tuple[Floats, Floats, Floats]:
        return self.grams.sum(3), self.crosses.sum(3), self.crosses.sum(2)

    @cached_property
    def _own(self) -> Floats:
        return np.ascontiguousarray(np.diagonal(self.grams, axis1=2, axis2=3))

    @cached_property
    def _cross_own(self) -> Floats:
        return np.ascontiguousarray(np.diagonal(self.crosses, axis1=2, axis2=3))


def sharing_pairs(sites: Sequence[Site]) -> tuple[tuple[int, int], ...]:
    """Sites (l, k), l < k, that use a parameter together."""
    users: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        for name in site.parameters:
            users.setdefault(name, []).append(index)
    return tuple(sorted({pair for indices in users.values() for pair in combinations(indices, 2)}))


def _total(values: Floats) -> Floats:
    return values.sum(axis=(1, 2))


def _over(values: Floats, by: Floats) -> Floats:
    return np.divide(values, by, out=np.zeros_like(values), where=by > 0)
