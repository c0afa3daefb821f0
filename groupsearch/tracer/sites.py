"""The sites of a model in the order backward reaches them: observed, never guessed from registration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import CheckpointError

from groupsearch.engine.entries import Dimensions
from groupsearch.engine.layout import Layouts
from groupsearch.engine.ownership import owned_layers
from groupsearch.engine.passes import Arrival
from groupsearch.engine.truth.check import CheckSubject, Reading, Tried, check_truth, try_rows
from groupsearch.engine.truth.draws import OTHERS, USUAL, Constants, alike
from groupsearch.engine.truth.leftovers import left_as_it_was
from groupsearch.engine.truth.rows import joined
from groupsearch.engine.whole import WholeEntry, called
from groupsearch.errors import OutsideUseError, UnsupportedModelError, is_out_of_memory
from groupsearch.options import EngineOptions
from groupsearch.plan.checked import Checked, merged
from groupsearch.plan.trace import Rows, Site, shared_parameters
from groupsearch.tracer.discovery import Loss, find_layouts
from groupsearch.tracer.fake import NEEDS_VALUES
from groupsearch.workloads.batches import count_examples, first_examples, map_tensors, tensors_of
from groupsearch.workloads.blocks import find_blocks
from groupsearch.workloads.copies import check_plain


@dataclass(frozen=True)
class Observed:
    """One arrival as it was seen."""

    key: str
    layer: str
    kind: str
    layout: str
    parameters: tuple[str, ...]
    parameter_count: int
    dimensions: Dimensions
    lent: bool
    expansions: tuple[tuple[int, int], ...] | None


def as_sites(arrivals: Sequence[Observed], model: nn.Module, rows: Rows) -> tuple[Site, ...]:
    """Number what backward reached, last first, and name further uses of a layer ``name#k``."""
    blocks = find_blocks(model)
    uses: Counter[str] = Counter()
    sites = []
    for seen in reversed(arrivals):
        use = uses[seen.key]
        uses[seen.key] += 1
        block = next((b for b in blocks if seen.layer == b or seen.layer.startswith(b + ".")), seen.layer)
        dims = seen.dimensions
        sites.append(
            Site(
                name=f"{seen.key}#{use}" if use else seen.key,
                layer=seen.layer,
                block=block,
                kind=seen.kind,
                method=dims.method,
                positions=dims.positions,
                inputs=dims.inputs,
                outputs=dims.outputs,
                parameters=seen.parameters,
                parameter_count=seen.parameter_count,
                layout=seen.layout,
                rows=rows,
                lent=seen.lent,
                expansions=seen.expansions,
            )
        )
    return tuple(sites)


@dataclass(frozen=True)
class Examined:
    """What is known of a model once it was looked at.

    Attributes:
        sites: in order.
        reading: how the engine is to read the model.
        draws: random draws at which every trainable parameter takes part.
        checked: what the truth check held; None without real weights and examples.
    """

    sites: tuple[Site, ...]
    reading: Reading
    draws: Constants
    checked: Checked | None


def observe_sites(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    *,
    options: EngineOptions | None = None,
    allow_state: Collection[str] = (),
) -> tuple[Site, ...]:
    """The sites of a model, from forward and backward passes over a few examples of a batch, in the mode it is in.

    On real tensors the engine is held to plain autograd on those examples, see
    :mod:`groupsearch.engine.truth`. Fake tensors only show that the sites are the same for two examples and for
    three. Model, gradients, modes and generators are left as they are.

    Raises:
        UnsupportedModelError: when a trainable parameter cannot be covered, by name, or when an
            example's gradient depends on the other examples of its batch.
    """
    return examine(model, batch, loss, options, allow_state).sites


def examine(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    options: EngineOptions | None = None,
    allow_state: Collection[str] = (),
) -> Examined:
    """Sites, reading and truth check of a model, see :func:`observe_sites`.

    Raises:
        UnsupportedModelError: as :func:`observe_sites`.
    """
    options = options or EngineOptions()
    if not is_real(model, batch):
        return _settled(model, batch, loss, options)
    check_plain(model)  # these refuse what needs no pass to be seen
    owned_layers(model)
    device = next(model.parameters()).device
    tried = try_rows(model, map_tensors(lambda x: x.to(device), batch), loss)
    try:
        return _examined(model, tried, loss, options, allow_state, apart=False)
    except UnsupportedModelError:
        if not _has_several_rows(model, joined(tried.rows.examples), loss):
            raise
        with suppress(UnsupportedModelError):  # the rows of an example may lie in the other order
            return _examined(model, tried, loss, options, allow_state, apart=True)
        raise


