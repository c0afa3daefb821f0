"""Rows that values chose are not the examples, however many there happen to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from groupsearch.errors import UnsupportedModelError
from groupsearch.measure import simulate_peak
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import peak_memory
from groupsearch.tracer import observe_sites, trace_model
from groupsearch.tracer.discovery import find_layouts
from tests.support.case import Wrap

BATCH = {"x": torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0)), "y": torch.tensor([0, 1, 2, 0])}


def loss(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def of_rows(pick: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    """The layer sees as many rows as there are examples, every other of all: its sizes are those of the examples."""

    def forward(m: Any, x: Tensor) -> Tensor:
        rows = m.a(x).flatten(0, 1)
        number = torch.arange(len(rows)) % 2
        index = pick(number)
        chosen = rows.masked_select(index).view(-1, 5) if index.dim() == 2 else rows[index]
        out = torch.zeros_like(rows)
        out[index if index.dim() == 1 else index[:, 0]] = m.b(torch.tanh(chosen))
        return m.h(out.unflatten(0, (-1, 2)).sum(1))

    return forward


PICKS: dict[str, Callable[[Tensor], Any]] = {
    "mask": lambda number: number == 0,
    "nonzero": lambda number: (number == 0).nonzero().flatten(),
    "where": lambda number: torch.where(number == 0)[0],
    "argsort": lambda number: number.argsort()[: len(number) // 2],
    "sort": lambda number: number.sort()[1][: len(number) // 2],
    "masked_select": lambda number: (number == 0)[:, None].expand(-1, 5),
}


@pytest.mark.parametrize("pick", PICKS)
def test_a_model_with_a_layer_that_sees_chosen_rows_is_differentiated_as_one(pick: str) -> None:
    model = Wrap(of_rows(PICKS[pick]), a=nn.Linear(5, 5), b=nn.Linear(5, 5), h=nn.Linear(5, 3))
    assert find_layouts(model, BATCH, loss).layouts == {"": "whole"}
    assert [(site.layer, site.kind) for site in observe_sites(model, BATCH, loss)] == [("", "function")]


def test_chosen_rows_that_mix_are_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        z = m.a(x).sum(1)
        return m.h(z[z[:, 0].argsort()])

    with pytest.raises(UnsupportedModelError, match="depends on the other examples"):
        observe_sites(Wrap(forward, a=nn.Linear(5, 5), h=nn.Linear(5, 3)), BATCH, loss)


def put_back(m: Any, x: Tensor) -> Tensor:
    z = m.a(x)
    z[z[..., 0] > 0] *= 0.5
    return m.h(torch.tanh(z).sum(1))


def looked_at(m: Any, x: Tensor) -> Tensor:
    z = m.a(x)
    z.detach()[z[..., 0] > 0].sum()
    return m.h(torch.tanh(z).sum(1))


def last_position(m: Any, x: Tensor) -> Tensor:
    z = torch.tanh(m.a(x))
    return m.h(z[torch.arange(len(z)), (x[..., 0] > 0).sum(1).clamp(max=1)])


@pytest.mark.parametrize("forward", [put_back, looked_at, last_position])
def test_rows_that_are_put_back_or_not_used_are_none(forward: Callable[[Any, Tensor], Tensor]) -> None:
    sites = observe_sites(Wrap(forward, a=nn.Linear(5, 5), h=nn.Linear(5, 3)), BATCH, loss)
    assert [(site.layer, site.layout) for site in sites] == [("a", "first"), ("h", "first")]


class Ranked(nn.Module):
    """Embedded rows, put in order and back: run whole."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(70, 40)

    def forward(self, ids: Tensor) -> Tensor:
        z = self.e(ids).mean(1)
        order = z[:, 0].argsort()
        return z[order][order.argsort()]


def test_the_memory_of_a_weight_that_a_module_run_whole_shares_with_a_layer_is_traced() -> None:
    model = Wrap(lambda m, x: m.h(m.i(x)), i=Ranked(), h=nn.Linear(40, 70, bias=False))
    model.h.weight = model.i.e.weight
    batch = {"x": torch.arange(96).view(32, 3) % 70, "y": torch.arange(32)}
    trace = trace_model(model, batch, loss, optimizer="sgd")
    assert [site.kind for site in trace.sites] == ["function", "linear"]
    grouping = Grouping((), trace.sites)
    simulated = simulate_peak(model, batch, loss, grouping, optimizer="sgd")
    assert simulated <= peak_memory(trace, grouping).peak_bytes <= 1.001 * simulated
