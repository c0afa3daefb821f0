"""What mixes examples in training mode only, or only for some batches: refused, with the mixing as the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.engine.kinds import Input, assert_right, cross_entropy, inputs, numbers, refused
from tests.support.case import Wrap

BATCH = numbers(6, 4)
PICTURES = numbers(6, 2, 4, 4)
MIXES = "(?i)example|batch|state|pass"


def with_(mix: Callable[[Any, Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A model whose features go through something in training mode."""
    return lambda: Wrap(
        lambda m, x: m.h(torch.tanh(mix(m, m.a(x)) if m.training else m.a(x))), a=nn.Linear(4, 5), h=nn.Linear(5, 3)
    )


class Bank(nn.Module):
    """Keeps features of earlier passes and looks at them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(4, 5), nn.Linear(5, 3)
        self.bank: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.a(x))
        if self.training:
            kept = sum(self.bank, torch.zeros(()))
            self.bank = [*self.bank[-2:], z.detach().mean()]
            z = z + kept
        return self.h(z)


class Normed(nn.Module):
    """Statistics of the batch in training, kept ones otherwise, as a class of one's own."""

    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        self.conv, self.h, self.momentum = nn.Conv2d(2, 3, 3), nn.Linear(12, 3), momentum
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        mean = z.mean((0, 2, 3)) if self.training else self.mean
        if self.training:
            self.mean = (1 - self.momentum) * self.mean + self.momentum * mean.detach()
        return self.h((z - mean[:, None, None]).relu().flatten(1))


class Teacher(nn.Module):
    """Centers its output by what it has seen (DINO): each step leaks into the next."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.register_buffer("center", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        out = z - self.center
        if self.training:
            self.center.mul_(0.9).add_(z.detach().mean(0), alpha=0.1)
        return out


def shuffled_labels(model: Any, batch: Any) -> Tensor:
    y = batch["y"].roll(1, 0) if model.training else batch["y"]
    logits = model(batch["x"])
    return 0.8 * F.cross_entropy(logits, batch["y"], reduction="none") + 0.2 * F.cross_entropy(
        logits, y, reduction="none"
    )


def covariance(model: Any, batch: Any) -> Tensor:
    z = model(batch["x"])
    off = (z - z.mean(0)).T @ (z - z.mean(0)) / max(len(z) - 1, 1)
    return F.cross_entropy(z, batch["y"], reduction="none") + 0.1 * (off.square().sum() - off.diagonal().square().sum())


def supervised_contrast(model: Any, batch: Any) -> Tensor:
    """Only examples with the same label see each other."""
    z = F.normalize(model(batch["x"]), dim=1)
    same = (batch["y"][:, None] == batch["y"][None]).to(z.dtype).fill_diagonal_(0)
    return cross_entropy(model, batch) - (same * (z @ z.T)).sum(1)


def hardest(model: Any, batch: Any) -> Tensor:
    """Only the examples with the largest losses count."""
    value = cross_entropy(model, batch)
    return value * (value >= value.detach().median())


def balanced(model: Any, batch: Any) -> Tensor:
    value = cross_entropy(model, batch)
    return value * len(value) / torch.bincount(batch["y"], minlength=3)[batch["y"]]


def counted(model: Any, batch: Any) -> Tensor:
    value = cross_entropy(model, batch)
    kept = batch["y"] != 0
    return value * kept * len(value) / kept.sum().clamp(min=1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


CASES = [
    refused(
        "mixup by a permutation",
        with_(lambda m, z: 0.6 * z + 0.4 * z[torch.randperm(len(z))]),
        BATCH,
        cross_entropy,
        MIXES,
    ),
    refused("mixup by a flip", with_(lambda m, z: 0.6 * z + 0.4 * z.flip(0)), BATCH, cross_entropy, MIXES),
    refused("cutmix", with_(lambda m, z: torch.cat([z[:, :2], z.roll(1, 0)[:, 2:]], 1)), BATCH, cross_entropy, MIXES),
    refused(
        "standardised",
        with_(lambda m, z: (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-3).sqrt()),
        BATCH,
        cross_entropy,
        MIXES,
    ),
    refused(
        "scaled by the largest of the batch, detached",
        with_(lambda m, z: z / z.detach().abs().max()),
        BATCH,
        cross_entropy,
        MIXES,
    ),
    refused(
        "functional instance norm over one instance",
        with_(lambda m, z: F.instance_norm(z.T[None])[0].T),
        BATCH,
        cross_entropy,
        MIXES,
    ),
    refused(
        "under enabled gradients",
        with_(lambda m, z: z - z.mean(0) if torch.is_grad_enabled() else z),
        BATCH,
        cross_entropy,
        MIXES,
    ),
    refused("only for large values", with_(lambda m, z: z + (z - 6.0).relu().mean(0)), BATCH, cross_entropy, MIXES),
    refused(
        "only in batches of four and more",
        with_(lambda m, z: z - z.mean(0) if len(z) >= 4 else z),
        BATCH,
        cross_entropy,
        MIXES,
    ),
    refused("a class of one's own over pictures", Normed, PICTURES, cross_entropy, MIXES),
    refused("earlier passes", Bank, BATCH, cross_entropy, MIXES),
    refused("a running center", Teacher, BATCH, cross_entropy, MIXES),
    refused("labels of neighbours", mlp, BATCH, shuffled_labels, MIXES),
    refused("covariance of features", mlp, BATCH, covariance, MIXES),
    refused("equal labels attract", mlp, BATCH, supervised_contrast, MIXES),
    refused("the hardest half", mlp, BATCH, hardest, MIXES),
    refused("divided by the class's count", mlp, BATCH, balanced, MIXES),
    refused("divided by what counts", mlp, BATCH, counted, MIXES),
]


@inputs(CASES)
def test_mixing_that_evaluation_hides_is_refused(case: Input) -> None:
    assert_right(case)
