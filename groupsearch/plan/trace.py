"""What one traced step tells about a model: its sites, and who is alive when.

Everything here is a frozen value without torch; :mod:`groupsearch.plan.memory` turns a
:class:`Trace` into the peak of any grouping.

Time runs along *instants*: a trace lists, in order of time, the largest number of live
bytes between two events that matter to grouping (a hook begins, a hook ends, autograd lets
go of something that a site books). Backward reaches site L-1 first and site 0 last.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from groupsearch.errors import DocumentError
from groupsearch.plan.checked import Checked

# -- The births and deaths of one step in order of time, and the order that another grouping puts them in
#
# A step is traced with every site a group of its own. With another grouping the same happens at other times: a site's
# clipped sums are formed when its group closes, and what the book holds lives until then.


@dataclass(frozen=True)
class Close:
    """Where in the sequence one site's clipped sums are formed when every site is a group of its own.

    Attributes:
        site: its number.
        begin, end: the first of the sequence that belongs to it, and the first that does not.
        booked: numbers of the storages that the site books.
    """

    site: int
    begin: int
    end: int
    booked: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class StepEvents:
    """What one step allocates and frees. A storage number n in a sequence says that n is born, ~n that it dies.

    Attributes:
        kept: sizes of what is alive throughout, in the order of allocation.
        sizes: bytes of every storage, by number.
        private: the private step, every site a group of its own.
        plain: the same step without privacy.
        closes: of the private step, in order of time; a step of several micro-batches has one per site and batch.
        heirs: by number of a storage the number of another, which it is the changed form of: it takes over that one's
            memory unless the book still holds it.
    """

    kept: tuple[int, ...]
    sizes: tuple[int, ...]
    private: tuple[int, ...]
    plain: tuple[int, ...]
    closes: tuple[Close, ...]
    heirs: Mapping[int, int]

    def ungrouped(self) -> Iterator[int]:
        """The sequence of the step without privacy: births and deaths of memory."""
        return _Order(self.plain, self.heirs).outside(0, len(self.plain))

    def grouped(self, boundaries: Sequence[int], cross_terms: Iterable[tuple[int, int, int]] = ()) -> Iterator[int]:
        """The private step's sequence with this grouping: births and deaths of memory.

        Args:
            boundaries: of the grouping, sorted.
            cross_terms: numbers of two sites that use one parameter, the one that backward reaches first in
                front, and the number of a storage that the later one needs where they share a group.
        """
        last, order, at = {0, *boundaries}, _Order(self.private, self.heirs), 0
        for close in self.closes:
            yield from order.outside(at, close.begin)
            for early, late, storage in cross_terms:
                if late == close.site and bisect_right(boundaries, early) == bisect_right(boundaries, late):
                    yield from (storage, ~storage)
            yield from order.book(close, is_last=close.site in last)
            at = close.end
        yield from order.outside(at, len(self.private))


class _Order:
    """Tells the sequence anew with what belongs to closes put off until the group's."""

    def __init__(self, sequence: Sequence[int], heirs: Mapping[int, int]) -> None:
        self._sequence, self._heirs = sequence, heirs
        self._open: list[Close] = []
        self._holders: Counter[int] = Counter()
        self._late: set[int] = set()
        self._alive: set[int] = set()
        self._done: set[int] = set()
        self._names: dict[int, int] = {}

    def book(self, close: Close, is_last: bool) -> Iterator[int]:
        """A site's entry is in the book. The last one's group closes; else the close is put off.

        What the site would have needed for its own close and nothing else (norms, clipping factors) is given up then:
        a group needs it once.
        """
        self._open.append(close)
        self._holders.update(close.booked)
        if is_last:
            yield from self._close()
            return
        for event in self._sequence[close.begin : close.end]:
            if event < 0 and ~event in self._alive and not self._holders[~event]:
                yield from self._die(~event)
                self._done.add(~event)

    def _close(self) -> Iterator[int]:
        """The group closes: its sites' sums are formed in the order of backward, each dropping its entry."""
        for close in self._open:
            self._holders.subtract(close.booked)
            yield from self.outside(close.begin, close.end)
            for number in close.booked:
                if number in self._late and not self._holders[number]:
                    yield from self._die(number)
        self._open.clear()
        for number in sorted(self._late & self._alive):  # died before its late birth
            yield from self._die(number)

    def outside(self, begin: int, end: int) -> Iterator[int]:
        """A stretch of the sequence, without the deaths of what the book holds or is still to be born."""
        for event in self._sequence[begin:end]:
            if event >= 0:
                yield from self._bear(event)
            elif ~event in self._done:
                self._done.discard(~event)
            elif self._holders[~event] or ~event not in self._alive:
                self._late.add(~event)
            else:
                yield from self._die(~event)

    def _bear(self, number: int) -> Iterator[int]:
        self._alive.add(number)
        old = self._heirs.get(number)
        if old is None or old not in self._alive or self._holders[old]:
            yield number
        else:
            self._alive.discard(old)
            self._done.add(old)
            self._names[number] = self._names.pop(old, old)

    def _die(self, number: int) -> Iterator[int]:
        self._late.discard(number)
        self._alive.discard(number)
        yield ~self._names.pop(number, number)


