"""How far what the engine booked may be from the truth, and where it is further.

Allowed is a part of the example's own gradient of the parameter, a tenth of that part of its whole
gradient, and a thousandth of it of the largest example's: rounding in what adds up to almost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groupsearch.engine.truth.gradients import Booked, Gradient
from groupsearch.engine.widening import HALF

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 5e-2
_LONGER = 0.1  # norms are rounded up, the more the more of them cancels


@dataclass(frozen=True)
class Difference:
    """Where the engine and the truth are further apart than is allowed.

    Attributes:
        what: ``loss``, ``gradient``, ``norm`` or ``sum``.
        parameter: whose gradient it is; empty for a loss.
        layer: that uses it.
        example: number of the example in the batch; None for a sum.
        found: size of the difference, relative to the truth.
        engine: what was found.  truth: what was expected; norms, or losses.
    """

    what: str
    parameter: str
    layer: str
    example: int | None
    found: float
    engine: float
    truth: float


def tolerance_of(model: nn.Module) -> float:
    """The part of an example's gradient that rounding may take, by the least precise dtype of the weights."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() or p.is_complex()}
    if dtypes & set(HALF):
        return _HALF_TOLERANCE
    wide = {torch.complex64: torch.float32, torch.complex128: torch.float64}
    return max((TOLERANCES.get(wide.get(d, d), _HALF_TOLERANCE) for d in dtypes), default=TOLERANCES[torch.float32])


@dataclass(frozen=True)
class Truth:
    """An example alone: its loss and its gradient."""

    loss: float
    gradient: Gradient


def compare_losses(losses: Tensor, truths: Mapping[int, Truth], tolerance: float) -> Difference | None:
    """The first loss of a batch that is not the example's own."""
    scale = max((abs(t.loss) for t in truths.values()), default=0.0)
    for i, truth in truths.items():
        found = float(losses[i])
        if not abs(found - truth.loss) <= tolerance * (abs(truth.loss) + 0.1 * scale) + 1e-30:
            return Difference(
                "loss", "", "", i, abs(found - truth.loss) / max(abs(truth.loss), 1e-30), found, truth.loss
            )
    return None


def compare(booked: Booked, truths: Mapping[int, Truth], tolerance: float) -> tuple[float, Difference | None]:
    """The largest difference of an example's gradient, and the worst of those that are not allowed.

    Args:
        booked: what the engine booked.
        truths: of the examples that were asked for, by their number in the batch.
        tolerance: see :func:`tolerance_of`.
    """
    largest = max((t.gradient.total() for t in truths.values()), default=0.0)
    worst, faults = 0.0, []
    for place, (i, truth) in enumerate(sorted(truths.items())):
        total = truth.gradient.total()
        floor = tolerance * (0.1 * total + 0.001 * largest) + 1e-30
        apart = _apart(booked.examples[i], truth.gradient)
        if total:
            worst = max(worst, sum(x * x for x in apart.values()) ** 0.5 / max(total, 0.01 * largest))
        for name, distance in apart.items():
            own = truth.gradient.size(name)
            if not distance <= tolerance * own + floor:
                faults.append(_fault("gradient", booked, name, i, distance, total, booked.examples[i].size(name), own))
        faults += _norm_faults(booked, truth.gradient, (place, i), tolerance, floor)
    if booked.together.signatures:
        faults += sum_faults(booked, [t.gradient for t in truths.values()], tolerance)
    return worst, max(faults, key=lambda fault: fault.found, default=None)


def _norm_faults(
    booked: Booked, truth: Gradient, example: tuple[int, int], tolerance: float, floor: float
) -> list[Difference]:
    faults = []
    place, number = example
    for names, sqnorm_B in booked.sqnorms.items():
        if not all(truth.is_exact(name) for name in names):
            continue
        own = sum(truth.size(name) ** 2 for name in names) ** 0.5
        found = max(float(sqnorm_B[place]), 0.0) ** 0.5
        if not own - tolerance * own - floor <= found <= own * (1 + _LONGER + tolerance) + 10 * floor:
            name = min(names)
            faults.append(_fault("norm", booked, name, number, abs(found - own), truth.total(), found, own))
    return faults


def sum_faults(booked: Booked, truths: Sequence[Gradient], tolerance: float) -> list[Difference]:
    """Where the sum over a batch is not that of the examples' own gradients."""
    faults = []
    wanted: dict[str, Tensor] = {}
    for truth in truths:
        for name, sketch in truth.signatures.items():
            wanted[name] = wanted[name] + sketch if name in wanted else sketch
    added = sum(t.total() for t in truths)
    for name in sorted(wanted.keys() | booked.together.signatures.keys()):
        own = sum(t.size(name) for t in truths)
        zero = torch.zeros((), device=next(iter(wanted.values())).device)
        got, want = booked.together.signatures.get(name, zero), wanted.get(name, zero)
        distance = float(torch.linalg.vector_norm(got - want))
        if not distance <= tolerance * (own + 0.1 * added) + 1e-30:
            sizes = (float(torch.linalg.vector_norm(x)) for x in (got, want))
            faults.append(_fault("sum", booked, name, None, distance, added, *sizes))
    return faults


def _apart(one: Gradient, other: Gradient) -> dict[str, float]:
    """Estimated norm of the difference, by parameter."""
    found = {}
    for name in one.signatures.keys() | other.signatures.keys():
        a, b = one.signatures.get(name), other.signatures.get(name)
        difference = a if b is None else b if a is None else a - b
        assert difference is not None
        found[name] = float(torch.linalg.vector_norm(difference))
    return found


def _fault(  # noqa: PLR0913 - the numbers of one sentence
    what: str,
    booked: Booked,
    name: str,
    example: int | None,
    distance: float,
    total: float,
    engine: float,
    truth: float,
) -> Difference:
    found = distance / max(total, 1e-30) if distance == distance else float("inf")
    return Difference(what, name, booked.places.get(name, name.rpartition(".")[0]), example, found, engine, truth)
