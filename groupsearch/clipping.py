"""ClipPlan: what the clipping mechanism does, and how far one example can move its sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from groupsearch.errors import GroupSearchError
from groupsearch.grouping import Grouping

RULES = ("abadi", "auto-s", "auto-v")
ALLOCATIONS = ("uniform", "dimension")
AUTO_S_GAMMA = 0.01


@dataclass(frozen=True)
class ClipPlan:
    """Groups, one threshold per group and the clip rule: the whole of the mechanism but its noise.

    Per example and group m with gradient norm n the factor is

    * ``abadi``: min(1, R_m / n);
    * ``auto-s``: R_m / (n + 0.01) (arXiv 2206.07136; 0.01 is its gamma);
    * ``auto-v``: R_m / n, and 0 where n = 0.

    Attributes:
        grouping: which sites share a factor.
        max_grad_norm: R, the norm that the thresholds are allotted from.
        rule: ``abadi``, ``auto-s`` or ``auto-v``.
        allocation: ``uniform`` R / sqrt(M); ``dimension`` R sqrt(d_m / sum d) with d_m the
            trainable numbers of group m (arXiv 2310.00098); or the M thresholds themselves.

    Raises:
        GroupSearchError: for an unknown rule or allocation, or a threshold that is not positive.
    """

    grouping: Grouping
    max_grad_norm: float = 1.0
    rule: str = "abadi"
    allocation: str | Sequence[float] = "uniform"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise GroupSearchError(f"Expected rule to be one of {', '.join(RULES)}, found {self.rule!r}.")
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise GroupSearchError(f"Expected max_grad_norm > 0, found {self.max_grad_norm}.")
        if isinstance(self.allocation, str):
            if self.allocation not in ALLOCATIONS:
                raise GroupSearchError(
                    f"Expected allocation to be one of {', '.join(ALLOCATIONS)} or a sequence of "
                    f"{self.grouping.groups} thresholds, found {self.allocation!r}."
                )
            return
        given = tuple(float(r) for r in self.allocation)
        object.__setattr__(self, "allocation", given)
        if len(given) != self.grouping.groups or not all(math.isfinite(r) and r > 0 for r in given):
            raise GroupSearchError(
                f"Expected {self.grouping.groups} positive thresholds, one per group, found {given}."
            )

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        """R_m of every group, group 0 first."""
        if self.allocation == "uniform":
            return (self.max_grad_norm / math.sqrt(self.grouping.groups),) * self.grouping.groups
        if self.allocation == "dimension":
            sizes = [sum(s.parameter_count for s in self.grouping.sites[lo:hi]) for lo, hi in self.grouping.spans]
            return tuple(self.max_grad_norm * math.sqrt(size / sum(sizes)) for size in sizes)
        return tuple(float(r) for r in self.allocation)

    @cached_property
    def sensitivity(self) -> float:
        """L2 sensitivity of the clipped sum to adding or removing one example.

        sqrt(sum R_m^2) where every parameter's sites lie in one group. Groups that share a
        parameter can push it the same way, so their thresholds are added before squaring;
        groups that share parameters through others count as sharing (a safe bound, exact
        when one parameter is common to them all).
        """
        bounds: dict[int, float] = {}
        for group, component in enumerate(self._components()):
            bounds[component] = bounds.get(component, 0.0) + self.thresholds[group]
        return math.sqrt(sum(bound * bound for bound in bounds.values()))

    def _components(self) -> list[int]:
        """For each group the smallest group it is connected to through shared parameters."""
        component = list(range(self.grouping.groups))
        owner: dict[str, int] = {}
        for index, site in enumerate(self.grouping.sites):
            for parameter in site.parameters:
                mine = component[self.grouping.group_of(index)]
                other = component[owner.setdefault(parameter, self.grouping.group_of(index))]
                low, high = min(mine, other), max(mine, other)
                component = [low if c == high else c for c in component]
        return component
