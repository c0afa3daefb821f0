"""The watch in training: now and then one example of a real physical batch is taken alone and compared.

It looks at a batch as it is handed out, before the loop has it: at one example by plain autograd,
and at the whole batch through the engine's own capture, under draws made alike. Nothing is summed,
and model, gradients and generators are left as they were. When it looks, and at which example, is
drawn from the operating system's entropy, independent of data and of every seed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from random import SystemRandom
from typing import Any

import torch

from groupsearch.engine.arithmetic import ieee
from groupsearch.engine.truth.check import CheckSubject, Reading, in_double, mode_of
from groupsearch.engine.truth.comparison import (
    Difference,
    Truth,
    compare,
    compare_losses,
    described,
    first_difference,
    tolerance_of,
)
from groupsearch.engine.truth.draws import alike
from groupsearch.engine.truth.leftovers import left_as_it_was
from groupsearch.errors import GroupSearchError, TruthError, is_out_of_memory
from groupsearch.plan.checked import Checked, Watched
from groupsearch.plan.clipping import ClipPlan
from groupsearch.workloads.batches import count_examples, map_tensors, take_examples

RATE = 0.01
MOST_BATCHES = (
    2.0  # that a look may take the time of, or it is made less often: a rate of 0.01 costs 2 % of time at most
)
_SLACK = 3.0  # a false alarm ends a training


class Watch:
    """Looks at some of the physical batches of a training.

    Args:
        subject: model, loss, and the engine's own capture turned to another receiver.
        aside: lets the model run for a while as if there were no engine.
        reading: how the engine reads a model, for a copy of it.
        rate: probability with which a batch is looked at, less below 1 where that takes longer than two batches do;
            the first in a mode not seen before always is.
        mode: that the model was checked in.
    """

    def __init__(
        self,
        subject: CheckSubject,
        aside: Callable[[], AbstractContextManager[None]],
        reading: Reading,
        rate: float,
        mode: str | None,
    ) -> None:
        if not 0 <= rate <= 1:
            raise GroupSearchError(f"Expected the watch's rate between 0 and 1, found {rate}.")
        self._subject = subject
        self._aside = aside
        self._reading = reading
        self._entropy = SystemRandom()
        self._modes = {mode}
        self._fault: str | None = None
        self._began: float | None = None
        self.watched = Watched(rate)

    def see(self, batch: Any) -> None:
        """A physical batch is about to be handed out."""
        if self._began is None:
            self._began = time.perf_counter()
        self.watched = replace(self.watched, batches=self.watched.batches + 1)
        if self._fault is not None or not self._is_due():
            return
        begin = time.perf_counter()
        try:
            self._look(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.watched = replace(self.watched, skipped=self.watched.skipped + 1)
        seconds = self.watched.seconds + time.perf_counter() - begin
        self.watched = replace(self.watched, seconds=seconds)

    def check(self) -> None:
        """Refuse the step after a difference was seen.

        Raises:
            TruthError: naming the layer.
        """
        if self._fault is not None:
            raise TruthError(self._fault)

    def _is_due(self) -> bool:
        rate, mode = self.watched.rate, mode_of(self._subject.model)
        if rate and mode not in self._modes:
            self._modes.add(mode)
            return True
        return self._entropy.random() < (rate * min(1.0, MOST_BATCHES / self._cost()) if rate < 1 else 1)

    def _cost(self) -> float:
        """How many batches take as long as a look; 1 while nobody knows."""
        seen, looks = self.watched, self.watched.runs + self.watched.skipped
        if not looks or self._began is None or seen.batches < 2:
            return 1.0
        training = time.perf_counter() - self._began - seen.seconds
        return (seen.seconds / looks) / max(training / (seen.batches - 1), 1e-9) or 1.0

    def _look(self, batch: Any) -> None:
        model = self._subject.model
        device = next(model.parameters()).device
        batch = map_tensors(lambda tensor: tensor.to(device), batch)
        size = count_examples(batch)
        if not size:
            return
        number = self._entropy.randrange(size)
        with (
            left_as_it_was(model) as memory,
            alike(),
            ieee(),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            example = take_examples(batch, (number,))
            with self._aside():
                truth = self._subject.alone(example)
            memory.put_back()
            worst, fault = self._compared(self._subject, batch, number, truth, tolerance_of(model) * _SLACK)
            memory.put_back()
            if fault is not None:
                with self._aside():
                    self._fault = self._confirmed(fault, batch, number)
        found = 0.0 if fault is not None and self._fault is None else worst
        self.watched = replace(self.watched, runs=self.watched.runs + 1, worst=max(self.watched.worst, found))

    def _compared(
        self, subject: CheckSubject, batch: Any, number: int, truth: Truth, tolerance: float
    ) -> tuple[float, Difference | None]:
        booked = subject.booked(batch, examples=[number])
        worst, fault = compare(booked, {number: truth}, tolerance)
        return worst, compare_losses(booked.losses, {number: truth}, tolerance) or fault

    def _confirmed(self, fault: Difference, batch: Any, number: int) -> str | None:
        """The message of a difference; None where float64 has none, which makes it rounding."""
        model, loss = self._subject.model, self._subject.loss
        plain = replace(self._subject, attach=self._reading.attached)

        def again(subject: CheckSubject, convert: Callable[[Any], Any]) -> Difference | None:
            wide = convert(batch)
            truth = subject.alone(take_examples(wide, (number,)))
            return self._compared(subject, wide, number, truth, tolerance_of(model) / 10)[1]

        found = in_double(plain, again)
        if found is not None and found[0] is None:
            return None
        fault = found[0] or fault if found is not None else fault
        examples = [take_examples(batch, (number,))]
        begins = first_difference(lambda b: loss(model, b), model, batch, examples, [number])
        message = described(fault, "several examples", begins, told=False)
        return (
            f"The watch in training found that {message[0].lower()}{message[1:]} The step that would have released it "
            "is refused, and the model is that of the last step. Steps before this one may have been wrong too: do not "
            "count on their guarantee."
        )


# -- What the engine does and how far it was checked, as a value with a readable text --------------

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
