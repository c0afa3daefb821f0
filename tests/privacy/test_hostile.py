"""What an adversary can do that a search from ordinary starts does not find: rounding, overflow, order and routes.

Here an example is chosen against the arithmetic, or a model against what tracing looks at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupsearch.errors import GroupSearchError
from groupsearch.options import EngineOptions
from groupsearch.plan.clipping import RULES, ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer.sites import observe_sites
from tests.engine.test_parity import assert_agree, step
from tests.privacy.adversary import Arena, Point
from tests.support.case import Batch, Case, Wrap
from tests.support.reference import per_example_gradients

SINGLE_ROUNDING = 1e-3


def difference(model: nn.Module, batch: Batch) -> Tensor:
    """A loss that sets the second half of the positions against the first: equal positions cancel."""
    output = model(batch["x"]).flatten(2)
    half = output.shape[1] // 2
    return batch["scale"] * (output[:, :half] - output[:, half:]).sum((1, 2))


def _tied(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, 0]), m.b(x[:, 1])], 1)


def _tied_pair() -> nn.Module:
    a, b = nn.Linear(6, 5), nn.Linear(6, 5)
    b.weight = a.weight
    return Wrap(_tied, a=a, b=b)


def _swapped(m: Any, x: Tensor) -> Tensor:
    return m.a(x).transpose(1, 2)


def _one_by_one(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.a(x[:, 0]), m.a(x[:, 1])], 1)


CANCELLING = {
    case.name: case
    for case in (
        Case("positions", lambda: nn.Linear(6, 5, bias=False), (2, 6), loss=difference),
        Case("positions-and-bias", lambda: nn.Linear(6, 5), (2, 6), loss=difference),
        Case("many-positions", lambda: nn.Linear(6, 5), (16, 6), loss=difference),
        Case("convolution", lambda: Wrap(_swapped, a=nn.Conv1d(6, 5, 1)), (6, 2), loss=difference),
        Case("two-uses", lambda: Wrap(_one_by_one, a=nn.Linear(6, 5)), (2, 6), loss=difference),
        Case("tied-weights", _tied_pair, (2, 6), loss=difference),
    )
}


def nearly_equal(point: Point, apart: float, case: Case, draw: torch.Generator) -> Point:
    """All positions the same but for noise ``apart``, so that the gradients of two halves cancel but for that."""
    x, position = point.x, 1 if case.name == "convolution" else 0
    same = x.select(position, 0).unsqueeze(position).expand_as(x)
    return replace(point, x=same + apart * torch.randn(x.shape, generator=draw).to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["ghost", "mixed"])
@pytest.mark.parametrize("case", CANCELLING.values(), ids=list(CANCELLING))
def test_gradients_that_cancel_are_clipped_all_the_same(case: Case, dtype: torch.dtype, method: str) -> None:
    """A norm from inner products loses the digits that cancel; a norm too short is a clip too weak."""
    sites = tuple(observe_sites(case.model(dtype), case.batch(dtype), case.loss))
    draw = torch.Generator().manual_seed(0)
    worst = 0.0
    for rule in RULES:
        arena = Arena(
            case, ClipPlan(Grouping((), sites), 1.0, rule), dtype=dtype, options=EngineOptions(norm_method=method)
        )
        for apart in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            for loudness in (0.0, 4.0, 8.0):
                point = replace(nearly_equal(arena.first(), apart, case, draw), loudness=loudness)
                worst = max(worst, arena.change(point))
    assert worst <= 1 + (SINGLE_ROUNDING if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_the_quietest_and_the_loudest_examples(rule: str) -> None:
    """Squares underflow below 1e-19 and overflow above 1e19; neither may let an example through unclipped."""
    case = Case("two-layers", lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,))
    sites = tuple(observe_sites(case.model(), case.batch(), case.loss))
    arena = Arena(case, ClipPlan(Grouping((1,), sites), 1.0, rule), dtype=torch.float32)
    levels = [0.25 * k for k in range(-180, 153)]
    changes = {level: arena.change(replace(arena.first(), loudness=level)) for level in levels}
    worst = max(changes, key=lambda level: changes[level])
    assert changes[worst] <= 1 + SINGLE_ROUNDING, f"loss scale 1e{worst}"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e25, 3e38])
def test_an_example_beyond_the_numbers_poisons_no_sum(value: float, rule: str) -> None:
    """One example must not be able to turn the sum of all into NaN: that shows its presence, without noise."""
    case = Case("two-layers", lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,))
    sites = tuple(observe_sites(case.model(), case.batch(), case.loss))
    arena = Arena(case, ClipPlan(Grouping((1,), sites), 1.0, rule), dtype=torch.float32)
    point = arena.first()
    point.x[0] = value
    assert arena.change(point) <= 1 + SINGLE_ROUNDING


def routed(m: Any, x: Tensor) -> Tensor:
    """Every position goes to one of two experts, gathered over the whole batch."""
    flat = x.flatten(0, 1)
    to_a = flat[:, 0] > 0
    output = torch.zeros(len(flat), 3, dtype=x.dtype)
    for chosen, expert in ((to_a, m.a), (~to_a, m.b)):
        rows = chosen.nonzero().squeeze(1)
        output = output.index_add(0, rows, expert(flat[rows]))
    return output.view(len(x), -1)


def in_order(m: Any, x: Tensor) -> Tensor:
    """Examples are sorted on the way, as sequences are by length before they are packed."""
    order = x[:, 0].argsort(stable=True)
    return m.b(m.a(x).tanh()[order])[order.argsort()]


def even(x: Tensor) -> Tensor:
    """As many positions for each expert as there are examples: gathered rows look like a batch."""
    return torch.cat([x[:, :1].abs(), -x[:, 1:].abs()], 1)


def uneven(x: Tensor) -> Tensor:
    """As many in all, but two of one example for one expert."""
    return x.abs() * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=x.dtype)[:, None, None]


ROUTES: dict[str, tuple[Case, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "experts": (Case("routed", lambda: Wrap(routed, a=nn.Linear(4, 3), b=nn.Linear(4, 3)), (2, 4)), even, uneven),
    "sorted": (
        Case("sorted", lambda: Wrap(in_order, a=nn.Linear(4, 3), b=nn.Linear(3, 3)), (4,)),
        lambda x: x[:1].expand_as(x).clone(),
        lambda x: x,
    ),
}


@pytest.mark.parametrize("traced", ["as trained", "in disguise"])
@pytest.mark.parametrize("name", ROUTES)
def test_rows_that_are_no_examples_are_refused(name: str, traced: str) -> None:
    """Traced on a batch that hides it, or not: the sums are exact or the model is refused."""
    case, disguise, trained = ROUTES[name]
    batch = case.batch()
    shown = {**batch, "x": disguise(batch["x"]) if traced == "in disguise" else trained(batch["x"])}
    batch["x"] = trained(batch["x"])
    expected = per_example_gradients(case.model(), batch, case.loss)
    norms = [sum(float(g.square().sum()) for g in example.values()) ** 0.5 for example in expected]
    threshold = sorted(norms)[1]
    sums = {
        name: sum(g[name] * min(1.0, threshold / norm) for g, norm in zip(expected, norms, strict=True))
        for name in expected[0]
    }
    try:
        sites = tuple(observe_sites(case.model(), shown, case.loss))
        _, found = step(case, torch.float64, ClipPlan(Grouping((), sites), threshold), batch=batch)
    except GroupSearchError:
        return
    assert_agree(found, sums, 1e-9)
