"""Outputs of layers that are changed in place, or read by hooks of the user's own: exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.engine.kinds import Input, assert_right, cross_entropy, inputs, numbers, refused
from tests.support.case import Wrap

SERIES = numbers(6, 4, 6)
VECTORS = numbers(6, 6)
PICTURES = numbers(6, 2, 5, 5)


def after(
    layer: Callable[[], nn.Module], change: Callable[[Any, Tensor], Tensor], apply: Any = None
) -> Callable[[], nn.Module]:
    """tanh(i(x)) goes through a layer, whose output is changed and averaged over positions."""
    apply = apply or (lambda layer, r: layer(r))

    def forward(m: Any, x: Tensor) -> Tensor:
        z = change(m, apply(m.f, torch.tanh(m.i(x))))
        return m.h(torch.tanh(z).mean(1))

    return lambda: Wrap(forward, i=nn.Linear(6, 8), f=layer(), g=nn.Linear(8, 8), h=nn.Linear(8, 3))


def read_then_zeroed(m: Any, z: Tensor) -> Tensor:
    mean = z.mean(1, keepdim=True)
    z[:, 0] = 0.0
    return z + m.g(mean)


def read_then_added(m: Any, z: Tensor) -> Tensor:
    z += m.g(z.mean(1, keepdim=True))
    return z


def first_position(m: Any, z: Tensor) -> Tensor:
    token = z[:, 0]
    token *= 3.0
    return m.g(z)


def half_of_the_features(m: Any, z: Tensor) -> Tensor:
    gate, value = z.split(4, -1)[0].clone(), z[..., 4:]
    value.relu_()
    return m.g(torch.cat([gate, value], -1))


def masked(m: Any, z: Tensor) -> Tensor:
    mask = z.detach() > 0.1
    return m.g(z.masked_fill_(mask, -1.0))


def twice_changed(m: Any, z: Tensor) -> Tensor:
    z.mul_(0.5)
    kept = z.sum(1, keepdim=True)
    z.add_(1.0)
    return m.g(z) + kept


def under_no_grad(m: Any, z: Tensor) -> Tensor:
    with torch.no_grad():
        z.mul_(0.5)
    return m.g(z)


def copied_over(m: Any, z: Tensor) -> Tensor:
    z.copy_(2 * z + 1)
    return m.g(z)


def transposed(m: Any, z: Tensor) -> Tensor:
    z.transpose(1, 2)[:, :2].neg_()
    return m.g(z)


def recomputed(m: Any, x: Tensor) -> Tensor:
    def run(r: Tensor) -> Tensor:
        z = m.f(r)
        z.relu_()
        return m.g(z)

    return m.h(checkpoint(run, torch.tanh(m.i(x)), use_reentrant=False).mean(1))


def linear() -> nn.Module:
    return nn.Linear(8, 8)


def convolution() -> nn.Module:
    return nn.Conv1d(8, 8, 3, padding=1)


def over_positions(layer: Any, r: Tensor) -> Tensor:
    return layer(r.mT).mT


def first_layer(m: Any, x: Tensor) -> Tensor:
    z = m.a(x)
    mean = z.mean(-1, keepdim=True)
    z[..., 0] = 0.0
    return m.h(torch.tanh(z + mean))


def pictures(m: Any, x: Tensor) -> Tensor:
    z = m.c(x)
    z += z.mean((2, 3), keepdim=True)
    z = m.n(z)
    z[:, :2].relu_()
    return m.h(z.flatten(1))


IN_PLACE = [
    Input("position read, then zeroed", after(linear, read_then_zeroed), SERIES, cross_entropy),
    Input("read, then added", after(linear, read_then_added), SERIES, cross_entropy),
    Input("a view of the first position", after(linear, first_position), SERIES, cross_entropy),
    Input("half of the features", after(linear, half_of_the_features), SERIES, cross_entropy),
    Input("masked", after(lambda: nn.Linear(8, 8, bias=False), masked), SERIES, cross_entropy),
    Input("changed twice, read between", after(linear, twice_changed), SERIES, cross_entropy),
    Input("changed without gradients", after(linear, under_no_grad), SERIES, cross_entropy),
    Input("copied over", after(linear, copied_over), SERIES, cross_entropy),
    Input("a transposed view", after(linear, transposed), SERIES, cross_entropy),
    Input("after a convolution", after(convolution, read_then_zeroed, over_positions), SERIES, cross_entropy),
    Input("after a norm", after(lambda: nn.LayerNorm(8), read_then_zeroed), SERIES, cross_entropy),
    Input(
        "after attention",
        after(lambda: nn.MultiheadAttention(8, 2, batch_first=True), read_then_added, lambda f, r: f(r, r, r)[0]),
        SERIES,
        cross_entropy,
    ),
    Input(
        "after a recurrent layer",
        after(lambda: nn.LSTM(8, 8, batch_first=True), masked, lambda f, r: f(r)[0]),
        SERIES,
        cross_entropy,
    ),
    Input(
        "in a checkpoint",
        lambda: Wrap(recomputed, i=nn.Linear(6, 8), f=linear(), g=linear(), h=nn.Linear(8, 3)),
        SERIES,
        cross_entropy,
    ),
    Input("the first layer", lambda: Wrap(first_layer, a=nn.Linear(6, 5), h=nn.Linear(5, 3)), VECTORS, cross_entropy),
    Input(
        "pictures",
        lambda: Wrap(pictures, c=nn.Conv2d(2, 4, 3), n=nn.GroupNorm(2, 4), h=nn.Linear(36, 3)),
        PICTURES,
        cross_entropy,
    ),
]


KEPT: dict[str, Tensor] = {}


def hooked(register: Callable[[Any], object]) -> Callable[[], nn.Module]:
    """Three layers with a hook of the user's own."""

    def make() -> nn.Module:
        model = Wrap(
            lambda m, x: m.h(torch.tanh(m.b(torch.tanh(m.a(x))))),
            a=nn.Linear(6, 5),
            b=nn.Linear(5, 5),
            h=nn.Linear(5, 3),
        )
        register(model)
        return model

    return make


