"""Grouping: where the sites of a trace are cut into contiguous clipping groups."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from groupsearch.errors import GroupSearchError
from groupsearch.plan import partition
from groupsearch.plan.checked import Checked
from groupsearch.plan.trace import Site, Trace
from groupsearch.units import parse_bytes

FORMS = "all-layer, layer-wise, block-wise, uniform:4, best:4, within:12GiB or boundaries such as 3,17,40"


@dataclass(frozen=True)
class Grouping:
    """A cut of L sites into M = len(boundaries) + 1 contiguous groups.

    Attributes:
        boundaries: sorted; boundary b cuts between site b-1 and site b, 1 <= b <= L-1.
        sites: the L sites that are grouped.
        checked: how the engine was held to plain autograd when the sites were traced; None where it was not.

    Raises:
        GroupSearchError: when a boundary lies outside the model, is repeated or out of order.
    """

    boundaries: tuple[int, ...]
    sites: tuple[Site, ...] = field(repr=False, compare=False)
    checked: Checked | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        last = len(self.sites) - 1
        outside = [b for b in self.boundaries if not 1 <= b <= last]
        if outside:
            raise GroupSearchError(
                f"Expected boundaries between 1 and {last} (the model has {last + 1} sites), found "
                f"{', '.join(map(str, outside))}. The page that `groupsearch report` draws of a profile lists the "
                "sites with their numbers."
            )
        if any(left >= right for left, right in pairwise(self.boundaries)):
            raise GroupSearchError(
                f"Expected boundaries in increasing order without repeats, found {self.boundaries}. Sort them first."
            )

    @classmethod
    def all_layer(cls, trace: Trace) -> Grouping:
        """One group: one clipping factor for the whole model."""
        return cls((), trace.sites, trace.checked)

    @classmethod
    def layer_wise(cls, trace: Trace) -> Grouping:
        """One group per layer (arXiv 2310.19215, section 3): a cut wherever the layer changes."""
        return cls(trace.layer_boundaries, trace.sites, trace.checked)

    @classmethod
    def block_wise(cls, trace: Trace) -> Grouping:
        """One group per repeated block; what stands outside the blocks has groups of its own."""
        return cls(trace.block_boundaries, trace.sites, trace.checked)

    @classmethod
    def uniform(cls, trace: Trace, groups: int) -> Grouping:
        """``groups`` groups with as nearly as possible the same number of sites.

        Raises:
            GroupSearchError: when there are fewer sites than groups, or no group at all.
        """
        _check_groups(trace, groups)
        return cls(tuple(round(m * trace.length / groups) for m in range(1, groups)), trace.sites, trace.checked)

    @classmethod
    def from_boundaries(cls, trace: Trace, boundaries: Iterable[int]) -> Grouping:
        """The grouping with these boundaries, in any order.

        Raises:
            GroupSearchError: when one is repeated or outside the model.
        """
        return cls(tuple(sorted(int(b) for b in boundaries)), trace.sites, trace.checked)

    @classmethod
    def parse(cls, trace: Trace, text: str) -> Grouping:
        """The grouping a text names: all-layer, layer-wise, block-wise, uniform:4, best:4, within:12GiB or 3,17,40.

        Raises:
            GroupSearchError: when the text is none of these.
            BudgetError: when ``within:`` names less than the floor.
        """
        name, _, argument = text.strip().partition(":")
        styles = {"all-layer": cls.all_layer, "layer-wise": cls.layer_wise, "block-wise": cls.block_wise}
        if name in styles and not argument:
            return styles[name](trace)
        if name == "within" and argument:
            return fewest_groups(trace, parse_bytes(argument))
        if name in ("uniform", "best") and argument.isdigit():
            return cls.uniform(trace, int(argument)) if name == "uniform" else least_peak(trace, int(argument))
        numbers = [part.strip() for part in text.split(",")]
        if all(part.isdigit() for part in numbers):
            return cls.from_boundaries(trace, map(int, numbers))
        raise GroupSearchError(f"Expected a grouping as {FORMS}, found {text!r}.")

    @property
    def groups(self) -> int:
        """M, the number of groups."""
        return len(self.boundaries) + 1

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(lo, hi) of every group: it holds the sites lo..hi-1; group 0 is on the input side."""
        return tuple(pairwise((0, *self.boundaries, len(self.sites))))

    def group_of(self, site: int) -> int:
        """The group that site number ``site`` is in."""
        return bisect_right(self.boundaries, site)

    def __str__(self) -> str:
        return ",".join(map(str, self.boundaries)) or "all-layer"


def least_peak(trace: Trace, groups: int) -> Grouping:
    """The grouping of exactly ``groups`` groups with the least estimated peak (exact: dynamic program).

    Raises:
        GroupSearchError: when there are fewer sites than groups, or no group at all.
    """
    _check_groups(trace, groups)
    return Grouping(partition.least_peak(trace, groups), trace.sites, trace.checked)


def fewest_groups(trace: Trace, budget_bytes: int) -> Grouping:
    """The fewest groups whose estimated peak is within ``budget_bytes`` (exact: dynamic program).

    Raises:
        BudgetError: when the budget is below the floor; the message states the floor.
    """
    return Grouping(partition.fewest_groups(trace, budget_bytes), trace.sites, trace.checked)


def named_groupings(trace: Trace, uniform: Sequence[int] = ()) -> dict[str, Grouping]:
    """The fixed styles by name, each distinct set of boundaries once."""
    named = {
        "all-layer": Grouping.all_layer(trace),
        "layer-wise": Grouping.layer_wise(trace),
        "block-wise": Grouping.block_wise(trace),
        **{f"uniform:{k}": Grouping.uniform(trace, k) for k in uniform if k <= trace.length},
    }
    seen: dict[tuple[int, ...], str] = {}
    for name, grouping in named.items():
        seen.setdefault(grouping.boundaries, name)
    return {name: named[name] for name in seen.values()}


def _check_groups(trace: Trace, groups: int) -> None:
    if not 1 <= groups <= trace.length:
        raise GroupSearchError(
            f"Expected between 1 and {trace.length} groups (the model has {trace.length} sites), found {groups}."
        )
