"""The cheapest evidence on groupings: Gram matrices of per-example gradients, which score any of them without training.

Shapes: n batches, L sites, B examples of a batch, P pairs of sites that share a parameter.

Apart from the jobs, as it is of use without a search, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from groupsearch.engine.arithmetic import widened
from groupsearch.engine.book import Groups
from groupsearch.engine.capture import Capture
from groupsearch.engine.entries import Entry, MatrixEntry, matrix_instances, of_examples
from groupsearch.engine.layout import Layouts
from groupsearch.engine.passes import Arrival
from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.gram import Grams, sharing_pairs
from groupsearch.options import EngineOptions
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import Site
from groupsearch.tracer import observe_sites
from groupsearch.tracer.discovery import Loss
from groupsearch.training import CurvePoint, TrainSettings, train
from groupsearch.workloads.batches import count_examples
from groupsearch.workloads.workload import Workload

Array = NDArray[np.float64]
CHUNK_BYTES = 2**28
"""Most bytes of per-example gradients of one site that are held at a time, unless one example's are more."""


def gram_matrices(
    workload: Workload,
    *,
    examples: int = 64,
    batches: int = 2,
    seed: int = 0,
    settings: TrainSettings | None = None,
    steps: Sequence[int] | None = None,
) -> Grams:
    """Gram matrices of random training examples, at several instants of a private training run.

    The run is all-layer, as ``settings`` say, and ends at the last of ``steps``. What is chosen by these
    matrices is chosen by the training data, and nothing of it is private: where groupings may not be chosen by
    private data (``selection_data``), give a workload with public or synthetic data.

    Args:
        workload: what to train; without data the examples are those of ``make_batch``.
        examples: B, at least 2.
        batches: of as many different examples as there are, at every instant.
        seed: draws the examples.
        settings: how it is trained; None for the workload's own.
        steps: instants, as numbers of steps taken before; None for 0, a sixteenth and an eighth of the training.

    Raises:
        DivergedError: when a weight is not finite in training.
        UnsupportedModelError: when the model cannot be trained privately.
        GroupSearchError: when there are fewer examples than asked for, or fewer than two, when there are steps to
            take but no data or settings, or when a gradient is not finite.
    """
    if batches < 1 or examples < 2:
        raise GroupSearchError(f"Expected a batch or more of at least two examples, found {batches} of {examples}.")
    if settings is None and workload.training is not None and workload.data is not None:
        settings = TrainSettings.of(workload, seed=seed)
    instants = tuple(sorted(set(default_steps(settings) if steps is None else steps)))
    last = math.inf if settings is None else settings.steps
    if not instants or not 0 <= instants[0] <= instants[-1] <= last:
        raise GroupSearchError(f"Expected instants of training between 0 and its {last} steps, found {instants}.")
    device = torch.device("cpu" if settings is None else settings.device)
    drawn = [_on(device, batch) for batch in _draw(workload, examples, batches, seed)]
    model = workload.build(seed).to(device)
    sites = observe_sites(model, drawn[0], workload.loss)
    found: list[tuple[int, Array, Array]] = []

    def take(step: int, state: Mapping[str, Any]) -> None:
        model.load_state_dict(state)
        found.extend((step, *site_grams(model, batch, workload.loss, sites)) for batch in drawn)

    if instants == (0,):
        take(0, model.state_dict())
    else:
        _visit(workload, settings, instants, sites, take)
    return Grams(
        sites=sites,
        parameter_sizes={name: p.numel() for name, p in model.named_parameters() if p.requires_grad},
        steps=tuple(step for step, _, _ in found),
        grams=np.stack([grams for _, grams, _ in found]),
        pairs=sharing_pairs(sites),
        crosses=np.stack([crosses for _, _, crosses in found]),
    )


