"""Functions of torch that hide parameters, said again in operations that can be followed.

``nn.MultiheadAttention`` and the recurrent layers hand their parameters to one function each.
Attention becomes projections around ``scaled_dot_product_attention``; a recurrence runs step by
step with its parameters detached, and the gradients of its gates, over all steps, are the output
gradients of two matrix sites: input to gates, state to gates. A cell that a loop of the model's own
calls is those two products at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from groupsearch.engine.entries import Dimensions, Entry, InstanceEntry
from groupsearch.engine.layers import Layer, Matrix, linear_operands, matrix_entry
from groupsearch.engine.passes import Pass
from groupsearch.engine.taps import Saved, Take, with_gradient
from groupsearch.errors import UnsupportedModelError, is_out_of_memory
from groupsearch.options import EngineOptions

# -- Functions of parameters alone, and how a per-example gradient is taken back from them to the parameters

Arrive = Callable[[str, Callable[[], Entry]], None]


@dataclass(frozen=True)
class Source:
    """A leaf of a function of parameters: a bare parameter, or the output of a layer that saw no batch.

    Attributes:
        key: name of the site.
        entry: turns the per-example gradient (B, *leaf.shape) of the leaf into a book entry.
        layer: whose parameter it is, or whose output.
        parameter: canonical name, where the leaf is a parameter itself.
    """

    key: str
    leaf: Tensor
    entry: Callable[[Tensor], Entry]
    layer: Layer
    parameter: str | None = None


@dataclass(frozen=True)
class Tracked:
    """A tensor that is a function of sources alone."""

    tensor: Tensor
    sources: tuple[Source, ...]


class Sources:
    """The functions of parameters of one pass, by the identity of their tensor."""

    def __init__(self) -> None:
        self._tracked: dict[int, Tracked] = {}
        self._chaining = False

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self._tracked

    def __len__(self) -> int:
        return len(self._tracked)

    def __getitem__(self, tensor: Tensor) -> Tracked:
        return self._tracked[id(tensor)]

    def of(self, tensors: Sequence[Tensor]) -> list[Tracked]:
        """Those of some tensors that are functions of parameters."""
        return [self._tracked[id(t)] for t in tensors if id(t) in self._tracked]

    def begin(self, source: Source) -> None:
        """Track a leaf; a gradient that autograd gives it raises, unless :meth:`deliver` asked for it.

        Raises:
            UnsupportedModelError: in backward.
        """
        key = source.key  # and not the source in the hook: its leaf would keep itself alive
        layer = source.layer.name

        def stray(g: Tensor) -> None:
            if not self._chaining:
                raise UnsupportedModelError(
                    f"Parameter {key!r} reached the loss through an operation that cannot be followed example "
                    "by example (such as an autograd.Function of your own). Use it in elementwise operations, expand, "
                    "matrix products or a torch.nn layer of its own, or put what uses it into a module of the model "
                    "that takes and returns the batch first; use use_reentrant=False where activation checkpointing is "
                    "on, or freeze it with requires_grad_(False).",
                    layer,
                )

        source.leaf.register_hook(stray)
        self._tracked[id(source.leaf)] = Tracked(source.leaf, (source,))

    def add(self, tensor: Tensor, made_of: Sequence[Tracked]) -> None:
        """Track what was made of others."""
        sources = tuple({id(s): s for t in made_of for s in t.sources}.values())
        self._tracked[id(tensor)] = Tracked(tensor, sources)

    def clear(self) -> None:
        """Track nothing more."""
        self._tracked.clear()

    def deliver(self, tracked: Tracked, instance: Tensor, arrive: Arrive) -> None:
        """Take the per-example gradient (B, *shape) of a function of parameters back to each of them."""
        for source in tracked.sources:
            if source.leaf is tracked.tensor:
                arrive(source.key, partial(source.entry, instance))
                continue
            self._chaining = True
            try:
                chained = _chained(tracked.tensor, source.leaf, instance)
            finally:
                self._chaining = False
            arrive(source.key, partial(source.entry, chained))


def _chained(tensor: Tensor, leaf: Tensor, instance: Tensor) -> Tensor:
    """The gradient (B, *leaf.shape) of a leaf from that of a function of it (B, *tensor.shape)."""
    try:
        return torch.autograd.grad(tensor, leaf, instance, is_grads_batched=True, retain_graph=True)[0]
    except RuntimeError as error:  # an operation that knows no batches of gradients (sparse tensors)
        if is_out_of_memory(error):
            raise
        each = [torch.autograd.grad(tensor, leaf, g, retain_graph=True)[0] for g in instance]
        return torch.stack(each) if each else leaf.new_zeros(0, *leaf.shape)


# -- substitutes -----------------------------------------------------------------------------------

T = TypeVar("T")


class Following(Protocol):
    """What follows the parameters of the layer that is running: :class:`groupsearch.engine.bare_parameters.Meeting`."""

    options: EngineOptions

    @property
    def layer(self) -> Layer | None:
        """The layer that is running."""

    def running(self) -> Pass:
        """The pass that is under way."""

    def arrival(self) -> Arrive:
        """What is called in backward with a site and a maker of its book entry."""

    def is_tracked(self, tensor: object) -> bool:
        """Whether a tensor is a function of parameters alone."""

    def seeing(self, layout: str, *tensors: Tensor) -> AbstractContextManager[None]:
        """For a while parameters meet examples in this layout."""

    def apply(self, func: Callable[..., Any], *args: Any) -> Any:
        """An operation, followed if it uses a parameter."""

    def during(self, work: Callable[[], T]) -> T:
        """Follow what runs again while backward does some work."""


def _attention(
    meeting: Following,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``torch.nn.functional.multi_head_attention_forward``: inputs and output (T, B, E), weights (B, [heads,] T, S)."""
    if query.dim() != 3 or static_k is not None or static_v is not None:
        raise UnsupportedModelError(
            f"Attention in layer {_name(meeting)!r} has an input without a batch, or static keys and values, whose "
            "per-example gradients are not formed. Give it a batch, or freeze it with requires_grad_(False)."
        )
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    with meeting.seeing("second", query, key, value):
        projected = _projections(meeting, (query, key, value), in_proj_weight, in_proj_bias, separate)
        extended = _extended(meeting, projected, (bias_k, bias_v), add_zero_attn)
    q, k, v = (x.transpose(0, 1) for x in extended)
    heads = partial(torch.unflatten, dim=2, sizes=(num_heads, -1))
    q, k, v = (heads(x).transpose(1, 2) for x in (q, k, v))
    alone = is_causal and key_padding_mask is None and not need_weights  # then torch does not read the mask
    mask = _mask(q, k, None if alone else attn_mask, key_padding_mask)
    if mask is not None:  # what was added to the keys is never masked
        mask = functional.pad(mask, (0, k.shape[2] - mask.shape[3]))
    dropout = dropout_p if training else 0.0
    weights = None
    if need_weights:
        scores = (q / math.sqrt(q.shape[3])) @ k.mT
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = functional.dropout(weights, dropout) if dropout else weights
        mixed = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=alone)
    mixed_TBE = mixed.transpose(1, 2).flatten(2).transpose(0, 1)
    with meeting.seeing("second", mixed_TBE):
        return meeting.apply(functional.linear, mixed_TBE, out_proj_weight, out_proj_bias), weights


