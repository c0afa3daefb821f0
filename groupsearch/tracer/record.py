"""trace_model: one step of the engine with every site a group of its own, written down as a Trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from groupsearch.engine.arrival import Arrival
from groupsearch.engine.book import Book
from groupsearch.engine.entries import Entry
from groupsearch.engine.noise import Gaussians, add_noises_
from groupsearch.engine.truth.draws import USUAL, alike
from groupsearch.errors import UnsupportedModelError, is_out_of_memory
from groupsearch.trace import Booked, Site, Trace, weights_with_choice
from groupsearch.tracer.crossing import blueprint, cross_terms
from groupsearch.tracer.events import step_events
from groupsearch.tracer.fake import NEEDS_VALUES
from groupsearch.tracer.instants import Hook, cut_instants
from groupsearch.tracer.sites import (
    Examined,
    Observed,
    as_sites,
    check_all_seen,
    check_same_sites,
    observe_pass,
    observed,
    settle,
)
from groupsearch.tracer.step import Stage, StepSettings
from groupsearch.workloads.batches import first_examples


@dataclass
class StepRecorder:
    """Receives arrivals, closes every site at once and remembers where in the log it all happened.

    What it remembers is the last micro-batch, and of those before it the hooks.
    """

    stage: Stage
    settings: StepSettings
    arrivals: list[Observed] = field(default_factory=list)
    hooks: list[Hook] = field(default_factory=list)
    passes: list[list[Hook]] = field(default_factory=list)
    blueprints: list[Callable[[], Entry]] = field(default_factory=list)
    start: int = 0
    carried_bytes: int = 0

    def __post_init__(self) -> None:
        self._sizes = {name: p.numel() for name, p in self.stage.model.named_parameters()}
        self._book = Book(lambda group, norm_B: torch.ones_like(norm_B), observer=self)
        self._log = self.stage.live.log
        self._summed = self._summed_bytes = 0

    def begin(self) -> None:
        """A micro-batch begins; the clipped sums of those before it stay."""
        self.hooks = []
        self.passes.append(self.hooks)
        self.arrivals.clear()
        self.blueprints.clear()
        self.start, self.carried_bytes = len(self._log), self._sums_bytes()

    def receive(self, arrival: Arrival) -> None:
        """One site: book it, close it."""
        hook = Hook(begin=len(self._log), sums_before=self._sums_bytes())
        self.hooks.append(hook)
        site = len(self.hooks) - 1
        entry = arrival.make_entry()
        self.arrivals.append(observed(arrival, entry.parameters, entry.dimensions, self._sizes))
        self.blueprints.append(blueprint(entry))
        self._book.enter(site, entry)
        del entry
        self._book.close(site, 1.0)
        self._book.norms.clear()
        hook.end = len(self._log)

    def entered(self, entry: Entry) -> None:
        """Note which storages the entry keeps."""
        numbers = {self.stage.live.number(tensor) for tensor in entry.booked}
        self.hooks[-1].storages = tuple(sorted(n for n in numbers if n is not None))

    def closing(self, group: int) -> None:
        """Note what is alive before sums are formed."""
        hook = self.hooks[-1]
        hook.closing = len(self._log)
        hook.close_live = self.stage.live.live_bytes - hook.sums_before

    def summed(self, entry: Entry) -> None:
        """Note how high forming the sums went."""
        hook = self.hooks[-1]
        hook.close_peak = max((*self._log[hook.closing :], self.stage.live.live_bytes)) - hook.sums_before
        hook.gradient_bytes = self._sums_bytes() - hook.sums_before

    def finish(self) -> None:
        """Noise and the optimizer's step, as the engine takes them."""
        self._book.overflowed = None  # which the engine takes before it adds noise
        parameters = {n: p for n, p in self.stage.model.named_parameters() if n in self._book.sums}
        sums = {name: self._book.sums.pop(name) for name in parameters}
        noise = [Gaussians(torch.Generator(device)) for device in {total.device for total in sums.values()}]
        for gaussians in noise:
            there = [total for total in sums.values() if total.device == gaussians.source.device]
            add_noises_(there, [self.settings.noise_multiplier] * len(there), gaussians)
            torch._foreach_div_(there, 1.5)
            del there
        for name, parameter in parameters.items():
            parameter.grad = sums.pop(name).to(parameter.dtype)
        for gaussians in noise:
            gaussians.forget()
        self.stage.optimizer.step()
        self.stage.optimizer.zero_grad(set_to_none=True)

    def _sums_bytes(self) -> int:
        sums = self._book.sums  # each comes after those before it, and stays as it is
        self._summed_bytes += self.stage.live.allocator.total(islice(reversed(sums.values()), len(sums) - self._summed))
        self._summed = len(sums)
        return self._summed_bytes


