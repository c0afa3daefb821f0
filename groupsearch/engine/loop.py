"""PrivateEngine: the engine as the training loop sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from groupsearch.clipping import ClipPlan
from groupsearch.engine.book import Groups
from groupsearch.engine.capture import Capture
from groupsearch.engine.ledger import Ledger
from groupsearch.engine.loading import PoissonBatches
from groupsearch.engine.mechanism import Mechanism
from groupsearch.engine.noise import added_delta
from groupsearch.engine.scaling import LossScale
from groupsearch.engine.state import VERSION, check_state, describe_plan
from groupsearch.engine.step import PrivateStep, nothing_yet
from groupsearch.engine.zeroing import ZeroGrad
from groupsearch.errors import GroupSearchError
from groupsearch.options import EngineOptions

if TYPE_CHECKING:
    from groupsearch.engine.accounting import Accountant


@dataclass(frozen=True)
class LoopSettings:
    """What the engine must know of the loop, as :func:`~groupsearch.engine.private.make_private` explains it."""

    expected_batch_size: float
    loss_reduction: str = "mean"
    sampling_rate: float | None = None
    batches: PoissonBatches | None = None
    grad_scaler: GradScaler | None = None
    options: EngineOptions = field(default_factory=EngineOptions)


class PrivateEngine:
    """What :func:`~groupsearch.engine.private.make_private` attached to a model and its optimizer.

    A logical batch is all that is backpropagated between two steps; every example may be in it once.
    It is given up, and what was summed of it is dropped,

    * by ``zero_grad`` of the optimizer or the model;
    * after a backward pass that raised: all micro-batches before the accident are dropped with it,
      whatever they summed. Those that follow count, so take the batch again from its beginning. (A
      forward pass that raised adds nothing and drops nothing.) Whether an accident happens is not
      covered by the guarantee: let it not depend on the data.

    Attributes:
        plan: the clip plan.
        mechanism: clips and adds noise.
        settings: what was said of the loop.
        accountant: counts the steps; None where no sampling rate was given.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        mechanism: Mechanism,
        settings: LoopSettings,
        accountant: Accountant | None = None,
    ) -> None:
        self.plan: ClipPlan = mechanism.plan
        self.mechanism = mechanism
        self.settings = settings
        self.accountant = accountant
        grouping = self.plan.grouping
        groups = Groups(grouping.sites, grouping.group_of, grouping.groups)
        layouts = {site.layer: site.layout for site in grouping.sites if site.layout != "first"}
        self._ledger = Ledger(
            groups, mechanism.clip, self._scale_of, lambda: self._capture.passes.current, mechanism.abandon
        )
        self._capture = Capture(model, self._ledger.receive, settings.options, layouts)
        self._capture.passes.on_begin = self._settle
        self._loss_scale = LossScale(optimizer, settings.grad_scaler)
        self._step = PrivateStep(
            model, optimizer, mechanism, self._ledger, settings.expected_batch_size, self._loss_scale, self._settle
        )
        if settings.batches is not None:
            self._step.on_check = settings.batches.check_step
        if accountant is not None:
            self._step.on_release = accountant.step
        self._zero_grads = [ZeroGrad(owner, self._discard) for owner in (optimizer, model)]

    @property
    def steps(self) -> int:
        """Noisy gradients handed to the optimizer so far."""
        return self._step.count

    @property
    def noise_multiplier(self) -> float:
        """Sigma of the whole release of a step."""
        return self.mechanism.noise_multiplier

    @property
    def expected_batch_size(self) -> float:
        """What the noisy sum is divided by."""
        return self.settings.expected_batch_size

    @property
    def norms(self) -> Tensor:
        """Gradient norms before clipping, (B, M), of the last forward pass that backward has reached.

        Infinite where an example's gradient was not finite; such an example adds nothing to the group's sum.
        """
        norms = self._ledger.norms
        return torch.stack([norms[m] for m in sorted(norms)], dim=1)

    def clipped_sums(self) -> dict[str, Tensor]:
        """The clipped sums of the logical batch so far, without noise, by parameter name; not private."""
        self._settle()
        return {name: self._ledger.sums.get(name, nothing_yet(p)) for name, p in self._step.parameters.items()}

    def same_examples(self) -> AbstractContextManager[None]:
        """Inside ``with``: several forward passes before one backward, row i of each being the same example.

        An example's gradient is that of all passes together, clipped once, as in a contrastive loss.
        The plan must come from a trace of a loss that makes as many passes. Rows that are not the same example
        void the guarantee.
        """
        return self._with_passes("same")

    def different_examples(self) -> AbstractContextManager[None]:
        """Inside ``with``: several forward passes before one backward, no example being in two of them.

        Every pass is clipped by itself, as micro-batches are. An example that is in two passes voids the guarantee.
        """
        return self._with_passes("different")

    @contextmanager
    def _with_passes(self, passes: str) -> Iterator[None]:
        self._settle()
        before, self._capture.passes.policy = self._capture.passes.policy, passes
        self._capture.passes.current = (
            None  # a forward pass from before, perhaps of other examples, is not gone on with
        )
        try:
            yield
        finally:
            self._capture.passes.policy = before

    def epsilon(self, delta: float) -> float:
        """Epsilon at ``delta`` of all steps so far, by the accountant.

        Raises:
            GroupSearchError: when the engine has no accountant.
        """
        if self.accountant is None:
            raise GroupSearchError(
                "Expected a sampling rate to account with, found none. Give make_private(..., sampling_rate=...): the "
                "probability with which each example enters a logical batch, under Poisson sampling."
            )
        return self.accountant.epsilon(delta)

    @property
    def added_delta(self) -> float:
        """What all steps so far add to delta because noise ends somewhere: no epsilon of any accountant has it.

        A bound, see :func:`groupsearch.engine.noise.added_delta`; infinite noise would add nothing, none adds 1.
        """
        if not self.steps:
            return 0.0
        if not self.noise_multiplier:
            return 1.0
        adaptive = 0 if self.plan.adaptive is None else self.plan.grouping.groups
        return added_delta(self._step.numbers + adaptive, self.noise_multiplier, self.steps)

    def state_dict(self, *, exact: bool = False) -> dict[str, Any]:
        """Steps, accountant and thresholds, for ``torch.save``; loads with ``weights_only=True``.

        Args:
            exact: whether to save the state of the noise's generator, too. With the states of the model, the
                optimizer, the batches (saved with ``exact``; and of a GradScaler and torch's own generators where
                they are used) a run that is resumed with ``exact`` goes on as if it had not stopped, bit for bit
                on the CPU. **Whoever reads such a state can take all noise away**, that of the steps before
                included: it is for experiments.

        Raises:
            GroupSearchError: in the middle of a logical batch, whose sums are not saved, or when the state of
                a secure stream is asked for, which has none.
        """
        self._check_between_steps("saved")
        return {
            "version": VERSION,
            **self._fixed(),
            "steps": self.steps,
            "mechanism": self.mechanism.state_dict(exact=exact),
            "accountant": None if self.accountant is None else self.accountant.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = False) -> None:
        """Go on where the engine that wrote the state stood, with fresh noise.

        The generator, also one that ``make_private`` was given, is filled anew from the operating system.

        Args:
            state: what :meth:`state_dict` returned.
            exact: whether to go on with the noise of the run that saved, bit for bit. **Epsilon holds for one
                continuation alone**: two with the same noise show by their difference what no noise hides.

        Raises:
            GroupSearchError: when the state is of another plan, noise, sampling rate or expected batch size,
                or in the middle of a logical batch, or holds no generator to go on with.
        """
        self._check_between_steps("loaded")
        check_state(state, self._fixed())
        self.mechanism.load_state_dict(state["mechanism"], exact=exact)
        if self.accountant is not None:
            self.accountant.load_state_dict(state["accountant"])
        self._step.count = int(state["steps"])

    def detach(self) -> None:
        """Take the engine away; model and optimizer are as they were."""
        self._capture.remove()
        self._step.remove()
        for zero_grad in self._zero_grads:
            zero_grad.remove()
        self._loss_scale.detach()
        self._ledger.abandon()
        self._ledger.norms = {}

    def _fixed(self) -> dict[str, Any]:
        return {
            "plan": describe_plan(self.plan),
            "noise_multiplier": float(self.noise_multiplier),
            "expected_batch_size": float(self.expected_batch_size),
            "sampling_rate": self.settings.sampling_rate,
        }

    def _check_between_steps(self, what: str) -> None:
        self._settle()
        if not self._ledger.empty:
            raise GroupSearchError(
                f"The engine's state cannot be {what} in the middle of a logical batch: its clipped sums are no part "
                "of it. Do it after optimizer.step(), or give the batch up with optimizer.zero_grad()."
            )

    def _scale_of(self, batch_size: int) -> float:
        return (batch_size if self.settings.loss_reduction == "mean" else 1.0) / self._loss_scale.value()

    def _settle(self) -> None:
        self._ledger.settle(self._capture.passes.open)

    def _discard(self) -> None:
        self._settle()
        self._ledger.abandon()
