"""Replay: a module's part of the book is not kept but run again when a group is closed.

The entry of a site follows from what its module was called with and from the gradients of what it returned. These are
kept (a tenth of a transformer block's book), the norm is taken when backward reaches the site, and the input and
output gradient of the site are let go. When the clipping factors are known the module runs again, forward and
backward, and every site's entry is consumed as it comes: the sums are formed by the same products as from the book.
With the output gradient of every site kept, running forward is enough.

That holds for a function of tensor inputs and parameters. A module that is none is refused by name: one that changes
a buffer or its input, has a generator of its own, keeps a tensor that asks for gradients, or receives gradients by
another way than its outputs. What cannot be seen of it (a counter in Python, say) shows in what comes back:
the length of every example's gradient at every site is compared with that of which the norm was taken.

Apart from the capture, which watches layers; here it is modules of many layers, and when they run again.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from groupsearch.engine.arithmetic import accumulator, habits_of
from groupsearch.engine.entries import EmbeddingEntry, Entry, MatrixEntry
from groupsearch.engine.layers import Layer
from groupsearch.engine.passes import Arrival, Owed, Pass, Receiver, in_backward
from groupsearch.engine.taps import Autocast, Hook, Take, with_gradients
from groupsearch.engine.whole import Left, RandomDraws, States, left_on
from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.options import EngineOptions
from groupsearch.workloads.blocks import CheckpointedForward, find_blocks

# -- Units: the modules that are replayed -----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ReplayUnit:
    """A module that is replayed, and how.

    Attributes:
        name: of the module in the model.
        module: itself.
        form: ``replay`` or ``replay-forward``.
        layers: names of the layers inside, itself not among them, whose sites may be owed.
        ruled: whether all layers inside have a rule.
        slots: where its trainable parameters lie.
        buffers: where its buffers lie, by name.
    """

    name: str
    module: nn.Module
    form: str
    layers: frozenset[str]
    ruled: bool
    slots: tuple[tuple[dict[str, Any], str], ...]
    buffers: Mapping[str, tuple[dict[str, Any], str]]

    @contextmanager
    def without_training(self) -> Iterator[None]:
        """For a while its parameters are constants that share the memory of those that are trained."""
        constants: dict[int, nn.Parameter] = {}
        originals = [(slots, name, slots[name]) for slots, name in self.slots]
        for slots, name, original in originals:
            slots[name] = constants.setdefault(id(original), nn.Parameter(original.detach(), requires_grad=False))
        self._update_flat_weights()
        try:
            yield
        finally:
            for slots, name, original in originals:
                slots[name] = original
            self._update_flat_weights()

    def _update_flat_weights(self) -> None:
        for module in self.module.modules():
            if isinstance(module, nn.RNNBase):
                module._update_flat_weights()  # it keeps a list of its parameters


def units_of(model: nn.Module, options: EngineOptions, layers: Sequence[Layer]) -> tuple[ReplayUnit, ...]:
    """The modules of a model that the options say to replay.

    Raises:
        GroupSearchError: for a module that the model does not have, more blocks than it has, or one inside another.
        UnsupportedModelError: for a module that cannot be replayed, as far as that shows before it has run.
    """
    forms = {name: form for name, form in _forms(model, options.replay).items() if form != "book"}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in forms:
        if not name or name not in modules:
            known = find_blocks(model)
            raise GroupSearchError(
                f"Expected modules of the model to replay{f', such as {known[0]}' if known else ''}, found {name!r}. "
                "Name modules as model.named_modules() does, and not the model itself."
            )
        outer = next((other for other in forms if name.startswith(other + ".")), None)
        if outer is not None:
            raise GroupSearchError(f"Module {name!r} is inside {outer!r}, which is replayed too. Name one of the two.")
    return tuple(_unit(name, modules[name], form, layers) for name, form in forms.items())


def _forms(model: nn.Module, replay: str | int | Mapping[str, str]) -> dict[str, str]:
    if isinstance(replay, Mapping):
        return dict(replay)
    if replay in ("none", 0):
        return {}
    blocks = find_blocks(model)
    if not blocks:
        raise UnsupportedModelError(
            f"Found no repeated blocks to replay in {type(model).__name__}: expected an nn.ModuleList or nn.Sequential "
            "with two or more blocks of one class. Name the modules with EngineOptions(replay={name: 'replay'}), or "
            "leave replay off."
        )
    count = len(blocks) if replay == "all" else int(replay)
    if count > len(blocks):
        raise GroupSearchError(f"Expected at most {len(blocks)} blocks to replay, which the model has, found {count}.")
    return dict.fromkeys(blocks[len(blocks) - count :], "replay")


def _unit(name: str, module: nn.Module, form: str, layers: Sequence[Layer]) -> ReplayUnit:
    inside = {id(part) for part in module.modules()} - {id(module)}
    there = [x for x in layers if id(x.module) in inside]
    owned = frozenset(x.name for x in there if not x.lent)
    for path, part in module.named_modules():
        for attribute, value in vars(part).items():
            if isinstance(value, torch.Generator):
                raise _cannot(
                    name,
                    f"{'.'.join(filter(None, (path, attribute)))!r} is a generator of its own, whose draws nobody can "
                    "repeat. Draw from torch's generators",
                )
    if not owned:
        raise _cannot(name, "no layer inside it is trained by itself. Name a module with layers, such as a block")
    slots = tuple(
        (part._parameters, local)
        for part in module.modules()
        for local, parameter in part._parameters.items()
        if parameter is not None and parameter.requires_grad
    )
    buffers = {
        f"{path}.{local}" if path else local: (part._buffers, local)
        for path, part in module.named_modules()
        for local in part._buffers
    }
    return ReplayUnit(name, module, form, owned, all(x.rule and not x.lent for x in there), slots, buffers)


def _cannot(name: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"Module {name!r} cannot be replayed: {why}, or leave it in the book.", name)


class OwingOptions(EngineOptions):
    """Options under which no per-example gradient of a matrix is kept: what would be is formed twice.

    Its norm is then rounded up, as the sum comes from another product.
    """

    def method_of(self, weight: str, positions: int, inputs: int, outputs: int) -> str:
        """As the options have it, with ``recompute`` in place of ``instantiate``."""
        method = super().method_of(weight, positions, inputs, outputs)
        return "recompute" if method == "instantiate" else method

    @classmethod
    def of(cls, options: EngineOptions) -> OwingOptions:
        """The same options otherwise."""
        return cls(**{x.name: getattr(options, x.name) for x in dataclasses.fields(options)})


# -- One call of a unit -------------------------------------------------------------------------------

_NOTES = "_groupsearch"
"""What the attributes begin with that tell of a tensor without gradients whether it comes from the batch."""


def _as_given(leaves: list[Any]) -> Any:
    return leaves


Runner = Callable[["KeptCall", list[Owed], Callable[[Entry], None]], None]
"""Runs a call again and hands over the entries of some of its sites."""


@dataclass(eq=False)
class UnitCall:
    """A call of a unit: all that is known of it but tensors. The graph knows it, and may live longer than a step.

    Attributes:
        unit: the module.
        run: runs it again.
        source: the forward pass.
        told: whether backward has reached its outputs.
        kept: then, what is kept of it while somebody needs it.
    """

    unit: ReplayUnit
    run: Runner
    source: Pass
    told: bool = False
    kept: Callable[[], KeptCall | None] = lambda: None
    _watch: _Surroundings | None = field(default=None, repr=False)
    _rebuild: Callable[[list[Any]], Any] = field(default=_as_given, repr=False)
    _leaves: list[Any] = field(default_factory=list, repr=False)
    _tensors: tuple[tuple[int, bool, dict[str, Any]], ...] = field(default=(), repr=False)
    _floating: tuple[int, ...] = ()
    _autocast: Autocast | None = None
    _states: States | None = field(default=None, repr=False)
    _arrived: Counter[tuple[str, bool]] = field(default_factory=Counter, repr=False)

    def begin(self, arguments: tuple[Any, Any], first: bool) -> None:
        """The module is about to run with (args, kwargs); ``first`` says that it never did before."""
        self._watch = _Surroundings(self.unit, arguments, first)

    def end(
        self, arguments: tuple[Any, Any], output: Any, is_tracked: Callable[[Any], bool]
    ) -> tuple[list[Any], tuple[int, ...], tuple[Tensor, ...], Callable[[list[Any]], Any]]:
        """The module returned.

        Returns:
            The leaves of the output, the indices of those whose gradients count, the tensors that must be saved, and
            what makes the output of leaves again.

        Raises:
            UnsupportedModelError: when it changed what replay needs as it was.
        """
        assert self._watch is not None
        self._states = self._watch.check()
        self._watch = None
        self._leaves, self._rebuild = _taken_apart(self.unit.name, arguments, strict=False)
        indices = [i for i, x in enumerate(self._leaves) if isinstance(x, Tensor)]
        saved = tuple(self._leaves[i] for i in indices)
        self._tensors = tuple(
            (i, x.requires_grad and not is_tracked(x), {k: v for k, v in vars(x).items() if k.startswith(_NOTES)})
            for i, x in zip(indices, saved, strict=True)
        )
        for i in indices:
            self._leaves[i] = None
        device = next(self.unit.module.parameters()).device.type
        self._autocast = Autocast.now(device)
        leaves, rebuild = _taken_apart(self.unit.name, output)
        self._floating = tuple(
            i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad and not is_tracked(x)
        )
        return leaves, self._floating, saved, rebuild

    def tell(self, inputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> KeptCall:
        """Backward has reached its outputs."""
        kept = KeptCall(self, inputs, grads)
        self.told, self.kept = True, weakref.ref(kept)
        return kept

    def arrive(self, key: str, ruled: bool) -> int:
        """A site inside has its gradient; how many of the same key had before, of those by a rule or of the others."""
        number = self._arrived[key, ruled]
        self._arrived[key, ruled] += 1
        return number

    @contextmanager
    def forward_again(self, inputs: tuple[Tensor, ...], asking: bool) -> Iterator[list[Any]]:
        """The leaves of its output as it runs again; inside ``with`` its parameters are constants.

        Args:
            inputs: the tensors it was given.
            asking: whether those that asked for gradients do so again.
        """
        leaves = list(self._leaves)
        for (i, asks, notes), x in zip(self._tensors, inputs, strict=True):
            leaf = x.detach()
            leaves[i] = leaf.requires_grad_() if asks and asking else leaf
            vars(leaf).update(notes)
        args, kwargs = self._rebuild(leaves)
        forward = self.unit.module.forward
        with ExitStack() as stack:
            stack.enter_context(self.unit.without_training())
            with ExitStack() as running:
                assert self._autocast is not None
                running.enter_context(self._autocast.again())
                if self._states is not None:
                    running.enter_context(self._states.again())
                if not asking:  # a checkpoint inside says so, and the unit then runs once more
                    running.enter_context(warnings.catch_warnings())
                    warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
                plain = forward.unchecked if isinstance(forward, CheckpointedForward) else forward
                output = plain(*args, **kwargs)
            yield _taken_apart(self.unit.name, output)[0]

    def backward_again(self, leaves: list[Any], grads: tuple[Tensor | None, ...]) -> None:
        """Send its output gradients through what :meth:`forward_again` made."""
        found = [(leaves[i], g) for i, g in zip(self._floating, grads, strict=True) if g is not None]
        found = [(x, g) for x, g in found if isinstance(x, Tensor) and x.requires_grad]
        if not found:
            return
        try:
            torch.autograd.backward([x for x, _ in found], [g for _, g in found])
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            raise self.from_outside() from error

    def unlike(self, key: str) -> UnsupportedModelError:
        """What to raise where something else came back, or nothing did."""
        return _cannot(
            self.unit.name,
            f"run again with the same inputs it gave layer {key!r} other numbers than before. It depends on something "
            "else than its tensor inputs and parameters (a counter, a cache, random draws of its own), or receives "
            "gradients by another way than its outputs (a loss of what it keeps, a hook). Change that",
        )

    def from_outside(self) -> UnsupportedModelError:
        """What to raise where it uses what it was not given."""
        return _cannot(
            self.unit.name,
            "it uses a tensor that asks for gradients and that it was not given (of an attribute, or a closure). Give "
            "it as an argument",
        )

    def not_told(self, key: str) -> UnsupportedModelError:
        """What to raise where a gradient reaches a site before the outputs of its module."""
        return _cannot(
            self.unit.name,
            f"layer {key!r} receives gradients by another way than the outputs of the module. Return what the loss "
            "uses from its forward",
        )


@dataclass(eq=False)
class KeptCall:
    """What is kept of a call from when backward reaches its outputs until no group needs it: inputs and gradients."""

    call: UnitCall
    inputs: tuple[Tensor, ...] = field(repr=False)
    grads: tuple[Tensor | None, ...] = field(repr=False)

    def owe(
        self, key: str, number: int, of_saved: Callable[[tuple[Tensor, ...]], Entry] | None, entry: Entry
    ) -> Owed | None:
        """What stands for an entry that will come again; None for one that had better be booked."""
        if isinstance(entry, MatrixEntry):
            a, g = entry.a, entry.g
        elif isinstance(entry, EmbeddingEntry):
            a, g = entry.ids_BT, entry.g_BTd
        else:
            return None
        if self.call.unit.form == "replay":
            return Owed(self, key, number, of_saved is not None, _print(g))
        return None if of_saved is None else Owed(self, key, number, True, _print(a), of_saved)

    def deliver(self, owed: list[Owed], consume: Callable[[Entry], None]) -> None:
        """Run again; see :class:`~groupsearch.engine.passes.Unit`."""
        self.call.run(self, owed, consume)

    def check_print(self, owed: Owed, entry: Entry) -> Tensor | None:
        """Hold what came back to what the norm was taken of; a flag on the device where numbers are not looked at.

        Raises:
            UnsupportedModelError: when it is something else.
        """
        a, g = (entry.a, entry.g) if isinstance(entry, MatrixEntry) else (entry.ids_BT, entry.g_BTd)  # type: ignore[attr-defined]
        seen = g if self.call.unit.form == "replay" else a
        after_B = _print(seen)
        if torch._guards.detect_fake_mode() is not None:
            return None
        half = torch.finfo(seen.dtype).eps if seen.is_floating_point() else 0.0
        tolerance = max(half, torch.finfo(after_B.dtype).eps ** 0.5)
        unlike = torch.isclose(after_B, owed.print_B, rtol=tolerance, atol=0.0, equal_nan=True).all().logical_not_()
        if not habits_of(after_B).looks:
            return unlike
        if unlike:
            raise self.call.unlike(owed.key)
        return None


def _print(x: Tensor) -> Tensor:
    """Length of every example's part, (B,)."""
    wide = x if x.is_floating_point() else x.float()
    wide = wide.unsqueeze(1) if wide.dim() == 1 else wide
    return torch.linalg.vector_norm(wide, dim=tuple(range(1, wide.dim())), dtype=accumulator(wide.dtype))