def record_step(
    stage: Stage, settings: StepSettings, batch_size: int, keys: dict[str, Any], examined: Examined | None = None
) -> Trace:
    """Trace a stage: a non-private step, then a private one, at draws at which all parameters take part.

    Args:
        stage: what steps.
        settings: how.
        batch_size: B.
        keys: what else the trace is keyed by.
        examined: what is known of the model; found out if not given.

    Raises:
        UnsupportedModelError: when a trainable parameter cannot be covered, by name.
        GroupSearchError: when the options name a method for a weight that no site chooses one for.
    """
    with alike(USUAL if examined is None else examined.draws):
        return _recorded(stage, settings, batch_size, keys, examined)


def _recorded(
    stage: Stage, settings: StepSettings, batch_size: int, keys: dict[str, Any], examined: Examined | None
) -> Trace:
    nonprivate_peak_bytes = _nonprivate_step(stage, examined)
    live = stage.live
    private_begin = len(live.log)
    recorder = StepRecorder(stage, settings)
    if examined is None:
        reading, _ = settle(stage.model, first_examples(stage.batch, 3), stage.loss, settings.options, None)
    else:
        reading = examined.reading
    with reading.attached(stage.model, recorder.receive), live:
        for _ in range(stage.micro_batches):
            recorder.begin()
            stage.backward()
        backward_end = len(live.log)
        recorder.finish()
    events = step_events(live, recorder.passes, private_begin)
    check_all_seen(stage.model, recorder.arrivals)
    fewer = first_examples(stage.batch, 2 if batch_size == 3 else 3)
    check_same_sites(recorder.arrivals, observe_pass(stage.model, fewer, stage.loss, reading))
    booked = _booked(recorder.hooks)
    instants, released = cut_instants(live, recorder.hooks, (recorder.start, backward_end), booked)
    sites = as_sites(recorder.arrivals, stage.model, reading.layouts.rows)
    settings.options.check_weights(weights_with_choice(sites))
    return Trace(
        sites=_measured(sites, recorder, stage.static.total),
        instants=tuple(replace(i, live_bytes=i.live_bytes + stage.static.total) for i in instants),
        booked=tuple(
            Booked(live.sizes[number], sites[0], sites[-1], released[number], sites[1:-1])
            for number, sites in sorted(booked.items())
        ),
        cross_terms=cross_terms(recorder.arrivals, recorder.blueprints, live.allocator.granularity_bytes),
        static=stage.static,
        step_bytes=live.peak_since(backward_end) + stage.static.total,
        nonprivate_peak_bytes=nonprivate_peak_bytes,
        batch_size=batch_size,
        carried_bytes=recorder.carried_bytes,
        checked=None if examined is None else examined.checked,
        unprobed=tuple(sorted(live.unprobed)),
        events=events,
        settings={**keys, **settings.to_json()},
    )


def _nonprivate_step(stage: Stage, examined: Examined | None) -> int:
    try:
        return stage.counted_step()
    except (RuntimeError, NotImplementedError) as error:
        if examined is None or isinstance(error, NEEDS_VALUES) or is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            "The model runs, but not on tensors without values, on which its memory is traced: "
            f"{type(error).__name__}: {error}. Sparse tensors are among what these do not know. Take its sites from "
            "observe_sites(model, batch, loss) to train it without an estimate of its memory."
        ) from error


def _booked(hooks: Sequence[Hook]) -> dict[int, tuple[int, ...]]:
    """Per booked storage the sites that book it, in the order of backward."""
    booked: dict[int, tuple[int, ...]] = {}
    for step, hook in enumerate(hooks):
        for number in hook.storages:
            booked[number] = (*booked.get(number, ()), len(hooks) - 1 - step)
    return booked


def _measured(sites: Sequence[Site], recorder: StepRecorder, static_bytes: int) -> tuple[Site, ...]:
    return tuple(
        replace(
            site,
            close_bytes=hook.close_peak - hook.close_live,
            gradient_bytes=hook.gradient_bytes,
            close_live_bytes=hook.close_live + static_bytes,
            groups=seen.dimensions.groups,
        )
        for site, hook, seen in zip(sites, reversed(recorder.hooks), reversed(recorder.arrivals), strict=True)
    )
