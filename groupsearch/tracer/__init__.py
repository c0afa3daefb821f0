"""From a model to a Trace: one step on fake or real tensors, watched."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from groupsearch.errors import GroupSearchError, UnsupportedModelError, is_out_of_memory
from groupsearch.options import SITE_METHODS, EngineOptions
from groupsearch.plan.cards import Card, card_of
from groupsearch.plan.joint import Alternatives
from groupsearch.plan.trace import Trace
from groupsearch.tracer.fake import ValuesNeededError
from groupsearch.tracer.record import record_step
from groupsearch.tracer.scratch import cpu_scratch
from groupsearch.tracer.sites import Examined, examine, is_real, observe_sites
from groupsearch.tracer.step import Loss, StepSettings, card_stage, fake_stage, held_interrupts, real_stage
from groupsearch.workloads.batches import count_examples

__all__ = ["StepSettings", "observe_sites", "trace_methods", "trace_model"]


@held_interrupts()
def trace_model(  # noqa: PLR0913 - settings by name, each with a default
    model: nn.Module,
    batch: Any,
    loss: Loss,
    *,
    options: EngineOptions | None = None,
    optimizer: str = "adam",
    checkpoint: str = "none",
    micro_batches: int = 1,
    autocast: str = "none",
    device: str | None = None,
    allow_state: Collection[str] = (),
    copy_model: bool = True,
) -> Trace:
    """Trace one training step: sites in order, who is alive when, and the non-private peak.

    By default the step runs on fake tensors: no weight is allocated, the model (real or on the
    meta device) is left as it is. A model whose path depends on values runs for real, on a copy, and
    with ``device`` every model does so there. A model whose weights are there is first held to plain autograd
    on three of the examples, one at a time, in the mode it is in (:mod:`groupsearch.engine.truth`): trace it in
    the mode it is trained in. ``Trace.checked`` says what was checked.
    Ctrl-C waits for the end of the trace; a second one does not.

    Args:
        model: the model.
        batch: a mapping, tuple or tensor whose first dimension is B.
        loss: ``loss(model, batch)`` is one loss per example, shape (B,).
        options: of the engine.
        optimizer: name of the optimizer whose state and step are part of the memory.
        checkpoint: ``none``, ``blocks`` or ``every:K``.
        micro_batches: how many batches are accumulated before the optimizer's step. The trace is of the
            last one, which finds the sums of those before it.
        autocast: ``none``, ``bfloat16`` or ``float16``: what forward and loss are cast to.
        device: a torch device to trace on with real tensors, or a card that is not there, as in ``cuda:h100``
            (:mod:`groupsearch.plan.cards`): its step on fake tensors, by its kernels for attention and with its
            allocator and workspaces, not measured on a GPU. On a CUDA device every storage counts as what
            the caching allocator hands out for it, a multiple of 512 bytes, an operation as the most it allocates
            inside, and the workspaces of cuBLAS as alive throughout.
        allow_state: names of buffers and attributes that a forward pass may leave data in; they are not private.
        copy_model: whether a device traces a copy; else the model itself takes the steps there.

    Raises:
        UnsupportedModelError: for a layer, a parameter or a loss that cannot be made private.
        GroupSearchError: for options that replay, which a trace does not know of.
    """
    settings = StepSettings(options or EngineOptions(), optimizer, checkpoint, micro_batches, autocast)
    if settings.options.replay != "none":
        raise GroupSearchError(
            f"Found replay={settings.options.replay!r} where a trace is asked for: its estimates do not know what is "
            "replayed. Trace without it; simulate_peak and measure_peak tell the peak of a grouping with it."
        )
    examined = examine(model, batch, loss, settings.options, allow_state) if is_real(model, batch) else None
    keys = {"device": device or "cpu", "fake": device is None, "torch": torch.__version__}
    card = card_of(device)
    if card is not None:
        return _on_card(model, batch, loss, settings, card, keys, examined)
    if device is None:
        try:
            fake, stage = fake_stage(model, batch, loss, settings, cpu_scratch)
            with fake:
                return record_step(stage, settings, count_examples(batch), keys, examined)
        except (ValuesNeededError, RuntimeError) as error:  # a kernel that asks for values, or mixes what has none in
            if any(parameter.is_meta for parameter in model.parameters()) or is_out_of_memory(error):
                raise
    stage = real_stage(model, batch, loss, settings, torch.device(device or "cpu"), cpu_scratch, copy_model)
    keys |= {"fake": False, **stage.live.allocator.to_json()}
    return record_step(stage, settings, count_examples(batch), keys, examined)


def _on_card(  # noqa: PLR0913 - the arguments of trace_model, read
    model: nn.Module,
    batch: Any,
    loss: Loss,
    settings: StepSettings,
    card: Card,
    keys: dict[str, Any],
    examined: Examined | None,
) -> Trace:
    """One step traced as a card that is not there would take it."""
    fake, stage = card_stage(model, batch, loss, settings, card)
    keys |= {"fake": True, **stage.live.allocator.to_json()}
    try:
        with fake:
            return record_step(stage, settings, count_examples(batch), keys, examined)
    except ValuesNeededError as error:
        raise UnsupportedModelError(
            f"The model's path depends on values, which a step for {keys['device']} without that card does not have. "
            f"Trace it with --device cpu, which takes real tensors, or on the card itself with --device cuda."
        ) from error


def trace_methods(model: nn.Module, batch: Any, loss: Loss, **settings: Any) -> Alternatives:
    """Trace one step by every norm method, so that any choice of methods per weight can be estimated.

    Args:
        model: the model.
        batch: a mapping, tuple or tensor whose first dimension is B.
        loss: ``loss(model, batch)`` is one loss per example, shape (B,).
        settings: further arguments of :func:`trace_model` but ``options``.

    Raises:
        UnsupportedModelError: as :func:`trace_model`.
        GroupSearchError: when the steps are not the same between hooks, for example because tensors are real
            and the model draws random paths.
    """
    return Alternatives(
        {method: trace_model(model, batch, loss, options=EngineOptions(method), **settings) for method in SITE_METHODS}
    )
