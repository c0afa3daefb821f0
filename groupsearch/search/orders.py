"""What is to be evaluated next, as a trial of Optuna's: queued, begun, or begun anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from groupsearch.search.choice import Choice
from groupsearch.search.space import Space


@runtime_checkable
class Proposer(Protocol):
    """A sampler that chooses without asking for one parameter after the other."""

    def propose(self, trials: Sequence[FrozenTrial], number: int) -> Choice | None:
        """What the trial of this number is to be, given the others; None while nothing is known."""


@dataclass(frozen=True)
class Order:
    """A trial that this worker runs.

    Attributes:
        choice: what it is to be.
        trial_id: what the storage calls it.
        trial: the same as Optuna's samplers know it, or None: ours needs nothing of it.
    """

    choice: Choice
    trial_id: int
    trial: Trial | None = None


def trial_of(space: Space, choice: Choice, state: TrialState, *, sparse: bool) -> FrozenTrial:
    """A trial that is this choice; ``sparse`` without a parameter for a cut that is not made.

    Optuna's samplers learn from parameters and need them all. Ours learns from the choice, and of 100 allowed
    cuts few are made: a database takes three statements for every parameter.
    """
    parameters = {name: value for name, value in space.parameters(choice).items() if not sparse or value != 0}
    distributions = space.distributions()
    return create_trial(
        state=state,
        params=parameters,
        distributions={name: distributions[name] for name in parameters},
        user_attrs=choice.to_json(),
        constraints=space.limits(choice.boundaries),
    )


def begun_anew(trial: FrozenTrial) -> FrozenTrial:
    """The same to be begun anew; its parameters need not be suggested again."""
    return create_trial(
        state=TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=Choice.from_json(trial.user_attrs).to_json(),
        constraints=trial.constraints,
    )
