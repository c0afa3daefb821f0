"""Where layers keep the examples, modules differentiated as one, and functions said again: beyond the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from groupsearch.engine import make_private
from groupsearch.errors import UnsupportedModelError
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer.sites import observe_sites
from groupsearch.workloads.blocks import checkpoint_blocks
from tests.support.cases import LAYER_CASES, Experts, Wrap, readout
from tests.support.reference import trainable

B = 4


def batch_of(*shape: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(B, *shape, generator=generator, dtype=torch.float64)
    return {"x": x, "scale": torch.linspace(0.5, 2.0, B, dtype=torch.float64)}


def check_against_autograd(model: nn.Module, batch: dict[str, Tensor], seed: int = 0) -> None:
    """Outputs are the model's own; every example's norm and the unclipped sum are those of autograd, draws included."""
    model = model.double().train()

    def losses() -> Tensor:
        torch.manual_seed(seed)
        return readout(model, batch)

    expected = losses()
    examples = []
    for index in range(B):
        losses()[index].backward()
        examples.append({name: p.grad for name, p in trainable(model).items() if p.grad is not None})
        model.zero_grad()
    norms = [sum(float(g.square().sum()) for g in example.values()) ** 0.5 for example in examples]
    plan = ClipPlan(Grouping((), observe_sites(model, batch, readout)), max_grad_norm=1e9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = make_private(model, optimizer, plan, noise_multiplier=0.0, expected_batch_size=B)
    found = losses()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    found.mean().backward()
    torch.testing.assert_close(engine.norms[:, 0], torch.tensor(norms, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    for name, total in engine.clipped_sums().items():
        torch.testing.assert_close(total, sum(example[name] for example in examples), rtol=1e-8, atol=1e-9, msg=name)
    engine.detach()


@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        ("linear-3d", {"first"}),
        ("folded-conv1d", {"folded"}),
        ("folded-scale", {"folded"}),
        ("second-linear-square", {"second"}),
        ("experts-of-linears", {"first", "whole"}),
    ],
)
def test_a_site_says_where_its_layer_keeps_the_examples(name: str, layouts: set[str]) -> None:
    case = LAYER_CASES[name]
    assert {site.layout for site in observe_sites(case.model(), case.batch(), case.loss)} == layouts


class Jittered(nn.Module):
    """Routes rows, after dropout: its examples cannot be run again one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts(6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        return self.experts(nn.functional.dropout(x, 0.4, self.training))[0]


class DroppingExperts(Experts):
    """Experts behind dropout, inside of one module."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, d), as the experts."""
        return super().forward(nn.functional.dropout(x, 0.4, self.training))


@pytest.mark.parametrize("inside", [True, False])
def test_dropout_in_a_module_differentiated_as_one_is_drawn_again(inside: bool) -> None:
    torch.manual_seed(1)
    experts = DroppingExperts(6) if inside else Jittered()

    def forward(m: Any, x: Tensor) -> Tensor:
        out = m.experts(m.a(x))
        return m.b(out[0] if inside else out)

    check_against_autograd(
        Wrap(forward, a=nn.Linear(6, 6), experts=experts, b=nn.Linear(6, 3)), batch_of(5, 6), seed=11
    )


class Capacity(Experts):
    """Each expert takes so many rows of the whole batch, so that one example displaces another."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, d), rows past the capacity dropped."""
        rows = x.flatten(0, 1)
        out = torch.zeros_like(rows)
        for index, network in enumerate(self.networks):
            mine = self.gate(rows)[:, index].argsort(descending=True)[:4]
            out = out.index_add(0, mine, network(rows[mine]))
        return out.view_as(x) + self.gate(x).sum(-1, keepdim=True), out.view_as(x)


def test_a_module_whose_examples_displace_each_other_is_refused() -> None:
    torch.manual_seed(1)
    model = Wrap(lambda m, x: m.b(m.experts(x)[0]), experts=Capacity(6), b=nn.Linear(6, 3)).double()
    with pytest.raises(UnsupportedModelError, match="depends on the other"):
        observe_sites(model, batch_of(5, 6), readout)


def test_a_layer_that_lost_the_examples_in_the_model_itself_is_differentiated_with_it() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        mine = (rows.sum(1) > 0).nonzero().squeeze(1)
        return torch.zeros_like(rows).index_add(0, mine, m.a(rows[mine])).view_as(x)

    model = Wrap(forward, a=nn.Linear(6, 6)).double()
    assert [site.kind for site in observe_sites(model, batch_of(5, 6), readout)] == ["function"]
    check_against_autograd(model, batch_of(5, 6))


def in_turn(rows: Iterable[str], columns: Iterable[str]) -> list[Any]:
    """All pairs, batch first and not in turn, so that every row and column has both; the other half is slow."""
    return [
        pytest.param(row, column, first, marks=() if first == ((i + j) % 2 == 0) else pytest.mark.slow)
        for (i, row), (j, column), first in product(enumerate(rows), enumerate(columns), (True, False))
    ]


ATTENTION = {
    "plain": {},
    "no bias": {"bias": False},
    "key and value of other widths": {"kdim": 5, "vdim": 3},
    "bias for keys and values": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
}
CALLS: dict[str, Callable[[int], dict[str, Any]]] = {
    "plain": lambda heads: {},
    "weights": lambda heads: {"need_weights": True},
    "weights of every head": lambda heads: {"need_weights": True, "average_attn_weights": False},
    "causal": lambda heads: {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True},
    "float mask": lambda heads: {"attn_mask": torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5)},
    "mask of every head": lambda heads: {"attn_mask": torch.ones(B * heads, 5, 5).triu(1).bool()},
    "padding": lambda heads: {"key_padding_mask": None},
    "padding and mask": lambda heads: {"key_padding_mask": None, "attn_mask": torch.ones(5, 5).triu(1).bool()},
}


