"""Gradients that the loss asks for itself (attacks, penalties, forces): left alone, or refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.engine.kinds import Input, assert_right, cross_entropy, either, inputs, numbers
from tests.support.case import Wrap

BATCH = numbers(6, 4)
SERIES = numbers(6, 3, 4)
TOKENS = {"x": torch.randint(9, (6, 3), generator=torch.Generator().manual_seed(0)), "y": BATCH["y"]}
INNER = "(?i)autograd|create_graph|inner|backward|second|penalty|gradient"


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def series() -> nn.Module:
    return Wrap(
        lambda m, x: m.h(m.r(torch.tanh(m.a(x)))[0][:, -1]),
        a=nn.Linear(4, 4),
        r=nn.GRU(4, 5, batch_first=True),
        h=nn.Linear(5, 3),
    )


def slope(model: Any, x: Tensor, y: Tensor, **more: Any) -> Tensor:
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x, **more)[0]


def attacked(steps: int) -> Any:
    def loss(model: Any, batch: Any) -> Tensor:
        x = batch["x"]
        for _ in range(steps):
            tried = x.detach().requires_grad_()
            x = (x + 0.05 * slope(model, tried, batch["y"]).sign()).detach()
        return F.cross_entropy(model(x), batch["y"], reduction="none")

    return loss


def clean_and_attacked(model: Any, batch: Any) -> Tensor:
    return cross_entropy(model, batch) + 0.5 * attacked(1)(model, batch)


def virtual(model: Any, batch: Any) -> Tensor:
    """Virtual adversarial training."""
    with torch.no_grad():
        target = model(batch["x"]).softmax(-1)
    d = (0.1 * torch.ones_like(batch["x"])).requires_grad_()
    away = F.kl_div(model(batch["x"] + d).log_softmax(-1), target, reduction="none").sum()
    (g,) = torch.autograd.grad(away, d)
    logits = model(batch["x"] + 0.3 * F.normalize(g.detach(), dim=-1))
    return cross_entropy(model, batch) + F.kl_div(logits.log_softmax(-1), target, reduction="none").sum(1)


def penalty(model: Any, batch: Any) -> Tensor:
    x = batch["x"].clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return F.cross_entropy(model(x), batch["y"], reduction="none") + g.flatten(1).square().sum(1)


def penalty_of_the_same_pass(model: Any, batch: Any) -> Tensor:
    x = batch["x"].clone().requires_grad_()
    value = F.cross_entropy(model(x), batch["y"], reduction="none")
    (g,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return value + g.flatten(1).norm(dim=1)


def forces(model: Any, batch: Any) -> Tensor:
    """Energies whose derivatives are fitted."""
    x = batch["x"].clone().requires_grad_()
    (force,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return (force + batch["x"].sin()).flatten(1).square().mean(1)


def of_a_feature(model: Any, batch: Any) -> Tensor:
    """The gradient in the output of the first layer, as saliency losses take it; the value is used, not its graph."""
    feature = model[0](batch["x"])
    if not feature.requires_grad:
        feature.requires_grad_()
    logits = model[2](torch.tanh(feature))
    (g,) = torch.autograd.grad(logits.square().sum(), feature, retain_graph=True)
    return F.cross_entropy(logits, batch["y"], reduction="none") + (g.detach() * feature).sum(1)


def in_the_embedding(model: Any, batch: Any) -> Tensor:
    """An attack on word vectors (FreeLB): the perturbation is a leaf of its own."""
    d = torch.zeros(*batch["x"].shape, 4).requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(batch["x"], d), batch["y"], reduction="sum"), d)
    return F.cross_entropy(model(batch["x"], 0.3 * g), batch["y"], reduction="none")


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.h = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        return self.h(torch.tanh(self.e(x) + d).mean(1))


def by_backward(model: Any, batch: Any) -> Tensor:
    """An attack whose gradient is taken by backward on the input alone."""
    x = batch["x"].clone().requires_grad_()
    F.cross_entropy(model(x), batch["y"], reduction="sum").backward(inputs=[x])
    return F.cross_entropy(model((x + 0.1 * x.grad.sign()).detach()), batch["y"], reduction="none")


def inside_the_model(m: Any, x: Tensor) -> Tensor:
    """An energy whose gradient moves the features, inside forward."""
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(m.energy(z).square().sum(), z)
    return m.h(x - 0.1 * g + 0.0 * m.energy(x).sum(-1, keepdim=True))


def jacobian(model: Any, batch: Any) -> Tensor:
    rows = torch.func.vmap(torch.func.jacrev(lambda x: model(x[None])[0]))(batch["x"])
    return cross_entropy(model, batch) + 0.1 * rows.flatten(1).square().sum(1)


def adapted(model: Any, batch: Any) -> Tensor:
    """A meta-gradient: weights moved by a step of each example's own would not be one gradient per example."""
    weights = dict(model.named_parameters())
    values = F.cross_entropy(torch.func.functional_call(model, weights, batch["x"]), batch["y"], reduction="none")
    return values


CASES = [
    Input("one step", mlp, BATCH, attacked(1)),
    Input("three steps", mlp, BATCH, attacked(3)),
    Input("through a recurrent layer", series, SERIES, attacked(2)),
    Input("clean and attacked", mlp, BATCH, clean_and_attacked),
    Input("virtual", mlp, BATCH, virtual),
    Input("on word vectors", Words, TOKENS, in_the_embedding),
    either("a feature's gradient", mlp, BATCH, of_a_feature, INNER),
    either("by backward(inputs=)", mlp, BATCH, by_backward, INNER),
    either(
        "inside forward",
        lambda: Wrap(inside_the_model, energy=nn.Linear(4, 4), h=nn.Linear(4, 3)),
        BATCH,
        cross_entropy,
        INNER,
    ),
    either("penalty", mlp, BATCH, penalty, INNER),
    either("penalty of the same pass", mlp, BATCH, penalty_of_the_same_pass, INNER),
    either("penalty through a recurrent layer", series, SERIES, penalty, INNER),
    either("forces", mlp, BATCH, forces, INNER),
    either("jacobian by torch.func", mlp, BATCH, jacobian, INNER + "|functorch|torch.func|transform"),
    either("functional_call", mlp, BATCH, adapted, INNER + "|functional|weight"),
]


@inputs(CASES)
def test_inner_gradients_are_left_alone_or_refused(case: Input) -> None:
    assert_right(case)
