"""What tables of hostile inputs are made of: a model, a batch, a loss, and what is right of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import groupsearch as gs
from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.trace import Trace

EXACT = "exact"
Loss = Callable[[Any, Any], Tensor]
Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Input:
    """A model with batch and loss, and what is right of it.

    Attributes:
        name: of the test.
        make: builds the model; the seed is set before.
        batch: of examples.
        loss: one value per example.
        refusal: a pattern of the true reason for a refusal; "" where a refusal is wrong.
        exact: whether sums that are those of plain autograd are right; otherwise only the refusal is.
        take: some examples of the batch; by default everything that has a first dimension is cut.
        tolerance: relative.
        plain: the model that the truth is computed of; ``make`` by default.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Any
    loss: Loss
    refusal: str = ""
    exact: bool = True
    take: Callable[[Any, Any], Any] | None = None
    tolerance: float = 1e-7
    plain: Callable[[], nn.Module] | None = None

    def taken(self, which: Any) -> Any:
        """Some examples."""
        return (self.take or cut)(self.batch, which)


def refused(name: str, make: Callable[[], nn.Module], batch: Any, loss: Loss, reason: str, **more: Any) -> Input:
    """An input that must be refused, for a reason."""
    return Input(name, make, batch, loss, reason, exact=False, **more)


def either(name: str, make: Callable[[], nn.Module], batch: Any, loss: Loss, reason: str, **more: Any) -> Input:
    """An input whose sums are exact, or that is refused for a true reason."""
    return Input(name, make, batch, loss, reason, **more)


def inputs(cases: list[Input]) -> pytest.MarkDecorator:
    """One test per input."""
    assert len({case.name for case in cases}) == len(cases)
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def cut(batch: Any, which: Any) -> Any:
    """Some examples of every tensor of a batch."""
    return pytree.tree_map_only(Tensor, lambda x: x[which] if x.dim() else x, batch)


def cross_entropy(model: Any, batch: Any) -> Tensor:
    """Of ``model(x)`` against ``y``."""
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """The model, the same whenever it is made, in training mode."""
    torch.manual_seed(3)
    return make().train()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def per_example(case: Input) -> list[Sums]:
    """The gradient of every example alone, by plain autograd."""
    result = []
    for index in range(count(case)):
        model = built(case.plain or case.make)
        torch.manual_seed(0)
        case.loss(model, case.taken(slice(index, index + 1))).sum().backward()
        result.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable(model).items()})
    return result


def count(case: Input) -> int:
    """B."""
    return len(case.loss(built(case.plain or case.make), case.batch))


def clipped(gradients: list[Sums], plan: ClipPlan) -> Sums:
    """Their sum, clipped by a plan whose groups share no parameter."""
    total = {name: torch.zeros_like(g) for name, g in gradients[0].items()}
    groups = [set[str]() for _ in range(plan.grouping.groups)]
    for index, site in enumerate(plan.grouping.sites):
        groups[plan.grouping.group_of(index)] |= set(site.parameters)
    for gradient in gradients:
        for names, threshold in zip(groups, plan.thresholds, strict=True):
            norm = length(gradient[name] for name in names)
            for name in names:
                total[name] += min(1.0, threshold / norm if norm else 1.0) * gradient[name]
    return total


def length(tensors: Any) -> float:
    """The norm of all of them together."""
    return sum(float(x.detach().abs().double().square().sum()) for x in tensors) ** 0.5


def off_by(found: Sums, expected: Sums) -> float:
    """The largest difference, relative to the largest number."""
    scale = max(float(x.abs().max()) for x in expected.values()) or 1.0
    return max(float((found[n] - expected[n]).abs().max()) for n in expected) / scale


def stepped(case: Input, trace: Trace, cuts: tuple[int, ...], threshold: float, which: Any) -> tuple[Sums, ClipPlan]:
    """What the optimizer saw of some examples, without noise, and the plan."""
    plan = ClipPlan(gs.Grouping(cuts, trace.sites), max_grad_norm=threshold)
    model = built(case.make)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
    gs.make_private(model, optimizer, plan, noise_multiplier=0.0, expected_batch_size=1)
    torch.manual_seed(0)
    case.loss(model, case.taken(which)).mean().backward()
    optimizer.step()
    return {name: p.grad.detach().clone() for name, p in trainable(model).items() if p.grad is not None}, plan


def layer_cuts(trace: Trace) -> tuple[int, ...]:
    """A cut between any two sites that share no parameter with the other side."""
    spans: dict[str, list[int]] = {}
    for index, site in enumerate(trace.sites):
        for name in site.parameters:
            spans.setdefault(name, []).append(index)
    return tuple(b for b in range(1, len(trace.sites)) if not any(span[0] < b <= span[-1] for span in spans.values()))


@contextmanager
def double() -> Iterator[None]:
    """float64 unless a model says otherwise, no warnings, generators left as they are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def assert_right(case: Input) -> None:
    """Exact, or refused for a true reason, as the input says; on the whole batch, all but one, and one alone."""
    said = refusal(case)
    if said is None:
        assert case.exact, f"accepted; expected a refusal that says {case.refusal!r}"
    else:
        assert case.refusal, f"refused, which is wrong: {said}"
        assert re.search(case.refusal, said), f"refused for another reason than {case.refusal!r}: {said}"


def refusal(case: Input) -> str | None:
    """What the engine says where it refuses; None where it does not, and then sums are compared."""
    try:
        with double():
            _assert_exact(case)
    except GroupSearchError as error:
        return str(error)
    return None


def _assert_exact(case: Input) -> None:
    trace = gs.trace_model(built(case.make), case.batch, case.loss)
    if not case.exact:
        for which in (slice(None), slice(1, None)):
            stepped(case, trace, (), 1.0, which)
        return
    gradients = per_example(case)
    threshold = sorted(length(g.values()) for g in gradients)[len(gradients) // 2]
    for cuts, which in (((), slice(None)), (layer_cuts(trace), slice(None)), ((), slice(1, None)), ((), slice(0, 1))):
        if not gradients[which]:
            continue
        found, plan = stepped(case, trace, cuts, threshold, which)
        worst = off_by(found, clipped(gradients[which], plan))
        assert worst <= case.tolerance, f"off by {worst:.1e} with {plan.grouping.groups} groups on examples {which}"


def numbers(*shape: int, seed: int = 0, classes: int = 3) -> Mapping[str, Tensor]:
    """A batch of float64 numbers and labels."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=draw, dtype=torch.float64)
    return {"x": x, "y": torch.randint(classes, (shape[0],), generator=draw)}