class _Surroundings:
    """What a module must leave as it is, noted as it begins to run."""

    def __init__(self, unit: ReplayUnit, arguments: tuple[Any, Any], first: bool) -> None:
        self._unit = unit
        leaves, _ = _taken_apart(unit.name, arguments, strict=False)
        self._inputs = [(x, x._version) for x in leaves if isinstance(x, Tensor)]
        self._buffers = {name: self._of_buffer(where) for name, where in unit.buffers.items()}
        self._left: Left | None = left_on(unit.module) if first else None
        self._randomness = RandomDraws(next(unit.module.parameters()).device)

    def check(self) -> States | None:
        """The states of the random generators from before, where the module drew from them.

        Raises:
            UnsupportedModelError: when something was changed.
        """
        name = self._unit.name
        if any(x._version != version for x, version in self._inputs):
            raise _cannot(name, "it changes its input in place. Let it make a new tensor")
        for buffer, where in self._unit.buffers.items():
            if self._of_buffer(where) != self._buffers[buffer]:
                raise _cannot(name, f"it changes its buffer {buffer!r}. Call .eval() on it if that stops this")
        if self._left is not None:
            self._check_left(self._left)
        return self._randomness.drawn()

    def _check_left(self, before: Left) -> None:
        for (path, attribute), tensors in left_on(self._unit.module).items():
            known = {id(x) for x in before.get((path, attribute), ())}
            if any(x.requires_grad and id(x) not in known for x in tensors):
                raise _cannot(
                    self._unit.name,
                    f"it leaves a tensor that asks for gradients in its attribute "
                    f"{'.'.join(filter(None, (path, attribute)))!r}, where the loss may use it. Return it from forward",
                )

    @staticmethod
    def _of_buffer(where: tuple[dict[str, Any], str]) -> tuple[int, int]:
        buffer = where[0].get(where[1])
        return (id(buffer), buffer._version) if isinstance(buffer, Tensor) else (id(buffer), 0)


