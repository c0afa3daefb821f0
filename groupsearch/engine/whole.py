"""A module differentiated as one: run again for each example alone.

Where rows leave their examples inside a module (tokens routed to experts), no operation inside can
be followed. What goes in and comes out still belongs to examples, so each example's gradient is
that of the module run again on this example's rows; the clipped sum is that of one run on all of
them. Nothing is kept but inputs and output gradients. A module that draws random numbers is run
again on the whole batch, with the same draws, and differentiated for one example after the other.

A run on one example and a run on all take kernels chosen for their sizes, which round otherwise. Both are of IEEE
float32 (convolutions of CUDA are not by default), and norms are made ``APART`` units of rounding longer for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from groupsearch.engine.arithmetic import habits_of, ieee, is_half
from groupsearch.engine.entries import Dimensions, InstanceEntry, instance_sqnorm
from groupsearch.engine.layers import Layer
from groupsearch.engine.layout import fold_rows
from groupsearch.engine.passes import Pass
from groupsearch.engine.taps import Autocast, Take, with_gradients
from groupsearch.errors import UnsupportedModelError, is_out_of_memory
from groupsearch.plan.trace import Rows


def called(name: str) -> str:
    """What messages call a module, by its name in the model; the model has none."""
    return f"Module {name!r}" if name else "The model itself"


ByLeaf = Mapping[int, Tensor]
APART = 64
"""Units of rounding that a norm is made longer by."""


class RandomDraws:
    """The state of the random generators as a module begins to run, if it draws from them."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._before = self._states()

    def drawn(self) -> States | None:
        """The states from before, where random numbers have been drawn since; None where none were."""
        changed = any(not torch.equal(one, other) for one, other in zip(self._before, self._states(), strict=True))
        return States(tuple(self._devices), tuple(self._before)) if changed else None

    def _states(self) -> list[Tensor]:
        if torch._guards.detect_fake_mode() is not None:
            return []
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]


@dataclass(frozen=True)
class States:
    """States of the CPU's generator and of those of some CUDA devices."""

    devices: tuple[torch.device, ...]
    states: tuple[Tensor, ...]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw for a while what was drawn from here."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.devices, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


