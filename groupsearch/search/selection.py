"""What it costs in privacy to have compared groupings, said in every result."""

from __future__ import annotations

from groupsearch.errors import GroupSearchError
from groupsearch.privacy import SelectionCost
from groupsearch.units import format_at_most, format_number

SELECTION_DATA = ("public", "private")


def adaptive_selection_cost(data: str) -> SelectionCost:
    """What a search costs that learns from the scores before it, as all of ours do.

    Private selection that is accounted for is of another kind, see :mod:`groupsearch.search.privacy`.

    Raises:
        GroupSearchError: when ``data`` is neither ``public`` nor ``private``.
    """
    if data not in SELECTION_DATA:
        raise GroupSearchError(f"Expected selection data to be {' or '.join(SELECTION_DATA)}, found {data!r}.")
    if data == "public":
        statement = "Groupings were trained and compared on public or synthetic data, which costs no privacy."
        return SelectionCost(data, 0.0, statement)
    return SelectionCost(
        data,
        None,
        "Groupings were compared on private data by an adaptive search, which no theorem accounts for: the epsilon "
        "stated is that of one training alone, and choosing has cost more. Runs of one seed share their noise, so that "
        "not even their own epsilons add up. Search on public or synthetic data, or "
        "with --private-selection, to state an epsilon of the whole.",
    )


def repeated_selection_cost(
    candidates: int, mean: float, delta: float, epsilon: float, with_training: float
) -> SelectionCost:
    """What it costs to have chosen by repeat-and-select on private data, see :mod:`groupsearch.search.privacy`.

    Args:
        candidates: how many there were to be drawn from.
        mean: how many were expected to be drawn.
        delta: the other half of both budgets.
        epsilon: of choosing, the trainings that were done for it included.
        with_training: of choosing and of training the chosen one anew.
    """
    return SelectionCost(
        "private",
        epsilon,
        f"Repeat-and-select (arXiv 2110.03620): a random number of groupings, {format_number(mean)} expected, was "
        f"drawn from {candidates} that were fixed beforehand, each was trained once, and the best by a noisy score is "
        f"all that is published. Choosing and the trainings for it cost epsilon {format_at_most(epsilon)} together, at "
        f"delta {format_at_most(delta)}; with the chosen one trained anew on the same data it is "
        f"{format_at_most(with_training)}.",
        with_training,
    )
