"""make_private: the one call that makes an existing loop differentially private."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from groupsearch.clipping import ClipPlan
from groupsearch.engine.coverage import check_covered, check_optimizer_kind, check_plain
from groupsearch.engine.layout import Layouts
from groupsearch.engine.loading import PoissonBatches
from groupsearch.engine.loop import LoopSettings, PrivateEngine
from groupsearch.engine.mechanism import Mechanism
from groupsearch.engine.truth.check import check_before
from groupsearch.engine.truth.draws import alike
from groupsearch.engine.truth.gradients import Loss
from groupsearch.engine.truth.reading import Reading
from groupsearch.engine.truth.watch import RATE
from groupsearch.errors import GroupSearchError
from groupsearch.options import EngineOptions
from groupsearch.randomness import source_of
from groupsearch.trace import shared_parameters, weights_with_choice

REDUCTIONS = ("mean", "sum")
_SHOWN = 16


def make_private(  # noqa: PLR0913, PLR0915 - what a loop may say, by name, and its checks in order
    model: nn.Module,
    optimizer: Optimizer,
    plan: ClipPlan,
    *,
    noise_multiplier: float,
    batches: PoissonBatches | None = None,
    expected_batch_size: float | None = None,
    sampling_rate: float | None = None,
    sampling: str = "poisson",
    loss_reduction: str = "mean",
    loss_divisor: float | None = None,
    grad_scaler: GradScaler | None = None,
    options: EngineOptions | None = None,
    generator: torch.Generator | None = None,
    loss: Loss | None = None,
    sample: Any = None,
    watch: float = RATE,
    allow_state: Collection[str] = (),
    secure: bool = False,
) -> PrivateEngine:
    """Make the steps of an existing loop differentially private (Book-Keeping with groups).

    ``loss.backward()`` and ``optimizer.step()`` stay as they are. Backward forms the clipped
    sums of every group of the plan in one pass (arXiv 2210.00038, 2310.19215); step adds
    Gaussian noise once, divides by ``expected_batch_size`` and hands the result to the
    optimizer as ``.grad``. Several backward passes before a step add up (micro-batches); a
    step without a backward is the step of an empty batch: noise alone.

    Norms and sums are formed in float32 at least, also under autocast and for half-precision
    weights; noise is added before the one rounding to the parameter's dtype. An example whose
    gradient is not finite adds nothing.

    Args:
        model: the model; every trainable parameter must be covered by the plan's sites.
        optimizer: holds exactly the model's trainable parameters.
        plan: groups, thresholds and clip rule, made from a trace of this model.
        noise_multiplier: sigma >= 0; the noise of a parameter has sigma times ``plan.noise_scales`` as its
            deviation (``plan.sensitivity`` where noise is allocated globally), with the thresholds in force
            (``engine.mechanism.thresholds``).
        batches: what the loop iterates. The expected batch size and the sampling rate are then theirs,
            and a step that is not on exactly one whole logical batch is refused.
        expected_batch_size: sampling rate times data set size, > 0; never the batch's own size.
        sampling_rate: probability with which each example enters a logical batch (else the batch size over the
            number of examples); with it ``engine.epsilon(delta)`` tells what the steps so far cost.
        sampling: what the loop's own loader does: ``poisson``, ``shuffled`` or ``fixed-size``, each with an epsilon
            of its own (:mod:`groupsearch.engine.composition`). Batches that are visibly drawn otherwise are refused:
            see :class:`~groupsearch.privacy.sizes.SizesSeen`, also for what that may tell of private sizes.
        loss_reduction: "mean" when the loss is the mean of per-example losses over the
            micro-batch, "sum" when it is their sum.
        loss_divisor: what the loop divides that mean or sum by before backward, as libraries do that accumulate
            gradients: thresholds would act so many times as large. None where it divides by nothing, which
            is then held against what accelerate and transformers' Trainer say of themselves.
        grad_scaler: the ``torch.amp.GradScaler`` of a float16 loop, which stays as it is. No step
            is skipped: an overflow adds zero, and lowers the scale at ``update()``. The scale then
            depends on whether any example overflowed, which no noise hides, and so does the rounding of
            all others: the guarantee is strict for a scale that does not adapt
            (``scaler.update(scaler.get_scale())``), or with bfloat16, which needs none.
        options: choices of cost only.
        generator: draws the noise, for experiments alone: epsilon holds for nobody who knows its seed. By default
            one that the operating system's entropy fills, see :mod:`groupsearch.randomness`.
        loss: ``loss(model, batch)``, one loss per example (B,). With it the engine is held to plain autograd before
            the first step, on the model in the mode it is in (:mod:`groupsearch.engine.truth`): on the sample, or on
            the first examples of the batches' data. It costs about 25 examples' forward and backward passes.
        sample: a batch to check on, as ``loss`` takes it.
        watch: with ``loss`` and ``batches``, the part of physical batches that the watch in training looks at
            (:mod:`groupsearch.engine.truth.watch`); 0 for none. A difference refuses the step.
        allow_state: names of buffers and attributes that a forward pass may leave data in; they are not private.
        secure: draw the noise from a cipher, see :class:`groupsearch.randomness.SecureStream`.

    Returns:
        The engine. ``engine.detach()`` takes it away again; ``engine.report()`` says what was checked.

    Raises:
        UnsupportedModelError: for a layer that mixes examples, a wrapped model or an optimizer that
            cannot be served, or a trainable parameter that no site of the plan covers or that the optimizer
            does not hold; where the check finds that examples mix or the engine is not right.
        GroupSearchError: for a number outside its range, batches together with what they say, or a generator
            where the noise is to be secure.
    """
    if loss_reduction not in REDUCTIONS:
        raise GroupSearchError(
            f"Expected loss_reduction to be one of {', '.join(REDUCTIONS)}, found {loss_reduction!r}."
        )
    if loss_divisor is not None and not 0 < loss_divisor < math.inf:
        raise GroupSearchError(f"Expected a finite loss_divisor > 0, found {loss_divisor}.")
    if batches is not None:
        if sampling != "poisson":
            raise GroupSearchError(
                f"Found batches and also sampling={sampling!r}: PoissonBatches are Poisson samples. Leave one out."
            )
        if expected_batch_size is not None or sampling_rate is not None:
            raise GroupSearchError(
                "Found batches and also expected_batch_size or sampling_rate, which are the batches' own. Give either."
            )
        expected_batch_size, sampling_rate = batches.expected_batch_size, batches.sampling_rate
    if expected_batch_size is None:
        raise GroupSearchError("Expected batches or an expected_batch_size, found neither. Give one of the two.")
    if not (0 <= noise_multiplier < math.inf and 0 < expected_batch_size < math.inf):
        raise GroupSearchError(
            f"Expected finite noise_multiplier >= 0 and expected_batch_size > 0, found {noise_multiplier} and "
            f"{expected_batch_size}."
        )
    options = options or EngineOptions()
    options.check_weights(weights_with_choice(plan.grouping.sites))
    check_plain(model)
    check_optimizer_kind(optimizer)
    check_covered(model, plan, optimizer)
    if sampling_rate is None and sampling != "poisson":
        raise GroupSearchError(f"Found sampling={sampling!r} without a sampling_rate to account with. Give both.")
    accountant = None
    if sampling_rate is not None:
        from groupsearch.engine.accounting import Accountant  # its libraries take as long to load as torch does

        accountant = Accountant(noise_multiplier, sampling_rate, sampling)
    seeded = generator is not None or (batches is not None and batches.seeded)
    device = next(p.device for p in model.parameters() if p.requires_grad)
    mechanism = Mechanism(plan, noise_multiplier, source_of(device, generator, secure), expected_batch_size)
    checked = None
    if loss is not None and (sample is not None or batches is not None):
        sites = plan.grouping.sites
        if sample is None and batches is not None:
            with alike():  # what loading draws is no part of the training
                sample = batches.first(_SHOWN)
        reading = Reading(options, Layouts.of_sites(sites))
        checked = check_before(model, loss, sample, reading, shared_parameters(sites), allow_state)
    settings = LoopSettings(
        expected_batch_size,
        loss_reduction,
        sampling_rate,
        batches,
        grad_scaler,
        options,
        sampling=sampling,
        loss_divisor=loss_divisor,
        seeded=seeded,
        loss=loss,
        watch=watch,
        checked=checked,
    )
    return PrivateEngine(model, optimizer, mechanism, settings, accountant)