@pytest.mark.parametrize(("setting", "call", "batch_first"), in_turn(ATTENTION, CALLS))
def test_attention_is_said_again_exactly(setting: str, call: str, batch_first: bool) -> None:
    settings = ATTENTION[setting]

    def forward(m: Any, x: Tensor) -> Tensor:
        # masks are rows of the batch: sites are observed on fewer examples than it has
        arguments = {
            name: value[: len(x) * 2] if name == "attn_mask" and getattr(value, "ndim", 0) == 3 else value
            for name, value in CALLS[call](2).items()
        }
        if "key_padding_mask" in arguments:
            padded = torch.zeros(x.shape[:2], dtype=torch.bool)
            padded[:, -1] = x[:, 0, 0] > 0  # the example's own, whatever its place
            arguments["key_padding_mask"] = padded
        y = m.a(x) if batch_first else m.a(x).transpose(0, 1)
        key = y[..., : settings.get("kdim", 6)]
        value = y[..., : settings.get("vdim", 6)]
        out, weights = m.attention(
            y, key if settings else y, value if settings else y, **{"need_weights": False, **arguments}
        )
        out = out if batch_first else out.transpose(0, 1)
        return out if weights is None else out.flatten(1).sum(1) + weights.flatten(1).square().sum(1)

    torch.manual_seed(3)
    attention = nn.MultiheadAttention(6, 2, batch_first=batch_first, **settings)
    check_against_autograd(Wrap(forward, a=nn.Linear(6, 6), attention=attention), batch_of(5, 6))


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"])
def test_attention_with_a_frozen_part(frozen: str) -> None:
    torch.manual_seed(3)
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    attention.get_parameter(frozen).requires_grad_(False)
    model = Wrap(lambda m, x: m.attention(m.a(x), m.a(x), x)[0], a=nn.Linear(6, 6), attention=attention)
    check_against_autograd(model, batch_of(5, 6))


RECURRENT = {
    "lstm": lambda **settings: nn.LSTM(6, 4, **settings),
    "gru": lambda **settings: nn.GRU(6, 4, **settings),
    "tanh": lambda **settings: nn.RNN(6, 4, **settings),
    "relu": lambda **settings: nn.RNN(6, 4, nonlinearity="relu", **settings),
}


RECURRENT_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "both ways": {"bidirectional": True, "num_layers": 2},
    "no dropout": {"num_layers": 2, "dropout": 0.0},
}


@pytest.mark.parametrize(("kind", "setting", "batch_first"), in_turn(RECURRENT, RECURRENT_SETTINGS))
def test_a_recurrence_is_said_again_exactly(kind: str, setting: str, batch_first: bool) -> None:
    settings = RECURRENT_SETTINGS[setting]

    def forward(m: Any, x: Tensor) -> Tensor:
        out, state = m.core(x if batch_first else x.transpose(0, 1))
        last = (state[0] + state[1]) if isinstance(state, tuple) else state
        return (out if batch_first else out.transpose(0, 1)).flatten(1).sin().sum(1) + last.sum((0, 2))

    torch.manual_seed(3)
    model = Wrap(forward, core=RECURRENT[kind](batch_first=batch_first, **settings))
    check_against_autograd(model, batch_of(5, 6))


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_recurrence_with_a_frozen_part_and_a_given_state(kind: str, frozen: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        start = m.start(x[:, 0]).tanh().unsqueeze(0)
        return m.core(x, (start, start * 2) if kind == "lstm" else start)[0]

    torch.manual_seed(3)
    core = RECURRENT[kind](batch_first=True)
    core.get_parameter(frozen).requires_grad_(False)
    check_against_autograd(Wrap(forward, start=nn.Linear(6, 4), core=core), batch_of(5, 6))


def test_dropout_between_recurrent_layers_is_drawn() -> None:
    torch.manual_seed(3)
    model = Wrap(lambda m, x: m.core(x)[0], core=nn.GRU(6, 4, num_layers=2, dropout=0.5, batch_first=True)).double()
    batch = batch_of(5, 6)
    plan = ClipPlan(Grouping((), observe_sites(model, batch, readout)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make_private(model.train(), optimizer, plan, noise_multiplier=0.0, expected_batch_size=B)
    assert (readout(model, batch) - readout(model, batch)).abs().min() > 0


@pytest.mark.parametrize(
    "core",
    [nn.LSTM(6, 4, batch_first=True, proj_size=2), nn.GRU(6, 4, batch_first=True)],
    ids=["projection", "packed"],
)
def test_recurrences_that_cannot_be_followed_are_refused(core: nn.RNNBase) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if isinstance(core, nn.LSTM):
            return m.core(x)[0]
        packed = pack_padded_sequence(x, [5] * len(x), batch_first=True)
        return m.core(packed)[1][0]

    with pytest.raises(UnsupportedModelError, match="packed sequences"):
        observe_sites(Wrap(forward, core=core).double(), batch_of(5, 6), readout)


class Scaled(nn.Module):
    """A block that owns a parameter itself, as blocks with layer scale do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """X + scale * linear(x)."""
        return x + self.scale * self.linear(x).tanh()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_block_may_own_parameters(use_reentrant: bool) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 6), *(Scaled() for _ in range(3)))
    checkpoint_blocks(model, use_reentrant)
    check_against_autograd(model, batch_of(5, 6))
