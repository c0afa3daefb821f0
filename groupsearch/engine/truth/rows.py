"""Which rows of a user's batch the check takes: whole ones, as the batch has them.

Rows are never mixed with each other: a table has columns with ranges of their own, a covariance
must stay one. Where a batch has too few different rows, further ones are derived from the first by
what most inputs bear; whoever runs them drops those that the model refuses alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from groupsearch.workloads.batches import count_examples, first_examples, map_tensors, take_examples, tensors_of

_LOOKED_AT = 64
_EXTREME = 30.0
_SHUFFLES = 3
_AT_LEAST = 6
_COPIES = 4


@dataclass(frozen=True)
class Crowd:
    """One example before copies of another, the last of which goes without what earlier ones have used up.

    Attributes:
        first: a batch of one.
        copied: likewise.
        batch: both as one batch, the second four times.
    """

    first: Any
    copied: Any
    batch: Any

    @classmethod
    def of(cls, first: Any, copied: Any) -> Crowd:
        """Two examples as a crowd."""
        return cls(first, copied, joined([first, *[copied] * _COPIES]))


@dataclass(frozen=True)
class TriedRows:
    """Examples to check with, each a batch of one.

    Attributes:
        examples: up to three, different from each other where that can be had.
        extremes: the first before four of the last with its numbers multiplied, and with the other sign, too: what a
            batch may hold only so much of is full. Empty where it has no numbers to multiply.
        shuffled: sets of as many with their numbers shuffled among all: data as it comes may hide what other data
            show (rows that are in order, as many positions for every expert); the last set with the other sign. Empty
            without numbers to shuffle.
        blank: one of them with zeros for the last half of its ids, labels and masks (padding, a class that does not
            count); None where it has none but zeros.
        crowds: two examples, and a batch of the first before four of the second: of the least label among those of
            the largest, and the other way round; any two where labels are no whole numbers. The last copy goes without
            what earlier ones have used up. Empty where all rows are the same.
        whole: the batch as it was given, of up to 64 rows; one of fewer than six is repeated.
        places: where in it the examples are that are its own.
        origin: where they came from, in words.
        derived: how many at the end are not the batch's own.
    """

    examples: tuple[Any, ...]
    extremes: tuple[Crowd, ...]
    whole: Any
    places: tuple[int, ...]
    origin: str
    shuffled: tuple[tuple[Any, ...], ...] = ()
    blank: Any = None
    crowds: tuple[Crowd, ...] = ()
    derived: int = 0

    def without_derived(self, refused: str) -> TriedRows:
        """The same with the first row in place of those that were derived, which the model refused."""
        own = self.examples[: len(self.examples) - self.derived]
        return replace(
            self, examples=own, derived=0, shuffled=(), origin=f"{self.origin}, dropped: {refused}", extremes=()
        )


def choose_rows(batch: Any) -> TriedRows:
    """Three rows of a batch: different ones, two with the same whole-numbered label and one with another.

    Raises:
        GroupSearchError: when the batch has no common number of examples.
    """
    chosen = _different(batch)
    examples = [take_examples(batch, (i,)) for i in chosen]
    origin, derived = f"{len(examples)} different rows of the batch", 0
    if len(examples) < 3:
        origin = "the one row of the batch" if len(examples) == 1 else "the two different rows of the batch"
        further = _derived(batch, examples[0], 3 - len(examples))
        derived = len(further)
        examples += further
        if derived:
            origin += f", and {derived} derived from the first by scaling numbers and rolling ids"
    extremes = [_scaled(batch, examples[-1], factor) for factor in (_EXTREME, -_EXTREME)]
    if extremes[0] is None:
        extremes, shuffle = [], _columns_shuffled
    else:
        shuffle = _shuffled
    shuffled = tuple(shuffle(batch, examples, seed) for seed in range(_SHUFFLES if len(chosen) > 1 else 0))
    if extremes and shuffled:  # what few numbers of the data do, others of the other sign do more often
        shuffled = (*shuffled[:-1], tuple(_scaled(batch, example, -1.0) for example in shuffled[-1]))
    whole = first_examples(batch, max(min(count_examples(batch), _LOOKED_AT), _AT_LEAST))
    blank = _blanked(examples[min(1, len(examples) - 1)])
    pairs = _unlike(batch) or list(
        {(chosen[0], chosen[-1]): None, (chosen[-1], chosen[0]): None} if len(chosen) > 1 else ()
    )
    crowds = tuple(Crowd.of(take_examples(batch, (a,)), take_examples(batch, (b,))) for a, b in pairs)
    crowded = tuple(Crowd.of(examples[0], row) for row in extremes)
    return TriedRows(tuple(examples), crowded, whole, tuple(chosen), origin, shuffled, blank, crowds, derived)


def joined(examples: Sequence[Any]) -> Any:
    """Batches of one as one batch."""
    parts = [list(tensors_of(example)) for example in examples]
    columns = iter([torch.cat(column) for column in zip(*parts, strict=True)])
    return map_tensors(lambda tensor: next(columns), examples[0])


def whole_numbered(batch: Any) -> list[Tensor | None]:
    """For every tensor of a batch where in a row all examples have whole numbers, (1, ...); None if it has no others.

    Such places may hold categories or masks, and must keep what they hold.
    """
    found: list[Tensor | None] = []
    for tensor in tensors_of(batch):
        if not tensor.is_floating_point():
            found.append(None)
            continue
        whole = (tensor == tensor.round()).all(0, keepdim=True)
        found.append(None if bool(whole.all()) else whole)
    return found


def _different(batch: Any) -> list[int]:
    """Numbers of up to three different rows; the second, where there is one, has the first one's label."""
    count = min(count_examples(batch), _LOOKED_AT)
    tensors = [tensor[:count].detach().cpu() for tensor in tensors_of(batch)]
    keys = [
        tuple(t[i].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for t in tensors) for i in range(count)
    ]
    firsts = list({key: i for i, key in reversed(list(enumerate(keys)))}.values())
    firsts.sort()
    labels = next((t for t in tensors if t[0].numel() == 1 and not t.is_floating_point()), None)
    if labels is None or len(firsts) < 3:
        return firsts[:3]
    label = {i: labels[i].item() for i in firsts}
    for first in firsts:
        alike = [i for i in firsts if label[i] == label[first] and i != first]
        unlike = [i for i in firsts if label[i] != label[first]]
        if alike and unlike:
            return [first, alike[0], unlike[0]]
    return firsts[:3]


