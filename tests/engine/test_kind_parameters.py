"""Parameters without layers, cells in loops, prompts, experts, copies of a private model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import groupsearch as gs
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.trace import Site
from tests.engine.kinds import Input, assert_right, built, cross_entropy, double, either, inputs, numbers, refused
from tests.support.case import Wrap

B = 6
VECTORS = numbers(B, 4)
SERIES = numbers(B, 3, 4)
TOKENS = {"x": torch.randint(9, (B, 4), generator=torch.Generator().manual_seed(0)), "y": VECTORS["y"]}


class Bag(nn.Module):
    """Parameters in lists and dictionaries."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        lists = [nn.ParameterList([torch.randn(4, 4) / 2, torch.randn(4)]) for _ in range(2)]
        self.ws = nn.ModuleList(lists) if nested else lists[0]
        self.nested = nested
        self.h = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in self.ws if self.nested else [tuple(self.ws)]:
            x = torch.tanh(x @ weight + bias)
        return self.h(x)


class Sign(torch.autograd.Function):
    """Weights of -1 and 1 whose gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class OwnLinear(torch.autograd.Function):
    """A layer whose parameter is an argument of a function of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


def mean_entropy(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]).mean(1), batch["y"], reduction="none")


def complex_layer(m: Any, x: Tensor) -> Tensor:
    return m.h(torch.fft.irfft(torch.fft.rfft(x) * m.w, n=4))


def parameter(*shape: int, **more: Any) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, **more) / 2)


def dictionary(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ m.w["in"]) @ m.w["out"]


def low_rank(m: Any, x: Tensor) -> Tensor:
    return m.h(F.linear(x, m.frozen.weight + m.a @ m.b, m.frozen.bias))


def _low_rank() -> nn.Module:
    model = Wrap(low_rank, frozen=nn.Linear(4, 4), a=parameter(4, 2), b=parameter(2, 4), h=nn.Linear(4, 3))
    model.frozen.requires_grad_(False)
    return model


def temperature(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]) * model.t.exp(), batch["y"], reduction="none")


def shared_slices(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ m.w[:, :4]) @ m.w[:, 4:]


def convolved(m: Any, x: Tensor) -> Tensor:
    return m.h(torch.tanh(m.c(x.mT)).mean(2))


def old_convolution() -> nn.Module:
    return nn.utils.weight_norm(nn.Conv1d(4, 4, 3, padding=1))


CONSTRAINED = "(?i)parameter|layer|weight"
PARAMETERS = [
    Input("a list on the model", Bag, VECTORS, cross_entropy),
    Input("a list in a part", lambda: nn.Sequential(Bag()), VECTORS, cross_entropy),
    Input("lists in a list", lambda: Bag(nested=True), VECTORS, cross_entropy),
    Input(
        "a dictionary",
        lambda: Wrap(dictionary, w=nn.ParameterDict({"in": torch.randn(4, 5), "out": torch.randn(5, 3)})),
        VECTORS,
        cross_entropy,
    ),
    Input("slices of one parameter", lambda: Wrap(shared_slices, w=parameter(4, 7)), VECTORS, cross_entropy),
    either(
        "straight-through",
        lambda: Wrap(lambda m, x: m.h(x @ Sign.apply(m.w)), w=parameter(4, 4), h=nn.Linear(4, 3)),
        VECTORS,
        cross_entropy,
        CONSTRAINED,
    ),
    either(
        "a function of one's own",
        lambda: Wrap(lambda m, x: m.h(torch.tanh(OwnLinear.apply(x, m.w))), w=parameter(5, 4), h=nn.Linear(5, 3)),
        VECTORS,
        cross_entropy,
        CONSTRAINED,
    ),
    either(
        "a temperature used in the loss",
        lambda: Wrap(lambda m, x: m.h(x), h=nn.Linear(4, 3), t=nn.Parameter(torch.zeros(()))),
        VECTORS,
        temperature,
        CONSTRAINED,
    ),
    either("low rank by hand", _low_rank, VECTORS, cross_entropy, CONSTRAINED),
    either(
        "complex",
        lambda: Wrap(complex_layer, w=parameter(3, dtype=torch.complex128), h=nn.Linear(4, 3)),
        VECTORS,
        cross_entropy,
        "(?i)complex",
    ),
    Input(
        "weight norm",
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)),
        VECTORS,
        cross_entropy,
    ),
    Input(
        "weight norm of the old kind",
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)),
        VECTORS,
        cross_entropy,
    ),
    Input(
        "of the old kind, of a convolution",
        lambda: Wrap(convolved, c=old_convolution(), h=nn.Linear(4, 3)),
        SERIES,
        cross_entropy,
    ),
    Input(
        "of the old kind, checkpointed",
        lambda: Wrap(
            lambda m, x: m.h(checkpoint(m.a, x, use_reentrant=False).tanh()),
            a=nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Tanh()),
            h=nn.Linear(4, 3),
        ),
        VECTORS,
        cross_entropy,
    ),
    either(
        "spectral norm",
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 3)),
        VECTORS,
        cross_entropy,
        "(?i)buffer|state|spectral|weight",
    ),
]


