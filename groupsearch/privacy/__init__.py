"""What is stated of a private training: one value and its words, and whether what is seen fits them. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from groupsearch.units import format_at_most, format_count, format_number

# -- PrivacyStatement: what a training costs in privacy and what that means, as one value with one set of words
#
# The engine, documents, terminal, pages and docs take their sentences from here and nowhere else.

NEIGHBOURS = (
    "two data sets of the same, public number of examples, in one of which one example contributes nothing (zero-out)"
)
COVERED = "the weights after every step, and what is computed from them and from public data alone"
NOT_COVERED = (
    "exact numbers about private examples, such as losses, metrics, norms and sizes of batches",
    "choices made by a look at them: settings, stopping, retrying, leaving batches out",
    "what else was made from the data: buffers, vocabularies, normalisation",
    "time, memory and failures",
)
_DRAWN = {
    "poisson": "on a Poisson sample (every example enters with probability {rate}, {batch} expected)",
    "fixed-size": "on a random subset of {batch} examples (rate {rate})",
    "shuffled": "on the next {batch} examples of data permuted every epoch (rate {rate}, no amplification)",
}
SECRET = "Noise and batches were drawn in secret, from no seed that is known."
EXPERIMENT = "This is an experiment: noise or batches came from a seed, and epsilon holds for nobody who knows it."


@dataclass(frozen=True)
class SelectionCost:
    """What choosing among candidates adds to the epsilon of the training that is published.

    Attributes:
        data: ``public`` (or synthetic), when all that was trained on and judged by is, or ``private``.
        epsilon: of choosing, with the trainings done for it; 0 for public data; None where it is not accounted for.
        statement: a sentence for the document and the report.
        whole: epsilon of choosing and of training what was chosen anew; None where that is not accounted for, or for
            public data, where it is the training's own.
    """

    data: str
    epsilon: float | None
    statement: str
    whole: float | None = None


@dataclass(frozen=True)
class PrivacyStatement:
    """What the steps of a training cost, for whom that holds, and what it is about.

    Attributes:
        epsilon: of all steps, at ``delta``; infinite without noise. Of one training where several were compared.
        delta: the other half.
        examples: n, public.
        sampling: how batches were drawn, of :data:`groupsearch.privacy.accounting.SAMPLINGS`.
        phases: noise multiplier, sampling rate and steps of every stretch of equal steps, in order.
        accountant: what epsilon is computed by, of :data:`groupsearch.privacy.accounting.ACCOUNTANTS`.
        seeded: whether noise or batches came from a seed or from a generator that the caller gave.
        selection: what choosing this training among others costs; None where nothing was chosen.
        given_up: logical batches that were summed and given up without a step, which epsilon does not cover.
    """

    epsilon: float
    delta: float
    examples: int
    sampling: str
    phases: tuple[tuple[float, float, int], ...]
    accountant: str
    seeded: bool = False
    selection: SelectionCost | None = None
    given_up: int = 0

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(steps for _, _, steps in self.phases)

    @property
    def whole(self) -> float | None:
        """Epsilon of all that was done with the private data, choosing included; None where nobody can tell."""
        if self.selection is None or self.selection.data == "public":
            return self.epsilon
        return self.selection.whole

    @property
    def brief(self) -> str:
        """Epsilon and delta, of the whole where it is known, in the middle of a sentence."""
        delta = f"at delta {format_at_most(self.delta)}"
        mark = " in an experiment with a known seed" if self.seeded else ""
        if self.whole is None:
            return f"epsilon {format_at_most(self.epsilon)} {delta} of one training alone, choosing left out{mark}"
        if self.whole != self.epsilon:
            one = format_at_most(self.epsilon)
            return f"epsilon {format_at_most(self.whole)} {delta} of the whole ({one} of one training){mark}"
        return f"epsilon {format_at_most(self.whole)} {delta}{mark}"

    @property
    def sentences(self) -> tuple[str, ...]:
        """Everything that is stated, the cost of the whole first."""
        lead = f"{self.brief[0].upper()}{self.brief[1:]}, for {format_count(self.examples)} examples."
        if math.isinf(self.epsilon):
            lead = "No privacy: without noise epsilon is infinite."
        return tuple(
            sentence
            for sentence in (
                lead,
                self.selection.statement if self.selection is not None else "",
                self._delta(),
                f"Neighbours are {NEIGHBOURS}.",
                *map(self._phase, self.phases),
                f"Covered: {COVERED}. Not covered: {'; '.join(NOT_COVERED)}.",
                EXPERIMENT if self.seeded else SECRET,
                self._given_up(),
            )
            if sentence
        )

    def __str__(self) -> str:
        return " ".join(self.sentences)

    def to_json(self) -> dict[str, Any]:
        """The fields, what they mean, and the sentences, as plain types."""
        meaning = {"neighbours": NEIGHBOURS, "covered": COVERED, "not_covered": list(NOT_COVERED)}
        return {**asdict(self), **meaning, "sentences": list(self.sentences)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PrivacyStatement:
        """What :meth:`to_json` gave, also after JSON, which has no infinity."""
        selection = data.get("selection")
        return cls(
            epsilon=math.inf if data["epsilon"] is None else float(data["epsilon"]),
            delta=float(data["delta"]),
            examples=int(data["examples"]),
            sampling=str(data["sampling"]),
            phases=tuple((float(noise), float(rate), int(steps)) for noise, rate, steps in data["phases"]),
            accountant=str(data["accountant"]),
            seeded=bool(data["seeded"]),
            selection=None if selection is None else SelectionCost(**selection),
            given_up=int(data["given_up"]),
        )

    def _delta(self) -> str:
        share = self.delta * self.examples
        if share <= 1e-2 * (1 + 1e-9):
            return ""
        return f"Delta is large: {format_number(share)}/n, where at most 0.01/n is advised."

    def _phase(self, phase: tuple[float, float, int]) -> str:
        noise, rate, steps = phase
        drawn = _DRAWN[self.sampling].format(rate=format_number(rate), batch=format_number(rate * self.examples, 4))
        count = f"{format_count(steps)} step{'' if steps == 1 else 's'}"
        return f"{count} of noise multiplier {format_number(noise)}, each {drawn}; accountant {self.accountant}."

    def _given_up(self) -> str:
        if not self.given_up:
            return ""
        batches = "1 logical batch was" if self.given_up == 1 else f"{format_count(self.given_up)} logical batches were"
        return (
            f"{batches} summed and given up without a step: epsilon leaves that out, and holds if no data decided it."
        )


_VALIDATION = "exact numbers of the validation data, which have no privacy of their own"
NOT_PRIVATE = {
    "train": {"metric": _VALIDATION, "curve": _VALIDATION, "step_seconds": "moves with the sizes of the batches"},
    "tracked": {"tracked": "norms, clipped shares and losses of training examples, exact"},
    "search": {
        "candidates, comparisons, evidence, correlations and training.curves": _VALIDATION,
        "cost": "seconds move with the sizes of the batches, and what was trained follows from scores",
    },
}


def not_private_sentence(parts: Mapping[str, str]) -> str:
    """The part ``not_private`` of a document, which says what of it is exact, in a sentence; empty where nothing is."""
    listed = "; ".join(f"{name}: {why}" for name, why in sorted(parts.items()))
    return f"Not private, to be kept as safe as the data: {listed}." if listed else ""
