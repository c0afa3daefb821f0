"""make_private: differentially private steps in a training loop that stays as it is."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from groupsearch.clipping import ClipPlan
from groupsearch.engine.arrival import Arrival
from groupsearch.engine.book import Book, Groups
from groupsearch.engine.capture import Capture
from groupsearch.engine.mechanism import Mechanism
from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.options import EngineOptions

REDUCTIONS = ("mean", "sum")


class PrivateEngine:
    """What :func:`make_private` attached to a model and its optimizer.

    Attributes:
        plan: the clip plan.
        noise_multiplier: sigma; noise of standard deviation sigma * plan.sensitivity is added
            to the clipped sum once per ``optimizer.step()``.
        expected_batch_size: what the noisy sum is divided by.
        mechanism: clips and adds noise.
        steps: optimizer steps taken with the engine.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        plan: ClipPlan,
        noise_multiplier: float,
        expected_batch_size: float,
        loss_reduction: str,
        options: EngineOptions,
        generator: torch.Generator | None,
    ) -> None:
        self.plan = plan
        self.noise_multiplier = noise_multiplier
        self.mechanism = Mechanism(plan, noise_multiplier, generator)
        self.expected_batch_size = expected_batch_size
        self.steps = 0
        self._model = model
        self._reduction = loss_reduction
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._given: dict[str, weakref.ref[Tensor]] = {}  # weak: zero_grad must be able to free them
        self._groups = Groups(plan.grouping.sites, plan.grouping.group_of, plan.grouping.groups)
        self._book = Book(self.mechanism.clip)
        self._capture = Capture(model, self._receive, options)
        self._capture.on_pass = self._end_pass
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def norms(self) -> Tensor:
        """Per-example gradient norms of the last backward pass before clipping, (B, M)."""
        return torch.stack([self._book.norms[m] for m in sorted(self._book.norms)], dim=1)

    def clipped_sums(self) -> dict[str, Tensor]:
        """The clipped sums of the logical batch so far, without noise, by parameter name."""
        self._end_pass()
        return {name: self._book.sums.get(name, torch.zeros_like(p)) for name, p in self._parameters.items()}

    def detach(self) -> None:
        """Take the engine away; model and optimizer are as they were."""
        self._capture.remove()
        for handle in self._handles:
            handle.remove()
        self._book.abandon()

    def _receive(self, arrival: Arrival) -> None:
        current = arrival.source_pass
        if current.arrivals == 1:
            self._groups.begin()
            self._book.norms.clear()
        group, last = self._groups.arrive(arrival.key)
        self._book.enter(group, arrival.make_entry())
        if last:
            self._book.close(group, self._scale(current.batch_size))

    def _scale(self, batch_size: int) -> float:
        return float(batch_size) if self._reduction == "mean" else 1.0

    def _end_pass(self) -> None:
        """Close what a finished backward left open: groups with a layer that took no part in the loss.

        A backward that raised half-way leaves nothing behind: its logical batch starts again.
        """
        current = self._capture.current
        if current is None or current.finished or not current.arrivals:
            return
        if current.in_backward:
            self._book.abandon()
        for group in self._book.open_groups:
            self._book.close(group, self._scale(current.batch_size))
        current.finished = True

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(x is not None for x in (*args[1:], *kwargs.values())):
            raise GroupSearchError(
                "optimizer.step was given a closure, which would run backward after the gradient was made private. "
                "Call backward before step, and step without a closure."
            )
        check_covered(self._model, self.plan, optimizer)  # nothing may have been unfrozen or added since
        self._end_pass()
        for name, parameter in self._parameters.items():
            given = self._given.get(name, lambda: None)()
            if parameter.grad is not None and parameter.grad is not given:
                raise UnsupportedModelError(
                    f"Parameter {name!r} holds a gradient that the engine did not make. Let only the engine write "
                    "gradients: no second backward, no other hook that fills .grad."
                )
            total = self._book.sums.pop(name, None)
            total = torch.zeros_like(parameter) if total is None else total.to(parameter.dtype)
            self.mechanism.add_noise_(name, total)
            parameter.grad = total.div_(self.expected_batch_size)
            self._given[name] = weakref.ref(parameter.grad)
        self.mechanism.end_step()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    plan: ClipPlan,
    *,
    noise_multiplier: float,
    expected_batch_size: float,
    loss_reduction: str = "mean",
    options: EngineOptions | None = None,
    generator: torch.Generator | None = None,
) -> PrivateEngine:
    """Make the steps of an existing loop differentially private (Book-Keeping with groups).

    ``loss.backward()`` and ``optimizer.step()`` stay as they are. Backward forms the clipped
    sums of every group of the plan in one pass (arXiv 2210.00038, 2310.19215); step adds
    Gaussian noise once, divides by ``expected_batch_size`` and hands the result to the
    optimizer as ``.grad``. Several backward passes before a step add up (micro-batches); a
    step without a backward is the step of an empty batch: noise alone.

    Args:
        model: the model; every trainable parameter must be covered by the plan's sites.
        optimizer: holds exactly the model's trainable parameters.
        plan: groups, thresholds and clip rule, made from a trace of this model.
        noise_multiplier: sigma >= 0, relative to ``plan.sensitivity``.
        expected_batch_size: sampling rate times data set size, > 0; never the batch's own size.
        loss_reduction: "mean" when the loss is the mean of per-example losses over the
            micro-batch, "sum" when it is their sum.
        options: choices of cost only.
        generator: draws the noise; by default one seeded from the operating system.

    Returns:
        The engine. ``engine.detach()`` takes it away again.

    Raises:
        UnsupportedModelError: for a layer that mixes examples, or a trainable parameter that no
            site of the plan covers or that the optimizer does not hold.
        GroupSearchError: for a number outside its range.
    """
    if loss_reduction not in REDUCTIONS:
        raise GroupSearchError(
            f"Expected loss_reduction to be one of {', '.join(REDUCTIONS)}, found {loss_reduction!r}."
        )
    if not (0 <= noise_multiplier < math.inf and 0 < expected_batch_size < math.inf):
        raise GroupSearchError(
            f"Expected finite noise_multiplier >= 0 and expected_batch_size > 0, found {noise_multiplier} and "
            f"{expected_batch_size}."
        )
    check_covered(model, plan, optimizer)
    if generator is None:
        generator = torch.Generator(next(p.device for p in model.parameters() if p.requires_grad))
        generator.seed()
    return PrivateEngine(
        model,
        optimizer,
        plan,
        noise_multiplier,
        expected_batch_size,
        loss_reduction,
        options or EngineOptions(),
        generator,
    )


