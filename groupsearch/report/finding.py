"""What grouping buys for one traced step, in words: what sets the peak, the floor, and what would lower it.

Every remedy is named for a part of the memory that is alive at that moment in this trace, with its
bytes; nothing is advised that the trace does not hold.
Apart from the page, as jobs store these sentences and need no page.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

from groupsearch.documents.rows import Bound, Communication, Joint
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import PeakEstimate, lifetimes, peak_memory, timeline
from groupsearch.plan.partition import floor_bytes, front
from groupsearch.plan.trace import Trace
from groupsearch.units import format_bytes, format_percent, format_ratio, format_seconds

NEAR_FLOOR = 1.01
WORTH_NAMING = 0.1
A_FEW = 4
_MOMENTS = {
    "forward and loss": "in the forward pass and the loss",
    "optimizer step": "in the optimizer's step",
    "norm of": "in the norm of",
    "close at": "at the close of the group that ends at",
    "after": "in the backward pass below",
}
_OUTSIDE = {
    "forward and loss": "before any group holds anything",
    "optimizer step": "after every group is closed",
}
_LOGIT_BYTES = 4  # losses are taken in float32
_LOGIT_COPIES = 8  # logits, as they came and in float32, their logarithms, gradients of each; with some headroom


class Part(NamedTuple):
    """Some of what is alive at a peak.

    Attributes:
        name: what it is.
        size_bytes: its bytes; the parts of a peak sum to it.
        remedy: what makes it smaller without touching the grouping; empty where nothing is known to.
    """

    name: str
    size_bytes: int
    remedy: str = ""


def finding(trace: Trace) -> str:
    """What matters in one sentence, and in a second one what the peak that is left consists of and what would lower it.

    The first says what sets the peak, the floor, and the fewest groups within 1 % of it, or that
    grouping saves nothing and why. The second is about the peak of those fewest groups: parts of a
    tenth of it or more, largest first, each with its bytes and remedy.
    """
    few = _fewest(trace)
    left = peak_memory(trace, few)
    return f"{_first(trace, left, len(few) + 1)} {_second(trace, few, left)}"


def joint_finding(trace: Trace, joint: Joint) -> str:
    """What a joint choice of grouping and norm methods gives, and :func:`finding`'s second sentence about its peak.

    Args:
        trace: of the step with the methods chosen.
        joint: the document's part ``joint``.
    """
    peak = peak_memory(trace, joint.boundaries)
    return f"{joint_sentence(trace, joint)} {_second(trace, joint.boundaries, peak)}"


def joint_sentence(trace: Trace, joint: Joint) -> str:
    """How many weights go by each method in how many groups, what that takes against ``mixed``, and how exact it is."""
    mixed = next(row for row in joint.compared if row.norm_method == "mixed")
    chosen = " and ".join(f"{count} by {method}" for method, count in joint.weights.items())
    budget = joint.budget_bytes
    aim = "the least peak" if budget is None else f"the fewest operations within {format_bytes(budget)}"
    groups = f"{joint.groups} group{'' if joint.groups == 1 else 's'}"
    return (
        f"Norms and grouping chosen together for {aim}: {groups}, norms of weights {chosen or 'none'}, peak at "
        f"{_told(trace, joint.peak_bytes)}, with {_times(joint.operations, mixed.operations)} the operations "
        f"of mixed, which needs {format_bytes(mixed.all_layer_bytes)} all-layer and "
        f"{format_bytes(mixed.floor_bytes)} at the least; {_exactness(joint.bound)}."
    )


def communication_sentence(found: Communication) -> str:
    """What the best grouping hides of the communication, against all-layer clipping where that is among them."""
    best = min(found.rows, key=lambda row: (row.step_seconds, row.groups))
    said = (
        f"On {found.processes} processes each sends {format_bytes(found.sent_bytes)} a step, which takes "
        f"{format_seconds(best.link_seconds)} with {best.grouping}, of which backward hides "
        f"{format_percent(best.hidden, 0)}: a step of {format_seconds(best.step_seconds)}, "
        f"{format_seconds(found.alone_seconds)} of it without communication"
    )
    whole = next((row for row in found.rows if row.groups == 1), None)
    if whole is None or whole is best:
        return f"{said}."
    return f"{said}; all-layer clipping, which sends all at the end of backward, {format_seconds(whole.step_seconds)}."


def _times(operations: float, of_mixed: float) -> str:
    return format_ratio(operations / of_mixed) if of_mixed else "none of"


def _exactness(bound: Bound) -> str:
    what = "bytes" if bound.of == "peak_bytes" else "operations"
    if bound.gap == 0:
        return f"no choice takes fewer {what}" + (" within it" if what == "operations" else "")
    if bound.gap is None or not math.isfinite(bound.gap):
        return f"how few {what} might do is not known"
    return f"at most {format_percent(bound.gap, 2)} more {what} than the best choice may take"


def parts(trace: Trace, peak: PeakEstimate) -> list[Part]:
    """What is alive at a peak of the trace, largest first; the sizes sum to ``peak.peak_bytes``."""
    alive = peak.breakdown
    loss = min(_loss_bytes(trace, peak), alive.activations)
    blocks = _block_bytes(trace, peak.site)
    in_blocks = min(sum(blocks), alive.activations - loss)
    found = [
        Part("weights, buffers and the batch", alive.weights + alive.buffers + alive.batch),
        Part("optimizer state", alive.optimizer, "an optimizer that keeps less"),
        Part("clipped sums, one number for each that is trained", alive.sums),
        Part("the open group's book", alive.book, "smaller groups there"),
        _head_part(trace, loss),
        _blocks_part(trace, in_blocks, blocks),
        Part("activations outside repeated blocks", alive.activations - loss - in_blocks),
        Part("workspaces of the device's libraries", trace.static.workspaces),
        Part(_passing(trace, peak), alive.transients - trace.static.workspaces),
    ]
    return sorted(found, key=lambda part: -part.size_bytes)


def growing_share(trace: Trace, peak: PeakEstimate) -> float:
    """How much of a peak grows with the number of examples in the batch, of 1."""
    alive = peak.breakdown
    passing = 0 if peak.where == "optimizer step" else alive.transients - trace.static.workspaces + alive.book
    return (alive.activations + alive.batch + passing) / peak.peak_bytes


def _first(trace: Trace, left: PeakEstimate, groups: int) -> str:
    whole = peak_memory(trace, Grouping.all_layer(trace))
    if groups == 1:
        place = _OUTSIDE.get(whole.where) or f"where the book holds {format_bytes(whole.breakdown.book)}"
        return (
            f"Grouping saves nothing here: all-layer peaks at {_told(trace, whole.peak_bytes)}, within 1 % of the "
            f"floor of any grouping, {_moment(whole)}, {place}."
        )
    layers = peak_memory(trace, Grouping.layer_wise(trace))
    book = format_bytes(whole.breakdown.book)
    already = f", {A_FEW} already {_told(trace, front(trace, A_FEW)[-1][1])}" if groups > A_FEW else ""
    return (
        f"{groups} groups need {_told(trace, left.peak_bytes)}, within 1 % of the floor of any grouping{already}; "
        f"all-layer needs {_told(trace, whole.peak_bytes)}, {book} of it book at its peak "
        f"{_moment(whole)}; layer-wise ({len(trace.layer_boundaries) + 1} groups) {_told(trace, layers.peak_bytes)}."
    )


def _second(trace: Trace, cuts: tuple[int, ...], left: PeakEstimate) -> str:
    named = [part for part in parts(trace, left) if part.size_bytes >= WORTH_NAMING * left.peak_bytes]
    listed = "; ".join(f"{format_bytes(p.size_bytes)} {p.name}{f' ({p.remedy})' if p.remedy else ''}" for p in named)
    share = growing_share(trace, left)
    grows = (
        f"{format_percent(share, 0)} of it grow with the batch" if share >= WORTH_NAMING else "the batch is no lever"
    )
    return f"What is left peaks {_moment(left)}: {listed}; {grows}.{_before_the_step(trace, cuts, left)}"


def _before_the_step(trace: Trace, cuts: tuple[int, ...], left: PeakEstimate) -> str:
    if left.where != "optimizer step":
        return ""
    site, live_bytes = max(timeline(trace, cuts)[:-1], key=lambda moment: moment[1])
    where = f"in the backward pass at {trace.sites[site].name}" if site >= 0 else "in the forward pass and the loss"
    return f" Before that step the most is {format_bytes(live_bytes)}, {where}."


def _fewest(trace: Trace) -> tuple[int, ...]:
    floor = floor_bytes(trace)
    return next(cuts for cuts, peak_bytes in front(trace) if peak_bytes <= NEAR_FLOOR * floor)


def _told(trace: Trace, size_bytes: int) -> str:
    ratio = format_ratio(size_bytes / trace.nonprivate_peak_bytes)
    return f"{format_bytes(size_bytes)} ({ratio} of non-private training)"


def _moment(peak: PeakEstimate) -> str:
    for kind, words in _MOMENTS.items():
        if peak.where.startswith(kind):
            return f"{words} {peak.where.removeprefix(kind).strip()}".rstrip()
    raise ValueError(f"Expected a moment of a step, found {peak.where!r}.")


def _passing(trace: Trace, peak: PeakEstimate) -> str:
    if peak.where == "optimizer step":
        return "noise and the optimizer's own tensors"
    if trace.settings.get("checkpoint", "none") != "none":
        return "gradients, recomputed activations and norms in the making"
    return "gradients and norms in the making"


def _head_part(trace: Trace, loss_bytes: int) -> Part:
    head = trace.sites[-1]
    logits_bytes = _LOGIT_BYTES * trace.batch_size * head.positions * head.outputs
    if head.block != head.layer:  # the last that is trained lies in a repeated block, as adapters do
        name = f"what lies above {head.name}, the last that is trained: frozen layers, their outputs and the loss"
        return Part(name, loss_bytes, "a loss taken in chunks where these are logits of a vocabulary")
    if logits_bytes <= loss_bytes <= _LOGIT_COPIES * logits_bytes:
        name = f"logits of {head.name} and what the loss makes of them"
        return Part(name, loss_bytes, "a loss taken in chunks, a smaller head")
    return Part(f"tensors of the forward pass that are gone when backward has left {head.name}", loss_bytes)


def _blocks_part(trace: Trace, in_blocks: int, blocks: list[int]) -> Part:
    remedy = ""
    if trace.settings.get("checkpoint", "none") not in ("blocks", "every:1") and len(blocks) > 1:
        remedy = f"--checkpoint blocks keeps their inputs and one block's {format_bytes(max(blocks))} at a time"
    return Part(f"activations of {len(blocks)} blocks", in_blocks, remedy)


def _loss_bytes(trace: Trace, peak: PeakEstimate) -> int:
    """Of the activations at a peak up to the last site's hook those that backward has let go of after it."""
    if peak.where != "forward and loss" and peak.site != trace.length - 1:
        return 0
    after = trace.instants[lifetimes(trace).hook_at[-2] if trace.length > 1 else -1].forward_bytes
    return max(0, peak.breakdown.activations - after)


def _block_bytes(trace: Trace, site: int) -> list[int]:
    """For each repeated block that backward has yet to reach at a site (-1: all), what it lets go of on its way.

    A block whose sites are not all in a row (a decoder's, between those of an encoder) is one block.
    """
    hook_at, held = lifetimes(trace).hook_at, [i.forward_bytes for i in trace.instants]
    found: Counter[str] = Counter()
    for low, end in pairwise((0, *trace.block_boundaries, trace.length)):
        name = trace.sites[low].block
        if name != trace.sites[low].layer and (site < 0 or end <= site):
            found[name] += max(0, held[hook_at[end - 1]] - (held[hook_at[low - 1]] if low else held[-1]))
    return list(found.values())
