"""Hooks that hand every site's book entry to a receiver while one backward pass runs.

Weights do not take part in autograd: inside a layer's forward its parameters are replaced by
detached ones, so no gradient is computed to be thrown away, and a parameter that is used
anywhere else betrays itself by receiving one. Those of a layer that a trace found to be used elsewhere (a lent
layer) are replaced for the whole forward of the model, by leaves that are followed until they meet the batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from groupsearch.engine.bare_parameters import Meeting
from groupsearch.engine.entries import Dimensions, Entry, InstanceEntry
from groupsearch.engine.layers import Layer, Rule
from groupsearch.engine.layout import Expansions, Layouts
from groupsearch.engine.ownership import may_mix, owned_layers, refuse_gradient, refuse_mixing
from groupsearch.engine.passes import Arrival, Pass, Passes, Receiver, in_backward
from groupsearch.engine.replay import FIRST, OwingOptions, Place, Replays, Stage, units_of
from groupsearch.engine.substitutes import Arrive, Source
from groupsearch.engine.taps import Hook, Take, with_gradient
from groupsearch.engine.whole import Left, RandomDraws, WholeCall, check_nothing_left, left_on
from groupsearch.errors import UnsupportedModelError
from groupsearch.options import EngineOptions
from groupsearch.plan.trace import Rows
from groupsearch.workloads.blocks import CheckpointedForward

_WATCHED: weakref.WeakSet[Any] = weakref.WeakSet()


class Capture:
    """Watches a model's forward and backward passes until :meth:`remove`.

    Args:
        model: the model; its parameters keep ``requires_grad`` and its modules their forward.
        receive: called once per site and backward pass, in the order backward reaches the sites.
        options: decides the norm method per site.
        layouts: where layers keep the examples of a batch; in the first dimension if not given.

    Attributes:
        layers: the modules that own trainable parameters.
        passes: the forward passes that wait for backward.
    """

    def __init__(
        self,
        model: nn.Module,
        receive: Receiver,
        options: EngineOptions,
        layouts: Layouts | None = None,
        passes: Passes | None = None,
    ) -> None:
        if model in _WATCHED:
            raise UnsupportedModelError(
                "The model has an engine already: two would clip and add noise twice. Call .detach() on the first."
            )
        self.layers = owned_layers(model, layouts)
        self.passes = passes or Passes()
        self._receive = receive
        units = units_of(model, options, self.layers)
        self._options = OwingOptions.of(options) if units else options
        self._rows = (layouts or Layouts()).rows
        self._expansions = (layouts or Layouts()).expansions
        self._meeting = self._new_meeting()
        self._mixing = [(name, m) for name, m in model.named_modules() if may_mix(m)]
        self._swapped: list[tuple[nn.Module, list[tuple[dict[str, Any], str, Any]]]] = []
        self._lent = _slots_of_lent(model, self.layers)
        self._lending: list[list[tuple[dict[str, Any], str, Any]]] = []
        self._inside: list[CheckpointedForward] = []
        self._before_calls: list[tuple[RandomDraws, Left]] = []
        self._aside = False
        self._given_as = ("second",) if self._rows.dimension else ("first",) if self._rows.count == 1 else ("folded",)
        self._watch_outputs = any(
            x.lent or x.rule is None or x.rule.kind == "embedding" or x.layout != "first" for x in self.layers
        )
        self._handles: list[RemovableHandle] = []
        _WATCHED.add(model)
        self._model = weakref.ref(model)
        stage = Stage(self._is_on, lambda: self.passes.running(), self._is_function, self._taken, self._running_again)
        self._replays = Replays(units, stage)
        self._handles += self._replays.watch_ends()  # the layers' own hooks run inside of these
        for layer in self.layers:
            self._watch(layer)
        self._handles += self._replays.watch_beginnings()
        # outside of the layers' own hooks: the model may be a layer itself
        begin, end = Hook(self._begin_pass), Hook(self._end_forward)
        self._handles.append(model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True))
        self._handles.append(model.register_forward_hook(end, always_call=True))

    def remove(self) -> None:
        """Take every hook away; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for forward in self._inside:
            forward.inside = nullcontext
        self._meeting.forget()
        _WATCHED.discard(self._model())

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """For a while the model runs as if nothing watched it."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    @contextmanager
    def turned_to(self, receive: Receiver) -> Iterator[None]:
        """For a while forward passes, of the same examples until the next backward, are another receiver's."""
        before = self._receive, self.passes
        self._receive, self.passes = receive, Passes()
        self.passes.policy = "same"
        try:
            yield
        finally:
            self._receive, self.passes = before
            self._meeting.forget()

    def _is_on(self) -> bool:
        return torch.is_grad_enabled() and not self._aside

    def _taken(self, take: Take) -> tuple[Tensor, ...]:
        return self._meeting.during(take) if self._watch_outputs else take()

    def _is_function(self, x: object) -> bool:
        return self._meeting.is_tracked(x)

    def _new_meeting(self) -> Meeting:
        running = lambda: self.passes.running()  # noqa: E731  # another's in turned_to
        return Meeting(running, self._site_arrival, self._options, Expansions(self._expansions))

    # -- passes ------------------------------------------------------------------------------

    def _begin_pass(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._lending.append([])
        if not self._is_on():
            return
        if not in_backward() and self.passes.begin(_count_examples((args, kwargs), self._rows), self._rows):
            for name, module in self._mixing:
                refuse_mixing(name, module)
            self._meeting.forget()
        if self._watch_outputs:
            self._meeting.mark(pytree.tree_leaves((args, kwargs)), self._given_as)
            self._meeting.enter()
            self._lend()

    def _lend(self) -> None:
        """While the model runs, parameters of lent layers are followed wherever they are used."""
        for layer, name, slots in self._lent:
            leaf = self._meeting.track(self._bare_source(layer, name))
            for parameters, local in slots:
                self._lending[-1].append((parameters, local, parameters[local]))
                parameters[local] = leaf

    def _end_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        for parameters, local, original in self._lending.pop() if self._lending else ():
            parameters[local] = original
        for layer in self.layers:
            if layer.lent and isinstance(layer.module, nn.RNNBase):
                layer.module._update_flat_weights()
        while self._meeting.watching:
            self._meeting.leave()
        if output is None and not in_backward() and not self._aside:
            self.passes.fail()

    def _arrive(self, arrival: Arrival, place: Place | None = None) -> None:
        self.passes.arrive(arrival.source_pass, self._meeting.forget)
        if place is not None:
            arrival = place(arrival)
        if arrival.source_pass.batch_size:  # an empty batch has no gradient
            with torch.no_grad():
                self._receive(arrival)

    # -- replay ------------------------------------------------------------------------------

    def check_replays(self) -> None:
        """Hold what was replayed to what norms were taken of, where numbers are not looked at in between.

        Raises:
            UnsupportedModelError: when it was something else.
        """
        self._replays.check()

    @contextmanager
    def _running_again(self, source: Pass, receive: Receiver, followed: bool) -> Iterator[None]:
        """For a while a part of the model runs by itself, of the examples of a pass, and its sites are another's.

        Parameters without a rule are followed as they were if asked for.
        """
        before = self._receive, self.passes, self._meeting
        self._receive, self.passes, self._meeting = receive, Passes(), self._new_meeting()
        self.passes.current = Pass(source.batch_size, source.rows)
        if followed and self._watch_outputs:
            self._meeting.enter()
        try:
            yield
        finally:
            while self._meeting.watching:
                self._meeting.leave()
            self._receive, self.passes, self._meeting = before

    # -- layers ------------------------------------------------------------------------------

    def _watch(self, layer: Layer) -> None:
        for name in layer.trainable:
            self._handles.append(refuse_gradient(layer, name, lambda: self._aside))
        before, after = self._hooks_of(layer)
        module = layer.module
        forward = vars(module).get("forward")
        if layer.rule is None and layer.layout != "whole" and isinstance(forward, CheckpointedForward):
            forward.inside = lambda: self._run_inside(layer, before, after)
            self._inside.append(forward)
            return

        def pre_hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._is_on() and self._replays.wanted is None and not self._is_swapped(layer):
                self.passes.running()
                _check_no_transform(layer)
                if self._watch_outputs:
                    self._meeting.given(layer, (args, kwargs), in_backward())
                (self._before_bare if self._goes_on(layer, args, kwargs) else before)(layer)

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if self._replays.wanted is not None:
                return self._after_again(layer, args, kwargs, output)
            if not self._restore(layer):
                return None
            with torch._C.DisableTorchFunction():  # what the engine does itself is not the model's doing
                if self._goes_on(layer, args, kwargs):
                    return self._after_bare(layer, args, kwargs, output)
                return after(layer, args, kwargs, output)

        # before the user's own: those that compute a weight from parameters, keep or replace an output
        self._handles.append(module.register_forward_pre_hook(Hook(pre_hook), **FIRST))
        self._handles.append(module.register_forward_hook(Hook(hook), always_call=True, **FIRST))

    def _goes_on(self, layer: Layer, args: Any, kwargs: Any) -> bool:
        """Whether a layer with a rule is given a function of parameters alone: so is what it returns."""
        given = args[0] if args else next(iter(kwargs.values()), None)
        return layer.rule is not None and layer.layout != "whole" and self._meeting.is_tracked(given)

    @contextmanager
    def _run_inside(self, layer: Layer, before: Callable[..., None], after: Callable[..., Any]) -> Iterator[None]:
        if not self._is_on():
            yield
            return
        self.passes.running()
        before(layer)
        try:
            yield
        finally:
            self._restore(layer)
            with torch._C.DisableTorchFunction():
                after(layer, (), {}, None)

    def _hooks_of(self, layer: Layer) -> tuple[Callable[..., None], Callable[..., Any]]:
        if layer.layout == "whole":
            return self._before_whole, self._after_whole
        return (self._before_rule, self._after_rule) if layer.rule else (self._before_bare, self._after_bare)

    def _swap(self, layer: Layer, replacements: Mapping[str, Any]) -> None:
        originals = []
        for local, replacement in replacements.items():
            path, _, name = local.rpartition(".")
            slots = layer.module.get_submodule(path)._parameters
            originals.append((slots, name, slots[name]))
            slots[name] = replacement
        self._swapped.append((layer.module, originals))

    def _is_swapped(self, layer: Layer) -> bool:
        """Whether a layer around it, which shares its parameters, has put others in their place already."""
        taken = {(id(slots), name) for _, originals in self._swapped for slots, name, _ in originals}
        return bool(taken) and any(
            (id(layer.module.get_submodule(path)._parameters), name) in taken
            for path, _, name in (local.rpartition(".") for local in layer.trainable)
        )

    def _restore(self, layer: Layer) -> bool:
        if not self._swapped or self._swapped[-1][0] is not layer.module:
            return False
        for slots, name, original in reversed(self._swapped.pop()[1]):  # a tied one comes twice
            slots[name] = original
        for module in layer.module.modules():
            if isinstance(module, nn.RNNBase):
                module._update_flat_weights()  # it keeps a list of its parameters
        return True

    def _detached(self, layer: Layer) -> dict[str, Tensor]:
        try:
            return {name: layer.module.get_parameter(name).detach() for name in layer.trainable}
        except AttributeError as error:
            raise UnsupportedModelError(
                f"Layer {layer.name!r} runs with other tensors in the place of its parameters "
                f"(torch.func.functional_call): {error}. What they are made of is not followed. Call the model itself.",
                layer.name,
            ) from error

    def _before_rule(self, layer: Layer) -> None:
        with torch._C.DisableTorchFunction():
            self._swap(layer, self._detached(layer))

    def _after_rule(self, layer: Layer, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        if output is None or layer.rule is None:  # the forward raised
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        saved = layer.rule.saved(layer, x)
        constant = self._meeting.watching and not self._meeting.from_batch(x)
        if constant or self.passes.running().rows_of(output, layer.layout) is None:
            return self._without_batch(layer, saved, output, constant)
        return self._rule_site(layer, layer.rule, saved, output)

    def _rule_site(self, layer: Layer, rule: Rule, saved: tuple[Tensor, ...], output: Tensor) -> Tensor:
        source_pass, layout, place = self.passes.running(), layer.layout, self._replays.place()
        self._replays.saw(layer.name, saved)

        def arrive(g: Tensor, take: Take) -> None:
            taken, g_B = self._taken(take), source_pass.by_example(g, layout)

            def of_saved(found: tuple[Tensor, ...]) -> Entry:
                seen = tuple(source_pass.by_example(x, layout) for x in found)
                return rule.entry(layer, seen, g_B, self._options)

            arrival = Arrival(layer.name, layer, rule.kind, partial(of_saved, taken), source_pass, of_saved=of_saved)
            self._arrive(arrival, place)

        return with_gradient(source_pass, output, arrive, saved)

    def _after_again(self, layer: Layer, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        """A layer of a unit that runs again, of which some sites are asked for and nothing else."""
        if output is None or layer.rule is None or layer.name not in (self._replays.wanted or ()):
            return None
        with torch._C.DisableTorchFunction():
            if self.passes.running().rows_of(output, layer.layout) is None:
                return None
            saved = layer.rule.saved(layer, args[0] if args else next(iter(kwargs.values())))
            if self._replays.saw(layer.name, saved) or not torch.is_grad_enabled():
                return None
            return self._rule_site(layer, layer.rule, saved, output)

    def _without_batch(self, layer: Layer, saved: tuple[Tensor, ...], output: Tensor, constant: bool) -> Tensor:
        if not constant:
            raise UnsupportedModelError(  # without numbers: sizes of Poisson samples are private
                f"The output of layer {layer.name!r}, of {output.dim()} dimensions, does not lead with the examples of "
                "the batch: their gradients cannot be told apart. Keep the batch first, and use use_reentrant=False "
                "where activation checkpointing is on.",
                layer.name,
            )

        def entry(instance: Tensor) -> Entry:
            assert layer.rule is not None
            size = instance.shape[0]
            if output.shape[0] == 1:
                instance = instance.squeeze(1)
                inputs = tuple(x.expand(size, *x.shape[1:]) for x in saved)
            else:
                inputs = tuple(x.expand(size, *x.shape) for x in saved)
            return layer.rule.entry(replace(layer, layout="first"), inputs, instance, self._options)

        leaf = self._meeting.track(Source(layer.name, output.detach().requires_grad_(), entry, layer))
        return self._meeting.apply(torch.clone, leaf)  # in-place operations may follow

    def _before_bare(self, layer: Layer) -> None:
        self._meeting.enter(layer)
        own = {name: self._bare_source(layer, name) for name in layer.trainable if not self._is_lent(layer, name)}
        self._swap(layer, {name: self._meeting.track(source) for name, source in own.items()})

    def _is_lent(self, layer: Layer, name: str) -> bool:
        """Whether a parameter has been replaced for the whole forward of the model."""
        return self._meeting.is_tracked(layer.module.get_parameter(name))

    def _bare_source(self, layer: Layer, name: str) -> Source:
        canonical = layer.trainable[name]
        leaf = nn.Parameter(layer.module.get_parameter(name).detach())  # may stand where a parameter is asked for
        dims = Dimensions(1, leaf.numel(), leaf.numel(), "direct")
        key = f"{layer.name}.{name}" if layer.name else name
        seen = replace(layer, layout="folded") if layer.layout == "whole" else layer  # by who uses it outside
        return Source(key, leaf, lambda instance: InstanceEntry({canonical: instance}, dims), seen, canonical)

    def _after_bare(self, layer: Layer, args: Any, kwargs: Any, output: Any) -> None:
        self._meeting.leave(layer)

    def _before_whole(self, layer: Layer) -> None:
        self._swap(layer, self._detached(layer))
        self._before_calls.append((RandomDraws(next(layer.module.parameters()).device), left_on(layer.module)))

    def _after_whole(self, layer: Layer, args: Any, kwargs: Any, output: Any) -> Any:
        randomness, left = self._before_calls.pop()
        if output is None:
            return None
        check_nothing_left(layer, left)
        source_pass, from_batch = self.passes.running(), self._meeting.from_batch
        call = WholeCall.of(layer, (args, kwargs), source_pass, from_batch, randomness.drawn())

        def deliver(make: Callable[[], Entry]) -> None:
            self._arrive(Arrival(layer.name, layer, "function", make, source_pass))

        return call.await_gradients(output, self._meeting.during, deliver)

    def _site_arrival(self) -> Arrive:
        source_pass, place = self.passes.running(), self._replays.place()

        def arrive(key: str, make: Callable[[], Entry]) -> None:
            layer = self._owner(key)
            kind = layer.rule.kind if layer.rule and key == layer.name else "parameter"
            arrival = Arrival(key, layer, kind, make, source_pass, self._meeting.expansions.seen(key))
            self._arrive(arrival, place)

        return arrive

    def _owner(self, key: str) -> Layer:
        whose = {x.name: x for x in self.layers if x.rule is not None or x.layout == "whole"}
        return whose[key] if key in whose else next(x for x in self.layers if key in self._keys(x))

    def _keys(self, layer: Layer) -> set[str]:
        return {f"{layer.name}.{name}" if layer.name else name for name in layer.trainable}


Slots = tuple[tuple[dict[str, Any], str], ...]


def _slots_of_lent(model: nn.Module, layers: Sequence[Layer]) -> list[tuple[Layer, str, Slots]]:
    """Every parameter of a lent layer once, as the layer has it, and all places of the model where it lies."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for local, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module._parameters, local))
    own = {canonical: (layer, name) for layer in layers if layer.lent for name, canonical in layer.trainable.items()}
    return [(layer, name, tuple(places[id(layer.module.get_parameter(name))])) for layer, name in own.values()]


def _count_examples(arguments: tuple[Any, Any], rows: Rows) -> int:
    """B of a call of the model, counted as a trace found that it can be.

    Raises:
        UnsupportedModelError: when no tensor tells it, or the rows do not make up whole examples.
    """
    tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor) and x.dim()]
    if len(tensors) <= rows.leaf or tensors[rows.leaf].dim() <= rows.dimension:
        raise UnsupportedModelError(
            "The model was called without the tensor that tells how many examples there are. Pass the batch to the "
            "model's forward as tensors, in the same places as when it was traced."
        )
    shape = tensors[rows.leaf].shape
    examples, left = divmod(shape[rows.dimension], rows.count)
    if left:
        raise UnsupportedModelError(
            f"The model was called with rows of which {rows.count} belong to every example, and whose number does not "
            "make up whole examples. Give every example as many rows as when the model was traced, or trace it again "
            "as it is trained."
        )
    return examples


def _check_no_transform(layer: Layer) -> None:
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedModelError(
            f"Layer {layer.name!r} runs inside a transform of torch.func (vmap, grad, jvp), which hides its examples. "
            "Call the model outside of it, or freeze the layer with requires_grad_(False).",
            layer.name,
        )