# -- trace -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """How the examples of a batch are counted in what the model is called with.

    Attributes:
        leaf: number of the tensor that tells, among those the model is given that have dimensions.
        dimension: of that tensor.
        count: K, how many rows there belong to one example (augmented views, a triplet).
        apart: whether they lie apart (K B, as ``torch.cat`` leaves them), or side by side (B K).
        calls: how often a loss calls the model, each time with the same examples in the same order.
    """

    leaf: int = 0
    dimension: int = 0
    count: int = 1
    apart: bool = False
    calls: int = 1


@dataclass(frozen=True)
class Site:
    """One use of a layer in the forward pass.

    Attributes:
        name: unique; the layer's qualified name, with ``#k`` appended for its k-th further use.
        layer: qualified name of the module (or ``module.parameter`` for a bare parameter's owner).
        block: the repeated block the layer lies in (``transformer.h.3``), or the layer's own name.
        kind: ``linear``, ``conv``, ``embedding``, ``norm``, ``parameter`` or ``function``.
        method: how its norm is taken: ``ghost``, ``instantiate``, ``recompute``, or ``direct`` where
            the per-example gradient is all there is.
        positions: T, positions per example.  inputs: d.  outputs: p.
        parameters: qualified names of the trainable parameters it uses, canonical for ties.
        parameter_count: trainable numbers in them.
        layout: where the layer keeps the examples: ``first`` dimension; ``folded`` into the first with
            another one (example by example); ``second`` dimension; or ``whole`` for a module whose
            inside mixes them up (routed tokens) and that is differentiated as one.
        close_bytes: largest bytes that forming this site's clipped sums needs on top of what
            is alive when that begins (the sums themselves included).
        gradient_bytes: bytes of the clipped sums it leaves behind; a parameter that an earlier
            processed site has already summed counts nothing.
        close_live_bytes: bytes alive at the close of this site's hook, just before sums are
            formed, without any clipped sum.
        groups: channel groups of a convolution; 1 elsewhere. d counts the inputs of one, p the outputs of all.
        rows: how examples are counted in what the model is called with; the same at every site.
        lent: whether parameters of its layer are used outside of the layer's own forward, too.
        expansions: what a parameter, or the output of a layer that sees no batch, is expanded to: rank and size in
            the dimension of the examples, 0 where that is their number. None where it is not known.
    """

    name: str
    layer: str
    block: str
    kind: str
    method: str
    positions: int
    inputs: int
    outputs: int
    parameters: tuple[str, ...]
    parameter_count: int
    layout: str = "first"
    close_bytes: int = 0
    gradient_bytes: int = 0
    close_live_bytes: int = 0
    groups: int = 1
    rows: Rows = field(default_factory=Rows)
    lent: bool = False
    expansions: tuple[tuple[int, int], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain structure; :meth:`from_json` is its inverse."""
        data = {**asdict(self), "parameters": list(self.parameters)}
        if self.rows == Rows():
            del data["rows"]
        if not self.lent:
            del data["lent"]
        if self.expansions is None:
            del data["expansions"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Site:
        """The site that :meth:`to_json` wrote; keys that are not known are left out."""
        known = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
        if known.get("expansions") is not None:
            known["expansions"] = tuple((rank, size) for rank, size in known["expansions"])
        return cls(**{**known, "parameters": tuple(data["parameters"]), "rows": Rows(**data.get("rows", {}))})


@dataclass(frozen=True)
class Instant:
    """The largest live bytes between two events that matter, without clipped sums.

    Attributes:
        site: the site whose hook is running, or ran last; -1 in the forward pass and the loss.
        in_hook: whether the engine's hook of that site is running (its norm, not its close).
        live_bytes: bytes alive (weights, optimizer, activations, transients), no clipped sums.
        forward_bytes: of those, what the forward pass and the loss allocated (activations).
    """

    site: int
    in_hook: bool
    live_bytes: int
    forward_bytes: int


@dataclass(frozen=True)
class Booked:
    """A storage that one or more sites book.

    Attributes:
        size_bytes: its bytes, counted once however many sites book it.
        first_site: the booking site that backward reaches first (the largest index).
        last_site: the booking site that backward reaches last (the smallest index).
        released: index of the first instant at which autograd itself no longer holds it;
            ``len(instants)`` when it outlives the backward pass anyway.
        between: further sites that book it, from the first to the last.
    """

    size_bytes: int
    first_site: int
    last_site: int
    released: int
    between: tuple[int, ...] = ()

    @property
    def sites(self) -> tuple[int, ...]:
        """Every site that books it, in the order of backward."""
        return tuple(sorted({self.first_site, *self.between, self.last_site}, reverse=True))


@dataclass(frozen=True)
class CrossTerm:
    """Two sites that use one parameter need an inner product when they share a group.

    Attributes:
        early: the site backward reaches first.  late: the site that completes the pair.
        transient_bytes: what computing the inner product needs on top, in the late site's hook.
    """

    early: int
    late: int
    transient_bytes: int


@dataclass(frozen=True)
class StaticBytes:
    """Bytes that live through the whole step; ``workspaces`` are what libraries of a device keep, as cuBLAS does."""

    weights: int = 0
    buffers: int = 0
    optimizer: int = 0
    batch: int = 0
    workspaces: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.buffers + self.optimizer + self.batch + self.workspaces

    def to_json(self) -> dict[str, int]:
        """Bytes by name; ``workspaces`` only where there are any, which is never on the CPU."""
        return {name: size for name, size in asdict(self).items() if size or name != "workspaces"}


@dataclass(frozen=True, eq=False)
class Trace:
    """One traced step of one model at one batch size.

    Attributes:
        sites: the sites in order 0..L-1.
        instants: in order of time.
        booked: storages that sites book.
        cross_terms: pairs of sites on one parameter.
        static: bytes alive throughout.
        step_bytes: largest live bytes after backward (noise, optimizer step), sums included.
        nonprivate_peak_bytes: peak of the same step without privacy.
        batch_size: B.
        settings: what the trace is keyed by (model, device, dtype, checkpoint, norm_method, ...).
        carried_bytes: clipped sums of earlier micro-batches, alive throughout; 0 where the trace is of
            the only one. Sites then leave none behind: what they sum is added to these in place.
        checked: how the engine was held to plain autograd on the model; None where it had no weights.
        unprobed: operations of the step of which it is not known what they allocate beside their results.
        events: every birth and death of the step; documents do not hold them, and a trace read from one has None.
    """

    sites: tuple[Site, ...]
    instants: tuple[Instant, ...]
    booked: tuple[Booked, ...]
    cross_terms: tuple[CrossTerm, ...]
    static: StaticBytes
    step_bytes: int
    nonprivate_peak_bytes: int
    batch_size: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    carried_bytes: int = 0
    checked: Checked | None = None
    unprobed: tuple[str, ...] = ()
    events: StepEvents | None = field(default=None, repr=False)

    @property
    def length(self) -> int:
        """L, the number of sites."""
        return len(self.sites)

    @cached_property
    def layer_boundaries(self) -> tuple[int, ...]:
        """Every boundary between sites of different layers."""
        return _changes([site.layer for site in self.sites])

    @cached_property
    def block_boundaries(self) -> tuple[int, ...]:
        """Every boundary between sites of different blocks."""
        return _changes([site.block for site in self.sites])

    def to_json(self) -> dict[str, Any]:
        """A plain structure of lists, strings and integers; :meth:`from_json` is its inverse."""
        return {
            "sites": [site.to_json() for site in self.sites],
            "instants": [[i.site, int(i.in_hook), i.live_bytes, i.forward_bytes] for i in self.instants],
            "booked": [[b.size_bytes, b.first_site, b.last_site, b.released, *b.between] for b in self.booked],
            "cross_terms": [[c.early, c.late, c.transient_bytes] for c in self.cross_terms],
            "static": self.static.to_json(),
            "step_bytes": self.step_bytes,
            "nonprivate_peak_bytes": self.nonprivate_peak_bytes,
            "batch_size": self.batch_size,
            "carried_bytes": self.carried_bytes,
            **({"unprobed": list(self.unprobed)} if self.unprobed else {}),
            "settings": dict(self.settings),
            **({"checked": self.checked.to_json()} if self.checked else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trace:
        """The trace that :meth:`to_json` wrote.

        Raises:
            DocumentError: when a part is missing or of the wrong form.
        """
        try:
            return cls(
                sites=tuple(map(Site.from_json, data["sites"])),
                instants=tuple(Instant(site, bool(hook), *sizes) for site, hook, *sizes in _integers(data["instants"])),
                booked=tuple(
                    Booked(size, first, last, released, tuple(between))
                    for size, first, last, released, *between in _integers(data["booked"])
                ),
                cross_terms=tuple(CrossTerm(*c) for c in _integers(data["cross_terms"])),
                static=StaticBytes(**data["static"]),
                step_bytes=data["step_bytes"],
                nonprivate_peak_bytes=data["nonprivate_peak_bytes"],
                batch_size=data["batch_size"],
                settings=dict(data["settings"]),
                carried_bytes=data.get("carried_bytes", 0),  # older documents are of one micro-batch
                checked=Checked.from_json(data["checked"]) if data.get("checked") else None,
                unprobed=tuple(data.get("unprobed", ())),  # and do not say what was not probed
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DocumentError(
                f"Expected a trace with sites, instants and booked storages, found one that lacks or "
                f"garbles {error}. Write the profile again with `groupsearch profile`."
            ) from error


def weights_with_choice(sites: Sequence[Site]) -> frozenset[str]:
    """The weights whose norm method can be chosen, by the name that :class:`EngineOptions` knows them by."""
    matrices = (site for site in sites if site.kind not in ("embedding", "function") and site.method != "direct")
    return frozenset(site.parameters[0] for site in matrices)


def shared_parameters(sites: Sequence[Site]) -> frozenset[str]:
    """The parameters that several sites use."""
    uses = Counter(name for site in sites for name in site.parameters)
    return frozenset(name for name, count in uses.items() if count > 1)


def _changes(labels: Sequence[str]) -> tuple[int, ...]:
    return tuple(b for b in range(1, len(labels)) if labels[b] != labels[b - 1])


def _integers(rows: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    for row in rows:
        if not all(isinstance(number, int) for number in row):
            raise ValueError(row)
    return rows
