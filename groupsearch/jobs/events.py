"""What a job tells while it runs, and how an interrupt leaves it. As text every event is one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from groupsearch.documents import Document, Profile
from groupsearch.units import format_bytes

if TYPE_CHECKING:
    from groupsearch.search import Event as Evaluation

LOSS = "negative loss"  # what short runs are judged by
_DONE = {"short": "Short run", "full": "Full run", "replication": "Further seed"}


@dataclass(frozen=True)
class Begun:
    """The request makes sense, and nothing has been run yet; ``header`` is the document so far."""

    header: Mapping[str, object]

    def __str__(self) -> str:
        return f"The {self.header['kind']} begins"


@dataclass(frozen=True)
class Said:
    """A sentence for a person."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Advanced:
    """So much of what is being done is done; ``total`` is None where nobody knows how much it will be."""

    stage: str
    item: str
    done: int
    total: int | None

    def __str__(self) -> str:
        return f"{self.item or self.stage} ({self.done}{'' if self.total is None else f'/{self.total}'})"


@dataclass(frozen=True)
class Profiled:
    """What a search starts from: a step was traced and its estimates were checked."""

    profile: Profile

    def __str__(self) -> str:
        return self.profile.summary


@dataclass(frozen=True)
class Evaluated:
    """A training of a search ended: with a value, or with the reason why there is none."""

    event: Evaluation
    metric_name: str

    def __str__(self) -> str:
        event = self.event
        name = LOSS if event.phase == "short" else self.metric_name
        value = f"failed ({event.reason})" if event.value is None else f"{name} {event.value:.4f}"
        return f"{event.done}/{event.total} {described(event)}: {value}, {format_bytes(event.peak_bytes)}"


def described(event: Evaluation) -> str:
    """What an event of a search is about, as in ``Full run: 4 groups, seed 1``."""
    groups = f"{len(event.boundaries) + 1} groups" if event.boundaries else "all-layer"
    seed = "" if event.seed is None else f", seed {event.seed}"
    return f"{_DONE[event.phase]}: {', '.join((groups, *event.choice.options))}{seed}"


Event = Begun | Said | Advanced | Profiled | Evaluated
Notify = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Tell nobody."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a job ran.

    Attributes:
        document: what was done until then; None where there is nothing to keep.
    """

    def __init__(self, message: str, document: Document | None = None) -> None:
        super().__init__(message)
        self.document = document
