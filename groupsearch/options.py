"""Choices that change what a step costs and never what it computes (to rounding)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from groupsearch.errors import GroupSearchError

SITE_METHODS = ("ghost", "instantiate", "recompute")
NORM_METHODS = ("mixed", *SITE_METHODS)
FORMS = ("book", "replay-forward", "replay")
_EVERY = re.compile(r"every:([1-9]\d*)")


@dataclass(frozen=True)
class EngineOptions:
    """How the Book-Keeping engine (arXiv 2210.00038) does its work.

    Attributes:
        norm_method: ``ghost`` takes norms from Gram matrices and keeps input and output gradient until the
            group is closed; ``instantiate`` forms per-example gradients and keeps those instead; ``recompute``
            forms them too, a few examples at a time, drops each once its norm is known and keeps what
            ``ghost`` keeps. ``mixed`` chooses per site between the first two: it instantiates where that keeps no
            more than the input and the output gradient would, d p <= T (d + p). That is also the faster way
            there (2 B T d p operations against 2 B T^2 (d + p) + 2 B T d p), and it instantiates more often
            than the rule of arXiv 2210.00038, 2 T^2 > d p, which counts only the space of the norms
            themselves. Embeddings always go by the rule of the paper.
        methods: what takes the place of ``norm_method`` for some weights, by the canonical name of the weight
            (the first of a site's ``parameters``); every use of a weight goes by one method. Only weights that
            are used as a matrix (linear layers, convolutions, attention, recurrent layers) have the choice.
        replay: whose part of the book is not kept but run again when a group is closed: ``none``, ``all`` repeated
            blocks, the last N of them (those that keep it longest), or modules by name with the form of each. A
            module must be a function of its tensor inputs and its parameters. The forms: ``book`` keeps every site's
            input and output gradient; ``replay-forward`` every site's output gradient, and runs the module forward
            again for the inputs; ``replay`` the module's own inputs and output gradients alone, and runs it forward
            and backward. Sites that share a parameter within a group stay in the book, as do per-example gradients
            that are small (of norms, biases and bare parameters).
    """

    norm_method: str = "mixed"
    methods: Mapping[str, str] = field(default_factory=dict, hash=False)
    replay: str | int | Mapping[str, str] = field(default="none", hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.replay, Mapping):
            wrong = sorted({form for form in self.replay.values() if form not in FORMS})
            if wrong:
                raise GroupSearchError(
                    f"Expected the form of a replayed module to be one of {', '.join(FORMS)}, found {wrong[0]!r}."
                )
        elif isinstance(self.replay, bool) or not (
            self.replay in ("none", "all") or (isinstance(self.replay, int) and self.replay >= 0)
        ):
            raise GroupSearchError(
                "Expected replay to be none, all, a number of blocks, or a form for every module by name, found "
                f"{self.replay!r}."
            )
        for name, method in (("norm_method", self.norm_method), *self.methods.items()):
            allowed = NORM_METHODS if name == "norm_method" else SITE_METHODS
            if method not in allowed:
                raise GroupSearchError(f"Expected {name} to be one of {', '.join(allowed)}, found {method!r}.")

    def method_of(self, weight: str, positions: int, inputs: int, outputs: int) -> str:
        """How the norm of a matrix site is taken: T positions, d inputs and p outputs (of one channel group)."""
        method = self.methods.get(weight, self.norm_method)
        if method == "mixed":
            return "ghost" if positions * (inputs + outputs) < inputs * outputs else "instantiate"
        return method

    def check_weights(self, choosing: Collection[str]) -> None:
        """Raise when a method is given for a weight that has no choice, or is of another model.

        Raises:
            GroupSearchError: naming it.
        """
        unknown = sorted(set(self.methods) - set(choosing))
        if unknown:
            known = f"such as {min(choosing)}" if choosing else "of which this model has none"
            raise GroupSearchError(
                f"Expected norm methods of weights that the model uses as a matrix, {known}, found one for "
                f"{', '.join(unknown)}. Name the first of a site's parameters."
            )


def checkpoint_interval(text: str) -> int:
    """Which repeated blocks are recomputed in the backward pass: one in how many, 0 for none of them.

    Raises:
        GroupSearchError: unless the text is ``none``, ``blocks`` (every one) or ``every:K`` (one in K).

    >>> [checkpoint_interval(text) for text in ("none", "blocks", "every:3")]
    [0, 1, 3]
    """
    if text in ("none", "blocks"):
        return int(text == "blocks")
    found = _EVERY.fullmatch(text)
    if found is None:
        raise GroupSearchError(
            f"Expected checkpoint to be none, blocks, or every:K for one block in K such as every:2, found {text!r}."
        )
    return int(found.group(1))