def _has_several_rows(model: nn.Module, batch: Any, loss: Loss) -> bool:
    with left_as_it_was(model), alike(), suppress(UnsupportedModelError):
        return find_layouts(model, first_examples(batch, 3), loss).rows.count > 1
    return False


def _examined(
    model: nn.Module, tried: Tried, loss: Loss, options: EngineOptions, allow_state: Collection[str], apart: bool
) -> Examined:
    settled = _settled(model, joined(tried.rows.examples), loss, options, apart)
    reading, draws, shared = settled.reading, settled.draws, shared_parameters(settled.sites)
    found = [
        check_truth(CheckSubject.of(model, loss, reading, shared, each), tried, allow_state)
        for each in dict.fromkeys((draws, USUAL))
    ]
    return replace(settled, checked=merged(found))


def sites_of(model: nn.Module, batch: Any, loss: Loss, options: EngineOptions, apart: bool = False) -> tuple[Site, ...]:
    """The sites of a model with weights, without the truth check: make_private makes it when it is told the loss.

    Several rows of an example lie ``apart`` or side by side.

    Raises:
        UnsupportedModelError: as :func:`observe_sites`.
    """
    return _settled(model, batch, loss, options, apart).sites


def _settled(model: nn.Module, batch: Any, loss: Loss, options: EngineOptions, apart: bool = False) -> Examined:
    check_plain(model)  # these refuse what needs no pass to be seen
    owned_layers(model)
    if not is_real(model, batch):
        with alike():
            reading, arrivals = settle(model, first_examples(batch, 3), loss, options, None)
            return Examined(_sites_of(model, batch, loss, reading, arrivals), reading, USUAL, None)
    reading, arrivals, draws = _settle_on_all(model, batch, loss, options, apart)
    with left_as_it_was(model), alike(draws):
        return Examined(_sites_of(model, batch, loss, reading, arrivals), reading, draws, None)


def is_real(model: nn.Module, batch: Any) -> bool:
    """Whether weights and examples have values."""
    tensors = [*model.parameters(), *tensors_of(batch)]
    return not any(isinstance(x, FakeTensor) or x.is_meta for x in tensors)


def _sites_of(
    model: nn.Module, batch: Any, loss: Loss, reading: Reading, arrivals: Sequence[Observed]
) -> tuple[Site, ...]:
    check_all_seen(model, arrivals)
    check_same_sites(arrivals, observe_pass(model, first_examples(batch, 2), loss, reading))
    return as_sites(arrivals, model, reading.layouts.rows)


def _settle_on_all(
    model: nn.Module, few: Any, loss: Loss, options: EngineOptions, apart: bool
) -> tuple[Reading, list[Observed], Constants]:
    """Settle at draws at which all parameters take part; at the usual ones where there are none such."""
    usual = None
    for draws in (USUAL, *OTHERS):
        with left_as_it_was(model), alike(draws):
            try:
                reading, arrivals = settle(model, first_examples(few, 3), loss, options, apart)
            except UnsupportedModelError:
                if usual is None:
                    raise
                continue
        usual = usual or (reading, arrivals, draws)
        if not unseen(model, arrivals):
            return reading, arrivals, draws
    assert usual is not None
    return usual


def settle(
    model: nn.Module, batch: Any, loss: Loss, options: EngineOptions, apart: bool | None
) -> tuple[Reading, list[Observed]]:
    """How the engine can read a model, and what arrives in a pass over three examples, see :func:`observe_pass`.

    A layer whose parameters are used elsewhere is lent. One that cannot be followed inside is differentiated as one,
    together with as few modules around it as keep the examples together. Several rows of an example lie ``apart`` or
    side by side; None: not known.

    Raises:
        UnsupportedModelError: when that is the whole model, or something else cannot be covered; and when nobody
            knows in which order several rows of an example lie.
    """
    three = first_examples(batch, 3)
    usage = find_layouts(model, three, loss)
    if apart is None and usage.rows.count > 1:
        raise UnsupportedModelError(
            f"The model is called with {usage.rows.count} rows of every example, whose order only values show. Give it "
            "with its weights and a batch with its values, not on the meta device."
        )
    rows = replace(usage.rows, apart=bool(apart) and usage.rows.count > 1)
    while True:
        reading = Reading(options, Layouts(dict(usage.layouts), rows, usage.lent))
        try:
            arrivals = observe_pass(model, three, loss, reading)
            expansions = {seen.key: seen.expansions for seen in arrivals if seen.expansions is not None}
            return replace(reading, layouts=replace(reading.layouts, expansions=expansions)), arrivals
        except UnsupportedModelError as error:
            if error.layer is None:
                raise
            outside = (error.layer,) if isinstance(error, OutsideUseError) else ()
            if not usage.lend(*outside) and not usage.make_whole(error.layer):
                raise


