"""The second level: the real engine on fake tensors, with the grouping that is asked about."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from groupsearch.cards import card_of
from groupsearch.grouping import Grouping
from groupsearch.options import EngineOptions
from groupsearch.tracer.scratch import cpu_scratch
from groupsearch.tracer.step import (
    Loss,
    Stage,
    StepSettings,
    card_stage,
    fake_stage,
    held_interrupts,
    made_private,
    real_stage,
)
from groupsearch.workloads.batches import count_examples


@held_interrupts()
def simulate_peak(  # noqa: PLR0913 - settings by name, each with a default
    model: nn.Module,
    batch: Any,
    loss: Loss,
    grouping: Grouping,
    *,
    options: EngineOptions | None = None,
    optimizer: str = "adam",
    checkpoint: str = "none",
    micro_batches: int = 1,
    autocast: str = "none",
    device: str | None = None,
) -> int:
    """Peak bytes of one private step, from the engine itself on fake tensors (CPU).

    Costs about as much time as a trace and no memory; the model is left as it is. Bytes are
    those of tensors (weights, optimizer state, batch and everything an operation allocates), and
    of scratch inside operations as :mod:`groupsearch.tracer.scratch` probes it.

    For a card that is not there (``cuda:h100``) fake tensors stand in, as for a trace. With another ``device`` the step
    is taken there on real tensors, by a copy of the model, and its bytes are counted as :func:`groupsearch.trace_model`
    counts them there.

    Raises:
        UnsupportedModelError: as :func:`groupsearch.make_private`.
        GroupSearchError: when the device is not there.
    """
    settings = StepSettings(options or EngineOptions(), optimizer, checkpoint, micro_batches, autocast)
    card = card_of(device)
    if device is not None and card is None:
        stage = real_stage(model, batch, loss, settings, torch.device(device), cpu_scratch)
        return private_peak(stage, settings, grouping, count_examples(batch))
    if card is None:
        fake, stage = fake_stage(model, batch, loss, settings, cpu_scratch)
    else:
        fake, stage = card_stage(model, batch, loss, settings, card)
    with fake:
        return private_peak(stage, settings, grouping, count_examples(batch))


def private_peak(stage: Stage, settings: StepSettings, grouping: Grouping, examples: int) -> int:
    """Peak bytes of one private step of a stage, static ones included.

    Raises:
        GroupSearchError: when the options name a method for a weight that no site chooses one for.
    """
    with made_private(stage, settings, grouping, examples):
        return stage.counted_step()