def check_covered(model: nn.Module, plan: ClipPlan, optimizer: Optimizer) -> None:
    """Check that what the model trains, what the plan covers and what the optimizer holds are the same parameters.

    Raises:
        UnsupportedModelError: naming those that are not in all three.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _check_plan(trainable, plan)
    _check_optimizer(trainable, optimizer)


def _check_plan(trainable: Mapping[str, Tensor], plan: ClipPlan) -> None:
    covered = {name for site in plan.grouping.sites for name in site.parameters}
    missing, unknown = sorted(trainable.keys() - covered), sorted(covered - trainable.keys())
    if missing:
        raise UnsupportedModelError(
            f"Trainable parameters without a site in the plan: {', '.join(missing)}. They took no part in the traced "
            "step. Freeze them with requires_grad_(False), or trace the model as it is trained."
        )
    if unknown:
        raise UnsupportedModelError(
            f"The plan covers parameters that this model does not train: {', '.join(unknown)}. Trace this model, with "
            "the same parameters frozen, and make the plan from that trace."
        )


def _check_optimizer(trainable: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    names = {id(p): name for name, p in trainable.items()}
    if missing := sorted(name for i, name in names.items() if i not in held):
        raise UnsupportedModelError(
            f"Trainable parameters that the optimizer does not hold: {', '.join(missing)}. Give them to the optimizer, "
            "or freeze them with requires_grad_(False)."
        )
    if len(held - names.keys()):
        raise UnsupportedModelError(
            f"The optimizer holds {len(held - names.keys())} trainable parameters that are not the model's: they would "
            "be updated without privacy. Give it model.parameters() only."
        )
