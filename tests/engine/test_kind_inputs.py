"""Constants, tables, batches of every form, layers used in training only: ordinary code, exact."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import groupsearch as gs
from tests.engine.kinds import Input, assert_right, built, cross_entropy, double, either, inputs, numbers, refused
from tests.support.case import Wrap

B = 6
VECTORS = numbers(B, 4)
SERIES = numbers(B, 3, 4)
WEIGHTS = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)
SMOOTH = np.array([0.1, 0.2, 0.7])


class Attribute(nn.Module):
    """Holds tensors as plain attributes."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        self.h = nn.Linear(4, 3)
        self.held = held
        self.mask = torch.tensor([1.0, 0.0, 1.0, 0.5], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(x * self.mask + sum(self.held.values()))


class Keeps(nn.Module):
    """Keeps its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(4, 4), nn.Linear(4, 3)
        self.features: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.features["last"] = self.a(x)
        self.shown = [self.features["last"].tanh()]
        return self.h(self.shown[0])


def linear() -> nn.Module:
    return nn.Linear(4, 3)


def weighted(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], weight=WEIGHTS, reduction="none")


def with_default(model: Any, batch: Any, scale: Tensor = WEIGHTS) -> Tensor:
    return cross_entropy(model, batch) * scale[batch["y"]]


def from_numpy(model: Any, batch: Any) -> Tensor:
    return cross_entropy(model, batch) * torch.as_tensor(SMOOTH)[batch["y"]]


def new_constant(model: Any, batch: Any) -> Tensor:
    return cross_entropy(model, batch) * torch.tensor(2.0)


CONSTANTS = [
    Input("class weights", linear, VECTORS, weighted),
    Input("a default argument", linear, VECTORS, with_default),
    Input("a numpy constant", linear, VECTORS, from_numpy),
    Input("made in the loss", linear, VECTORS, new_constant),
    Input("a mask as an attribute", Attribute, VECTORS, cross_entropy),
    Input("a dictionary of tensors", lambda: Attribute(a=torch.ones(4), b=torch.full((), 2.0)), VECTORS, cross_entropy),
    Input("kept activations", Keeps, VECTORS, cross_entropy),
    Input("a list of tensors in a closure", lambda: _shifted([torch.ones(4), torch.zeros(4)]), VECTORS, cross_entropy),
]


def _shifted(shifts: list[Tensor]) -> nn.Module:
    return Wrap(lambda m, x: m.h(x + sum(shifts)), h=nn.Linear(4, 3))


def in_training(m: Any, x: Tensor) -> Tensor:
    return m.h(x + m.a(x) if m.training else x)


class Auxiliary(nn.Module):
    """Two heads in training, one otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.aux, self.h = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        z = torch.tanh(self.a(x))
        return {"logits": self.h(z), "aux": self.aux(z)} if self.training else {"logits": self.h(z)}


def heads(model: Any, batch: Any) -> Tensor:
    return sum(F.cross_entropy(out, batch["y"], reduction="none") for out in model(batch["x"]).values())


def kept_auxiliary(m: Any, x: Tensor) -> Tensor:
    if m.training:
        m.side = m.aux(x).square().sum(1)
    return m.h(x)


def deeply_supervised(m: Any, x: Tensor) -> Tensor:
    out = 0.0
    for a, h in ((m.a, m.h), (m.b, m.g)):
        x = torch.tanh(a(x))
        out = out + h(x) if m.training else h(x)
    return out


def noisy(m: Any, x: Tensor) -> Tensor:
    return m.h(m.a(x) + m.shift if m.training else m.a(x))


TRAINING = [
    Input("a branch", lambda: Wrap(in_training, a=nn.Linear(4, 4), h=nn.Linear(4, 3)), VECTORS, cross_entropy),
    Input("an auxiliary head", Auxiliary, VECTORS, heads),
    Input(
        "an auxiliary loss kept",
        lambda: Wrap(kept_auxiliary, aux=nn.Linear(4, 2), h=nn.Linear(4, 3)),
        VECTORS,
        lambda m, b: cross_entropy(m, b) + 0.1 * m.side,
    ),
    Input(
        "deep supervision",
        lambda: Wrap(deeply_supervised, a=nn.Linear(4, 4), b=nn.Linear(4, 4), h=nn.Linear(4, 3), g=nn.Linear(4, 3)),
        VECTORS,
        cross_entropy,
    ),
    Input(
        "a parameter of training",
        lambda: Wrap(noisy, a=nn.Linear(4, 4), shift=nn.Parameter(torch.randn(4)), h=nn.Linear(4, 3)),
        VECTORS,
        cross_entropy,
    ),
    Input("a frozen part in evaluation mode", lambda: _backbone(), VECTORS, cross_entropy),
]


def _backbone() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    model[1].train = lambda mode=True: nn.Module.train(model[1], False)  # as people keep statistics fixed
    return model.train()


def layer_drop(rate: float) -> Callable[[], nn.Module]:
    def forward(m: Any, x: Tensor) -> Tensor:
        for layer in m.layers:
            if not m.training or torch.rand(()) >= rate:
                x = x + torch.tanh(layer(x))
        return m.h(x)

    return lambda: Wrap(forward, layers=nn.ModuleList([nn.Linear(4, 4) for _ in range(5)]), h=nn.Linear(4, 3))


def test_layers_dropped_at_random_are_all_seen() -> None:
    """Whatever the seed, every layer is a site of its own."""
    with double():
        for seed in range(4):
            model = built(layer_drop(0.5))
            torch.manual_seed(seed)
            sites = gs.trace_model(model, VECTORS, cross_entropy).sites
            assert {site.layer for site in sites} == {*(f"layers.{k}" for k in range(5)), "h"}


class Categories(nn.Module):
    """One integer tensor, columns with different numbers of values."""

    def __init__(self, sizes: tuple[int, ...] = (50, 4, 2)) -> None:
        super().__init__()
        self.e = nn.ModuleList([nn.Embedding(size, 3) for size in sizes])
        self.h = nn.Linear(3 * len(sizes), 3)

    def forward(self, c: Tensor) -> Tensor:
        return self.h(torch.cat([e(c[:, j].long()) for j, e in enumerate(self.e)], 1))


def column(size: int, seed: int) -> Tensor:
    return torch.randint(size, (B, 1), generator=torch.Generator().manual_seed(seed))


def table(*columns: Tensor) -> dict[str, Tensor]:
    return {"x": torch.cat(columns, 1), "y": VECTORS["y"]}


def one_hot(m: Any, x: Tensor) -> Tensor:
    return m.h(torch.cat([F.one_hot(x[:, 0].long(), 5).to(x.dtype), x[:, 1:]], 1))


def lengths(m: Any, x: Tensor) -> Tensor:
    """The first column says how many of the others count."""
    real = torch.arange(4) < x[:, :1]
    return m.h(torch.where(real, x[:, 1:], torch.zeros(())))


def year(m: Any, x: Tensor) -> Tensor:
    """An index that the model shifts itself."""
    return m.h(torch.cat([m.e((x[:, 0] - 1990).long()), x[:, 1:]], 1))


def interpolated(m: Any, x: Tensor) -> Tensor:
    low = x[:, 0].floor().long()
    part = (x[:, :1] - low[:, None]).to(x.dtype)
    return m.h((1 - part) * m.e(low) + part * m.e(low + 1))


def spd(x: Tensor) -> Tensor:
    return x @ x.mT + 0.1 * torch.eye(x.shape[-1])


SPD = {"x": spd(numbers(B, 3, 3)["x"]), "y": VECTORS["y"]}
PROBABILITIES = {"x": SERIES["x"].softmax(-1), "y": VECTORS["y"]}
real = numbers(B, 4, seed=5)["x"]
TABULAR = [
    Input("categories of different sizes", Categories, table(column(50, 0), column(4, 1), column(2, 2)), cross_entropy),
    Input(
        "categories as floats",
        Categories,
        table(column(50, 0).double(), column(4, 1).double(), column(2, 2).double()),
        cross_entropy,
    ),
    Input(
        "one-hot of a float column",
        lambda: Wrap(one_hot, h=nn.Linear(9, 3)),
        table(column(5, 3).double(), real),
        cross_entropy,
    ),
    Input(
        "a length in a column",
        lambda: Wrap(lengths, h=nn.Linear(4, 3)),
        table(column(5, 4).double(), real),
        cross_entropy,
    ),
    Input(
        "a year",
        lambda: Wrap(year, e=nn.Embedding(8, 2), h=nn.Linear(6, 3)),
        table(1990.0 + column(8, 5).double(), real),
        cross_entropy,
    ),
    Input(
        "a position between two knots",
        lambda: Wrap(interpolated, e=nn.Embedding(6, 4), h=nn.Linear(4, 3)),
        table(5 * torch.rand(B, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)),
        cross_entropy,
    ),
    Input(
        "Cholesky factors",
        lambda: Wrap(lambda m, x: m.h(torch.linalg.cholesky(x).flatten(1)), h=nn.Linear(9, 3)),
        SPD,
        cross_entropy,
    ),
    Input(
        "logarithms of determinants",
        lambda: Wrap(lambda m, x: m.h(torch.cat([x.flatten(1), x.logdet()[:, None]], 1)), h=nn.Linear(10, 3)),
        SPD,
        cross_entropy,
    ),
    Input(
        "logarithms of probabilities",
        lambda: Wrap(lambda m, x: m.h(x.log().flatten(1)), h=nn.Linear(12, 3)),
        PROBABILITIES,
        cross_entropy,
    ),
    Input(
        "a checked range", lambda: Wrap(lambda m, x: m.h(_within(x)), h=nn.Linear(12, 3)), PROBABILITIES, cross_entropy
    ),
]


def _within(x: Tensor) -> Tensor:
    if not bool(((x.sum(-1) - 1).abs() < 1e-6).all()):
        raise ValueError("expected probabilities")
    return x.flatten(1)


class Sequence(nn.Module):
    """Takes (T, B, d)."""

    def __init__(self, kind: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.r, self.h = kind(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.r(x)[0][-1])


def time_first(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"].transpose(0, 1)), batch["y"], reduction="none")


def pair(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]["x"]), batch[1], reduction="none")


def squeezed(m: Any, x: Tensor) -> Tensor:
    return m.h(m.r(x.squeeze())[0][..., -1, :])


ROWS = {"x": numbers(B, 1, 2, 3)["x"], "y": VECTORS["y"]}


def cut_all(batch: Any, which: slice) -> Any:
    """Some examples of tensors and arrays."""
    if isinstance(batch, (dict, UserDict)):
        return type(batch)({key: cut_all(value, which) for key, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return type(batch)(cut_all(value, which) for value in batch)
    return batch[which] if isinstance(batch, (Tensor, np.ndarray)) else batch


BATCHES = [
    Input("a tokenizer's output and labels", linear, (UserDict(x=VECTORS["x"]), VECTORS["y"]), pair, take=cut_all),
    Input(
        "labels of numpy",
        linear,
        {"x": VECTORS["x"], "y": VECTORS["y"].numpy()},
        lambda m, b: F.cross_entropy(m(b["x"]), torch.as_tensor(b["y"]), reduction="none"),
        take=cut_all,
    ),
    Input("None among the values", linear, {**VECTORS, "mask": None}, cross_entropy, take=cut_all),
    Input(
        "nested mappings",
        linear,
        {"in": {"x": VECTORS["x"]}, "y": VECTORS["y"]},
        lambda m, b: F.cross_entropy(m(b["in"]["x"]), b["y"], reduction="none"),
        take=cut_all,
    ),
    Input("a list of a mapping and labels", linear, [{"x": VECTORS["x"]}, VECTORS["y"]], pair, take=cut_all),
    either(
        "text and numbers among the values",
        linear,
        {**VECTORS, "task": "sst2", "epoch": 3},
        cross_entropy,
        "batch|tensor|task",
        take=cut_all,
    ),
    Input("time first, LSTM", Sequence, SERIES, time_first),
    Input("time first, GRU", lambda: Sequence(nn.GRU), SERIES, time_first),
    Input("time first, as many steps as examples", Sequence, numbers(3, 3, 4), time_first),
    refused(
        "squeeze",
        lambda: Wrap(squeezed, r=nn.LSTM(3, 4, batch_first=True), h=nn.Linear(4, 3)),
        ROWS,
        cross_entropy,
        "(?i)one example|size|squeeze",
    ),
    refused(
        "squeeze of a logit",
        lambda: nn.Linear(4, 1),
        VECTORS,
        lambda m, b: F.binary_cross_entropy_with_logits(
            m(b["x"]).squeeze(), (b["y"] > 0).to(b["x"].dtype), reduction="none"
        ),
        "(?i)example|size|shape",
    ),
    Input("a batch of one", linear, {key: value[:1] for key, value in VECTORS.items()}, cross_entropy),
    Input("a batch of two", linear, {key: value[:2] for key, value in VECTORS.items()}, cross_entropy),
]


@inputs(CONSTANTS)
def test_constants(case: Input) -> None:
    assert_right(case)


@inputs(TRAINING)
def test_what_is_used_in_training_only(case: Input) -> None:
    assert_right(case)


@inputs(TABULAR)
def test_values_that_a_model_depends_on(case: Input) -> None:
    assert_right(case)


@inputs(BATCHES)
def test_batches_as_people_have_them(case: Input) -> None:
    assert_right(case)
