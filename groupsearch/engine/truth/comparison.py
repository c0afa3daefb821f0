"""How far what the engine booked may be from the truth, and where it is further.

Allowed is a part of the example's own gradient of the parameter, a tenth of that part of its whole
gradient, and a thousandth of it of the largest example's: rounding in what adds up to almost nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from groupsearch.engine.arithmetic import HALF, widened
from groupsearch.engine.entries import Entry, inner, of_examples
from groupsearch.engine.passes import Arrival, Owed, Receiver, Unit
from groupsearch.workloads.batches import check_loss, count_examples

# -- Signatures of gradients: short vectors that add up as gradients do, so that no gradient needs to be kept
#
# A gradient is multiplied by random signs and summed into buckets, twice with other signs. The
# length of the difference of two signatures estimates that of the gradients' difference.

BUCKETS = 64
_TIMES = 2
_ROW = 4096


def signature(gradient: Tensor) -> Tensor:
    """The signature (64,) of a gradient of any shape, in float32 at least. It is linear in the gradient."""
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
    flat = widened(gradient.detach().reshape(-1))
    if flat.numel() <= BUCKETS:
        return torch.nn.functional.pad(flat, (0, BUCKETS - flat.numel()))
    rows, rest = divmod(flat.numel(), _ROW)
    total = flat.new_zeros(_TIMES, _ROW)
    if rows:
        total += _signs(rows, 1, flat.device, flat.dtype) @ flat[: rows * _ROW].view(rows, _ROW)
    if rest:
        total[:, :rest] += flat[rows * _ROW :]
    signed = total * _signs(_ROW, 2, flat.device, flat.dtype)
    return signed.view(_TIMES, -1, BUCKETS // _TIMES).sum(1).flatten() / math.sqrt(_TIMES)


@lru_cache(maxsize=64)
def _signs(count: int, salt: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Signs (2, count) from a hash of the place: no random draw, for these are made alike meanwhile."""
    x = torch.arange(_TIMES * count, dtype=torch.int64, device="cpu") * 0x9E3779B1 + salt * 0x85EBCA77
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    x = ((x ^ (x >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return (1 - 2 * ((x ^ (x >> 15)) & 1)).view(_TIMES, count).to(device=device, dtype=dtype)


def forget_signs() -> None:
    """Let go of the signs, which lie on the devices that gradients had lain on."""
    _signs.cache_clear()


# -- Gradients as signatures: by plain autograd, and as the engine books them ----------------------
#
# Neither keeps a gradient of the whole model: each is taken as it arrives, parameter by parameter.

Loss = Callable[[nn.Module, Any], Tensor]
Attached = Callable[[Receiver], AbstractContextManager[Any]]


@dataclass
class Gradient:
    """One gradient of all parameters, as what is known of it.

    Attributes:
        signatures: (64,) by parameter name; what did not arrive is zero.
        sqnorms: exact squared norm by parameter name; NaN where its parts arrived one by one.
    """

    signatures: dict[str, Tensor] = field(default_factory=dict)
    sqnorms: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, gradient: Tensor) -> None:
        """A parameter's gradient, or a part of it."""
        with _disable_current_modes():  # nothing is drawn here, and every mode takes its time
            sketch = signature(gradient)
            if name in self.signatures:
                self.signatures[name] = self.signatures[name] + sketch
                self.sqnorms[name] = torch.full_like(self.sqnorms[name], torch.nan)
            else:
                wide = gradient.detach()
                self.signatures[name] = sketch
                self.sqnorms[name] = torch.linalg.vector_norm(wide, dtype=_summed_in(wide)).square()

    def is_exact(self, name: str) -> bool:
        """Whether the norm of a parameter's gradient is known, and not only estimated."""
        return name not in self.sqnorms or not bool(self.sqnorms[name].isnan())

    def size(self, name: str) -> float:
        """Norm of a parameter's gradient, estimated where it is not known."""
        if name not in self.signatures:
            return 0.0
        exact = float(self.sqnorms[name])
        return exact**0.5 if exact == exact else float(torch.linalg.vector_norm(self.signatures[name]))

    def times(self, factor: float) -> Gradient:
        """The gradient of the loss times a factor."""
        return Gradient(
            {name: sketch * factor for name, sketch in self.signatures.items()},
            {name: sqnorm * factor**2 for name, sqnorm in self.sqnorms.items()},
        )

    def total(self) -> float:
        """Norm of the whole gradient."""
        return sum(self.size(name) ** 2 for name in self.signatures) ** 0.5


@dataclass
class BookedPass:
    """What the engine booked of a batch.

    Attributes:
        losses: (B,).
        examples: gradient of every example that was asked for, by its number.
        together: the sum with all factors 1; empty if not asked for.
        sqnorms: squared norms of the examples that were asked for, in order, by the parameters that a site uses;
            parameters that are shared with all that they share a site with.
        places: name of the layer that used each parameter.
    """

    losses: Tensor
    examples: dict[int, Gradient]
    together: Gradient
    sqnorms: dict[frozenset[str], Tensor]
    places: dict[str, str]


def plain_pass(model: nn.Module, batch: Any, loss: Loss) -> tuple[Tensor, Gradient]:
    """Losses (B,) of a batch and the gradient of their sum, by plain autograd on the model itself.

    Gradients that the parameters hold are put aside meanwhile.
    """
    found = Gradient()
    with _gradients_to(model, found.add):
        losses = check_loss(model, batch, loss)
        losses.sum().backward()
    return losses.detach(), found


@contextmanager
def _gradients_to(model: nn.Module, take: Callable[[str, Tensor], None]) -> Iterator[None]:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = {name: p.grad for name, p in trainable.items()}

    def taken(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            with torch.no_grad():
                take(name, parameter.grad)
            parameter.grad = None

    handles = []
    try:
        for name, p in trainable.items():
            p.grad = None
            handles.append(p.register_post_accumulate_grad_hook(partial(taken, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, p in trainable.items():
            p.grad = held[name]


def booked_pass(  # noqa: PLR0913 - what one pass is made of
    model: nn.Module,
    batch: Any,
    loss: Loss,
    attached: Attached,
    shared: Collection[str],
    examples: Sequence[int] | None = None,
    factor: float = 1.0,
) -> BookedPass:
    """One pass of a batch through the engine's capture.

    Args:
        model: the model.
        batch: the batch.
        loss: one loss per example.
        attached: attaches a capture with a receiver to the model for a while.
        shared: parameters that several sites use; their entries are kept until all have come.
        examples: whose gradients are asked for, and no sum; all and their sum if None. What others hold may be NaN.
        factor: that every loss is multiplied by, as a mean over the batch does.
    """
    size = count_examples(batch)
    receiver = _Receiver(size, shared, range(size) if examples is None else examples, examples is None)
    with attached(receiver.receive):
        losses = check_loss(model, batch, loss)
        (losses * factor).sum().backward()
        receiver.replay()
    found = receiver.gradients
    return BookedPass(losses.detach(), found, receiver.together, receiver.sqnorms(), receiver.places)


class _Receiver:
    def __init__(self, size: int, shared: Collection[str], examples: Sequence[int], together: bool) -> None:
        self.gradients = {i: Gradient() for i in examples}
        self.together = Gradient()
        self.places: dict[str, str] = {}
        self._shared = shared
        self._size = size
        self._together = together
        self._sites: list[tuple[frozenset[str], Tensor]] = []
        self._kept: dict[str, list[Entry]] = defaultdict(list)
        self._owed: dict[Unit, list[Owed]] = defaultdict(list)

    def receive(self, arrival: Arrival) -> None:
        """Take what is asked for of a site and let it go."""
        entry = arrival.make_entry()
        numbers = sorted(self.gradients)
        asked = entry if len(numbers) == self._size else of_examples(entry, self._mask(numbers, entry))
        sqnorm_B = self._sqnorm(entry, asked, numbers)
        self._sites.append((frozenset(entry.parameters), sqnorm_B))
        self.places.update(dict.fromkeys(entry.parameters, arrival.key))
        owed = arrival.owe(entry) if self._together and arrival.owe is not None else None
        if owed is not None:
            self._owed[owed.call].append(owed)
        elif self._together:
            self._add(asked)
        for place, i in enumerate(numbers):
            factor_B = sqnorm_B.new_zeros(len(numbers))
            factor_B[place] = 1
            for name, total in asked.clipped_sums(factor_B).items():
                self.gradients[i].add(name, total)

    def replay(self) -> None:
        """The sums of what is replayed are taken from there, as they are in training."""
        while self._owed:
            call, owed = self._owed.popitem()
            call.deliver(owed, self._add)

    def _add(self, entry: Entry) -> None:
        for name, total in entry.clipped_sums(entry.booked[0].new_ones(self._size, dtype=torch.float32)).items():
            self.together.add(name, total)

    def _mask(self, numbers: Sequence[int], entry: Entry) -> Tensor:
        kept_B = torch.zeros(self._size, dtype=torch.bool, device=entry.booked[0].device)
        kept_B[list(numbers)] = True
        return kept_B

    def _sqnorm(self, entry: Entry, asked: Entry, numbers: Sequence[int]) -> Tensor:
        """Squared norms of the examples that are asked for, with what a site shares with those before it."""
        sharing = [name for name in entry.parameters if name in self._shared]
        if not sharing:
            return entry.sqnorm()[list(numbers)]
        sqnorm_B = asked.sqnorm()
        for other in {id(e): e for name in sharing for e in self._kept[name]}.values():
            sqnorm_B = sqnorm_B + 2 * inner(other, asked)
        for name in sharing:
            self._kept[name].append(asked)
        return sqnorm_B

    def sqnorms(self) -> dict[frozenset[str], Tensor]:
        """Squared norms of parameters that no site ties to others, added up."""
        added: dict[frozenset[str], Tensor] = {}
        for names, sqnorm_B in self._sites:
            for group in [group for group in added if group & names]:
                sqnorm_B = sqnorm_B + added.pop(group)
                names |= group
            added[names] = sqnorm_B
        return added


def _summed_in(tensor: Tensor) -> torch.dtype:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return wide if not wide.is_complex else torch.complex128


# -- comparison ------------------------------------------------------------------------------------

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 5e-2
_LONGER = 0.1  # norms are rounded up, the more the more of them cancels


@dataclass(frozen=True)
class Difference:
    """Where the engine and the truth are further apart than is allowed.

    Attributes:
        what: ``loss``, ``gradient``, ``norm`` or ``sum``.
        parameter: whose gradient it is; empty for a loss.
        layer: that uses it.
        example: number of the example in the batch; None for a sum.
        found: size of the difference, relative to the truth.
        engine: what was found.  truth: what was expected; norms, or losses.
    """

    what: str
    parameter: str
    layer: str
    example: int | None
    found: float
    engine: float
    truth: float


def tolerance_of(model: nn.Module) -> float:
    """The part of an example's gradient that rounding may take, by the least precise dtype of the weights."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() or p.is_complex()}
    if dtypes & set(HALF):
        return _HALF_TOLERANCE
    wide = {torch.complex64: torch.float32, torch.complex128: torch.float64}
    return max((TOLERANCES.get(wide.get(d, d), _HALF_TOLERANCE) for d in dtypes), default=TOLERANCES[torch.float32])


@dataclass(frozen=True)
class Truth:
    """An example alone: its loss and its gradient."""

    loss: float
    gradient: Gradient


def compare_losses(losses: Tensor, truths: Mapping[int, Truth], tolerance: float) -> Difference | None:
    """The first loss of a batch that is not the example's own."""
    scale = max((abs(t.loss) for t in truths.values()), default=0.0)
    for i, truth in truths.items():
        found = float(losses[i])
        if not abs(found - truth.loss) <= tolerance * (abs(truth.loss) + 0.1 * scale) + 1e-30:
            return Difference(
                "loss", "", "", i, abs(found - truth.loss) / max(abs(truth.loss), 1e-30), found, truth.loss
            )
    return None


def compare(booked: BookedPass, truths: Mapping[int, Truth], tolerance: float) -> tuple[float, Difference | None]:
    """The largest difference of an example's gradient, and the worst of those that are not allowed.

    Args:
        booked: what the engine booked.
        truths: of the examples that were asked for, by their number in the batch.
        tolerance: see :func:`tolerance_of`.
    """
    largest = max((t.gradient.total() for t in truths.values()), default=0.0)
    worst, faults = 0.0, []
    for place, (i, truth) in enumerate(sorted(truths.items())):
        total = truth.gradient.total()
        floor = tolerance * (0.1 * total + 0.001 * largest) + 1e-30
        apart = _apart(booked.examples[i], truth.gradient)
        if total:
            worst = max(worst, sum(x * x for x in apart.values()) ** 0.5 / max(total, 0.01 * largest))
        for name, distance in apart.items():
            own = truth.gradient.size(name)
            if not distance <= tolerance * own + floor:
                faults.append(_fault("gradient", booked, name, i, distance, total, booked.examples[i].size(name), own))
        faults += _norm_faults(booked, truth.gradient, (place, i), tolerance, floor)
    if booked.together.signatures:
        faults += sum_faults(booked, [t.gradient for t in truths.values()], tolerance)
    return worst, max(faults, key=lambda fault: fault.found, default=None)


def _norm_faults(
    booked: BookedPass, truth: Gradient, example: tuple[int, int], tolerance: float, floor: float
) -> list[Difference]:
    faults = []
    place, number = example
    for names, sqnorm_B in booked.sqnorms.items():
        if not all(truth.is_exact(name) for name in names):
            continue
        own = sum(truth.size(name) ** 2 for name in names) ** 0.5
        found = max(float(sqnorm_B[place]), 0.0) ** 0.5
        if not own - tolerance * own - floor <= found <= own * (1 + _LONGER + tolerance) + 10 * floor:
            name = min(names)
            faults.append(_fault("norm", booked, name, number, abs(found - own), truth.total(), found, own))
    return faults


def sum_faults(booked: BookedPass, truths: Sequence[Gradient], tolerance: float) -> list[Difference]:
    """Where the sum over a batch is not that of the examples' own gradients."""
    faults = []
    wanted: dict[str, Tensor] = {}
    for truth in truths:
        for name, sketch in truth.signatures.items():
            wanted[name] = wanted[name] + sketch if name in wanted else sketch
    added = sum(t.total() for t in truths)
    for name in sorted(wanted.keys() | booked.together.signatures.keys()):
        own = sum(t.size(name) for t in truths)
        zero = torch.zeros((), device=next(iter(wanted.values())).device)
        got, want = booked.together.signatures.get(name, zero), wanted.get(name, zero)
        distance = float(torch.linalg.vector_norm(got - want))
        if not distance <= tolerance * (own + 0.1 * added) + 1e-30:
            sizes = (float(torch.linalg.vector_norm(x)) for x in (got, want))
            faults.append(_fault("sum", booked, name, None, distance, added, *sizes))
    return faults


def _apart(one: Gradient, other: Gradient) -> dict[str, float]:
    """Estimated norm of the difference, by parameter."""
    found = {}
    for name in one.signatures.keys() | other.signatures.keys():
        a, b = one.signatures.get(name), other.signatures.get(name)
        difference = a if b is None else b if a is None else a - b
        assert difference is not None
        found[name] = float(torch.linalg.vector_norm(difference))
    return found


def _fault(  # noqa: PLR0913 - the numbers of one sentence
    what: str,
    booked: BookedPass,
    name: str,
    example: int | None,
    distance: float,
    total: float,
    engine: float,
    truth: float,
) -> Difference:
    found = distance / max(total, 1e-30) if distance == distance else float("inf")
    return Difference(what, name, booked.places.get(name, name.rpartition(".")[0]), example, found, engine, truth)


# -- What a difference means, where it begins, and what to do: the sentences of the truth check ----

Outputs = list[tuple[str, list[Tensor]]]

MIXING = (
    "Remove what mixes or reorders examples (batch statistics, a mean over the batch, mixup, flips of the first "
    "dimension, a queue of earlier examples), or let it act on one example at a time."
)


def first_difference(
    forward: Callable[[Any], Any], model: nn.Module, batch: Any, alone: Sequence[Any], numbers: Sequence[int] = ()
) -> str | None:
    """Name of the first module whose output for an example is another one in the batch than alone.

    ``numbers`` says which examples of the batch those alone are; all in order if not given.

    None where every module's outputs agree, or they cannot be compared.
    """
    try:
        with torch.no_grad():
            together = _outputs(forward, model, batch, count_examples(batch))
            apart = [_outputs(forward, model, one, 1) for one in alone]
    except Exception:  # a diagnosis must not hide what it is of
        return None
    if any([name for name, _ in one] != [name for name, _ in together] for one in apart):
        return None
    for number, (name, rows) in enumerate(together):
        for i, one in zip(numbers or range(len(alone)), apart, strict=True):
            own = one[number][1]
            row = rows[i] if rows else None
            if (
                row is not None
                and len(own) == 1
                and not torch.allclose(row, own[0], rtol=1e-2, atol=1e-3 * float(own[0].abs().max()))
            ):
                return name
    return None


def _outputs(forward: Callable[[Any], Any], model: nn.Module, batch: Any, size: int) -> Outputs:
    """Signatures of every module's output by example, in the order in which they return."""
    found: Outputs = []
    with _hooked(model, lambda name, out: found.append((name, _rows(out, size)))):
        forward(batch)
    return found


@contextmanager
def _hooked(model: nn.Module, see: Callable[[str, Any], None]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: see(name, out))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(output: Any, size: int) -> list[Tensor]:
    leading = [
        x
        for x in pytree.tree_leaves(output)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() and x.shape[0] == size
    ]
    return [sum((signature(x[i]) for x in leading), torch.zeros(())) for i in range(size)] if leading else []


def described(
    fault: Difference, batch: str, begins: str | None, plain_agrees: bool | None = None, told: bool = True
) -> str:
    """The message of a difference.

    Args:
        fault: the difference.
        batch: which batch, in words.
        begins: see :func:`first_difference`.
        plain_agrees: whether plain autograd on the whole batch gives the sum of the examples' own gradients.
        told: whether numbers may be told; those of an example in training are private.
    """
    place = "In the loss" if not fault.layer and not fault.parameter else f"At layer {fault.layer!r}"
    place = f"{place} (parameter {fault.parameter!r})" if fault.parameter else place
    by = f" by {_percent(fault.found)}" if told else ""
    if fault.what == "loss":
        where = (
            f", from module {begins!r} on" if begins else ", though no module's output does: it is the loss that mixes"
        )
        if begins == "":
            where = ", between the model's parts, in its own forward"
        numbers = f": {fault.engine:.4g} in a batch of {batch}, {fault.truth:.4g} alone" if told else ""
        return (
            f"The loss of an example depends on the other examples of its batch{where}{numbers}. A loss that is "
            f"divided by what the batch counts does so too: divide by what the example counts. {MIXING}"
        )
    if plain_agrees and fault.what != "norm":
        return (
            f"{place} the engine books another gradient than plain autograd on the example alone, different{by}, in a "
            f"batch of {batch}, though the examples do not mix: what the layer is given or returns is changed where "
            "the engine cannot see it, or examples change places. Let the layer be called as a module and its output "
            "be used as it is, or freeze it with requires_grad_(False)."
        )
    if fault.what == "norm":
        numbers = f"{fault.engine:.4g} for the norm of an example's gradient that is {fault.truth:.4g}"
        return (
            f"{place} the engine takes {numbers if told else 'for the norm of an example another than it has'} by "
            f"plain autograd, in a batch of {batch}. Freeze the layer with requires_grad_(False), and report this."
        )
    begun = (
        ""
        if begins is None
        else f" It begins in module {begins!r}."
        if begins
        else " It begins in the model's own forward."
    )
    return (
        f"{place} the gradient of an example depends on the other examples of its batch, or the examples are in "
        f"another order there: it differs{by} from that of the example alone, in a batch of {batch}, and clipping it "
        f"protects nobody.{begun} {MIXING}"
    )


def not_linear(fault: Difference, factor: float) -> str:
    """The message where gradients are not as many times smaller as the losses are."""
    return (
        f"At layer {fault.layer!r} (parameter {fault.parameter!r}) the gradient of an example whose loss is multiplied "
        f"by {factor:g} is not {factor:g} times its gradient, but differs by {_percent(fault.found)}: something "
        "clamps, rounds or normalises gradients on their way (a hook, a function of your own), so that with a mean "
        "over the batch they depend on how many examples it has. Clip nothing on the way; the engine clips what "
        "arrives."
    )


def _percent(found: float) -> str:
    return f"{100 * found:.2g} %" if found < 10 else f"{found:.2g} times the size"
