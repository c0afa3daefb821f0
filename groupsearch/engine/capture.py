"""Hooks that hand every site's book entry to a receiver while one backward pass runs.

Weights do not take part in autograd: inside a layer's forward its parameters are replaced by
detached ones, so no gradient is computed to be thrown away, and a parameter that is used
anywhere else betrays itself by receiving one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from groupsearch.engine.arrival import Arrival, Pass, Receiver
from groupsearch.engine.entries import Dimensions, Entry, InstanceEntry
from groupsearch.engine.layers import Layer
from groupsearch.engine.meeting import Arrive, Meeting, Source
from groupsearch.engine.ownership import may_mix, owned_layers, refuse_gradient, refuse_mixing
from groupsearch.engine.taps import Saved, with_gradient
from groupsearch.errors import UnsupportedModelError
from groupsearch.options import EngineOptions

_WATCHED: weakref.WeakSet[Any] = weakref.WeakSet()


class Capture:
    """Watches a model's forward and backward passes until :meth:`remove`.

    Args:
        model: the model; its parameters keep ``requires_grad`` and its modules their forward.
        receive: called once per site and backward pass, in the order backward reaches the sites.
        options: decides the norm method per site.
    """

    def __init__(self, model: nn.Module, receive: Receiver, options: EngineOptions) -> None:
        if model in _WATCHED:
            raise UnsupportedModelError(
                "The model has an engine already: two would clip and add noise twice. Call .detach() on the first."
            )
        self.layers = owned_layers(model)
        self.current: Pass | None = None
        self.on_pass: Callable[[], None] = lambda: None
        self._receive = receive
        self._options = options
        self._open: weakref.WeakSet[Pass] = weakref.WeakSet()
        self._meeting = Meeting(self._batch_size, self._source_arrival)
        self._mixing = [(name, m) for name, m in model.named_modules() if may_mix(m)]
        self._swapped: list[tuple[nn.Module, dict[str, Any]]] = []
        self._watch_outputs = any(x.rule is None or x.rule.kind == "embedding" for x in self.layers)
        self._handles = [
            model.register_forward_pre_hook(self._begin_pass, with_kwargs=True, prepend=True),
        ]
        _WATCHED.add(model)
        self._model = weakref.ref(model)
        for layer in self.layers:
            self._watch(layer)
        # after the layers' own hooks: the model may be a layer itself
        self._handles.append(model.register_forward_hook(self._end_forward, always_call=True))

    def remove(self) -> None:
        """Take every hook away; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._meeting.forget()
        _WATCHED.discard(self._model())

    # -- passes ------------------------------------------------------------------------------

    def _begin_pass(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if not _in_backward():
            self.on_pass()
            for name, module in self._mixing:
                refuse_mixing(name, module)
            tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
            if not tensors:
                raise UnsupportedModelError(
                    "The model was called without a tensor that leads with the examples of a batch, so that their "
                    "number is unknown. Pass the batch to the model's forward as tensors, batch first."
                )
            self.current = Pass(tensors[0].shape[0])
            self._open.add(self.current)
            self._meeting.forget()
        if self._watch_outputs:
            self._meeting.mark(pytree.tree_leaves((args, kwargs)))
            self._meeting.enter()

    def _end_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        while self._meeting.watching:
            self._meeting.leave()

    def _batch_size(self) -> int:
        return self._pass().batch_size

    def _pass(self) -> Pass:
        if self.current is None:
            raise UnsupportedModelError(
                "A layer ran with gradients before the model itself was called. Call the model that was given to "
                "the engine, not one of its parts, or use torch.no_grad()."
            )
        return self.current

    def _arrive(self, arrival: Arrival) -> None:
        source = arrival.source_pass
        others = [p for p in self._open if p is not source and not p.finished]
        if others or source.finished:
            raise UnsupportedModelError(
                "Backward reached a forward pass while another one is still open (or ran twice through the same one): "
                "an example that takes part in both would be clipped twice and exceed the sensitivity. Run forward "
                "and backward of one micro-batch before the next forward, and evaluate under torch.no_grad()."
            )
        source.arrivals += 1
        if not source.in_backward:
            source.in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end_backward(source))
        with torch.no_grad():
            self._receive(arrival)

    def _end_backward(self, source: Pass) -> None:
        source.in_backward = False
        self._meeting.forget()

    # -- layers ------------------------------------------------------------------------------

    def _watch(self, layer: Layer) -> None:
        for name in layer.trainable:
            self._handles.append(refuse_gradient(layer, name))
        before, after = (self._before_rule, self._after_rule) if layer.rule else (self._before_bare, self._after_bare)
        module = layer.module

        def pre_hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if torch.is_grad_enabled():
                self._pass()
                before(layer)

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            if not self._restore(layer):
                return None
            with torch._C.DisableTorchFunction():  # what the engine does itself is not the model's doing
                return after(layer, args, kwargs, output)

        self._handles.append(module.register_forward_pre_hook(pre_hook, with_kwargs=True))
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=True))

    def _swap(self, layer: Layer, replacements: dict[str, Any]) -> None:
        parameters = layer.module._parameters
        self._swapped.append((layer.module, {name: parameters[name] for name in replacements}))
        parameters.update(replacements)

    def _restore(self, layer: Layer) -> bool:
        if not self._swapped or self._swapped[-1][0] is not layer.module:
            return False
        module, originals = self._swapped.pop()
        module._parameters.update(originals)
        return True

    def _before_rule(self, layer: Layer) -> None:
        with torch._C.DisableTorchFunction():
            self._swap(layer, {name: layer.module.get_parameter(name).detach() for name in layer.trainable})

    def _after_rule(self, layer: Layer, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        if output is None or layer.rule is None:  # the forward raised
            return None
        source_pass, x = self._pass(), args[0] if args else next(iter(kwargs.values()))
        if self._meeting.is_tracked(x):
            raise UnsupportedModelError(
                f"Layer {layer.name!r} works on the output of another layer that saw no batch. Let one of the two see "
                "the batch (expand its input over the examples), or freeze one with requires_grad_(False)."
            )
        saved = layer.rule.saved(layer, x)
        constant = self._meeting.watching and not self._meeting.from_batch(x)
        if output.shape[0] != source_pass.batch_size or constant:
            return self._without_batch(layer, saved, output, constant)
        tensors = Saved(saved)

        def arrive(g: Tensor) -> None:
            assert layer.rule is not None
            rule, taken = layer.rule, self._meeting.during(tensors.take) if self._watch_outputs else tensors.take()
            make = partial(rule.entry, layer, taken, g, self._options)
            self._arrive(Arrival(layer.name, layer, rule.kind, make, source_pass))

        return with_gradient(output, arrive)

    def _without_batch(self, layer: Layer, saved: tuple[Tensor, ...], output: Tensor, constant: bool) -> Tensor:
        if not constant:
            raise UnsupportedModelError(
                f"The output of layer {layer.name!r} has shape {tuple(output.shape)}, which does not lead with the "
                f"batch of {self._batch_size()} examples: their gradients cannot be told apart. Keep the batch first."
            )

        def entry(instance: Tensor) -> Entry:
            assert layer.rule is not None
            size = instance.shape[0]
            if output.shape[0] == 1:
                instance = instance.squeeze(1)
                inputs = tuple(x.expand(size, *x.shape[1:]) for x in saved)
            else:
                inputs = tuple(x.expand(size, *x.shape) for x in saved)
            return layer.rule.entry(layer, inputs, instance, self._options)

        return self._meeting.track(Source(layer.name, output.detach().requires_grad_(), entry))

    def _before_bare(self, layer: Layer) -> None:
        self._meeting.enter()
        self._swap(layer, {name: self._meeting.track(self._bare_source(layer, name)) for name in layer.trainable})

    def _bare_source(self, layer: Layer, name: str) -> Source:
        canonical = layer.trainable[name]
        leaf = layer.module.get_parameter(name).detach().requires_grad_()
        dims = Dimensions(1, leaf.numel(), leaf.numel(), "direct")
        key = f"{layer.name}.{name}" if layer.name else name
        return Source(key, leaf, lambda instance: InstanceEntry({canonical: instance}, dims))

    def _after_bare(self, layer: Layer, args: Any, kwargs: Any, output: Any) -> None:
        self._meeting.leave()

    def _source_arrival(self) -> Arrive:
        source_pass = self._pass()

        def arrive(source: Source, instance: Tensor) -> None:
            layer = self._owner(source.key)
            kind = layer.rule.kind if layer.rule else "parameter"
            self._arrive(Arrival(source.key, layer, kind, lambda: source.entry(instance), source_pass))

        return arrive

    def _owner(self, key: str) -> Layer:
        return next(x for x in self.layers if x.name == key or (not x.rule and key.rpartition(".")[0] == x.name))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
