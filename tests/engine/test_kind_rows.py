"""Several rows of the model belong to one example: clipped once per example, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.engine.kinds import Input, assert_right, either, inputs, numbers, refused
from tests.support.case import Wrap

B, K = 6, 3
VECTORS = {**numbers(B, K, 4), "z": numbers(B, 4, seed=1)["x"]}
PICTURES = numbers(B, K, 2, 5, 5)
SENTENCES = {"x": torch.randint(9, (B, K, 4), generator=torch.Generator().manual_seed(0)), "y": VECTORS["y"]}
PAIRS = {
    "a": numbers(B, 4, seed=2)["x"],
    "p": numbers(B, 4, seed=3)["x"],
    "n": numbers(B, 4, seed=4)["x"],
    "y": VECTORS["y"],
}
SERIES = {key: numbers(B, 5, 4, seed=seed)["x"] for seed, key in enumerate("apn")}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def per_view(model: Any, batch: Any) -> Tensor:
    x, y = batch["x"], batch["y"]
    logits = model(x.flatten(0, 1))
    return F.cross_entropy(logits, y.repeat_interleave(x.shape[1]), reduction="none").view(len(y), -1).mean(1)


def view_after_view(model: Any, batch: Any) -> Tensor:
    logits = model(torch.cat(batch["x"].unbind(1)))
    return torch.stack([F.cross_entropy(part, batch["y"], reduction="none") for part in logits.chunk(K)]).mean(0)


def logits_averaged(model: Any, batch: Any) -> Tensor:
    logits = model(batch["x"].flatten(0, 1)).view(len(batch["y"]), K, -1).mean(1)
    return F.cross_entropy(logits, batch["y"], reduction="none")


def choice(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"].flatten(0, 1)).view(-1, K), batch["y"], reduction="none")


def pictures() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 3))


def reader(width: int = 1) -> nn.Module:
    return Wrap(
        lambda m, x: m.h(m.r(m.e(x))[0].mean(1)),
        e=nn.Embedding(9, 4),
        r=nn.GRU(4, 5, batch_first=True),
        h=nn.Linear(5, width),
    )


def siamese(model: Any, batch: Any) -> Tensor:
    one, other = model(torch.cat([batch["a"], batch["p"]])).chunk(2)
    same = (batch["y"] == 0).to(one.dtype)
    far = (one - other).norm(dim=1)
    return same * far.square() + (1 - same) * (1.0 - far).relu().square()


def triplet(model: Any, batch: Any) -> Tensor:
    rows = model(torch.cat([batch["a"], batch["p"], batch["n"]]))
    return F.triplet_margin_loss(*rows.chunk(3), margin=5.0, reduction="none")


def triplet_stacked(model: Any, batch: Any) -> Tensor:
    rows = model(torch.stack([batch["a"], batch["p"], batch["n"]], 1).flatten(0, 1)).unflatten(0, (-1, 3))
    return F.triplet_margin_loss(rows[:, 0], rows[:, 1], rows[:, 2], margin=5.0, reduction="none")


def mirrored(model: Any, batch: Any) -> Tensor:
    logits = model(torch.cat([batch["z"], -batch["z"]]))
    return F.cross_entropy(logits, batch["y"].repeat(2), reduction="none").view(2, -1).sum(0)


def encoder_and_head(m: Any, x: Tensor) -> Tensor:
    return m.h(torch.tanh(m.a(x.flatten(0, 1))).view(x.shape[0], -1))


def ragged(model: Any, batch: Any) -> Tensor:
    real = batch["x"][..., 0] > -0.5
    value = F.cross_entropy(model(batch["x"][real]), batch["y"][:, None].expand(-1, K)[real], reduction="none")
    return torch.zeros_like(batch["x"][..., 0]).masked_scatter(real, value).sum(1)


CASES = [
    Input("crops of a picture", pictures, PICTURES, per_view),
    Input("sentences, one recurrent pass", lambda: reader(3), SENTENCES, per_view),
    Input("answers to choose from", reader, SENTENCES, choice),
    Input("view after view", mlp, VECTORS, view_after_view),
    Input("logits averaged over views", mlp, VECTORS, logits_averaged),
    Input("siamese pairs", mlp, PAIRS, siamese),
    Input(
        "triplets of series",
        lambda: Wrap(lambda m, x: m.r(x)[0][:, -1], r=nn.LSTM(4, 3, batch_first=True)),
        SERIES,
        triplet,
    ),
    Input("triplets, each beside its own", mlp, PAIRS, triplet_stacked),
    Input("an example and its mirror", mlp, VECTORS, mirrored),
    Input(
        "views encoded, examples classified",
        lambda: Wrap(encoder_and_head, a=nn.Linear(4, 2), h=nn.Linear(6, 3)),
        VECTORS,
        lambda m, b: F.cross_entropy(m(b["x"]), b["y"], reduction="none"),
    ),
    either("views of unequal number", mlp, VECTORS, ragged, "example|rows|batch"),
    refused(
        "one loss for every view",
        mlp,
        VECTORS,
        lambda m, b: F.cross_entropy(m(b["x"].flatten(0, 1)), b["y"].repeat_interleave(K), reduction="none"),
        "example|per-example|shape",
    ),
    refused(
        "views of neighbours compared",
        mlp,
        VECTORS,
        lambda m, b: per_view(m, b) + (m(b["x"][:, 0]) - m(b["x"][:, 1].roll(1, 0))).square().sum(1),
        "example|batch",
    ),
]


@inputs(CASES)
def test_rows_of_one_example_are_clipped_together(case: Input) -> None:
    assert_right(case)


def test_the_table_is_as_long_as_it_should_be() -> None:
    assert len(CASES) >= 10


@pytest.mark.parametrize("views", [1, 2, 5])
def test_any_number_of_views(views: int) -> None:
    assert_right(Input(f"{views} views", mlp, numbers(B, views, 4), per_view))
