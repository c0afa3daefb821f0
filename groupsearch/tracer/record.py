"""trace_model: one step of the engine with every site a group of its own, written down as a Trace.

Apart from the package, whose call chooses between real and fake tensors.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from groupsearch.engine.book import Book
from groupsearch.engine.entries import Dimensions, Entry, InstanceEntry, inner
from groupsearch.engine.mechanism import Gaussians, add_noises_
from groupsearch.engine.passes import Arrival
from groupsearch.engine.truth.draws import USUAL, alike
from groupsearch.engine.whole import WholeEntry
from groupsearch.errors import UnsupportedModelError, is_out_of_memory
from groupsearch.plan.trace import Booked, Close, CrossTerm, Instant, Site, StepEvents, Trace, weights_with_choice
from groupsearch.tracer.allocator import Allocator
from groupsearch.tracer.fake import NEEDS_VALUES
from groupsearch.tracer.live import LiveBytes
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

# -- Cuts the log of one step into the instants of a Trace -----------------------------------------

FORWARD_PIECES = 60


@dataclass
class HookSpan:
    """Where in the log one site's hook began, closed its group and ended, and what it told.

    Attributes:
        sums_before: bytes of clipped sums when it began.
        close_live: bytes alive when sums began to be formed, clipped sums left out.
        close_peak: the most alive until they were formed, earlier clipped sums left out.
        gradient_bytes: bytes of the sums it left.
        storages: numbers of the storages the site books.
    """

    begin: int
    closing: int = 0
    end: int = 0
    sums_before: int = 0
    close_live: int = 0
    close_peak: int = 0
    gradient_bytes: int = 0
    storages: tuple[int, ...] = ()


class _Segment(NamedTuple):
    site: int
    in_hook: bool
    begin: int
    end: int
    sums_bytes: int


def cut_instants(
    live: LiveBytes, hooks: Sequence[HookSpan], span: tuple[int, int], booked: Iterable[int]
) -> tuple[tuple[Instant, ...], dict[int, int]]:
    """Cut time at hooks and wherever a booked storage is released.

    Args:
        live: the log.
        hooks: in order of time.
        span: positions in the log between which forward and backward lie.
        booked: numbers of the storages that sites book.

    Returns:
        The instants (live bytes without static ones and clipped sums), and for every booked
        storage the index of the first instant at which it is released.
    """
    start, end = span
    log = np.asarray(live.log, dtype=np.int64)
    forward = _forward_bytes(live, (start, hooks[0].begin), len(log))
    deaths = sorted({live.deaths[n] for n in booked if n in live.deaths})
    cuts = [d for d, following in zip(deaths, [*deaths[1:], -1], strict=True) if following != d + 1]
    instants: list[Instant] = []
    begins: list[int] = []
    for segment in _segments(hooks, start, end):
        inside = cuts[bisect_left(cuts, segment.begin + 1) : bisect_left(cuts, segment.end)]
        if segment.site < 0:
            inside = [int(x) for x in np.linspace(segment.begin, segment.end, FORWARD_PIECES + 1)[1:-1]]
        edges = [segment.begin, *inside, segment.end]
        for piece, (low, high) in enumerate(pairwise(edges)):
            # a piece after a release begins with what is alive then; a segment, with what was alive before it
            first = low if piece and segment.site >= 0 else max(low - 1, 0)
            values = log[first : max(high, first + 1)]
            top = first + int(values.argmax())
            begins.append(low)
            instants.append(
                Instant(segment.site, segment.in_hook, int(log[top]) - segment.sums_bytes, int(forward[top]))
            )
    released = {n: _released(live.deaths.get(n), end, begins, hooks) for n in booked}
    return tuple(instants), released


def _segments(hooks: Sequence[HookSpan], start: int, end: int) -> Iterable[_Segment]:
    yield _Segment(-1, False, start, hooks[0].begin, hooks[0].sums_before)
    for step, hook in enumerate(hooks):
        site = len(hooks) - 1 - step
        yield _Segment(site, True, hook.begin, hook.closing, hook.sums_before)
        following = hooks[step + 1].begin if site else end
        yield _Segment(site, False, hook.end, following, hook.sums_before + hook.gradient_bytes)


def _released(death: int | None, end: int, begins: Sequence[int], hooks: Sequence[HookSpan]) -> int:
    if death is None or death >= end:
        return len(begins)
    return bisect_left(begins, death)


def _forward_bytes(live: LiveBytes, span: tuple[int, int], length: int) -> npt.NDArray[np.int64]:
    """Per position of the log the bytes alive that the forward pass and the loss allocated."""
    changes = np.zeros(length + 1, dtype=np.int64)
    for number, birth in enumerate(live.births):
        if span[0] <= birth < span[1]:
            changes[birth] += live.sizes[number]
            changes[live.deaths.get(number, length)] -= live.sizes[number]
    return np.cumsum(changes)[:length]


# -- Reads the births and deaths of a step out of the log of what was alive ------------------------

_DEATH, _INSIDE, _LOGGED = -1, 0, 1
"""At one position of the log what an operation had beside its results ends first, then the next one's begins."""


