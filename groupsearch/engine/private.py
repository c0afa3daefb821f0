"""make_private: the one call that makes an existing loop differentially private."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from groupsearch.clipping import ClipPlan
from groupsearch.engine.coverage import check_covered, check_optimizer_kind, check_plain
from groupsearch.engine.loading import PoissonBatches
from groupsearch.engine.loop import LoopSettings, PrivateEngine
from groupsearch.engine.mechanism import Mechanism
from groupsearch.errors import GroupSearchError
from groupsearch.options import EngineOptions
from groupsearch.randomness import source_of
from groupsearch.trace import weights_with_choice

REDUCTIONS = ("mean", "sum")


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    plan: ClipPlan,
    *,
    noise_multiplier: float,
    batches: PoissonBatches | None = None,
    expected_batch_size: float | None = None,
    sampling_rate: float | None = None,
    loss_reduction: str = "mean",
    grad_scaler: GradScaler | None = None,
    options: EngineOptions | None = None,
    generator: torch.Generator | None = None,
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
        sampling_rate: probability with which each example enters a logical batch; with it
            ``engine.epsilon(delta)`` tells what the steps so far cost.
        loss_reduction: "mean" when the loss is the mean of per-example losses over the
            micro-batch, "sum" when it is their sum.
        grad_scaler: the ``torch.amp.GradScaler`` of a float16 loop, which stays as it is. No step
            is skipped: an overflow adds zero, and lowers the scale at ``update()``. The scale then
            depends on whether any example overflowed, which no noise hides, and so does the rounding of
            all others: the guarantee is strict for a scale that does not adapt
            (``scaler.update(scaler.get_scale())``), or with bfloat16, which needs none.
        options: choices of cost only.
        generator: draws the noise, for experiments alone: epsilon holds for nobody who knows its seed. By default
            one that the operating system's entropy fills, see :mod:`groupsearch.randomness`.
        secure: draw the noise from a cipher, see :class:`groupsearch.randomness.SecureStream`.

    Returns:
        The engine. ``engine.detach()`` takes it away again.

    Raises:
        UnsupportedModelError: for a layer that mixes examples, a wrapped model or an optimizer that
            cannot be served, or a trainable parameter that no site of the plan covers or that the optimizer
            does not hold.
        GroupSearchError: for a number outside its range, batches together with what they say, or a generator
            where the noise is to be secure.
    """
    if loss_reduction not in REDUCTIONS:
        raise GroupSearchError(
            f"Expected loss_reduction to be one of {', '.join(REDUCTIONS)}, found {loss_reduction!r}."
        )
    if batches is not None:
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
    accountant = None
    if sampling_rate is not None:
        from groupsearch.engine.accounting import Accountant  # its libraries take as long to load as torch does

        accountant = Accountant(noise_multiplier, sampling_rate)
    device = next(p.device for p in model.parameters() if p.requires_grad)
    mechanism = Mechanism(plan, noise_multiplier, source_of(device, generator, secure), expected_batch_size)
    settings = LoopSettings(expected_batch_size, loss_reduction, sampling_rate, batches, grad_scaler, options)
    return PrivateEngine(model, optimizer, mechanism, settings, accountant)