def lent(forward: Callable[[Any, Tensor], Tensor], **layers: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A model whose forward uses parameters of its layers; a head if there is none."""
    layers.setdefault("h", lambda: nn.Linear(4, 3))
    return lambda: Wrap(forward, **{name: make() for name, make in layers.items()})


def linear(bias: bool = True) -> nn.Module:
    return nn.Linear(4, 4, bias=bias)


class OfAnother(nn.Module):
    """Multiplies by the weight of a layer that it does not own."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other, self.scale = [other], parameter(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.other[0].weight) * self.scale


def of_another() -> nn.Module:
    one = linear()
    return Wrap(lambda m, x: m.h(m.o(torch.tanh(m.a(x)))), a=one, o=OfAnother(one), h=nn.Linear(4, 3))


def normalised_by_hand(m: Any, x: Tensor) -> Tensor:
    weight = m.a.weight
    return m.h(torch.tanh(F.linear(x, weight / weight.norm(dim=1, keepdim=True), m.a.bias)))


def distance(m: Any, x: Tensor) -> Tensor:
    """Of every example from the weights, as learning vector quantisation and radial layers have it."""
    return m.h(torch.exp(-(x[:, None] - m.a.weight).square().sum(-1)))


def tied_head(m: Any, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(m.a(m.e(x))).mean(1), m.e.weight)[:, :3]


def tied_modules() -> nn.Module:
    model = Wrap(
        lambda m, x: m.h(F.linear(torch.tanh(m.b(x) + m.a(x)), m.b.weight)), a=linear(), b=linear(), h=linear()
    )
    model.b.weight = model.a.weight
    return model


def affine(m: Any, x: Tensor) -> Tensor:
    return m.h(torch.tanh(m.n(x)) * m.n.weight + m.n.bias)


def convolved_again(m: Any, x: Tensor) -> Tensor:
    x = torch.tanh(m.c(x.mT))
    return m.h(F.conv1d(x, m.c.weight, m.c.bias, padding=1).mean(2))


def gates(m: Any, x: Tensor) -> Tensor:
    return m.h(torch.tanh(F.linear(m.r(x)[0][:, -1], m.r.weight_hh_l0[:4], m.r.bias_hh_l0[:4])))


def attended(m: Any, x: Tensor) -> Tensor:
    return m.h(torch.tanh(F.linear(m.t(x, x, x)[0], m.t.out_proj.weight.t())).mean(1))


def folded(m: Any, x: Tensor) -> Tensor:
    rows = F.linear(m.a(x.flatten(0, 1)), m.a.weight.t())
    return m.h(torch.tanh(rows).view(x.shape).mean(1))


def checkpointed(reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        z = checkpoint(lambda z: torch.tanh(F.linear(z, m.b.weight) * z).exp(), m.a(x), use_reentrant=reentrant)
        return m.h(m.b(z))

    return forward


def scaled(model: Any, batch: Any) -> Tensor:
    return cross_entropy(model, batch) + model.a.weight.square().sum()


class Within(nn.Module):
    """A module that is differentiated as one and uses a layer of its own both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor) -> Tensor:
        s = x.reshape(-1, 4)
        out, positive = torch.zeros_like(s), s[:, 0] > 0
        out[positive] = self.a(s[positive])
        out[~positive] = F.linear(s[~positive], self.a.weight.t())
        return out.view(x.shape)


LENT = [
    Input("another's weight", of_another, VECTORS, cross_entropy),
    Input(
        "only its weight",
        lent(lambda m, x: m.h(torch.tanh(F.linear(x, m.a.weight, m.a.bias))), a=linear),
        VECTORS,
        cross_entropy,
    ),
    Input("transposed", lent(lambda m, x: m.h(torch.tanh(m.a(x)) @ m.a.weight.t()), a=linear), SERIES, mean_entropy),
    Input(
        "slices",
        lent(lambda m, x: m.h(torch.tanh(x @ m.a.weight[:2].mT) @ m.a.weight[2:]), a=lambda: linear(bias=False)),
        VECTORS,
        cross_entropy,
    ),
    Input("weight norm by hand", lent(normalised_by_hand, a=linear), VECTORS, cross_entropy),
    Input(
        "a penalty per example",
        lent(lambda m, x: m.h(m.a(x)) * m.a.weight.square().mean(), a=linear),
        VECTORS,
        cross_entropy,
    ),
    Input("distances from the weights", lent(distance, a=lambda: linear(bias=False)), VECTORS, cross_entropy),
    Input("a tied head", lent(tied_head, e=lambda: nn.Embedding(9, 4), a=linear, h=nn.Identity), TOKENS, cross_entropy),
    Input("tied modules", tied_modules, VECTORS, cross_entropy),
    Input("of a norm", lent(affine, n=lambda: nn.LayerNorm(4)), VECTORS, cross_entropy),
    Input("of a convolution", lent(convolved_again, c=lambda: nn.Conv1d(4, 4, 3, padding=1)), SERIES, cross_entropy),
    Input("of a recurrent layer", lent(gates, r=lambda: nn.GRU(4, 4, batch_first=True)), SERIES, cross_entropy),
    Input(
        "of attention", lent(attended, t=lambda: nn.MultiheadAttention(4, 2, batch_first=True)), SERIES, cross_entropy
    ),
    Input("rows folded", lent(folded, a=linear), SERIES, cross_entropy),
    Input(
        "inside of what is differentiated as one",
        lent(lambda m, x: m.h(m.w(m.b(x)).mean(1)), w=Within, b=linear),
        SERIES,
        cross_entropy,
    ),
    either("checkpointed", lent(checkpointed(False), a=linear, b=linear), VECTORS, cross_entropy, "checkpoint"),
    either(
        "checkpointed, reentrant",
        lent(checkpointed(True), a=linear, b=linear),
        VECTORS,
        cross_entropy,
        "use_reentrant|outside the forward",
    ),
    refused("a penalty in the loss", lent(lambda m, x: m.h(m.a(x)), a=linear), VECTORS, scaled, "penalty in the loss"),
]


def loop(cell: Callable[[], nn.Module], states: int = 2, start: bool = True) -> Callable[[], nn.Module]:
    """A loop over a cell."""

    def forward(m: Any, x: Tensor) -> Tensor:
        state: Any = None
        if start:
            zeros = x.new_zeros(len(x), 5)
            state = (zeros, zeros) if states == 2 else zeros
        for t in range(x.shape[1]):
            state = m.c(x[:, t], state)
        return m.h(state[0] if states == 2 else state)

    return lambda: Wrap(forward, c=cell(), h=nn.Linear(5, 3))


def stacked(m: Any, x: Tensor) -> Tensor:
    one = other = None
    for step in x.unbind(1):
        one = m.a(step, one)
        other = m.b(torch.tanh(one[0]), other)
    return m.h(other[0] + other[1])


def both_ways(m: Any, x: Tensor) -> Tensor:
    there = back = None
    for step, last in zip(x.unbind(1), x.flip(1).unbind(1), strict=True):
        there, back = m.c(step, there), m.c(last, back)
    return m.h(there[0] + back[1])


def learned_start(m: Any, x: Tensor) -> Tensor:
    h, c = m.start.expand(2, len(x), 5).unbind(0)
    for step in x.unbind(1):
        h, c = m.c(step, (h, c))
    return m.h(h)


def every_step(m: Any, x: Tensor) -> Tensor:
    state, out = None, []
    for step in x.unbind(1):
        state = m.c(step, state)
        out.append(m.h(state[0]))
    return torch.stack(out).mean(0)


CELLS = [
    Input("LSTMCell", loop(lambda: nn.LSTMCell(4, 5)), SERIES, cross_entropy),
    Input("LSTMCell without bias", loop(lambda: nn.LSTMCell(4, 5, bias=False)), SERIES, cross_entropy),
    Input("LSTMCell without a first state", loop(lambda: nn.LSTMCell(4, 5), start=False), SERIES, cross_entropy),
    Input("GRUCell", loop(lambda: nn.GRUCell(4, 5), 1), SERIES, cross_entropy),
    Input("RNNCell", loop(lambda: nn.RNNCell(4, 5, nonlinearity="relu"), 1), SERIES, cross_entropy),
    Input(
        "two LSTMCells",
        lambda: Wrap(stacked, a=nn.LSTMCell(4, 5), b=nn.LSTMCell(5, 5), h=nn.Linear(5, 3)),
        SERIES,
        cross_entropy,
    ),
    Input(
        "both ways through one", lambda: Wrap(both_ways, c=nn.LSTMCell(4, 5), h=nn.Linear(5, 3)), SERIES, cross_entropy
    ),
    either(
        "a learned first state",
        lambda: Wrap(learned_start, c=nn.LSTMCell(4, 5), h=nn.Linear(5, 3), start=parameter(2, 1, 5)),
        SERIES,
        cross_entropy,
        "'c'.*does not run on part of its batch.*inside the module",
    ),
    Input(
        "a head at every step", lambda: Wrap(every_step, c=nn.LSTMCell(4, 5), h=nn.Linear(5, 3)), SERIES, cross_entropy
    ),
]


def soft_prompt(m: Any, x: Tensor) -> Tensor:
    prompt = m.prompt(torch.arange(2)).expand(len(x), -1, -1)
    return m.h(m.r(torch.cat([prompt, m.e(x)], 1))[0][:, -1])


def bare_prompt(m: Any, x: Tensor) -> Tensor:
    return m.h(m.r(torch.cat([m.prompt.expand(len(x), -1, -1), m.e(x)], 1))[0][:, -1])


def encoded_prompt(m: Any, x: Tensor) -> Tensor:
    """p-tuning: what makes the prompt never sees the batch."""
    prompt = m.b(torch.tanh(m.a(m.prompt(torch.arange(2)))))
    return m.h(m.r(torch.cat([prompt.expand(len(x), -1, -1), m.e(x)], 1))[0][:, -1])


def repeated_prompt(m: Any, x: Tensor) -> Tensor:
    prompt = m.prompt(torch.arange(2)[None].repeat(len(x), 1))
    return m.h(m.r(torch.cat([prompt, m.e(x)], 1))[0][:, -1])


def prefix(m: Any, x: Tensor) -> Tensor:
    """Keys and values before those of the input; layers first, as past_key_values are."""
    z = m.e(x)
    past = m.past(torch.arange(2)).expand(len(x), -1, -1).unflatten(-1, (2, 4)).permute(2, 0, 1, 3)
    k, v = (torch.cat([p, w(z)], 1) for p, w in zip(past, (m.k, m.v), strict=True))
    return m.h(((z @ k.mT).softmax(-1) @ v).mean(1))


def prompted(
    forward: Callable[[Any, Tensor], Tensor], freeze: bool = True, **more: Callable[[], Any]
) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made = {name: build() for name, build in more.items()}
        model = Wrap(
            forward,
            e=nn.Embedding(9, 4),
            r=nn.GRU(4, 5, batch_first=True),
            h=nn.Linear(made.pop("width", 5), 3),
            **made,
        )
        if freeze:
            model.e.requires_grad_(False)
            model.r.requires_grad_(False)
        return model

    return make


PROMPTS = [
    Input(
        "an embedding of its own, expanded",
        prompted(soft_prompt, prompt=lambda: nn.Embedding(2, 4)),
        TOKENS,
        cross_entropy,
    ),
    Input(
        "nothing frozen", prompted(soft_prompt, freeze=False, prompt=lambda: nn.Embedding(2, 4)), TOKENS, cross_entropy
    ),
    Input("a parameter, expanded", prompted(bare_prompt, prompt=lambda: parameter(1, 2, 4)), TOKENS, cross_entropy),
    Input("ids repeated", prompted(repeated_prompt, prompt=lambda: nn.Embedding(2, 4)), TOKENS, cross_entropy),
    either(
        "an encoder of prompts",
        prompted(
            encoded_prompt, prompt=lambda: nn.Embedding(2, 4), a=lambda: nn.Linear(4, 4), b=lambda: nn.Linear(4, 4)
        ),
        TOKENS,
        cross_entropy,
        "(?i)example|batch",
    ),
    Input(
        "prefixes of keys and values",
        lambda: Wrap(
            prefix,
            e=nn.Embedding(9, 4),
            past=nn.Embedding(2, 8),
            k=nn.Linear(4, 4),
            v=nn.Linear(4, 4),
            h=nn.Linear(4, 3),
        ),
        TOKENS,
        cross_entropy,
    ),
]


class Experts(nn.Module):
    """Each position goes to the best of three experts; how rows are gathered differs."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.gate, self.way = nn.Linear(4, 3), way
        self.up = parameter(3, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        s = x.reshape(-1, 4)
        weight, index = self.gate(s).softmax(-1).max(-1)
        if self.way == "sorted":
            order = index.argsort(stable=True)
            counts = torch.bincount(index, minlength=3).tolist()
            parts = [rows @ w for rows, w in zip(s[order].split(counts), self.up, strict=True)]
            out = torch.cat(parts)[order.argsort()]
        elif self.way == "masks":
            out = torch.zeros_like(s)
            for k in range(3):
                out[index == k] = s[index == k] @ self.up[k]
        elif self.way == "dense":
            out = torch.einsum("nd,kde,nk->ne", s, self.up, F.one_hot(index, 3).to(s.dtype))
        elif self.way == "gathered":
            out = torch.einsum("nd,nde->ne", s, self.up[index])
        elif self.way == "capacity":
            out = torch.zeros_like(s)
            for k in range(3):
                rows = (index == k).nonzero().squeeze(1)[:2]
                out = out.index_add(0, rows, s[rows] @ self.up[k])
        else:  # experts choose their rows
            chosen = self.gate(s).topk(2, 0).indices
            out = torch.zeros_like(s)
            for k in range(3):
                out = out.index_add(0, chosen[:, k], s[chosen[:, k]] @ self.up[k])
        return x + (weight[:, None] * out).view(x.shape)


def experts(way: str) -> Callable[[], nn.Module]:
    return lambda: Wrap(
        lambda m, x: m.h(m.x(torch.tanh(m.a(x))).mean(1)), a=nn.Linear(4, 4), x=Experts(way), h=nn.Linear(4, 3)
    )


EXPERTS = [
    *(Input(way, experts(way), SERIES, cross_entropy) for way in ("sorted", "masks", "dense", "gathered")),
    refused("capacity", experts("capacity"), SERIES, cross_entropy, "(?i)example|batch"),
    refused("experts choose", experts("chosen"), SERIES, cross_entropy, "(?i)example|batch"),
]


@inputs(PARAMETERS)
def test_parameters_without_layers(case: Input) -> None:
    assert_right(case)


def expanded(grow: Callable[[Tensor], Tensor], *shape: int) -> Callable[[], nn.Module]:
    """Five rows made of a parameter meet every example; one of the batches has five examples, too."""
    return lambda: Wrap(
        lambda m, x: m.h(torch.tanh(x[:, None] + STEPS * grow(m.w)).sum(1)), h=nn.Linear(4, 3), w=parameter(*shape)
    )


def positions(m: Any, x: Tensor) -> Tensor:
    rows = STEPS * m.e(torch.arange(1)).expand(5, -1)
    return m.h(torch.tanh(x[:, None] + rows.expand(len(x), 5, 4)).sum(1))


def both(m: Any, x: Tensor) -> Tensor:
    rows, own = m.w.expand(5, 4), m.w.expand(len(x), 4)
    return m.h(torch.tanh(x[:, None] + STEPS * rows).sum(1) + own)


STEPS = torch.arange(5.0)[:, None]
EXPANDED = [
    Input("expand", expanded(lambda w: w.expand(5, -1), 1, 4), VECTORS, cross_entropy),
    Input("a new dimension", expanded(lambda w: w.expand(5, 4), 4), VECTORS, cross_entropy),
    Input("repeat", expanded(lambda w: w.repeat(5, 1), 1, 4), VECTORS, cross_entropy),
    Input("broadcast_to", expanded(lambda w: torch.broadcast_to(w, (5, 4)), 4), VECTORS, cross_entropy),
    Input("added to zeros", expanded(lambda w: w + torch.zeros(5, 4), 4), VECTORS, cross_entropy),
    Input("times what is made of ones", expanded(lambda w: (torch.ones(5, 4) * 2 - 1) * w, 4), VECTORS, cross_entropy),
    Input(
        "an embedding, then over the examples",
        lambda: Wrap(positions, e=nn.Embedding(1, 4), h=nn.Linear(4, 3)),
        VECTORS,
        cross_entropy,
    ),
    either("over both", lambda: Wrap(both, h=linear(), w=parameter(4)), VECTORS, cross_entropy, "cannot be told apart"),
]


@inputs(EXPANDED)
def test_what_parameters_are_expanded_to_is_not_told_by_size(case: Input) -> None:
    assert_right(case)


@inputs(LENT)
def test_parameters_outside_of_their_layers(case: Input) -> None:
    assert_right(case)


def test_a_document_says_which_layers_are_lent() -> None:
    with double():
        trace = gs.trace_model(built(LENT[0].make), LENT[0].batch, LENT[0].loss)
    assert [site.layer for site in trace.sites if site.lent] == ["a", "a"]
    assert tuple(Site.from_json(site.to_json()) for site in trace.sites) == trace.sites


@inputs(CELLS)
def test_cells_in_loops(case: Input) -> None:
    assert_right(case)


@inputs(PROMPTS)
def test_prompts(case: Input) -> None:
    assert_right(case)


@inputs(EXPERTS)
def test_experts(case: Input) -> None:
    assert_right(case)


Made = tuple[nn.Module, torch.optim.Optimizer]


@cache
def plan_of(kind: str) -> ClipPlan:
    return ClipPlan(gs.Grouping.all_layer(gs.trace_model(MODELS[kind](), SERIES, cross_entropy)))


def private(kind: str) -> Made:
    model = MODELS[kind]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gs.make_private(model, optimizer, plan_of(kind), noise_multiplier=1.0, expected_batch_size=B)
    return model, optimizer


def averaged(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model).module


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def in_a_list(model: nn.Module) -> nn.Module:
    return copy.deepcopy([model, {"best": model}])[1]["best"]


def part_of_it(model: nn.Module) -> nn.Module:
    return nn.Sequential(*(copy.deepcopy(part) for part in model))


class Last(nn.Module):
    """The last position."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1]


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Last(), nn.Linear(5, 3)),
    "norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Last(), nn.Linear(4, 3)),
    "attention": lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), Last(), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("when", ["before a step", "between forward and step", "after a step"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved, pickled, averaged, in_a_list, part_of_it])
@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_of_a_private_model_is_a_plain_one(kind: str, duplicate: Any, when: str) -> None:
    """It computes the same and is trained like any model."""
    with double():
        model, optimizer = private(kind)
        if when != "before a step":
            cross_entropy(model, SERIES).mean().backward()
        if when == "after a step":
            optimizer.step()
        twin = duplicate(model)
        twin.zero_grad()
        twin.eval(), model.eval()
        torch.testing.assert_close(twin(SERIES["x"]), model(SERIES["x"]))
        cross_entropy(twin, SERIES).mean().backward()
        plain = MODELS[kind]().eval()
        plain.load_state_dict(model.state_dict())
        cross_entropy(plain, SERIES).mean().backward()
        for one, other in zip(twin.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
