"""Whether the model in training is the one that its grouping was made for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from groupsearch.errors import GroupSearchError
from groupsearch.grouping import Grouping
from groupsearch.trace import Site


def check_sites(grouping: Grouping, observed: Sequence[Site]) -> None:
    """Raise unless a model's sites are, by name, parameters and order, those of the grouping.

    A plan tells which parameters share a threshold by the sites of the trace: with other sites in
    the model its groups, and with them the sensitivity that the noise is scaled to, would be wrong.
    Numbers of positions may differ, as batches of text do.

    Args:
        grouping: what the model is to be trained with.
        observed: what :func:`groupsearch.tracer.observe_sites` found in the model.

    Raises:
        GroupSearchError: naming the first site that differs.
    """
    for number, (expected, found) in enumerate(zip_longest(grouping.sites, observed)):
        if _told(expected) != _told(found):
            raise GroupSearchError(
                f"Expected the model to have the {len(grouping.sites)} sites that the grouping was made for, found "
                f"{len(observed)}, and at site {number} {_told(found)} instead of {_told(expected)}. Profile the "
                f"model again with the settings that it is trained with, and make the grouping from that trace."
            )


def _told(site: Site | None) -> str:
    return "none" if site is None else f"{site.name} (parameters {', '.join(site.parameters)})"