def _unlike(batch: Any) -> list[tuple[int, int]]:
    """The rows with the least and the largest label, and these in the other order; none without different labels."""
    labels = next((t for t in tensors_of(batch) if t[0].numel() == 1 and not t.is_floating_point()), None)
    if labels is None:
        return []
    flat = labels.flatten()[:_LOOKED_AT].long()
    least, largest = int(flat.argmin()), int(flat.argmax())
    return [(least, largest), (largest, least)] if flat[least] < flat[largest] else []


def _derived(batch: Any, example: Any, count: int) -> list[Any]:
    """Different rows made of one; none where there is nothing to change."""
    made: list[Any] = []
    for k in range(1, count + 1):
        scaled = _scaled(batch, example, 1 - 0.3 * k)
        if scaled is None:
            scaled = map_tensors(partial(_rolled, by=k), example)
            if all(torch.equal(a, b) for a, b in zip(tensors_of(scaled), tensors_of(example), strict=True)):
                return made
        made.append(scaled)
    return made


def _rolled(tensor: Tensor, by: int) -> Tensor:
    return tensor.roll(by, 1) if tensor.dim() == 2 and tensor.shape[1] > by else tensor


def _shuffled(batch: Any, examples: Sequence[Any], seed: int) -> tuple[Any, ...]:
    each, generator = iter(whole_numbered(batch)), np.random.default_rng(seed)  # torch draws alike meanwhile

    def shuffle(tensor: Tensor) -> Tensor:
        whole = next(each)
        if whole is None:
            return tensor
        order = torch.from_numpy(generator.permutation(tensor.numel())).to(tensor.device)
        return torch.where(whole, tensor, tensor.flatten()[order].view_as(tensor))

    together = map_tensors(shuffle, joined(examples))
    return tuple(take_examples(together, (i,)) for i in range(len(examples)))


