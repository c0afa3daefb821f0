"""The sites of a model in the order backward reaches them: observed, never guessed from registration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from groupsearch.engine.arrival import Arrival
from groupsearch.engine.capture import Capture
from groupsearch.engine.entries import Dimensions
from groupsearch.engine.layout import Layouts
from groupsearch.engine.ownership import owned_layers
from groupsearch.engine.whole import WholeEntry
from groupsearch.errors import UnsupportedModelError
from groupsearch.options import EngineOptions
from groupsearch.trace import Rows, Site
from groupsearch.tracer.discovery import Loss, find_layouts
from groupsearch.tracer.fake import NEEDS_VALUES
from groupsearch.workloads.batches import count_examples, first_examples, varied_examples
from groupsearch.workloads.blocks import find_blocks


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
            )
        )
    return tuple(sites)


def observe_sites(
    model: nn.Module, batch: Any, loss: Loss, *, options: EngineOptions | None = None
) -> tuple[Site, ...]:
    """The sites of a model, from forward and backward passes over a few examples of a batch.

    The model runs in evaluation mode on three examples, twice on the same with the third replaced, and
    on two: the sites must be the same and, on real tensors, replacing the third must change no gradient
    norm of the others at any site. Fake tensors show only the former. Random numbers are drawn from
    one seed; gradients, parameters, modes and generators are left as they are.

    Raises:
        UnsupportedModelError: when a trainable parameter cannot be covered, by name, or when an
            example's gradient depends on the other examples of its batch.
    """
    owned_layers(model)  # refuses in the mode the model is trained in
    several = varied_examples(batch, 5)
    with _evaluating(model):
        usage = find_layouts(model, first_examples(several, 3), loss)
        for rows in usage.orders[:-1]:
            try:
                return _observed_in_order(model, several, loss, options, rows)
            except UnsupportedModelError:  # perhaps the rows of an example lie in another order
                pass
        return _observed_in_order(model, several, loss, options, usage.orders[-1])


def _observed_in_order(
    model: nn.Module, several: Any, loss: Loss, options: EngineOptions | None, rows: Rows
) -> tuple[Site, ...]:
    layouts, arrivals, norms_LB = settle(model, several, loss, options, rows)
    passes = [observe_pass(model, _taken(several, (0, 1, k)), loss, options, layouts) for k in (3, 4)]
    fewer, _ = observe_pass(model, first_examples(several, 2), loss, options, layouts)
    check_all_seen(model, arrivals)
    check_same_sites(arrivals, fewer)
    for replaced, replaced_LB in passes:
        check_same_sites(arrivals, replaced)
        if not isinstance(norms_LB, FakeTensor):
            _check_separate(arrivals, norms_LB[:, :2], replaced_LB[:, :2])
    return as_sites(arrivals, model, layouts.rows)


def check_examples(model: nn.Module, batch: Any, loss: Loss, options: EngineOptions | None = None) -> Rows | None:
    """How the model is called with the examples, as far as it can be seen: only weights that are there show it.

    Raise when examples cannot be told apart, as far as that can be seen: only weights that are there show it.

    Raises:
        UnsupportedModelError: see :func:`observe_sites`.
    """
    tensors = [*model.parameters(), *(x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor))]
    if any(isinstance(x, FakeTensor) or x.is_meta for x in tensors):
        return None
    device = next(model.parameters()).device
    few = pytree.tree_map_only(Tensor, lambda x: x.to(device), varied_examples(batch, 5))
    return observe_sites(model, few, loss, options=options)[0].rows


def settle(
    model: nn.Module, batch: Any, loss: Loss, options: EngineOptions | None = None, rows: Rows | None = None
) -> tuple[Layouts, list[Observed], Tensor]:
    """Where the layers keep the examples, and what arrives in a pass over three of them, see :func:`observe_pass`.

    A layer that cannot be followed inside is differentiated as one, together with as few modules
    around it as keep the examples together. Several rows of an example lie as ``rows`` says.

    Raises:
        UnsupportedModelError: when that is the whole model, or something else cannot be covered; and when nobody
            knows in which order several rows of an example lie.
    """
    three = first_examples(batch, 3)
    usage = find_layouts(model, three, loss)
    if rows is None and len(usage.orders) > 1:
        raise UnsupportedModelError(
            f"The model is called with {usage.rows.count} rows of every example, whose order only values show. Give it "
            "with its weights and a batch with its values, not on the meta device."
        )
    while True:
        layouts = Layouts(usage.layouts, rows or usage.rows)
        try:
            arrivals, norms_LB = observe_pass(model, three, loss, options, layouts)
            return layouts, arrivals, norms_LB
        except UnsupportedModelError as error:
            if error.layer is None or not usage.make_whole(error.layer):
                raise


def observe_pass(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    options: EngineOptions | None = None,
    layouts: Layouts | None = None,
) -> tuple[list[Observed], Tensor]:
    """What arrives in one backward pass, in that order, and every example's gradient norm, (L, B)."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    arrivals: list[Observed] = []
    sqnorms: list[Tensor] = []

    def receive(arrival: Arrival) -> None:
        entry = arrival.make_entry()
        arrivals.append(observed(arrival, entry.parameters, entry.dimensions, sizes))
        sqnorms.append(entry.sqnorm().float())
        if isinstance(entry, WholeEntry) and not isinstance(sqnorms[-1], FakeTensor):
            _check_adds_up(arrival.key, entry)

    capture = Capture(model, receive, options or EngineOptions(), layouts)
    capture.passes.policy = "same"  # a batch is one set of examples, however often the loss calls the model
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss(model, batch).sum().backward()
    except NEEDS_VALUES:
        raise
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"A step on {count_examples(batch)} examples failed: {error}. Poisson sampling draws batches of any size; "
            "make the model and the loss run on all of them."
        ) from error
    finally:
        capture.remove()
    return arrivals, torch.stack(sqnorms).clamp(min=0).sqrt()


