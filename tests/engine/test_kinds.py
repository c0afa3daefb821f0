"""Ways of holding and using parameters that need no layer: lists, cells, constants, sparse and written ones."""

# ruff: noqa: E501
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from groupsearch.errors import UnsupportedModelError
from groupsearch.tracer.sites import observe_sites
from tests.support.architecture_table import Verdict, _compare, per_example
from tests.support.case import Wrap

pytestmark = pytest.mark.filterwarnings("ignore")


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).sin().flatten(1).sum(1)


def _cells(m: nn.Module, x: Tensor) -> Tensor:
    state = x.new_zeros(len(x), 4)
    pair = (state, state)
    for step in x.unbind(1):
        pair = m.cell(step, pair) if isinstance(m.cell, nn.LSTMCell) else (m.cell(step, pair[0]), state)
    return m.head(pair[0])


def _lists(m: nn.Module, x: Tensor) -> Tensor:
    for weight in m.weights:
        x = torch.tanh(x @ weight)
    return m.head(x * m.scales["one"])


def _masked(m: nn.Module, x: Tensor) -> Tensor:
    x = m.stem(x)
    x[x.detach()[..., 0] > 0] = m.token
    return m.head(x)


def _bias_network(m: nn.Module, x: Tensor) -> Tensor:
    places = torch.linspace(-1, 1, x.shape[1]).to(x.dtype)[:, None]
    return m.scale * m.head(x) + m.second(torch.relu_(m.first(places)))


def _filled(m: nn.Module, x: Tensor) -> Tensor:
    square = torch.zeros(3, 3, dtype=x.dtype)
    square[m.rows, m.columns] = m.upper
    return m.head(x) @ torch.linalg.solve(torch.eye(3, dtype=x.dtype) - square, torch.eye(3, dtype=x.dtype))


def _sparse(m: nn.Module, x: Tensor) -> Tensor:
    change = torch.sparse_coo_tensor(torch.tensor([[0, 1], [2, 4]]), m.values, (3, 6))
    return nn.functional.linear(x, change.to_dense() + m.base)


def _with(model: nn.Module, **buffers: Tensor) -> nn.Module:
    for name, tensor in buffers.items():
        model.register_buffer(name, tensor)
    return model


def _random(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 3)


KINDS: dict[str, Callable[[], nn.Module]] = {
    **{c.__name__: lambda c=c: Wrap(_cells, cell=c(6, 4), head=nn.Linear(4, 3)) for c in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)},
    "lists": lambda: Wrap(_lists, weights=nn.ParameterList([_random(6, 6), _random(6, 6)]), scales=nn.ParameterDict({"one": _random(6)}), head=nn.Linear(6, 3)),
    "masked": lambda: Wrap(_masked, stem=nn.Linear(6, 5), token=_random(5), head=nn.Linear(5, 3)),
    "bias network": lambda: Wrap(_bias_network, scale=_random(3), first=nn.Linear(1, 5), second=nn.Linear(5, 3), head=nn.Linear(6, 3)),
    "filled": lambda: _with(Wrap(_filled, upper=_random(3), head=nn.Linear(6, 3)), rows=torch.tensor([0, 0, 1]), columns=torch.tensor([1, 2, 2])),
    "sparse": lambda: _with(Wrap(_sparse, values=_random(2)), base=torch.randn(3, 6)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [3, 5])
def test_it_is_exact(kind: str, size: int) -> None:
    torch.manual_seed(size)
    model = KINDS[kind]().double()
    batch = {"x": torch.randn(size, 4, 6, dtype=torch.float64)}
    verdict: Verdict = _compare(model, batch, _loss, per_example(model, batch, _loss), torch.float64)
    assert verdict.outcome == "right", verdict
    assert verdict.error is not None
    assert verdict.error < 1e-12


def test_a_complex_parameter_is_refused_by_name_and_the_remedy_works() -> None:
    whole = Wrap(lambda m, x: (x.to(m.w.dtype) @ m.w).real, w=nn.Parameter(torch.randn(6, 3, dtype=torch.cdouble)))
    batch = {"x": torch.randn(3, 6, dtype=torch.float64)}
    with pytest.raises(UnsupportedModelError, match="'w' holds complex numbers"):
        observe_sites(whole, batch, _loss)
    parts = Wrap(lambda m, x: (x.to(torch.cdouble) @ torch.view_as_complex(m.w)).real, w=nn.Parameter(torch.randn(6, 3, 2, dtype=torch.float64)))  # fmt: skip
    verdict = _compare(parts, batch, _loss, per_example(parts, batch, _loss), torch.float64)
    assert verdict.outcome == "right", verdict
