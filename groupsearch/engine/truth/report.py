"""What the engine does and how far it was checked, as a value with a readable text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from groupsearch.checked import Checked, Watched
from groupsearch.clipping import ClipPlan

_UNCHECKED = (
    "Not checked: give make_private the loss, with batches=PoissonBatches(...) or a sample of the data, to have the "
    "engine held to plain autograd before the first step."
)
_UNWATCHED = "No watch in training: it needs the loss and batches=PoissonBatches(...), and a rate above 0."


@dataclass(frozen=True)
class SiteReport:
    """A site, the group that it is clipped in, and how its norm is taken."""

    name: str
    kind: str
    layout: str
    method: str
    group: int


@dataclass(frozen=True)
class EngineReport:
    """What an engine does and what is known of its being right.

    Attributes:
        sites: all of them, in order.
        traced: the check of the model that the plan was made from; None if there was none.
        checked: the check of this model, before its first private step; None if there was none.
        watched: what the watch in training did so far; None where there is none.
    """

    sites: tuple[SiteReport, ...]
    traced: Checked | None
    checked: Checked | None
    watched: Watched | None

    @classmethod
    def of(
        cls, plan: ClipPlan, methods: Mapping[str, str], checked: Checked | None, watched: Watched | None
    ) -> EngineReport:
        """The report of a plan; ``methods`` overrides how the norms of weights are taken."""
        grouping = plan.grouping
        sites = tuple(
            SiteReport(s.name, s.kind, s.layout, methods.get(s.parameters[0], s.method), grouping.group_of(i))
            for i, s in enumerate(grouping.sites)
        )
        return cls(sites, grouping.checked, checked, watched)

    def __str__(self) -> str:
        kinds = Counter(f"{site.kind} by {site.method}" for site in self.sites)
        groups = len({site.group for site in self.sites})
        lines = [
            f"{len(self.sites)} sites in {groups} group{'' if groups == 1 else 's'}: "
            + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
            "",
            "Before the first step: " + (str(self.checked) if self.checked else _UNCHECKED),
        ]
        if self.traced is not None:
            lines += ["", f"When the plan was traced: {self.traced}"]
        return "\n".join([*lines, "", str(self.watched) if self.watched else _UNWATCHED])