def _check_adds_up(key: str, entry: WholeEntry) -> None:
    together = entry.clipped_sums(torch.ones_like(entry.sqnorm()))
    alone = {name: entry.instance(name) for name in together}
    scale = max(float(instance.abs().max()) for instance in alone.values())
    if any(float((alone[name].sum(0) - total).abs().max()) > 1e-3 * scale for name, total in together.items()):
        raise UnsupportedModelError(
            f"Module {key!r} gives other gradients when its examples run one by one than when they run together: an "
            "example's gradient depends on the others (batch statistics, capacity limits of experts). Remove what "
            "mixes the examples, or freeze it with requires_grad_(False).",
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


def _taken(batch: Any, examples: tuple[int, ...]) -> Any:
    index = torch.tensor(examples)
    return pytree.tree_map_only(Tensor, lambda t: t[index.to(t.device)], batch)


def _check_separate(arrivals: Sequence[Observed], norms_LB: Tensor, others_LB: Tensor) -> None:
    scale_B = torch.linalg.vector_norm(others_LB, dim=0)
    differs_L = ((norms_LB - others_LB).abs() > 1e-2 * others_LB + 1e-3 * scale_B).any(1)
    if differs_L.any():
        raise UnsupportedModelError(
            f"At layer {arrivals[int(differs_L.nonzero()[0])].key!r} the gradient of an example depends on the other "
            "examples of its batch, or the examples are in another order there: clipping it protects nobody. Remove "
            "what mixes or reorders examples (batch statistics, a mean over the batch, flips of the first dimension)."
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def observed(arrival: Arrival, parameters: tuple[str, ...], dims: Dimensions, sizes: dict[str, int]) -> Observed:
    """What an arrival says about its site."""
    count = sum(sizes[name] for name in parameters)
    layer = arrival.layer
    return Observed(arrival.key, layer.name, arrival.kind, layer.layout, parameters, count, dims)


def check_all_seen(model: nn.Module, arrivals: Sequence[Observed]) -> None:
    """Raise for trainable parameters that no site uses.

    Raises:
        UnsupportedModelError: naming them.
    """
    seen = {name for a in arrivals for name in a.parameters}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and name not in seen]
    if missing:
        raise UnsupportedModelError(
            f"Backward reached no use of these trainable parameters: {', '.join(missing)}. They take no part in the "
            "loss of this batch. Freeze them with requires_grad_(False), or give a batch that uses them."
        )
