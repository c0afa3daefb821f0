"""How something is allotted to groups, as text or as it is."""

from __future__ import annotations

from collections.abc import Sequence

from groupsearch.clipping import AdaptiveQuantile
from groupsearch.errors import GroupSearchError


def allotment(
    value: str | Sequence[float] | AdaptiveQuantile, names: tuple[str, ...], *, adaptive: bool = False
) -> str | tuple[float, ...] | AdaptiveQuantile:
    """A name, a number for each group, or ``adaptive:0.7`` where that is one.

    Raises:
        GroupSearchError: for anything else.

    >>> allotment("0.5,1", ("uniform",)), allotment("adaptive:0.7", (), adaptive=True).quantile
    ((0.5, 1.0), 0.7)
    """
    if isinstance(value, AdaptiveQuantile):
        return value
    if not isinstance(value, str):
        return tuple(map(float, value))
    if value in names:
        return value
    name, colon, quantile = value.partition(":")
    try:
        if adaptive and name == "adaptive":
            return AdaptiveQuantile(float(quantile)) if colon else AdaptiveQuantile()
        return tuple(float(part) for part in value.split(","))
    except (ValueError, GroupSearchError) as error:
        known = ", ".join((*names, *(("adaptive", "adaptive:0.7") if adaptive else ())))
        raise GroupSearchError(
            f"Expected {known} or a number for each group, such as 0.5,1,0.8, found {value!r}."
        ) from error