def step_events(live: LiveBytes, passes: Sequence[Sequence[HookSpan]], private_begin: int) -> StepEvents:
    """The events of a non-private step and the private one after it.

    Args:
        live: the log of both.
        passes: hooks of every micro-batch of the private step, in order of time.
        private_begin: position in the log where the private step begins.
    """
    events = sorted(_events(live))
    keys = [(position, order) for position, order, _ in events]
    sequence = tuple(event for *_, event in events)

    def place(position: int) -> int:
        return bisect_left(keys, (position, _INSIDE))

    begin = place(private_begin)
    closes = tuple(
        Close(
            site=len(hooks) - 1 - step,
            begin=place(hook.closing) - begin,
            end=place(hook.end) - begin,
            booked=hook.storages,
        )
        for hooks in passes
        for step, hook in enumerate(hooks)
    )
    sizes = (*live.sizes, *(size for _, _, size in live.insides))
    return StepEvents(tuple(live.kept), sizes, sequence[begin:], sequence[:begin], closes, dict(live.heirs))


def _events(live: LiveBytes) -> list[tuple[int, int, int]]:
    """(position, order there, event) of every birth and death."""
    births = [(at, _LOGGED, number) for number, at in enumerate(live.births)]
    deaths = [(at, _LOGGED, ~number) for number, at in live.deaths.items()]
    for number, (began, done, _) in enumerate(live.insides, len(live.sizes)):
        births.append((began, _INSIDE, number))
        deaths.append((done, _DEATH, ~number))
    return births + deaths


# -- What the inner products of sites that share a parameter cost, which no trace of single sites shows


def blueprint(entry: Entry) -> Callable[[], Entry]:
    """A maker of entries of the same shapes on the meta device; keeps no tensor of the entry."""
    if isinstance(entry, WholeEntry):
        whole: Any = _Whole({name: entry.outline(name) for name in entry.parameters}, entry.dimensions)
        return lambda: whole
    cls = type(entry)
    outlines = {f.name: _outline(getattr(entry, f.name)) for f in fields(entry)}  # type: ignore[arg-type]
    return lambda: cls(**{name: make() for name, make in outlines.items()})


def cross_terms(
    arrivals: Sequence[Observed], blueprints: Sequence[Callable[[], Entry]], granularity_bytes: int = 1
) -> tuple[CrossTerm, ...]:
    """For every two sites on one parameter the bytes that their inner product takes.

    Args:
        arrivals: in the order backward reached the sites.
        blueprints: of their entries.
        granularity_bytes: what every storage is rounded up to a multiple of.
    """
    allocator = Allocator(granularity_bytes)
    last = len(arrivals) - 1
    users: dict[str, list[int]] = {}
    for step, seen in enumerate(arrivals):
        for name in seen.parameters:
            users.setdefault(name, []).append(step)
    pairs = sorted({pair for steps in users.values() for pair in combinations(steps, 2)})
    return tuple(
        CrossTerm(last - early, last - late, _transient(blueprints[early], blueprints[late], allocator))
        for early, late in pairs
    )


def _transient(early: Callable[[], Entry], late: Callable[[], Entry], allocator: Allocator) -> int:
    with _disable_current_modes():
        one, other = early(), late()
        live = LiveBytes(allocator=allocator)
        live.ignore((*one.booked, *other.booked))
        with torch.no_grad(), live:
            inner(one, other)
    return live.peak_since(0)


@dataclass(frozen=True)
class _Whole:
    """A module's call that is not run again, for its parameters have values: its gradients alone are allocated.

    Attributes:
        outlines: makers of every parameter's gradients, (B, *shape), without values.
        dimensions: as the entry's.
    """

    outlines: dict[str, Callable[[], Tensor]]
    dimensions: Dimensions
    booked: tuple[Tensor, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.outlines)

    def alone(self, kept_B: slice) -> InstanceEntry:
        return InstanceEntry({name: make() for name, make in self.outlines.items()}, self.dimensions)


def _outline(value: Any) -> Callable[[], Any]:
    if isinstance(value, Tensor):
        shape, dtype = value.shape, value.dtype
        return lambda: torch.empty(shape, dtype=dtype, device="meta")
    if isinstance(value, dict):
        parts = {key: _outline(part) for key, part in value.items()}
        return lambda: {key: make() for key, make in parts.items()}
    return lambda: value


# -- record ----------------------------------------------------------------------------------------


@dataclass
class StepRecorder:
    """Receives arrivals, closes every site at once and remembers where in the log it all happened.

    What it remembers is the last micro-batch, and of those before it the hooks.
    """

    stage: Stage
    settings: StepSettings
    arrivals: list[Observed] = field(default_factory=list)
    hooks: list[HookSpan] = field(default_factory=list)
    passes: list[list[HookSpan]] = field(default_factory=list)
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
        hook = HookSpan(begin=len(self._log), sums_before=self._sums_bytes())
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


def _booked(hooks: Sequence[HookSpan]) -> dict[int, tuple[int, ...]]:
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
