"""One step by every norm method: the trace of any choice of methods, composed of one trace per method.

A site's method changes what happens in the site's own hook and what it books, nothing else: input
and output gradient (``ghost``, ``recompute``), or the per-example gradients, which live from its hook
to the close of its group (``instantiate``). Everything between hooks is autograd's doing and the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from groupsearch.errors import GroupSearchError
from groupsearch.lifetimes import Bytes, lifetimes
from groupsearch.options import SITE_METHODS
from groupsearch.trace import Booked, CrossTerm, Instant, Site, Trace


def operations(site: Site, examples: int) -> int:
    """Multiply-accumulates of a matrix site's norm and clipped sum: operations of a step, not seconds.

    With B examples, T positions, d inputs and p outputs (of G channel groups: G d inputs, p outputs in all)
    ``ghost`` takes B T^2 (G d + p) for the norm and B T d p for the clipped sum, ``instantiate`` B T d p for the
    per-example gradients and B d p for their clipped sum, ``recompute`` B T d p twice. Inner products of sites that
    share a weight, biases and passes over single tensors are not counted.
    """
    B, T, d, p, G = examples, site.positions, site.inputs, site.outputs, site.groups
    product = B * T * d * p
    norm_and_sum = {
        "ghost": (B * T * T * (G * d + p), product),
        "instantiate": (product, B * d * p),
        "recompute": (product, product),
    }
    return sum(norm_and_sum[site.method])


@dataclass(frozen=True, eq=False)
class Alternatives:
    """Traces of one step, each with one norm method for all sites that have the choice.

    :func:`groupsearch.tracer.trace_methods` takes them.

    Attributes:
        traces: by method; ``ghost`` is among them.

    Raises:
        GroupSearchError: when the traces are not of one and the same step.
    """

    traces: Mapping[str, Trace]

    def __post_init__(self) -> None:
        if "ghost" not in self.traces or set(self.traces) - set(SITE_METHODS):
            raise GroupSearchError(
                f"Expected traces by norm method, ghost and any of {', '.join(SITE_METHODS)}, found "
                f"{', '.join(self.traces) or 'none'}. Take them with tracer.trace_methods."
            )
        same = {method: _between_hooks(trace) == _between_hooks(self.base) for method, trace in self.traces.items()}
        strange = [method for method, alike in same.items() if not alike]
        strange = strange or [method for method, trace in self.traces.items() if not self._goes_by(trace, method)]
        if strange:
            raise GroupSearchError(
                f"The trace with norm method {strange[0]} is of another step than the one with ghost: between the "
                "hooks of the sites something else is alive, or other sites have a choice. Take both with the same "
                "model, batch and settings."
            )

    @property
    def base(self) -> Trace:
        """The trace in which every site with a choice takes the ghost norm."""
        return self.traces["ghost"]

    @cached_property
    def choosing(self) -> tuple[bool, ...]:
        """Which sites have a choice."""
        by_site = zip(*(trace.sites for trace in self.traces.values()), strict=True)
        return tuple(
            sites[0].kind != "embedding" and {site.method for site in sites} == set(self.traces) for sites in by_site
        )

    @cached_property
    def weights(self) -> tuple[str | None, ...]:
        """The weight by whose name a site's method is given; None where there is no choice."""
        return tuple(
            site.parameters[0] if chooses else None
            for site, chooses in zip(self.base.sites, self.choosing, strict=True)
        )

    def site_methods(self, methods: Mapping[str, str] | str) -> tuple[str, ...]:
        """The method of every site, from one for all or one per weight; ghost for weights that are not named.

        Raises:
            GroupSearchError: for a weight without a choice or a method without a trace.
        """
        named = dict.fromkeys(filter(None, self.weights), methods) if isinstance(methods, str) else methods
        unknown = sorted({*named} - {*self.weights}) + sorted({*named.values()} - {*self.traces})
        if unknown:
            raise GroupSearchError(
                f"Expected weights with a choice of norm method and one of {', '.join(self.traces)} for each, found "
                f"{', '.join(unknown)}."
            )
        return tuple(
            named.get(weight, "ghost") if weight else site.method
            for weight, site in zip(self.weights, self.base.sites, strict=True)
        )

    def trace(self, methods: Mapping[str, str] | str) -> Trace:
        """The trace of a step in which weights go by these methods; see :meth:`site_methods`.

        Raises:
            GroupSearchError: as :meth:`site_methods`; when sites that share a parameter but not their weight
                go by different methods, whose inner product was never traced; or when hooks cannot be exchanged.
        """
        chosen = self.site_methods(methods)
        taken = [self._taken(index, method) for index, method in enumerate(chosen)]
        named = {weight: method for weight, method in zip(self.weights, chosen, strict=True) if weight}
        return replace(
            self.base,
            sites=tuple(trace.sites[index] for index, trace in enumerate(taken)),
            instants=tuple(self._instants(taken)),
            booked=tuple(self._booked(chosen)),
            cross_terms=tuple(self._cross_terms(chosen)),
            settings={**self.base.settings, "methods": named},
            events=None,  # those of the base are of one method for all
        )

    def operations(self, methods: Mapping[str, str] | str) -> int:
        """Multiply-accumulates of the norms and clipped sums of all sites with a choice, see :func:`operations`."""
        chosen = self.site_methods(methods)
        return self.operations_of([replace(s, method=m) for s, m in zip(self.base.sites, chosen, strict=True)])

    def operations_of(self, sites: Sequence[Site]) -> int:
        """As :meth:`operations`, of these sites by their own methods: of a trace that is not among the alternatives."""
        by_choice = zip(sites, self.choosing, strict=True)
        return sum(operations(site, self.base.batch_size) for site, chooses in by_choice if chooses)

    def hook(self, index: int, method: str) -> tuple[Instant, ...]:
        """The instants in a site's hook by a method.

        Raises:
            GroupSearchError: when there are not as many as by the ghost norm.
        """
        found = [self._in_hook(trace, index) for trace in (self.base, self._taken(index, method))]
        if len(found[0]) != len(found[1]):
            raise GroupSearchError(
                f"In the hook of site {self.base.sites[index].name} autograd lets go of something that is booked, at "
                f"other times by {method} than by ghost: their traces cannot be composed. Trace the choice itself, "
                "with EngineOptions(methods=...)."
            )
        return found[1]

    def instances(self, index: int) -> tuple[Booked, ...]:
        """What a site books by instantiate, in the instants of :attr:`base`."""
        after = int(lifetimes(self.base).close_at[index]) + 1
        return tuple(
            Booked(storage.size_bytes, index, index, after)
            for storage in self.traces["instantiate"].booked
            if index in storage.sites
        )

    def pair(self, number: int, early: str, late: str) -> CrossTerm | None:
        """Cross term ``number`` of :attr:`base` when its sites go by these methods; None where it was not traced."""
        term = self.base.cross_terms[number]
        found = {method for site, method in ((term.early, early), (term.late, late)) if self.choosing[site]}
        return self.traces[found.pop() if found else "ghost"].cross_terms[number] if len(found) < 2 else None

    def _goes_by(self, trace: Trace, method: str) -> bool:
        expected = (
            method if chooses else site.method for site, chooses in zip(self.base.sites, self.choosing, strict=True)
        )
        return [site.method for site in trace.sites] == list(expected)

    def _taken(self, index: int, method: str) -> Trace:
        return self.traces[method] if self.choosing[index] else self.base

    def _in_hook(self, trace: Trace, index: int) -> tuple[Instant, ...]:
        times = lifetimes(trace)
        return trace.instants[int(times.hook_at[index]) : int(times.close_at[index]) + 1]

    def _instants(self, taken: Sequence[Trace]) -> Iterator[Instant]:
        times, instants = lifetimes(self.base), self.base.instants
        yield from instants[: int(times.hook_at[-1])]
        for index in reversed(range(self.base.length)):
            yield from self.hook(index, taken[index].sites[index].method)
            yield from instants[int(times.close_at[index]) + 1 : int(times.end_at[index])]

    def _booked(self, chosen: Sequence[str]) -> Iterator[Booked]:
        kept = {i for i, chooses in enumerate(self.choosing) if chooses and chosen[i] == "instantiate"}
        for storage in self.base.booked:
            sites = [i for i in storage.sites if i not in kept]
            if sites:
                yield Booked(storage.size_bytes, sites[0], sites[-1], storage.released, tuple(sites[1:-1]))
        for index in sorted(kept):
            yield from self.instances(index)

    def _cross_terms(self, chosen: Sequence[str]) -> Iterator[CrossTerm]:
        for number, term in enumerate(self.base.cross_terms):
            found = self.pair(number, chosen[term.early], chosen[term.late])
            if found is None:
                names = [self.base.sites[i].name for i in (term.early, term.late)]
                raise GroupSearchError(
                    f"Sites {' and '.join(names)} share a parameter and were given different norm methods, whose inner "
                    "product no trace tells. Give both the same method."
                )
            yield found


def _between_hooks(trace: Trace) -> tuple[object, ...]:
    times = lifetimes(trace)
    largest: list[Bytes] = [
        times.live[int(close) + 1 : int(end)].max() for close, end in zip(times.close_at, times.end_at, strict=True)
    ]
    forward = tuple(i for i in trace.instants if i.site < 0)
    sites = tuple((site.name, site.parameters, site.gradient_bytes) for site in trace.sites)
    pairs = tuple((term.early, term.late) for term in trace.cross_terms)
    return sites, forward, pairs, tuple(int(x) for x in largest), trace.step_bytes, trace.static, trace.carried_bytes
