"""Gradients as signatures: by plain autograd, and as the engine books them.

Neither keeps a gradient of the whole model: each is taken as it arrives, parameter by parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from groupsearch.engine.arrival import Arrival, Receiver
from groupsearch.engine.entries import Entry, inner, of_examples
from groupsearch.engine.truth.signature import signature
from groupsearch.workloads.batches import check_loss, count_examples

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
class Booked:
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
) -> Booked:
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
    found = receiver.gradients
    return Booked(losses.detach(), found, receiver.together, receiver.sqnorms(), receiver.places)


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

    def receive(self, arrival: Arrival) -> None:
        """Take what is asked for of a site and let it go."""
        entry = arrival.make_entry()
        numbers = sorted(self.gradients)
        asked = entry if len(numbers) == self._size else of_examples(entry, self._mask(numbers, entry))
        sqnorm_B = self._sqnorm(entry, asked, numbers)
        self._sites.append((frozenset(entry.parameters), sqnorm_B))
        self.places.update(dict.fromkeys(entry.parameters, arrival.key))
        if self._together:
            for name, total in asked.clipped_sums(sqnorm_B.new_ones(len(numbers))).items():
                self.together.add(name, total)
        for place, i in enumerate(numbers):
            factor_B = sqnorm_B.new_zeros(len(numbers))
            factor_B[place] = 1
            for name, total in asked.clipped_sums(factor_B).items():
                self.gradients[i].add(name, total)

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
