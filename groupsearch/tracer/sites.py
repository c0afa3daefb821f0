"""The sites of a model in the order backward reaches them: observed, never guessed from registration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from groupsearch.engine.capture import Arrival, Capture
from groupsearch.engine.entries import Dimensions
from groupsearch.errors import UnsupportedModelError
from groupsearch.options import EngineOptions
from groupsearch.trace import Site
from groupsearch.workloads.blocks import find_blocks

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Observed:
    """One arrival as it was seen."""

    key: str
    layer: str
    kind: str
    parameters: tuple[str, ...]
    parameter_count: int
    dimensions: Dimensions


def as_sites(arrivals: Sequence[Observed], model: nn.Module) -> tuple[Site, ...]:
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
            )
        )
    return tuple(sites)


def observe_sites(
    model: nn.Module, batch: Any, loss: Loss, *, options: EngineOptions | None = None
) -> tuple[Site, ...]:
    """The sites of a model, from one forward and backward pass on the tensors it is given.

    Works on real and on fake tensors; gradients and parameters are left as they are.

    Raises:
        UnsupportedModelError: when a trainable parameter cannot be covered, by name.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    arrivals: list[Observed] = []

    def receive(arrival: Arrival) -> None:
        entry = arrival.make_entry()
        arrivals.append(observed(arrival, entry.parameters, entry.dimensions, sizes))

    capture = Capture(model, receive, options or EngineOptions())
    try:
        loss(model, batch).sum().backward()
    finally:
        capture.remove()
    check_all_seen(model, arrivals)
    return as_sites(arrivals, model)


def observed(arrival: Arrival, parameters: tuple[str, ...], dims: Dimensions, sizes: dict[str, int]) -> Observed:
    """What an arrival says about its site."""
    count = sum(sizes[name] for name in parameters)
    return Observed(arrival.key, arrival.layer.name, arrival.kind, parameters, count, dims)


def check_all_seen(model: nn.Module, arrivals: Sequence[Observed]) -> None:
    """Raise for trainable parameters that no site uses.

    Raises:
        UnsupportedModelError: naming them.
    """
    seen = {name for a in arrivals for name in a.parameters}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and name not in seen]
    if missing:
        raise UnsupportedModelError(
            f"Backward reached no use of these trainable parameters: {', '.join(missing)}. They take no part in the loss "
            "of this batch. Freeze them with requires_grad_(False), or give a batch that uses them."
        )
