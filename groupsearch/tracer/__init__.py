"""From a model to a Trace: one step on fake or real tensors, watched."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from groupsearch.options import EngineOptions
from groupsearch.trace import Trace
from groupsearch.tracer.record import record_step
from groupsearch.tracer.scratch import cpu_scratch
from groupsearch.tracer.sites import observe_sites
from groupsearch.tracer.step import Loss, StepSettings, fake_stage, make_stage, real_copy
from groupsearch.workloads.batches import count_examples

__all__ = ["StepSettings", "observe_sites", "trace_model"]


def trace_model(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    *,
    options: EngineOptions | None = None,
    optimizer: str = "adam",
    checkpoint: str = "none",
    device: str | None = None,
) -> Trace:
    """Trace one training step: sites in order, who is alive when, and the non-private peak.

    By default the step runs on fake tensors: no weight is allocated, the model (real or on the
    meta device) is left as it is. With ``device`` it runs for real there, on a copy.

    Args:
        model: the model.
        batch: a mapping, tuple or tensor whose first dimension is B.
        loss: ``loss(model, batch)`` is one loss per example, shape (B,).
        options: of the engine.
        optimizer: name of the optimizer whose state and step are part of the memory.
        checkpoint: ``none`` or ``blocks``.
        device: a torch device to trace on with real tensors.

    Raises:
        UnsupportedModelError: for a layer, a parameter or a loss that cannot be made private.
    """
    settings = StepSettings(options or EngineOptions(), optimizer, checkpoint)
    keys = {"device": device or "cpu", "fake": device is None, "torch": torch.__version__}
    if device is not None:
        stage = make_stage(*real_copy(model, batch, torch.device(device)), loss, settings)
        return record_step(stage, settings, count_examples(batch), keys)
    fake, stage = fake_stage(model, batch, loss, settings, cpu_scratch)
    with fake:
        return record_step(stage, settings, count_examples(batch), keys)