def observe_pass(model: nn.Module, batch: Any, loss: Loss, reading: Reading) -> list[Observed]:
    """What arrives in one backward pass, in that order."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    arrivals: list[Observed] = []

    def receive(arrival: Arrival) -> None:
        entry = arrival.make_entry()
        arrivals.append(observed(arrival, entry.parameters, entry.dimensions, sizes))
        if isinstance(entry, WholeEntry):
            if any(isinstance(x, FakeTensor) for x in entry.booked):
                entry.sqnorm()  # whatever cannot run again is found now, and made whole with what is around it
            else:
                _check_adds_up(arrival.key, entry)

    try:
        with reading.attached(model, receive):
            loss(model, batch).sum().backward()
    except NEEDS_VALUES:
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        said = str(error).split("\n\n")[0]
        remedy = "Make the model and the loss run on batches of any size."
        if isinstance(error, CheckpointError):
            said = said.split(". ")[0].splitlines()[0]
            remedy = "Leave activation checkpointing off (--checkpoint none, or in the model)."
        raise UnsupportedModelError(
            f"A step on {count_examples(batch)} examples with the engine failed: {' '.join(said.split()).rstrip('.')}. "
            f"{remedy}"
        ) from error
    return arrivals


def _check_adds_up(key: str, entry: WholeEntry) -> None:
    together = entry.clipped_sums(torch.ones_like(entry.sqnorm()))
    alone = {name: entry.instance(name) for name in together}
    scale = max(float(instance.abs().max()) for instance in alone.values())
    if any(float((alone[name].sum(0) - total).abs().max()) > 1e-3 * scale for name, total in together.items()):
        raise UnsupportedModelError(
            f"{called(key)} gives other gradients when its examples run one by one than when they run together: an "
            "example's gradient depends on the other examples (batch statistics, mixed examples, capacity limits of "
            "experts). Remove what mixes them, or freeze it with requires_grad_(False).",
            key,
        )


def check_same_sites(arrivals: Sequence[Observed], others: Sequence[Observed]) -> None:
    """Raise when batches of two sizes give different sites.

    Raises:
        UnsupportedModelError: naming the first layer that differs.
    """
    for one, other in zip_longest(arrivals, others):
        if one != other:
            raise UnsupportedModelError(
                f"Layer {(one or other).key!r} is used differently when the batch has another size: what it takes for "
                "the batch is not, or the model's path depends on the number of examples. Keep the examples in the "
                "first dimension of everything a layer sees."
            )


def observed(arrival: Arrival, parameters: tuple[str, ...], dims: Dimensions, sizes: dict[str, int]) -> Observed:
    """What an arrival says about its site."""
    count = sum(sizes[name] for name in parameters)
    layer = arrival.layer
    where = layer.layout, parameters, count
    return Observed(arrival.key, layer.name, arrival.kind, *where, dims, layer.lent, arrival.expansions)


def unseen(model: nn.Module, arrivals: Sequence[Observed]) -> list[str]:
    """Trainable parameters that no site uses."""
    seen = {name for a in arrivals for name in a.parameters}
    return [name for name, p in model.named_parameters() if p.requires_grad and name not in seen]


def check_all_seen(model: nn.Module, arrivals: Sequence[Observed]) -> None:
    """Raise for trainable parameters that no site uses.

    Raises:
        UnsupportedModelError: naming them.
    """
    missing = unseen(model, arrivals)
    if missing:
        mode = "" if model.training else " The model is in evaluation mode: call .train() first if it is trained so."
        raise UnsupportedModelError(
            f"Backward reached no use of these trainable parameters: {', '.join(missing)}. They take no part in the "
            f"loss of this batch. Freeze them with requires_grad_(False), or give a batch that uses them.{mode}"
        )
