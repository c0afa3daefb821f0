"""What it costs in privacy to have compared groupings, said in every result."""

from __future__ import annotations

from dataclasses import dataclass

from groupsearch.errors import GroupSearchError

SELECTION_DATA = ("public", "private")


@dataclass(frozen=True)
class SelectionCost:
    """What choosing among candidates adds to the epsilon of the training that is published.

    Attributes:
        data: ``public`` (or synthetic) or ``private``.
        epsilon: 0 for public data; None where it is not accounted for.
        statement: a sentence for the document and the report.
    """

    data: str
    epsilon: float | None
    statement: str


def adaptive_selection_cost(data: str) -> SelectionCost:
    """What a search costs that learns from the scores before it, as all of ours do.

    Private selection that is accounted for is of another kind, see :mod:`groupsearch.search.privacy`.

    Raises:
        GroupSearchError: when ``data`` is neither ``public`` nor ``private``.
    """
    if data not in SELECTION_DATA:
        raise GroupSearchError(f"Expected selection data to be {' or '.join(SELECTION_DATA)}, found {data!r}.")
    if data == "public":
        return SelectionCost(data, 0.0, "Groupings were compared on public or synthetic data, which costs no privacy.")
    return SelectionCost(
        data,
        None,
        "Groupings were compared on private data by an adaptive search, which no theorem accounts for: the epsilon "
        "stated is that of one training alone, and choosing has cost more. Compare on public or synthetic data to "
        "state an epsilon of the whole.",
    )
