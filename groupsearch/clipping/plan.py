"""ClipPlan: what the clipping mechanism does, and how far one example can move its sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

from groupsearch.clipping.adaptive import AdaptiveQuantile
from groupsearch.clipping.sensitivity import Users, worst_change
from groupsearch.errors import GroupSearchError
from groupsearch.grouping import Grouping

RULES = ("abadi", "auto-s", "auto-v")
ALLOCATIONS = ("uniform", "dimension")
NOISE_ALLOCATIONS = ("global", "equal")
AUTO_S_GAMMA = 0.01


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
            :class:`~groupsearch.clipping.AdaptiveQuantile`, and then :attr:`thresholds`,
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
        :func:`groupsearch.clipping.sensitivity.worst_change`.
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
