"""An adversary who searches for the two neighbouring batches whose clipped sums lie furthest apart.

What is searched is the engine itself, not a model of it: the value of a point is the length of the
difference between ``engine.clipped_sums()`` with and without one example. The adversary chooses the
example, how loud its loss is, and the weights of the model (to the mechanism they are public).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from groupsearch.engine import make_private
from groupsearch.options import EngineOptions
from groupsearch.plan.clipping import ClipPlan
from tests.privacy.broken import Damage, none
from tests.support.case import VOCABULARY, Case
from tests.support.reference import trainable

LOUDEST = 6.0
HEAVIEST = 30.0


@dataclass(frozen=True)
class Point:
    """What the adversary chose: one example, log10 of its loss scale, and the weights."""

    x: Tensor
    loudness: float
    weights: tuple[Tensor, ...]


class Arena:
    """The engine on a case's model, and the batch that the chosen example joins.

    Args:
        case: model and loss.
        plan: what its sensitivity is claimed for.
        damage: what is broken about the engine.
        cuts: where the batch with the example is cut into micro-batches; the batch has three rows.
        dtype: of weights and inputs.
        options: cost-only choices.
    """

    def __init__(
        self,
        case: Case,
        plan: ClipPlan,
        damage: Damage = none,
        cuts: Sequence[int] = (0, 3),
        dtype: torch.dtype = torch.float64,
        options: EngineOptions | None = None,
    ) -> None:
        self.case = case
        self.plan = plan
        self.cuts = tuple(cuts)
        self.evaluations = 0
        self._model = case.model(dtype)
        self._parameters = list(trainable(self._model).values())
        self._optimizer = torch.optim.SGD(self._parameters, lr=0.0)
        self._engine = make_private(
            self._model, self._optimizer, plan, noise_multiplier=0.0, expected_batch_size=1, options=options
        )
        damage(self._engine)
        self._others = case.batch(dtype, 2)
        self._settled: tuple[tuple[Tensor, ...], dict[str, Tensor]] | None = None

    def first(self) -> Point:
        """The case as the catalogue has it."""
        weights = tuple(p.detach().clone() for p in self._parameters)
        return Point(self.case.batch(self._others["scale"].dtype, 3)["x"][2].clone(), 0.0, weights)

    def change(self, point: Point) -> float:
        """How far the example moves the clipped sums, as a part of the sensitivity claimed; inf where not finite.

        Sums are divided by ``plan.noise_scales``: under global noise that is the sensitivity for all.
        """
        self.evaluations += 1
        if self._settled is None or self._settled[0] is not point.weights:
            with torch.no_grad():
                for parameter, weight in zip(self._parameters, point.weights, strict=True):
                    parameter.copy_(weight)
            self._settled = point.weights, self._sums(self._others, (0, 2))
        without = self._settled[1]
        scale = torch.full_like(self._others["scale"][:1], 10.0**point.loudness)
        batch = {"x": _middle(self._others["x"], point.x[None]), "scale": _middle(self._others["scale"], scale)}
        sums = self._sums(batch, self.cuts)
        scales = self.plan.noise_scales
        squared = sum(float((sums[name] - without[name]).double().square().sum()) / scales[name] ** 2 for name in sums)
        return math.sqrt(squared) if math.isfinite(squared) else math.inf

    def _sums(self, batch: dict[str, Tensor], cuts: Sequence[int]) -> dict[str, Tensor]:
        for start, stop in pairwise(cuts):
            part = {name: value[start:stop] for name, value in batch.items()}
            self.case.loss(self._model, part).mean().backward()
        sums = {name: total.clone() for name, total in self._engine.clipped_sums().items()}
        self._optimizer.step()  # a learning rate of 0: it only ends the logical batch
        return sums


def search(
    arena: Arena,
    restarts: int = 3,
    steps: int = 40,
    seed: int = 0,
    enough: float = math.inf,
    ascend: bool = True,
) -> tuple[float, Point]:
    """The largest change found, and where; it ends early once the change is ``enough``.

    From every start an evolution strategy with one parent (its step widens on success and narrows on
    failure) over everything, then, with ``ascend``, an ascent over the example alone: along the gradient by finite
    differences through the engine where its numbers are real, position by position over the vocabulary
    where they are ids.
    """
    draw = torch.Generator().manual_seed(seed)
    best, where = -1.0, arena.first()
    for number in range(restarts):
        point = arena.first() if number == 0 else _elsewhere(arena.first(), draw, alike=number % 2 == 1)
        # The loudest example is beyond every threshold; the quietest is beyond none.
        value, point = max(
            ((arena.change(p), p) for p in (replace(point, loudness=level) for level in (4.0, 0.0, -2.0))),
            key=lambda pair: pair[0],
        )
        width = 1.0
        for _ in range(steps):
            if value > enough:
                return value, point
            trial = _mutated(point, width, draw)
            found = arena.change(trial)
            width = min(2.0, 1.5 * width) if found > value else max(0.05, 0.9 * width)
            if found >= value:
                value, point = found, trial
        if ascend:
            value, point = _ascended(arena, value, point)
        if value > best:
            best, where = value, point
    return best, where


def _ascended(arena: Arena, value: float, point: Point) -> tuple[float, Point]:
    if not point.x.is_floating_point():
        return _every_id(arena, value, point)
    for _ in range(2):
        slope = torch.zeros_like(point.x)
        for index in range(min(point.x.numel(), 24)):
            nudged = point.x.clone()
            nudged.view(-1)[index] += 1e-4
            slope.view(-1)[index] = arena.change(replace(point, x=nudged)) - value
        if not slope.isfinite().all() or not slope.any():
            break
        slope /= slope.norm()
        for length in (3.0, 1.0, 0.3, 0.1, 0.01):
            trial = replace(point, x=point.x + length * slope)
            if (found := arena.change(trial)) > value:
                value, point = found, trial
                break
    return value, point


def _every_id(arena: Arena, value: float, point: Point) -> tuple[float, Point]:
    for index in range(min(point.x.numel(), 6)):
        for token in range(VOCABULARY):
            x = point.x.clone()
            x.view(-1)[index] = token
            if (found := arena.change(replace(point, x=x))) > value:
                value, point = found, replace(point, x=x)
    return value, point


def _elsewhere(point: Point, draw: torch.Generator, alike: bool) -> Point:
    """A start with another example and other weights; one whose positions are ``alike`` has aligned gradients."""
    weights = tuple(w + _noise(w, draw) * w.std().nan_to_num(1.0) for w in point.weights)
    point = replace(point, x=_other_example(point.x, 2.0, draw), weights=weights)
    if point.x.dim() and alike:
        point = replace(point, x=point.x[:1].expand_as(point.x).clone())
    return point


def _mutated(point: Point, width: float, draw: torch.Generator) -> Point:
    kind = int(torch.randint(4, (), generator=draw))
    if kind == 0:
        return replace(point, x=_other_example(point.x, width, draw))
    if kind == 1:
        loudness = point.loudness + 2 * width * float(torch.randn((), generator=draw))
        return replace(point, loudness=max(-LOUDEST, min(LOUDEST, loudness)))
    weights = list(point.weights)
    chosen = int(torch.randint(len(weights), (), generator=draw))
    w = weights[chosen]
    if kind == 2:
        w = w + width * _noise(w, draw) * w.square().mean().sqrt().clamp(min=0.1)
    else:
        w = w * 10 ** (width * float(torch.randn((), generator=draw)))
    weights[chosen] = w.clamp(-HEAVIEST, HEAVIEST)
    return replace(point, weights=tuple(weights))


def _other_example(x: Tensor, width: float, draw: torch.Generator) -> Tensor:
    if x.is_floating_point():
        return x + width * _noise(x, draw)
    fresh = torch.randint(VOCABULARY, x.shape, generator=draw)
    return torch.where(torch.rand(x.shape, generator=draw) < 0.5 * width, fresh, x)


def _noise(like: Tensor, draw: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=draw, dtype=torch.float64).to(like.dtype)


def _middle(others: Tensor, row: Tensor) -> Tensor:
    return torch.cat([others[:1], row, others[1:]])