def _columns_shuffled(batch: Any, examples: Sequence[Any], seed: int) -> tuple[Any, ...]:
    """Of ids alone: every place of an example is one that some example of the batch has there."""
    generator = np.random.default_rng(seed)

    def shuffle(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2:
            return tensor[: len(examples)]
        flat = tensor.flatten(1)
        order = torch.from_numpy(generator.integers(len(flat), size=(len(examples), flat.shape[1]))).to(tensor.device)
        return flat.gather(0, order).unflatten(1, tensor.shape[1:])

    together = map_tensors(shuffle, batch)
    return tuple(take_examples(together, (i,)) for i in range(len(examples)))


def _scaled(batch: Any, example: Any, factor: float) -> Any:
    places = whole_numbered(batch)
    if all(place is None for place in places):
        return None
    each = iter(places)

    def scale(tensor: Tensor) -> Tensor:
        place = next(each)
        return tensor if place is None else torch.where(place, tensor, tensor * factor)

    return map_tensors(scale, example)


def _blanked(example: Any) -> Any:
    """The example with zeros for the last half of its whole numbers; None where that changes nothing."""

    def blank(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor
        flat = tensor.flatten().clone()
        flat[len(flat) // 2 :] = 0
        return flat.view_as(tensor)

    made = map_tensors(blank, example)
    same = all(torch.equal(a, b) for a, b in zip(tensors_of(made), tensors_of(example), strict=True))
    return None if same else made


# -- NaN in one example, which must reach no other: a product with zero hides a mixture from numbers, but not from NaN

_CASTING = {"to", "type_as", "expand_as", "view_as", "reshape_as"}


def poisoned(batch: Any) -> tuple[Any, bool]:
    """A batch with NaN wherever its last example has numbers, and whether it has any.

    Whole numbers in a tensor that has others too are left: they may be categories. So is, on a GPU, a tensor
    of nothing else: NaN as an index there takes the whole process down.
    """
    places = iter(whole_numbered(batch))
    changed = False

    def poison(tensor: Tensor) -> Tensor:
        nonlocal changed
        whole = next(places)
        if not tensor.is_floating_point() or (whole is None and tensor.device.type != "cpu"):
            return tensor
        changed = True
        tensor = tensor.clone()
        last = tensor[-1:]
        tensor[-1:] = torch.full_like(last, torch.nan) if whole is None else torch.where(whole, last, torch.nan)
        return tensor

    return map_tensors(poison, batch), changed


class PoisonedIds(TorchFunctionMode):
    """Inside, embeddings of the last example's ids are NaN. What is made of ids is followed.

    Attributes:
        reached: whether there were any.
    """

    def __init__(self, batch: Any) -> None:
        super().__init__()
        self.reached = False
        self._size = count_examples(batch)
        self._ids: dict[int, weakref.ref[Tensor]] = {}
        for tensor in tensors_of(batch):
            self._follow(tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if func is functional.embedding:
            ids = args[0] if args else kwargs["input"]
            return self._poisoned(out, ids) if self._is_followed(ids) else out
        name = getattr(func, "__name__", "")
        deciding = tensors[:1] if name in _CASTING else tensors
        if any(self._is_followed(t) for t in deciding):
            for part in out if isinstance(out, list | tuple) else (out,):
                if isinstance(part, Tensor):
                    self._follow(part)
        return out

    def _is_followed(self, tensor: Tensor) -> bool:
        reference = self._ids.get(id(tensor))
        return reference is not None and reference() is tensor

    def _follow(self, tensor: Tensor) -> None:
        if (
            tensor.dim()
            and tensor.shape[0] == self._size
            and not tensor.is_floating_point()
            and not tensor.is_complex()
        ):
            self._ids[id(tensor)] = weakref.ref(tensor)

    def _poisoned(self, out: Tensor, ids: Tensor) -> Tensor:
        self.reached = True
        last = torch.zeros(self._size, dtype=torch.bool, device=out.device)
        last[-1] = True
        return torch.where(last.view(-1, *[1] * (out.dim() - 1)), torch.nan, out)
