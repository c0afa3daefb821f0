"""What clips an example's gradient: groups, thresholds, rule, noise, and the sensitivity they leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeVar

from groupsearch.errors import GroupSearchError
from groupsearch.plan.grouping import Grouping

# -- How far one example can move the sums that clipping groups share: exact, for any sharing ------

Array = TypeVar("Array", bound=Any)
_ITERATIONS = 500
_TIGHTNESS = 1e-10

Users = frozenset[int]  # the groups that use a parameter


def worst_change(radii: Sequence[float], scales: Mapping[Users, float]) -> float:
    """The largest norm of what one example adds to the clipped sums, each divided by its scale.

    Group m adds any vector of norm at most R_m, spread over the parameters that it uses. Groups
    that share a parameter may add to it in the same direction, so with v_{m,A} >= 0 for what group
    m puts into the parameters that exactly the groups A use, the square of the answer is

        max  sum_A (sum_{m in A} v_{m,A} / s_A)^2    where  sum_{A with m} v_{m,A}^2 <= R_m^2.

    In the squares of v this is a concave maximum over simplices, and its dual (Cauchy-Schwarz) is

        min  sum_m R_m^2 / w_m    where  w > 0  and  sum_{m in A} w_m <= s_A^2  for every A:

    every w that keeps the constraints proves an upper bound, and the best one is the maximum
    itself. What is returned is such a proven bound, so it is never too small; iteration brings it
    to the maximum. Where every parameter has one group it is sqrt(sum (R_m / s_m)^2).

    Args:
        radii: R_m > 0 of every group.
        scales: for each set of groups that share a parameter, the scale s_A > 0 of such parameters.

    >>> worst_change([3.0, 4.0], {frozenset({0}): 1.0, frozenset({1}): 1.0})
    5.0
    >>> worst_change([1.0, 2.0], {frozenset({0, 1}): 1.0})
    3.0
    """
    return math.sqrt(sum(_worst_square(radii, part) for part in _connected(scales)))


def _connected(scales: Mapping[Users, float]) -> list[dict[Users, float]]:
    """The sets of groups, parted so that no group is in two parts; values are squared scales."""
    parts: list[dict[Users, float]] = []
    for users, scale in scales.items():
        touching = [part for part in parts if any(users & other for other in part)]
        parts = [part for part in parts if part not in touching]
        merged = {users: scale * scale}
        for part in touching:
            merged |= part
        parts.append(merged)
    return parts


def _worst_square(radii: Sequence[float], limits: dict[Users, float]) -> float:
    """The square of :func:`worst_change` of one connected part, by a multiplicative fixed point.

    Started from any y > 0, w_m = R_m / |y restricted to m's sets| and y_A <- y_A sum_{m in A} w_m / s_A^2
    climb the maximum: v_{m,A} = w_m y_A keeps its constraints, and w, once shrunk into its own, bounds it.
    """
    # A set within another one that is no louder constrains nothing.
    limits = {a: s for a, s in limits.items() if not any(a < b and limits[b] <= s for b in limits)}
    groups = sorted(frozenset().union(*limits))
    of = {m: [a for a in limits if m in a] for m in groups}
    y = {a: sum(radii[m] for m in a) / limit for a, limit in limits.items()}
    best = math.inf
    for _ in range(_ITERATIONS):
        w = {m: radii[m] / math.hypot(*(y[a] for a in of[m])) for m in groups}
        load = {a: sum(w[m] for m in a) / limit for a, limit in limits.items()}
        reached = sum((y[a] * load[a]) ** 2 * limit for a, limit in limits.items())
        best = min(best, _proven(radii, limits, w, of, max(load.values())))
        if best <= reached * (1 + _TIGHTNESS):
            break
        y = {a: y[a] * load[a] for a in limits}
    return best


def _proven(
    radii: Sequence[float],
    limits: Mapping[Users, float],
    w: Mapping[int, float],
    of: Mapping[int, Sequence[Users]],
    load: float,
) -> float:
    """The bound that w proves, once shrunk into its constraints and raised group by group as far as they allow."""
    kept = {m: value / load for m, value in w.items()}
    for m in kept:
        slack = min(limits[a] - sum(kept[k] for k in a) for a in of[m])
        kept[m] += max(0.0, slack)
    # Rounding may leave a constraint off by an ulp: shrink once more by what it is off.
    excess = max(1.0, *(sum(kept[m] for m in a) / limit for a, limit in limits.items()))
    return excess * sum(radii[m] ** 2 / value for m, value in kept.items())


# -- AdaptiveQuantile: thresholds that follow a quantile of the norms, and what counting them costs

COUNT_NOISE_SHARE = 1 / 20


@dataclass(frozen=True)
class AdaptiveQuantile:
    """Every group's threshold follows a quantile of its gradient norms, privately.

    A step counts for each group m how many of its examples have a norm within R_m, as the sum of
    b - 1/2 with b in {0, 1}, adds Gaussian noise of standard deviation ``count_noise`` to each
    count, and sets, with E the expected batch size (arXiv 1905.03871, geometric update;
    arXiv 2212.01539, one threshold per group),

        R_m <- R_m exp(-learning_rate (share_m - quantile)),   share_m = noisy count / E + 1/2.

    Attributes:
        quantile: share of the examples that a threshold should leave unclipped, between 0 and 1.
        learning_rate: of the logarithm of the thresholds.
        count_noise: standard deviation of the noise on each count, in examples; None for a
            twentieth of the expected batch size (arXiv 1905.03871).
        initial: the thresholds of the first step: ``uniform``, ``dimension`` or given, as a fixed
            allocation would be.
        least: no threshold falls below.
        most: no threshold rises above.

    Raises:
        GroupSearchError: for a value outside its range.
    """

    quantile: float = 0.5
    learning_rate: float = 0.3
    count_noise: float | None = None
    initial: str | Sequence[float] = "uniform"
    least: float = 1e-6
    most: float = 1e6

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise GroupSearchError(f"Expected a quantile between 0 and 1, found {self.quantile}.")
        noise = 1.0 if self.count_noise is None else self.count_noise
        for name, value in (("learning_rate", self.learning_rate), ("count_noise", noise)):
            if not 0 < value < math.inf:
                raise GroupSearchError(f"Expected a finite {name} > 0 of adaptive thresholds, found {value}.")
        if not 0 < self.least < self.most < math.inf:
            raise GroupSearchError(
                f"Expected 0 < least < most of adaptive thresholds, both finite, found {self.least} and {self.most}."
            )
        if not isinstance(self.initial, str):
            object.__setattr__(self, "initial", tuple(float(r) for r in self.initial))

    def count_noise_for(self, expected_batch_size: float) -> float:
        """Standard deviation of the noise on each count, in examples."""
        return COUNT_NOISE_SHARE * expected_batch_size if self.count_noise is None else self.count_noise

    def updated(self, thresholds: Sequence[float], shares: Sequence[float]) -> tuple[float, ...]:
        """The next step's thresholds, from each group's noisy share of examples within the present ones.

        Whatever finite shares are, the thresholds stay between ``least`` and ``most``.
        """
        low, high = math.log(self.least), math.log(self.most)
        steps = (self.learning_rate * (share - self.quantile) for share in shares)
        moved = (math.log(r) - step for r, step in zip(thresholds, steps, strict=True))
        return tuple(min(max(math.exp(min(max(x, low), high)), self.least), self.most) for x in moved)


def gradient_noise_multiplier(noise_multiplier: float, groups: int, count_noise: float) -> float:
    """What the gradients' noise must be so that gradients and counts together cost ``noise_multiplier``.

    One example changes every one of the M counts by 1/2 up or down, so the vector of counts by
    sqrt(M) / 2, and the gradients, over the scales of their noise, by at most 1. Divided by their
    standard deviations both are one Gaussian release of sensitivity

        sqrt(1 / sigma_gradient^2 + M / (2 count_noise)^2) = 1 / sigma,

    which is solved for sigma_gradient (arXiv 1905.03871, theorem 1, is M = 1; 2212.01539 has M).
    Without noise (0) it stays 0.

    Raises:
        GroupSearchError: when the counts alone cost more than ``noise_multiplier`` allows.

    >>> round(gradient_noise_multiplier(1.0, groups=4, count_noise=10.0), 4)
    1.005
    """
    if noise_multiplier == 0:
        return 0.0
    least = noise_multiplier * math.sqrt(groups) / 2
    if count_noise <= least:
        raise GroupSearchError(
            f"Expected a count_noise above {least:.3g} for {groups} adaptive thresholds at noise multiplier "
            f"{noise_multiplier:.3g}, found {count_noise:.3g}: the counts alone would spend the whole budget. Raise "
            f"count_noise (at {2.4 * least:.3g} the gradients' noise grows by a tenth), expect larger batches, or take "
            f"fewer groups."
        )
    return noise_multiplier / math.sqrt(1 - (least / count_noise) ** 2)


# -- ClipPlan: what the clipping mechanism does, and how far one example can move its sum ----------

RULES = ("abadi", "auto-s", "auto-v")
ALLOCATIONS = ("uniform", "dimension")
NOISE_ALLOCATIONS = ("global", "equal")
AUTO_S_GAMMA = 0.01
LEAST_NORM = 1e-15
"""The square of a shorter float32 norm has lost digits, or all, to underflow."""


@dataclass(frozen=True)
class ClipPlan:
    """Groups, thresholds, the clip rule and how noise is divided: the whole of the mechanism but its sigma.

    Per example and group m with gradient norm n the factor is

    * ``abadi``: min(1, R_m / n);
    * ``auto-s``: R_m / (n + 0.01) (arXiv 2206.07136; 0.01 is its gamma);
    * ``auto-v``: R_m / n, and 0 where n is 0, or too short (1e-15) for its square to be known.

    Attributes:
        grouping: which sites share a factor.
        max_grad_norm: R, the norm that the thresholds are allotted from.
        rule: ``abadi``, ``auto-s`` or ``auto-v``.
        allocation: ``uniform`` R / sqrt(M); ``dimension`` R sqrt(d_m / sum d) with d_m the
            trainable numbers of group m (arXiv 2310.00098); the M thresholds themselves; or an
            :class:`~groupsearch.plan.clipping.AdaptiveQuantile`, and then :attr:`thresholds`,
            :attr:`sensitivity` and :attr:`noise_scales` are those of the first step.
        noise_allocation: ``global``, the same standard deviation in every group; ``equal``, in
            proportion to the group's threshold, R_m sqrt(M) where no parameter is shared
            (arXiv 2212.01539); or M weights that the groups' standard deviations are in proportion to.

    Raises:
        GroupSearchError: for an unknown rule or allocation, or a threshold that is not positive.
    """

    grouping: Grouping
    max_grad_norm: float = 1.0
    rule: str = "abadi"
    allocation: str | Sequence[float] | AdaptiveQuantile = "uniform"
    noise_allocation: str | Sequence[float] = "global"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise GroupSearchError(f"Expected rule to be one of {', '.join(RULES)}, found {self.rule!r}.")
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise GroupSearchError(f"Expected max_grad_norm > 0, found {self.max_grad_norm}.")
        if self.adaptive is None:
            object.__setattr__(self, "allocation", self._checked("allocation", ALLOCATIONS, "thresholds"))
        noise = self._checked("noise_allocation", NOISE_ALLOCATIONS, "weights")
        object.__setattr__(self, "noise_allocation", noise)
        if self.adaptive is not None:
            start = self.with_thresholds(self.adaptive.initial).thresholds
            if not all(self.adaptive.least <= r <= self.adaptive.most for r in start):
                raise GroupSearchError(
                    f"Expected initial thresholds between {self.adaptive.least:g} and {self.adaptive.most:g}, the "
                    f"range that adaptive thresholds stay in, found {start}."
                )

    @property
    def adaptive(self) -> AdaptiveQuantile | None:
        """The allocation, if the thresholds change from step to step."""
        return self.allocation if isinstance(self.allocation, AdaptiveQuantile) else None

    def with_thresholds(self, thresholds: str | Sequence[float]) -> ClipPlan:
        """The same plan with fixed thresholds, those of one step of an adaptive one."""
        return replace(self, allocation=thresholds)

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        """R_m of every group, group 0 first."""
        allocation = self.allocation
        if isinstance(allocation, AdaptiveQuantile):
            return self.with_thresholds(allocation.initial).thresholds
        if allocation == "uniform":
            return (self.max_grad_norm / math.sqrt(self.grouping.groups),) * self.grouping.groups
        if allocation == "dimension":
            sizes = [sum(s.parameter_count for s in self.grouping.sites[lo:hi]) for lo, hi in self.grouping.spans]
            return tuple(self.max_grad_norm * math.sqrt(size / sum(sizes)) for size in sizes)
        return tuple(float(r) for r in allocation)

    @cached_property
    def sensitivity(self) -> float:
        """L2 sensitivity of the clipped sum to one example, which contributes or does not (zero-out).

        sqrt(sum R_m^2) where every parameter's sites lie in one group. Groups that share
        parameters can push them the same way; what they reach together is computed exactly, see
        :func:`groupsearch.plan.clipping.worst_change`.
        """
        return worst_change(self.thresholds, dict.fromkeys(self._users.values(), 1.0))

    @cached_property
    def noise_scales(self) -> Mapping[str, float]:
        """Standard deviation of each parameter's noise at noise multiplier one, by parameter name.

        Divided by these no example moves the clipped sum by more than 1, and some gradients move
        it by 1: noise of sigma times the scale is one Gaussian release of multiplier sigma.

        A group's weight is 1 (``global``), R_m (``equal``) or given. A parameter's scale is in
        proportion to the weights of its groups, added in squares as if each group's sum got noise
        of its own; under ``global`` it is the sensitivity for all.
        """
        shapes = {users: self._shape(users) for users in set(self._users.values())}
        change = worst_change(self.thresholds, shapes)
        return MappingProxyType({name: change * shapes[users] for name, users in self._users.items()})

    def _shape(self, users: Users) -> float:
        if self.noise_allocation == "global":
            return 1.0
        weights = self.thresholds if self.noise_allocation == "equal" else self.noise_allocation
        return math.hypot(*(float(weights[m]) for m in users))

    @cached_property
    def _users(self) -> dict[str, Users]:
        """The groups that use each parameter."""
        users: dict[str, Users] = {}
        for index, site in enumerate(self.grouping.sites):
            for name in site.parameters:
                users[name] = users.get(name, frozenset()) | {self.grouping.group_of(index)}
        return users

    def _checked(self, field: str, names: Sequence[str], what: str) -> str | tuple[float, ...]:
        found, groups = getattr(self, field), self.grouping.groups
        if isinstance(found, str):
            if found not in names:
                raise GroupSearchError(
                    f"Expected {field} to be one of {', '.join(names)} or a sequence of {groups} {what}, found "
                    f"{found!r}."
                )
            return found
        given = tuple(float(value) for value in found)
        if len(given) != groups or not all(math.isfinite(value) and value > 0 for value in given):
            raise GroupSearchError(f"Expected {groups} positive {what}, one per group, found {given}.")
        return given


def clip_factors(rule: str, norm: Array, threshold: Any, where: Callable[..., Array]) -> Array:
    """What the gradients of these norms are multiplied by, as :class:`ClipPlan` states it.

    Args:
        rule: of :data:`RULES`.
        norm: an array of NumPy's, or a tensor of torch's, of any shape.
        threshold: R > 0, a number or what the norm can be divided into.
        where: :func:`numpy.where` or :func:`torch.where`.
    """
    if rule == "auto-s":
        return threshold / (norm + AUTO_S_GAMMA)
    if rule == "abadi":
        return threshold / norm.clip(min=threshold)
    return where(norm > LEAST_NORM, threshold / norm.clip(min=LEAST_NORM), 0.0)
