"""Choices that change what a step costs and never what it computes (to rounding)."""

from __future__ import annotations

from dataclasses import dataclass

from groupsearch.errors import GroupSearchError

NORM_METHODS = ("mixed", "ghost", "instantiate")


@dataclass(frozen=True)
class EngineOptions:
    """How the Book-Keeping engine (arXiv 2210.00038) does its work.

    Attributes:
        norm_method: ``ghost`` takes norms from Gram matrices, ``instantiate`` forms
            per-example gradients and keeps them until the group is closed, ``mixed`` chooses per
            site: it instantiates where that keeps no more than the input and the output gradient
            would, d p <= T (d + p). That is also the faster way there (2 B T d p operations against
            2 B T^2 (d + p) + 2 B T d p), and it instantiates more often than the rule of arXiv
            2210.00038, 2 T^2 > d p, which counts only the space of the norms themselves. Embeddings
            always go by the rule of the paper.
    """

    norm_method: str = "mixed"

    def __post_init__(self) -> None:
        if self.norm_method not in NORM_METHODS:
            raise GroupSearchError(
                f"Expected norm_method to be one of {', '.join(NORM_METHODS)}, found {self.norm_method!r}."
            )

    def use_ghost(self, positions: int, inputs: int, outputs: int) -> bool:
        """Whether a matrix site of T positions, d inputs and p outputs (of one channel group) takes the ghost norm."""
        if self.norm_method == "mixed":
            return positions * (inputs + outputs) < inputs * outputs
        return self.norm_method == "ghost"