def _projections(
    meeting: Following,
    inputs: tuple[Tensor, Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    separate: tuple[Tensor | None, ...] | None,
) -> Sequence[Tensor]:
    query, key, value = inputs
    linear = partial(meeting.apply, functional.linear)
    if any(meeting.is_tracked(x) for x in inputs):
        raise UnsupportedModelError(
            f"Layer {_name(meeting)!r} attends to parameters that saw no batch. Expand them over the examples first."
        )
    if separate is None and query is key and key is value:
        assert weight is not None
        return linear(query, weight, bias).chunk(3, 2)
    # the parts of a packed weight are functions of it: each is projected with its part
    weights = meeting.apply(torch.chunk, weight, 3) if separate is None else separate
    biases = (None, None, None) if bias is None else meeting.apply(torch.chunk, bias, 3)
    return [linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def _extended(
    meeting: Following, projected: Sequence[Tensor], biases: tuple[Tensor | None, Tensor | None], zero: bool
) -> tuple[Tensor, ...]:
    """Keys and values with a further position that is a parameter, and one that is zero."""
    q, *others = projected
    for i, bias in enumerate(biases):
        if bias is not None:
            own = meeting.apply(Tensor.expand, bias, 1, q.shape[1], -1)
            others[i] = torch.cat([others[i], own])
        if zero:
            others[i] = functional.pad(others[i], (0, 0, 0, 0, 0, 1))
    return q, *others


def _mask(q: Tensor, k: Tensor, attn_mask: Tensor | None, padding_BS: Tensor | None) -> Tensor | None:
    def additive(mask: Tensor) -> Tensor:
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask

    total = None
    if attn_mask is not None:
        total = additive(attn_mask)
        total = total.unflatten(0, (q.shape[0], q.shape[1])) if total.dim() == 3 else total[None, None]
    if padding_BS is not None:
        padding = additive(padding_BS)[:, None, None]
        total = padding if total is None else total + padding
    return None if total is None else total.to(q.dtype)


Cell = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _lstm_cell(x_gates: Tensor, h_gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (x_gates + h_gates).chunk(4, 1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru_cell(x_gates: Tensor, h_gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (xr, xz, xn), (hr, hz, hn) = x_gates.chunk(3, 1), h_gates.chunk(3, 1)
    z = (xz + hz).sigmoid()
    return ((1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * state[0],)


def _tanh_cell(x_gates: Tensor, h_gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((x_gates + h_gates).tanh(),)


def _relu_cell(x_gates: Tensor, h_gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((x_gates + h_gates).relu(),)


def _recurrence(
    cell: Cell,
    meeting: Following,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    parameters: Sequence[Tensor] | Tensor,
    has_biases: bool | Sequence[Tensor],
    num_layers: int | bool,
    dropout: float | int,
    train: bool | float,
    bidirectional: bool,
    batch_first: bool | None = None,
) -> tuple[Tensor, ...]:
    """``torch.lstm`` and its like: input (B, T, d) or (T, B, d), states (layers * directions, B, H)."""
    directions = 2 if bidirectional else 1
    if batch_first is None or input.dim() != 3 or len(parameters) != num_layers * directions * (4 if has_biases else 2):
        raise UnsupportedModelError(
            f"Recurrent layer {_name(meeting)!r} works on packed sequences, without a batch or with a projection "
            "(proj_size), which is not followed example by example. Pad the sequences (batch first) and mask the loss."
        )
    x_BTd = input if batch_first else input.transpose(0, 1)
    states = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
    finals: list[tuple[Tensor, ...]] = []
    for layer in range(int(num_layers)):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            step = 4 if has_biases else 2
            weights = list(parameters)[number * step : (number + 1) * step]
            suffix = f"l{layer}{'_reverse' if direction else ''}"
            start = tuple(state[number] for state in states)
            y_BTH, final = _one_direction(cell, meeting, x_BTd, start, weights, suffix, bool(direction))
            outputs.append(y_BTH)
            finals.append(final)
        x_BTd = torch.cat(outputs, 2) if directions == 2 else outputs[0]
        if train and dropout and layer < int(num_layers) - 1:
            x_BTd = functional.dropout(x_BTd, float(dropout))
    out = x_BTd if batch_first else x_BTd.transpose(0, 1)
    return out, *(torch.stack(parts) for parts in zip(*finals, strict=True))


def _one_direction(
    cell: Cell,
    meeting: Following,
    x_BTd: Tensor,
    state: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    suffix: str,
    backwards: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    w_ih, w_hh, *biases = (w.detach() for w in weights)
    if backwards:
        x_BTd = x_BTd.flip(1)
    x_gates_BTp = functional.linear(x_BTd, w_ih, biases[0] if biases else None)
    # an addition of nothing to the state's gates: its gradient is theirs, over all steps
    probe_BTp = torch.zeros_like(x_gates_BTp)
    before: list[Tensor] = []
    outputs: list[Tensor] = []
    sites, source = _GateSites(meeting, suffix), meeting.running()
    x_gates_BTp = with_gradient(source, x_gates_BTp, sites.site("ih"), (x_BTd,))
    probe_BTp = with_gradient(source, probe_BTp, sites.site("hh"))
    for x_gates, probe in zip(x_gates_BTp.unbind(1), probe_BTp.unbind(1), strict=True):
        before.append(state[0])
        state = cell(x_gates, functional.linear(state[0], w_hh, biases[1] if biases else None) + probe, state)
        outputs.append(state[0])
    sites.states = Saved((torch.stack(before, 1),))
    y_BTH = torch.stack(outputs, 1)
    return (y_BTH.flip(1) if backwards else y_BTH), state


class _GateSites:
    """The two matrix sites of one direction of one recurrent layer."""

    def __init__(self, meeting: Following, suffix: str) -> None:
        layer = meeting.layer
        assert layer is not None
        self.states = Saved(())
        self._meeting, self._layer, self._suffix = meeting, layer, suffix
        self._arrive, self._source = meeting.arrival(), meeting.running()

    def site(self, part: str) -> Callable[[Tensor, Take], None]:
        names = [f"{stem}_{part}_{self._suffix}" for stem in ("weight", "bias")]
        weight, bias = (self._layer.trainable.get(name) for name in names)

        def pull(g_BTp: Tensor, take: Take) -> None:
            (a_BTd,) = self._meeting.during(take if part == "ih" else self.states.take)
            if self._source.rows.count > 1:  # (B, K, T, ...)
                a_BTd, g_BTp = (self._source.by_example(x, "folded") for x in (a_BTd, g_BTp))
            own = names[0] if weight is not None else names[1]
            key = f"{self._layer.name}.{own}" if self._layer.name else own
            if weight is not None:
                matrix = Matrix(weight, bias, torch.Size((g_BTp.shape[-1], a_BTd.shape[-1])))
                options = self._meeting.options
                self._arrive(key, lambda: matrix_entry(matrix, a_BTd, g_BTp, linear_operands, options))
            elif bias is not None:
                self._arrive(key, lambda: _bias_entry(bias, g_BTp))

        return pull


def _bias_entry(bias: str, g_BTp: Tensor) -> Entry:
    g_BTp = g_BTp.flatten(1, -2)
    return InstanceEntry({bias: g_BTp.sum(1)}, Dimensions(g_BTp.shape[1], 0, g_BTp.shape[2], "direct"))


def _cell(
    cell: Cell,
    meeting: Following,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """``torch.lstm_cell`` and its like: one step, of input (B, d) and states (B, H), as two products."""
    states = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
    x_gates = meeting.apply(functional.linear, input, w_ih, b_ih)
    h_gates = meeting.apply(functional.linear, states[0], w_hh, b_hh)
    after = cell(x_gates, h_gates, states)
    return after if isinstance(hx, list | tuple) else after[0]


def _name(meeting: Following) -> str:
    return meeting.layer.name if meeting.layer else ""


SUBSTITUTES: Mapping[Any, Callable[..., Any]] = {
    functional.multi_head_attention_forward: _attention,
    torch.lstm: partial(_recurrence, _lstm_cell),
    torch.gru: partial(_recurrence, _gru_cell),
    torch.rnn_tanh: partial(_recurrence, _tanh_cell),
    torch.rnn_relu: partial(_recurrence, _relu_cell),
    torch.lstm_cell: partial(_cell, _lstm_cell),
    torch.gru_cell: partial(_cell, _gru_cell),
    torch.rnn_tanh_cell: partial(_cell, _tanh_cell),
    torch.rnn_relu_cell: partial(_cell, _relu_cell),
}
SUBSTITUTED = (nn.MultiheadAttention, nn.RNNBase)
