"""How far one example can move the sums that clipping groups share: exact, for any sharing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