def kept(layer: str, change: Callable[[Tensor], Tensor] = lambda out: out) -> Callable[[], nn.Module]:
    return hooked(
        lambda m: getattr(m, layer).register_forward_hook(lambda mod, args, out: KEPT.__setitem__(layer, change(out)))
    )


def feature(layer: str) -> Callable[[Any, Any], Tensor]:
    return lambda m, b: cross_entropy(m, b) + 0.3 * KEPT[layer].square().mean(1)


def kept_then_replaced(m: Any) -> None:
    m.a.register_forward_hook(lambda mod, args, out: KEPT.__setitem__("a", out))
    m.a.register_forward_hook(lambda mod, args, out: out * 2.0)


def kept_input(m: Any) -> None:
    m.b.register_forward_pre_hook(lambda mod, args: KEPT.__setitem__("b", args[0]))


def of_the_whole(m: Any) -> None:
    m.register_forward_hook(lambda mod, args, out: out.mul_(2.0))


def gradient_read(m: Any) -> None:
    m.a.register_full_backward_hook(lambda mod, gi, go: KEPT.__setitem__("g", go[0]))


def scaled(module: Any, args: Any, out: Tensor) -> None:
    out.register_hook(lambda g: 0.5 * g)


def clamped(module: Any, args: Any, out: Tensor) -> None:
    out.register_hook(lambda g: g.clamp(-0.02, 0.02))


class Tapped(nn.Module):
    """A module that keeps what it computed and returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.l(x)
        return x


def tapped(model: Any, batch: Any) -> Tensor:
    return cross_entropy(model, batch) + 0.2 * model.t.kept.square().sum(1)


class Biased(nn.Module):
    """Adds to its input in place and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x += self.b
        return x


HOOKS = [
    Input("the first layer's output kept", kept("a"), VECTORS, feature("a")),
    Input("the last layer's", kept("h"), VECTORS, feature("h")),
    Input("a function of it kept", kept("a", torch.tanh), VECTORS, feature("a")),
    Input("a view of it kept", kept("a", lambda out: out[:, :2]), VECTORS, feature("a")),
    Input("kept, then replaced", hooked(kept_then_replaced), VECTORS, feature("a")),
    Input("kept through an input", hooked(kept_input), VECTORS, feature("b")),
    Input(
        "replaced",
        hooked(lambda m: m.a.register_forward_hook(lambda mod, args, out: torch.sin(out))),
        VECTORS,
        cross_entropy,
    ),
    Input(
        "changed in place",
        hooked(lambda m: m.a.register_forward_hook(lambda mod, args, out: out.mul_(2.0))),
        VECTORS,
        cross_entropy,
    ),
    Input(
        "changed in place, nothing returned",
        hooked(lambda m: m.b.register_forward_hook(lambda mod, args, out: (out.mul_(0.5), None)[1])),
        VECTORS,
        cross_entropy,
    ),
    Input("of the whole model", hooked(of_the_whole), VECTORS, cross_entropy),
    Input("the output's gradient read", hooked(gradient_read), VECTORS, cross_entropy),
    Input("the output's gradient scaled", hooked(lambda m: m.b.register_forward_hook(scaled)), VECTORS, cross_entropy),
    # of a mean over the batch each example has a part that is the smaller the more examples there are
    refused(
        "the output's gradient clamped",
        hooked(lambda m: m.b.register_forward_hook(clamped)),
        VECTORS,
        cross_entropy,
        "(?i)example|batch",
    ),
    Input(
        "a module that returns its input",
        lambda: Wrap(lambda m, x: m.h(m.t(x)), t=Tapped(), h=nn.Linear(6, 3)),
        VECTORS,
        tapped,
    ),
    Input(
        "a module that adds to its input",
        lambda: Wrap(lambda m, x: m.h(torch.tanh(m.b(m.a(x)))), a=nn.Linear(6, 5), b=Biased(), h=nn.Linear(5, 3)),
        VECTORS,
        cross_entropy,
    ),
    Input(
        "sequence features",
        lambda: _features(),
        SERIES,
        lambda m, b: F.cross_entropy(m(b["x"]), b["y"], reduction="none") + 0.1 * KEPT["i"].square().mean((1, 2)),
    ),
]


def _features() -> nn.Module:
    model = Wrap(lambda m, x: m.h(torch.tanh(m.i(x)).mean(1)), i=nn.Linear(6, 5), h=nn.Linear(5, 3))
    model.i.register_forward_hook(lambda mod, args, out: KEPT.__setitem__("i", out))
    return model


@inputs(IN_PLACE)
def test_outputs_changed_in_place(case: Input) -> None:
    assert_right(case)


@inputs(HOOKS)
def test_hooks_of_the_users_own(case: Input) -> None:
    assert_right(case)