def default_steps(settings: TrainSettings | None) -> tuple[int, ...]:
    """Instants that say enough of a training: its beginning, a sixteenth and an eighth of it."""
    return (0,) if settings is None else (0, -(-settings.steps // 16), -(-settings.steps // 8))


def site_grams(model: nn.Module, batch: Any, loss: Loss, sites: Sequence[Site]) -> tuple[Array, Array]:
    """The Gram matrices of one batch: (L, B, B) per site, (P, B, B) per pair of sites that share a parameter.

    One forward and backward pass through the engine's book; the model, its mode and gradients stay as they are.

    Args:
        model: with the trainable parameters that the sites name.
        batch: B examples.
        loss: ``loss(model, batch)`` of shape (B,).
        sites: as :func:`groupsearch.tracer.observe_sites` finds them.

    Raises:
        UnsupportedModelError: when the pass does not use exactly these sites.
    """
    pairs, size = sharing_pairs(sites), count_examples(batch)
    progress = Groups(sites, lambda site: site, len(sites)).begin()
    grams: dict[int, Array] = {}
    kept: dict[int, Entry] = {}
    sharing = {site for pair in pairs for site in pair}

    def receive(arrival: Arrival) -> None:
        site, _ = progress.arrive(arrival.key)
        entry = arrival.make_entry()
        grams[site] = gram(entry, entry, size)
        if site in sharing:
            kept[site] = entry

    capture = Capture(model, receive, EngineOptions(), Layouts.of_sites(sites))
    capture.passes.policy = "same"  # a batch is one set of examples, however often the loss calls the model
    try:
        with torch.random.fork_rng():  # a training that is under way must go on as if nothing had been drawn
            torch.manual_seed(0)
            loss(model, batch).sum().backward()
    finally:
        capture.remove()
    missing = [site.name for index, site in enumerate(sites) if index not in grams]
    if missing:
        raise UnsupportedModelError(
            f"Backward did not reach {', '.join(missing)}, which the sites name. Find the sites with the model and the "
            f"loss that the Grams are taken with."
        )
    crosses = [gram(kept[early], kept[late], size) for early, late in pairs]
    empty = np.zeros((0, size, size))
    return np.stack([grams[site] for site in range(len(sites))]), np.stack(crosses) if crosses else empty


@torch.no_grad()
def gram(one: Entry, other: Entry, size: int, limit_bytes: int = CHUNK_BYTES) -> Array:
    """Inner products of every two of ``size`` examples' gradients in two sites, over the parameters they share, (B, B).

    Per-example gradients are held for as many examples at a time as ``limit_bytes`` allow, and formed again
    where that is not all of them.
    """
    names = [name for name in one.parameters if name in other.parameters]
    first = _gradients(one, names, torch.arange(size) < 1)
    example_bytes = sum(g.numel() * g.element_size() for g in first.values())
    chunk = max(1, min(size, limit_bytes // max(1, 2 * example_bytes)))
    numbers = torch.arange(size)
    result = np.zeros((size, size))
    for i in range(0, size, chunk):
        rows = _gradients(one, names, (numbers >= i) & (numbers < i + chunk))
        for j in range(i if one is other else 0, size, chunk):
            same = one is other and i == j
            columns = rows if same else _gradients(other, names, (numbers >= j) & (numbers < j + chunk))
            block = sum((rows[name] @ columns[name].mT).double() for name in names)
            assert isinstance(block, Tensor)
            result[i : i + chunk, j : j + chunk] = block.cpu().numpy()
            if one is other and not same:
                result[j : j + chunk, i : i + chunk] = block.mT.cpu().numpy()
    return result


def _gradients(entry: Entry, names: Sequence[str], wanted_B: Tensor) -> dict[str, Tensor]:
    """Per-example gradients of some examples as rows, by parameter."""
    part = of_examples(entry, wanted_B)
    instances = matrix_instances(part) if isinstance(part, MatrixEntry) else {n: part.instance(n) for n in names}
    return {name: widened(instances[name]).unsqueeze(1).flatten(1) for name in names}


def _visit(
    workload: Workload,
    settings: TrainSettings | None,
    instants: Sequence[int],
    sites: tuple[Site, ...],
    take: Callable[[int, Mapping[str, Any]], None],
) -> None:
    """Call ``take`` with the weights at every instant of an all-layer training."""
    if settings is None or workload.data is None:
        raise GroupSearchError(
            f"Expected data and settings to train by up to step {instants[-1]}, found none in {workload.name!r}. Take "
            f"the Grams at step 0 alone, or give data and settings."
        )
    training: list[nn.Module] = []

    def build(seed: int = 0) -> nn.Module:
        training.append(workload.build(seed))
        if 0 in instants:
            take(0, training[0].state_dict())
        return training[0]

    def on_step(step: int, _: CurvePoint | None) -> None:
        if step in instants:
            take(step, training[0].state_dict())

    noise_multiplier = settings.noise_multiplier_for(workload.data.train_size)
    shorter = replace(settings, steps=instants[-1], noise_multiplier=noise_multiplier, epsilon=None, evaluate_every=0)
    train(replace(workload, build=build), Grouping((), sites), shorter, on_step)


def _draw(workload: Workload, examples: int, batches: int, seed: int) -> list[Any]:
    """Batches of ``examples`` random training examples; no example is in two of them while there are others."""
    if workload.data is None:
        together, order = workload.make_batch(examples * batches), torch.arange(examples * batches)
    else:
        together, size = dict(workload.data.train), workload.data.train_size
        if size < examples:
            raise GroupSearchError(
                f"Expected as many examples as a batch takes, {examples}, found {size} training examples. Take fewer."
            )
        # Round and round one order: as many in a row as there are examples are all different.
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).repeat(
            -(-examples * batches // size)
        )
    return [_taken(together, part) for part in order[: examples * batches].split(examples)]


def _taken(examples: Any, numbers: Tensor) -> Any:
    return tree_map(lambda x: x[numbers] if isinstance(x, Tensor) else x, examples)


def _on(device: torch.device, batch: Any) -> Any:
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