def _taken_apart(name: str, value: Any, strict: bool = True) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of what a module is given or returned, those of dataclasses too, and what puts it together again.

    Raises:
        UnsupportedModelError: where ``strict``, for an object that may hold tensors and cannot be taken apart.
    """
    leaves, spec = pytree.tree_flatten(value)
    if all(x is None or isinstance(x, _PLAIN) for x in leaves):
        return leaves, lambda found: pytree.tree_unflatten(found, spec)
    flat: list[Any] = []
    makers: list[tuple[int, Callable[[list[Any]], Any]]] = []
    for leaf in leaves:
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            inner, make = _fields(name, leaf, strict)
        elif leaf is None or isinstance(leaf, _PLAIN) or not strict:
            inner, make = _as_it_is(leaf)
        else:
            raise _cannot(name, f"it returns a {type(leaf).__name__}, which cannot be taken apart. Return tensors")
        makers.append((len(inner), make))
        flat += inner

    def rebuild(found: list[Any]) -> Any:
        parts, place = [], 0
        for count, make in makers:
            parts.append(make(found[place : place + count]))
            place += count
        return pytree.tree_unflatten(parts, spec)

    return flat, rebuild


_PLAIN = (Tensor, bool, int, float, complex, str, torch.dtype, torch.device)


def _as_it_is(leaf: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    return [leaf], lambda found: found[0]


def _fields(name: str, value: Any, strict: bool) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    given = {x.name: getattr(value, x.name) for x in dataclasses.fields(value) if x.init}
    leaves, rebuild = _taken_apart(name, given, strict)
    return leaves, lambda found: dataclasses.replace(value, **rebuild(found))


# -- What a capture does for its units ----------------------------------------------------------------

FIRST: dict[str, Any] = {"with_kwargs": True, "prepend": True}
"""How the engine's hooks are registered: before the user's own."""
Place = Callable[[Arrival], Arrival]
"""Tells an arrival which call of a unit its site ran in."""


@dataclass(frozen=True)
class Stage:
    """What replay asks of the capture.

    It says whether it watches, which pass runs, whether a tensor is a function of parameters alone and what was
    saved, and runs a part of the model with another receiver for a while.
    """

    is_on: Callable[[], bool]
    running: Callable[[], Pass]
    is_function: Callable[[object], bool]
    taken: Callable[[Take], tuple[Tensor, ...]]
    running_again: Callable[[Pass, Receiver, bool], AbstractContextManager[None]]


class Replays:
    """Watches the units of a model, and runs their calls again.

    Where all layers of a unit have a rule its input need not ask for gradients, nor any layer that nothing is wanted
    of: autograd then goes no further than to the first one that something is wanted of. Only where that does not bring
    back everything (a checkpoint inside the unit with use_reentrant=True, which wants an input that asks) it runs as
    it did before.

    Attributes:
        wanted: names of the layers of which something is wanted while a unit runs in that way; None otherwise.
    """

    def __init__(self, units: Sequence[ReplayUnit], stage: Stage) -> None:
        self.wanted: frozenset[str] | None = None
        self._asking = {unit.name for unit in units if not unit.ruled}
        self._units = units
        self._stage = stage
        self._calls: list[UnitCall] = []
        self._told: KeptCall | None = None
        self._ran: set[str] = set()
        self._kept: dict[str, list[tuple[Tensor, ...]]] | None = None
        self._unlike: tuple[Tensor, UnitCall, str] | None = None

    def watch_ends(self) -> list[RemovableHandle]:
        """Hooks that run after those of the layers that are registered later."""
        return [u.module.register_forward_hook(self._after(u), always_call=True, **FIRST) for u in self._units]

    def watch_beginnings(self) -> list[RemovableHandle]:
        """Hooks that run before those of the layers that were registered earlier."""
        return [u.module.register_forward_pre_hook(self._before(u), **FIRST) for u in self._units]

    def place(self) -> Place | None:
        """Of a site that runs now; None where it is in no unit."""
        if self._calls:
            return partial(_placed, self._calls[-1])
        # run again in backward, apart from its unit: that of which backward came last
        return self._placed_last if self._units and in_backward() else None

    def saw(self, key: str, saved: tuple[Tensor, ...]) -> bool:
        """A layer has run, and needs these tensors; whether that is all that is asked."""
        if self._kept is None:
            return False
        self._kept.setdefault(key, []).append(saved)
        return True

    def check(self) -> None:
        """Hold what was replayed to what norms were taken of, where numbers are not looked at in between.

        Raises:
            UnsupportedModelError: when it was something else.
        """
        found, self._unlike = self._unlike, None
        if found is not None and found[0]:
            raise found[1].unlike(found[2])

    # -- watching ----------------------------------------------------------------------------

    def _before(self, unit: ReplayUnit) -> Hook:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._stage.is_on():
                call = UnitCall(unit, self._run, self._stage.running())
                call.begin((args, kwargs), unit.name not in self._ran)
                self._calls.append(call)
                self._ran.add(unit.name)

        return Hook(before)

    def _after(self, unit: ReplayUnit) -> Hook:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not self._calls or self._calls[-1].unit is not unit:
                return None
            call = self._calls.pop()
            if output is None:  # the forward raised
                return None
            with torch._C.DisableTorchFunction():
                return self._end(call, (args, kwargs), output)

        return Hook(after)

    def _end(self, call: UnitCall, arguments: tuple[Any, Any], output: Any) -> Any:
        leaves, floating, saved, rebuild = call.end(arguments, output, self._stage.is_function)
        if not floating:
            return None

        def arrive(grads: tuple[Tensor | None, ...], take: Take) -> None:
            if self._told is None:  # of this call's sites no other backward comes than the one that runs
                torch.autograd.Variable._execution_engine.queue_callback(self._forget)
            self._told = call.tell(self._stage.taken(take), grads)

        told = with_gradients(call.source, [leaves[i] for i in floating], arrive, saved)
        for i, tensor in zip(floating, told, strict=True):
            leaves[i] = tensor
        return rebuild(leaves)

    def _forget(self) -> None:
        self._told = None

    def _placed_last(self, arrival: Arrival) -> Arrival:
        return arrival if self._told is None else _placed(self._told.call, arrival)

    # -- running again -----------------------------------------------------------------------

    def _run(self, kept: KeptCall, owed: list[Owed], consume: Callable[[Entry], None]) -> None:
        """Run a call again and hand over the entries of some of its sites.

        Raises:
            UnsupportedModelError: when it does not run as it did.
        """
        wanted = {(x.key, x.number, x.ruled): x for x in owed}
        owed.clear()
        unit = kept.call.unit
        run = self._forward if unit.form == "replay-forward" else self._both
        if unit.name not in self._asking:
            self.wanted = frozenset(key for key, _, _ in wanted)
            try:
                self._apart(run, kept, wanted, consume)
            finally:
                self.wanted = None
            if wanted:
                self._asking.add(unit.name)
        if wanted:
            self._apart(run, kept, wanted, consume)
        if wanted:
            raise kept.call.unlike(next(iter(wanted))[0])

    def _apart(self, run: Callable[..., None], kept: KeptCall, wanted: _Wanted, consume: _Consume) -> None:
        before = self._calls, self._told
        self._calls, self._told = [], None
        try:
            run(kept, wanted, consume)
        finally:
            (self._calls, self._told), self._kept = before, None

    @contextmanager
    def _again(self, kept: KeptCall, receive: Receiver) -> Iterator[list[Any]]:
        asking = self.wanted is None
        with (
            self._stage.running_again(kept.call.source, receive, asking),
            torch.enable_grad(),
            kept.call.forward_again(kept.inputs, asking) as leaves,
        ):
            yield leaves

    def _both(self, kept: KeptCall, wanted: _Wanted, consume: _Consume) -> None:
        seen: Counter[tuple[str, bool]] = Counter()

        def receive(arrival: Arrival) -> None:
            if arrival.source_pass is kept.call.source:
                raise kept.call.from_outside()
            key, ruled = arrival.key, arrival.of_saved is not None
            owed = wanted.pop((key, seen[key, ruled], ruled), None)
            seen[key, ruled] += 1
            if owed is not None:
                entry = arrival.make_entry()
                self._check(kept, owed, entry)
                consume(entry)

        with self._again(kept, receive) as leaves:
            kept.call.backward_again(leaves, kept.grads)

    def _forward(self, kept: KeptCall, wanted: _Wanted, consume: _Consume) -> None:
        seen = self._kept = {}
        with self._again(kept, _nobody):
            self._kept = None
        with torch.no_grad():
            for (key, number, ruled), owed in list(wanted.items()):
                uses = seen.get(key, [])
                if number < len(uses) and owed.make is not None:
                    del wanted[key, number, ruled]
                    entry = owed.make(tuple(x.detach() for x in uses[-1 - number]))  # backward has the last use first
                    self._check(kept, owed, entry)
                    consume(entry)

    def _check(self, kept: KeptCall, owed: Owed, entry: Entry) -> None:
        unlike = kept.check_print(owed, entry)
        if unlike is not None:
            before = unlike if self._unlike is None else self._unlike[0] | unlike.to(self._unlike[0].device)
            self._unlike = before, kept.call, owed.key


_Wanted = dict[tuple[str, int, bool], Owed]
_Consume = Callable[[Entry], None]


def _placed(call: UnitCall, arrival: Arrival) -> Arrival:
    if arrival.layer.name not in call.unit.layers:
        return arrival
    if not call.told:
        raise call.not_told(arrival.key)
    number, kept = call.arrive(arrival.key, arrival.of_saved is not None), call.kept()
    if kept is None:
        return arrival
    return replace(arrival, owe=partial(kept.owe, arrival.key, number, arrival.of_saved))


def _nobody(arrival: Arrival) -> None:
    raise AssertionError("nothing runs backward")