@dataclass(frozen=True)
class Call:
    """One call of a module: where the examples' rows were in its arguments, and everything else.

    Attributes:
        name: of the module.
        module: itself.
        trainable: canonical name of every trainable parameter inside, by its name in the module.
        leaves: of the arguments, None where an example's rows belong.
        spec: how the leaves make up (args, kwargs).
        order: of the rows of an example.
        autocast: what autocast was set to.
        states: of the random generators, where the module draws; it is then run again on the whole batch only.
    """

    name: str
    module: nn.Module
    trainable: Mapping[str, str]
    leaves: tuple[Any, ...]
    spec: Any
    order: Rows
    autocast: Autocast
    states: States | None

    def gradients(self, rows: ByLeaf, grads: Iterable[ByLeaf]) -> Iterator[dict[str, Tensor]]:
        """Run again on rows (b, k, ...); the gradient of every parameter for each of some output gradients (b, k, ...).

        Raises:
            UnsupportedModelError: when the module does not run on these examples alone.
        """
        leaves = list(self.leaves)
        for index, x in rows.items():
            leaves[index] = fold_rows(x.detach(), self.order)
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with torch.enable_grad(), ieee(), _fresh(self.module, self.trainable) as fresh:
            outputs = pytree.tree_leaves(self._run(args, kwargs))
        for wanted in grads:
            reached = [i for i in wanted if outputs[i].requires_grad]
            with ieee():
                found = torch.autograd.grad(
                    [outputs[i] for i in reached],
                    list(fresh.values()),
                    [fold_rows(wanted[i], self.order) for i in reached],
                    retain_graph=True,
                    allow_unused=True,
                )
            yield {
                name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(fresh.items(), found, strict=True)
            }

    def _run(self, args: Any, kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(self.autocast.again())
            if self.states is not None:
                stack.enter_context(self.states.again())
            try:
                return self.module.forward(*args, **kwargs)
            except (RuntimeError, IndexError) as error:
                if is_out_of_memory(error):
                    raise
                raise UnsupportedModelError(
                    f"{called(self.name)} is differentiated as one, and does not run on part of its batch: {error}. "
                    "Make everything that grows with the batch inside the module.",
                    self.name,
                ) from error


@dataclass(frozen=True)
class WholeEntry:
    """A module's call, the rows that went in (B, k, ...) and the gradients of what came out (B, k, ...)."""

    call: Call
    rows: ByLeaf
    grads: ByLeaf
    dimensions: Dimensions

    @property
    def parameters(self) -> tuple[str, ...]:
        """Canonical names, each once."""
        return tuple(dict.fromkeys(self.call.trainable.values()))

    @property
    def booked(self) -> tuple[Tensor, ...]:
        """Inputs and output gradients."""
        return (*self.rows.values(), *self.grads.values())

    def sqnorm(self) -> Tensor:
        """Squared gradient norm per example, (B,), one example at a time, rounded up."""
        squares = [[instance_sqnorm(g[None]) for g in gradient.values()] for gradient in self._examples()]
        sqnorm_B = torch.stack([torch.cat(parts).sum() for parts in squares])
        return sqnorm_B.mul_((1 + APART * torch.finfo(sqnorm_B.dtype).eps) ** 2)

    def instance(self, name: str) -> Tensor:
        """Per-example gradient of one parameter, (B, *shape)."""
        return torch.stack([gradient[name] for gradient in self._examples()])

    def clipped_sums(self, factor_B: Tensor) -> Mapping[str, Tensor]:
        """Sum over examples of factor times gradient, from one run on all examples.

        In half precision that run would round otherwise than those that the norms were taken of; these are summed then.
        """
        if is_half(*self.grads.values(), *(self.call.module.get_parameter(n) for n in self.call.trainable)):
            return self.alone(slice(None)).clipped_sums(factor_B)
        scaled = {i: g * _by_example(factor_B.to(g.dtype), g) for i, g in self.grads.items()}
        if habits_of(factor_B).looks:
            return next(self.call.gradients(self.rows, [scaled]))
        # Without a look: an example with a factor of zero runs with the rows of one that has another, if there is one.
        kept_B = factor_B != 0
        places = torch.arange(len(kept_B), device=kept_B.device)
        places = torch.where(kept_B, places, kept_B.to(torch.uint8).argmax())
        for g in scaled.values():
            g.masked_fill_(_by_example(~kept_B, g), 0)
        sums = next(self.call.gradients({i: x[places] for i, x in self.rows.items()}, [scaled]))
        return {name: total.masked_fill(~kept_B.any(), 0) for name, total in sums.items()}

    def outline(self, name: str) -> Callable[[], Tensor]:
        """A maker of the per-example gradients of one parameter, (B, *shape), without values."""
        local = next(local for local, canonical in self.call.trainable.items() if canonical == name)
        parameter = self.call.module.get_parameter(local)
        shape, dtype = (self._size, *parameter.shape), parameter.dtype
        return lambda: torch.empty(shape, dtype=dtype, device="meta")

    def alone(self, kept_B: Tensor | slice) -> InstanceEntry:
        """The gradients of some examples, (B, *shape) each, as they come from the runs that the norms were taken of."""
        numbers = kept_B.nonzero().flatten().tolist() if isinstance(kept_B, Tensor) else range(self._size)[kept_B]
        found = list(self._examples(numbers))
        if not found:
            return InstanceEntry({name: self.instance(name)[:0] for name in self.parameters}, self.dimensions)
        stacked = {name: torch.stack([gradient[name] for gradient in found]) for name in self.parameters}
        return InstanceEntry(stacked, self.dimensions)

    @property
    def _size(self) -> int:
        return len(next(iter(self.grads.values())))

    def _examples(self, numbers: Sequence[int] | None = None) -> Iterator[dict[str, Tensor]]:
        """The gradients of some examples, of all by default, one after the other."""
        numbers = range(self._size) if numbers is None else numbers
        if self.call.states is not None:  # what an example draws depends on its place in the batch
            yield from self.call.gradients(self.rows, (self._only(i) for i in numbers))
            return
        for one in (slice(i, i + 1) for i in numbers):
            rows = {k: x[one] for k, x in self.rows.items()}
            yield next(self.call.gradients(rows, [{k: g[one] for k, g in self.grads.items()}]))

    def _only(self, example: int) -> ByLeaf:
        alone = {i: torch.zeros_like(g) for i, g in self.grads.items()}
        for i, g in self.grads.items():
            alone[i][example] = g[example]
        return alone


def _by_example(numbers_B: Tensor, like: Tensor) -> Tensor:
    return numbers_B.view(-1, *[1] * (like.dim() - 1))


Deliver = Callable[[Callable[[], WholeEntry]], None]
During = Callable[[Take], tuple[Tensor, ...]]


@dataclass(frozen=True)
class WholeCall:
    """A call that has just returned: its call, and its rows saved for backward.

    Attributes:
        call: the call.
        indices: of the leaves that are rows.
        saved: those leaves.
        source: the forward pass.
    """

    call: Call
    indices: tuple[int, ...]
    saved: tuple[Tensor, ...]
    source: Pass

    @classmethod
    def of(
        cls,
        layer: Layer,
        arguments: tuple[Any, Any],
        source: Pass,
        from_batch: Callable[[Tensor], bool],
        states: States | None,
    ) -> WholeCall:
        """The call of a layer with (args, kwargs).

        Raises:
            UnsupportedModelError: when an argument comes from the batch and does not lead with it.
        """
        leaves, spec = pytree.tree_flatten(arguments)
        indices = tuple(i for i, x in enumerate(leaves) if isinstance(x, Tensor) and from_batch(x))
        for i in indices:
            _check_rows(layer.name, leaves[i], source)
        saved = tuple(leaves[i] for i in indices)
        kept = tuple(None if i in indices else x for i, x in enumerate(leaves))
        autocast = Autocast.now(next(layer.module.parameters()).device.type)
        call = Call(layer.name, layer.module, layer.trainable, kept, spec, source.rows, autocast, states)
        return cls(call, indices, saved, source)

    def await_gradients(self, output: Any, during: During, deliver: Deliver) -> Any:
        """The output, with an entry delivered when backward has the gradients of all that backward reaches of it."""
        leaves, spec = pytree.tree_flatten(output)
        floating = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
        for i in floating:
            _check_rows(self.call.name, leaves[i], self.source)

        def arrive(found: tuple[Tensor | None, ...], take: Take) -> None:
            split = partial(self.source.by_example, layout="folded")
            grads = {i: split(g) for i, g in zip(floating, found, strict=True) if g is not None}
            rows = {i: split(x) for i, x in zip(self.indices, during(take), strict=True)}
            count = sum(p.numel() for p in self.call.module.parameters() if p.requires_grad)
            dims = Dimensions(next(iter(grads.values())).shape[1], count, count, "recompute")
            deliver(lambda: WholeEntry(self.call, rows, grads, dims))

        told = with_gradients(self.source, [leaves[i] for i in floating], arrive, self.saved)
        for i, tensor in zip(floating, told, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, spec)


def _check_rows(name: str, tensor: Tensor, source: Pass) -> None:
    if source.rows_of(tensor, "folded") is None:
        raise UnsupportedModelError(
            f"{called(name)} is differentiated as one, and was given or returned a tensor of "
            f"{tensor.dim()} dimensions that does not lead with the examples of the batch. Keep the batch first.",
            name,
        )


Left = Mapping[tuple[str, str], tuple[Tensor, ...]]


def left_on(module: nn.Module) -> Left:
    """The floating tensors, but for parameters and buffers, that lie in attributes of a module and its parts."""
    found = {
        (name, attribute): tuple(
            x for x in pytree.tree_leaves(value) if isinstance(x, Tensor) and x.is_floating_point()
        )
        for name, part in module.named_modules()
        for attribute, value in vars(part).items()
        if isinstance(value, Tensor | list | tuple | dict) and attribute not in _OF_MODULES
    }
    return {where: tensors for where, tensors in found.items() if tensors}


def check_nothing_left(layer: Layer, before: Left) -> None:
    """Check that a call left no tensor on its module: what reaches the loss by that way would not be told.

    Raises:
        UnsupportedModelError: naming the attribute.
    """
    for (name, attribute), tensors in left_on(layer.module).items():
        known = {id(x) for x in before.get((name, attribute), ())}
        if any(id(x) not in known for x in tensors):
            raise UnsupportedModelError(
                f"{called(layer.name)} is differentiated as one and leaves a tensor in the attribute "
                f"{'.'.join(filter(None, (layer.name, name, attribute)))!r}, whose gradient would be lost if the loss "
                "used it. Return it from forward instead, or do not keep it.",
                layer.name,
            )


# of nn.Module itself: parameters, buffers, parts, hooks; and a recurrent layer's list of its parameters
_OF_MODULES = frozenset(vars(nn.Module())) | {"_flat_weights"}


@contextmanager
def _fresh(module: nn.Module, trainable: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """The module with leaves of their own as parameters, by canonical name; a tied parameter has one."""
    fresh: dict[str, Tensor] = {}
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    for local, canonical in trainable.items():
        path, _, name = local.rpartition(".")
        slots = module.get_submodule(path)._parameters
        original = slots[name]
        assert original is not None
        replaced.append((slots, name, original))
        slots[name] = fresh.setdefault(canonical, original.detach().requires_grad_())  # type: ignore[assignment]
    try:
        yield fresh
    finally:
        for slots, name, original in reversed(replaced):  # a tied one comes twice
            slots[name] = original
