"""What the hook-based Book-Keeping engine of fastDP would hold for a grouping, by formula.

As its code of May 2023 to 2025 does it: every trainable layer keeps its input (``activations``) from forward on and
a copy of its output gradient (``backprops``) until its group is closed; autograd forms the non-private ``.grad``,
which stays until the optimizer's step; a closed group leaves ``private_grad``. The sums of a closing group are
formed by one more copy of an output gradient, and of an embedding by a one-hot of its ids, B x T x V integers of
8 bytes and as many floats of 4. All layers here take the ghost norm, which is what fastDP's rule 2 T^2 <= d p says
of the four models that :mod:`benchmarks.sweep` uses it for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from groupsearch.plan.memory import lifetimes
from groupsearch.plan.trace import Trace
from groupsearch.tracer.step import StepSettings, fake_stage
from groupsearch.workloads import Workload

ONE_HOT_BYTES = 8 + 4


@dataclass(frozen=True)
class Held:
    """What hooks keep for one site.

    Attributes:
        storage: number of its input; sites that share an input share the number.
        input_bytes: of that input.
        gradient_bytes: of the copy of its output gradient.
        one_hot_bytes: of an embedding's one-hot, else 0.
        parameter_bytes: of the parameters that it is the first in backward to reach.
        block: the repeated block it lies in, or its own layer.
    """

    storage: int
    input_bytes: int
    gradient_bytes: int
    one_hot_bytes: int
    parameter_bytes: int
    block: str


def held_by(workload: Workload, trace: Trace) -> list[Held]:
    """What hooks keep for every site of a trace, from one forward pass on fake tensors.

    Bare parameters (a class token, positions) have no layer: fastDP does not train them and holds nothing.
    """
    with torch.device("meta"):
        model = workload.build()
    fake, stage = fake_stage(model, workload.make_batch(workload.batch_size), workload.loss, StepSettings())
    seen: dict[str, tuple[Tensor, int]] = {}

    def note(name: str, given: tuple[Tensor, ...], out: Tensor) -> None:
        seen[name] = (given[0], out.numel() * out.element_size())

    for name in {site.layer for site in trace.sites if site.kind != "parameter"}:
        layer = stage.model.get_submodule(name)
        layer.register_forward_hook(lambda _, given, out, name=name: note(name, given, out))
    with fake, torch.no_grad():
        stage.loss(stage.model, stage.batch)
    numbers: dict[int, int] = {}
    return [_held(trace, index, seen, numbers) for index in range(trace.length)]


def _held(trace: Trace, index: int, seen: dict[str, tuple[Tensor, int]], numbers: dict[int, int]) -> Held:
    site = trace.sites[index]
    if site.kind == "parameter":
        return Held(-1 - index, 0, 0, 0, site.gradient_bytes, site.block)
    given, out_bytes = seen[site.layer]
    number = numbers.setdefault(id(given.untyped_storage()), len(numbers))
    ids = site.kind == "embedding"
    vocabulary = site.inputs if ids else 0
    one_hot = ONE_HOT_BYTES * given.numel() * vocabulary
    return Held(number, given.numel() * given.element_size(), out_bytes, one_hot, site.gradient_bytes, site.block)


def peak_bytes(trace: Trace, held: Sequence[Held], boundaries: Sequence[int], *, one_hot: bool = True) -> int:
    """The peak of a step by these buffers, on top of what the trace says of autograd alone.

    Args:
        trace: of the same model, batch and checkpointing.
        held: of its sites.
        boundaries: of the grouping.
        one_hot: whether an embedding's sum is formed by a one-hot; without, it costs nothing.
    """
    sites = held if one_hot else [replace(site, one_hot_bytes=0) for site in held]
    found = [max(i.live_bytes for i in trace.instants if i.site < 0) + _not_reached(trace, sites, trace.length)]
    private = 0
    for low, high in reversed(list(pairwise((0, *boundaries, trace.length)))):
        group, reached = sites[low:high], sum(site.parameter_bytes for site in sites[high:])
        for index in range(high - 1, low - 1, -1):
            reached += sites[index].parameter_bytes
            around = reached + private + _not_reached(trace, sites, index) + _book(sites[index:high])
            norm = 3 * 4 * trace.batch_size * trace.sites[index].positions ** 2
            found.append(_autograd(trace, index, low) + around + (norm if trace.sites[index].positions > 1 else 0))
        formed = max(max(site.gradient_bytes, site.one_hot_bytes) + site.parameter_bytes for site in group)
        found.append(trace.sites[low].close_live_bytes + around + formed)
        private += sum(site.parameter_bytes for site in group)
    return max(*found, trace.step_bytes)


def _autograd(trace: Trace, index: int, low: int) -> int:
    """Alive without any book while the site is reached and, with its group still open, until the next one is."""
    if index == low:
        return trace.sites[index].close_live_bytes
    end, close_at = lifetimes(trace).end_at[index], lifetimes(trace).close_at[index]
    return max(i.live_bytes for i in trace.instants[close_at + 1 : end])


def _book(group: Sequence[Held]) -> int:
    """Inputs, each storage once and without the newest site's (autograd still has it), and copies of gradients."""
    inputs = {site.storage: site.input_bytes for site in group if site.storage != group[0].storage}
    return sum(inputs.values()) + sum(site.gradient_bytes for site in group)


def _not_reached(trace: Trace, sites: Sequence[Held], index: int) -> int:
    """Inputs in checkpointed blocks that backward has yet to come to: hooks keep what checkpointing would drop.

    Each block's first input is left out, which checkpointing keeps too.
    """
    if trace.settings["checkpoint"] == "none":
        return 0
    here = sites[index].block if index < trace.length else ""
    kept: dict[int, int] = {}
    first: dict[str, int] = {}
    for site, known in zip(sites[:index], trace.sites, strict=False):
        if known.block != known.layer and known.block != here:
            first.setdefault(known.block, site.storage)
            kept[site.storage] = site.input_bytes
    return sum(size for storage, size in kept.items() if storage not in first.values())
